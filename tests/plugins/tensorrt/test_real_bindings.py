"""What our Python hands to TensorRT's own Python bindings, and what the plugin receives of it.

The bindings come without TensorRT's libraries; those they link are stubs here (stub_nvinfer.cpp),
which do with plugins what TensorRT does. TensorRT-LLM is the double of tests/trtllm.

    pip download --no-deps tensorrt-cu12-bindings==10.13.3.9 && unzip *.whl -d bindings
    TENSORRT_BINDINGS=bindings TENSORRT_ROOT=… python -m pytest tests/plugins/tensorrt/test_real_bindings.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plugin_build import HERE, Build

RELEASES = ("1.0.0", "1.1.0", "1.2.1")
Child = Callable[..., Any]


@pytest.fixture(scope="module")
def child(request: pytest.FixtureRequest) -> Child:
    """Runs a task of bindings_child.py."""
    folder = os.environ.get("TENSORRT_BINDINGS")
    if not folder:
        pytest.skip("TENSORRT_BINDINGS is not set: a folder with the package tensorrt_bindings")
    package = Path(folder).resolve() / "tensorrt_bindings"
    if not (package / "tensorrt.so").is_file():
        pytest.fail(f"TENSORRT_BINDINGS={folder}: expected tensorrt_bindings/tensorrt.so in it")
    version = re.search(r'^__version__ = "(\d+)\.', (package / "__init__.py").read_text(), re.M)
    if version is None or version[1] not in ("10", "11"):
        pytest.fail(f"TENSORRT_BINDINGS={folder}: expected version 10 or 11")
    real: Build = request.getfixturevalue("real")
    if real.major != int(version[1]):
        pytest.skip(f"TENSORRT_ROOT has headers of {real.major}.x, the bindings are {version[1]}.x")
    if not (real.folder / "stub").is_dir():
        pytest.skip("TENSORRT_ROOT has no NvInfer.h")

    def run(task: str, release: str = RELEASES[-1]) -> Any:
        job = {"task": task, "release": release, "stub": str(real.folder / "stub")}
        path = os.pathsep.join(p for p in (str(package.parent), *sys.path) if p)
        done = subprocess.run(
            [sys.executable, str(HERE / "bindings_child.py")],
            input=json.dumps({**job, "plugins": str(real.plugins)}),
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize("release", RELEASES)
def test_every_plugin_of_every_network_arrives(child: Child, release: str) -> None:
    """Fields with their names, types and values, inputs in their order."""
    plugins = child("add_plugins", release)
    assert len(plugins) >= 24
    for plugin in plugins:
        label = plugin["label"]
        assert plugin["received"] == plugin["inputs"], label
        assert plugin["dtypes"][0] == plugin["dtypes"][1] == "HALF", label
        stored = {}
        for line in plugin["stored"].splitlines():
            name, _, length, value = line.split()
            assert length == "1", line
            stored[name] = float(value) if name == "scale" else int(value)
        del stored["plan_version"]
        assert stored == {**plugin["fields"], "scale": stored["scale"]}, label
        assert stored["scale"] == pytest.approx(plugin["fields"]["scale"], rel=1e-5), label
    # Numbers below zero were among them, and of 64 bits where there are slots.
    assert -1 in {p["fields"]["layer_local"] for p in plugins}
    if release != "1.0.0":
        assert max(p["fields"]["ring_slot_bytes"] for p in plugins) > 0


def test_refusals_are_errors_of_ours(child: Child) -> None:
    found = child("refusals")
    assert "not registered with TensorRT" in found["unregistered"][0]
    assert "none.so: cannot be loaded" in found["no library"][0]
    assert found["creators"] == [2, 2]
    assert found["right"] == ["", ""]
    assert "refused the fields of razor_attention_0" in found["wrong value"][0]
    assert "field window: " in found["wrong value"][1]
    assert "found -5" in found["wrong value"][1]
    assert "refused the fields of razor_attention_0" in found["unknown field"][0]
    assert "anything" in found["unknown field"][1]
    assert found["wide"] == ["", ""]
    assert f"ring_slot_bytes 10 1 {1 << 40}" in found["wide fields"].splitlines()
    assert "TensorRT refused RazorGptAttention of razor_attention_0" in found["wrong input"][0]


def test_names(child: Child) -> None:
    found = child("names")
    version = tuple(map(int, found.pop("version").split(".")[:2]))
    assert found.pop("flags") == {
        "ENABLE_PLUGIN_OVERRIDE": version >= (10, 15),
        "ALIASED_PLUGIN_IO_10_03": True,
        "ON_PROFILE_CHANGE": True,
    }
    assert "nullptr" in found.pop("null")
    assert len(found) == 4
    for name, (double, real) in found.items():
        assert double == real, name
