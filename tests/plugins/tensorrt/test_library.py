"""The plugin library as a file: what it exports, needs and offers."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
from fake_host import Host
from plugin_build import Build


def _exports(library: Path) -> list[str]:
    command = ["nm", "--dynamic", "--defined-only", "--format=just-symbols", str(library)]
    return sorted(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    )


def _needs(library: Path) -> str:
    command = ["readelf", "--dynamic", str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_exports_two_functions(build: Build) -> None:
    assert _exports(build.plugins) == ["getCreators", "setLoggerFinder"]


def test_loads_without_tensorrt(build: Build) -> None:
    assert "nvinfer" not in _needs(build.plugins)
    ctypes.CDLL(str(build.plugins))


def test_preload_library_is_light(build: Build) -> None:
    """It gets into every process of a start script."""
    assert _exports(build.preload) == ["createInferRuntime_INTERNAL", "getPluginRegistry"]
    needs = _needs(build.preload)
    for heavy in ("nvinfer", "cuda", "razor_shim", "libstdc++"):
        assert f"[{heavy}" not in needs
        assert f"[lib{heavy}" not in needs


def test_creators(host: Host) -> None:
    assert host.creators() == ["RazorAttention 1 trt_razor", "RazorGptAttention 1 trt_razor"]


def test_a_logger_that_throws_is_survived(host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    host.set_logger_throws(True)
    try:
        assert host.create("RazorAttention", {}) is None
    finally:
        host.set_logger_throws(False)
    assert host.log() == ""
    assert (
        "[trt_razor] RazorAttention 'layer.7': field num_heads: missing" in capfd.readouterr().err
    )
