"""benchmarks/kernels.py in small on the CPU: its checks, calls and files, not its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels.py"
POLICY = {"sink_tokens": 2, "min_window": 8, "compression": 5, "comp_tokens": 1}


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    # No GPU is seen: what is tested is what happens without one.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.parametrize("heavy_hitters", [0, 3])
def test_dry_run(shim_library: Path, tmp_path: Path, heavy_hitters: int) -> None:
    output, policy = tmp_path / "kernels.json", POLICY | {"heavy_hitters": heavy_hitters}
    small = "--tiny --batches 3 --lengths 60 --prefill-length 56 --prefill-chunks 24 --seconds 0"
    done = _run(
        *small.split(),
        *("--device", "cpu", "--library", shim_library, "--policy", json.dumps(policy)),
        *("--copy-bytes", 100_000, "--dtype", "float16", "--output", output),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(output.read_text())
    kinds = [r["kind"] for r in document["rows"]]
    assert kinds == ["decode"] * 6 + ["prefill"] * 3  # two shapes; three shares
    assert document["left_out"] == []
    for row in document["rows"]:
        assert 0 < row["error"] < 2e-3
        assert row["us"] > 0
        assert row["peers"]["sdpa"]["us"] > 0
    assert done.stdout.count("| tiny") == len(kinds)
    assert "no measurement" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kernels.json", "kernels.png"]


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = _run("--output", tmp_path / "kernels.json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "nothing was measured" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import torch
    from kernel_razor import WrongResult, accept, relative_error

    assert accept(1e-3, torch.float16, "x") == 1e-3
    for wrong in (3e-3, float("inf"), float("nan")):
        with pytest.raises(WrongResult, match=r"expected outputs within 0\.002"):
            accept(wrong, torch.float16, "x")
    ones, nothing = torch.ones(2, 4, dtype=torch.float64), torch.full((2, 4), torch.nan)
    assert relative_error(ones.half() * 2, ones) == 1
    assert relative_error(nothing, ones) == relative_error(ones, nothing.double()) == float("inf")
