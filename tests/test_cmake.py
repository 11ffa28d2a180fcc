"""cmake/RazorCuda.cmake: which architectures a compiler gets."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _architectures(tmp_path: Path, nvcc: str) -> subprocess.CompletedProcess[str]:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    compiler = tmp_path / "nvcc"
    compiler.write_text(f"#!/bin/sh\n{nvcc}\n")
    compiler.chmod(0o755)
    script = tmp_path / "try.cmake"
    script.write_text(
        f'include("{ROOT}/cmake/RazorCuda.cmake")\n'
        f'razor_supported_architectures("{compiler}" found)\n'
        'message("found ${found}")\n'
    )
    return subprocess.run([cmake, "-P", str(script)], capture_output=True, text=True)


def _listing(*numbers: int) -> str:
    return "printf '" + "".join(f"compute_{n}\\n" for n in numbers) + "'"


def test_a_new_compiler_gets_all(tmp_path: Path) -> None:
    done = _architectures(tmp_path, _listing(75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121))
    assert done.stderr.strip() == "found 80-real;86-real;89-real;90-real;100-real;120"


def test_an_old_compiler_gets_what_it_knows_and_ptx(tmp_path: Path) -> None:
    done = _architectures(tmp_path, _listing(50, 70, 80, 86, 87, 89, 90))
    assert done.stderr.strip() == "found 80-real;86-real;89-real;90"
    assert "too old for architectures 100 120" in done.stdout


def test_a_compiler_without_any_is_refused(tmp_path: Path) -> None:
    for nvcc in (_listing(50, 70, 75), "exit 3"):
        done = _architectures(tmp_path, nvcc)
        assert done.returncode != 0
        assert "expected" in done.stderr


def test_presets_build_what_they_configure() -> None:
    presets = json.loads((ROOT / "CMakePresets.json").read_text())
    shown = [p["name"] for p in presets["configurePresets"] if not p.get("hidden")]
    assert [p["name"] for p in presets["buildPresets"]] == shown
    assert all(p["configurePreset"] == p["name"] for p in presets["buildPresets"])


def test_a_preset_keeps_nothing_of_an_earlier_call() -> None:
    """`make plugin` after `make plugin ARCHS=… TENSORRT_ROOT=…`: the cache must not answer for the user."""
    presets = json.loads((ROOT / "CMakePresets.json").read_text())["configurePresets"]
    known = {p["name"]: p for p in presets}

    def variables(name: str) -> dict[str, object]:
        preset = known[name]
        inherited = variables(preset["inherits"]) if "inherits" in preset else {}
        return {**inherited, **preset.get("cacheVariables", {})}

    for name in ("release", "resources", "debug", "quick", "gpu"):
        assert {"CMAKE_CUDA_ARCHITECTURES", "TENSORRT_ROOT"} <= variables(name).keys()
