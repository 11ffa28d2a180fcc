"""Registration by LD_PRELOAD, with a made-up TensorRT in a made-up server."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from plugin_build import Build

REGISTERED = [
    "registered trt_razor::RazorAttention 1",
    "registered trt_razor::RazorGptAttention 1",
]


def _run(
    command: list[str | Path], preload: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | {"LD_PRELOAD": str(preload)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def _server(stand_in: Build, mode: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [stand_in.folder / "fake_server", stand_in.folder / "libfake_backend.so", mode]
    return _run(command, stand_in.preload, **environment)


@pytest.mark.parametrize("mode", ["runtime", "registry"])
def test_registers_before_the_first_runtime(stand_in: Build, mode: str) -> None:
    """The server links no TensorRT; its backend brings it, long after the start, for itself alone."""
    done = _server(stand_in, mode)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*REGISTERED, "runtime created"]
    assert done.stderr == ""


def test_other_programs_run_as_ever(build: Build) -> None:
    for command in (["true"], ["sh", "-c", "echo hello"]):
        done = _run([shutil.which(command[0]) or command[0], *command[1:]], build.preload)
        assert done.returncode == 0
        assert done.stderr == ""
    assert done.stdout == "hello\n"


def test_another_major_is_left_alone(stand_in: Build) -> None:
    done = _server(stand_in, "registry", FAKE_NVINFER_VERSION="110100")
    assert done.returncode == 0
    assert done.stdout == "runtime created\n"
    assert "expected TensorRT 10, found version 110100" in done.stderr
    assert "libnvinfer.so.10" in done.stderr


def test_missing_plugins_are_named(stand_in: Build, tmp_path: Path) -> None:
    """The plugins must lie beside the preload library."""
    alone = tmp_path / stand_in.preload.name
    shutil.copy(stand_in.preload, alone)
    command = [stand_in.folder / "fake_server", stand_in.folder / "libfake_backend.so", "runtime"]
    done = _run(command, alone)
    assert done.returncode == 0
    assert done.stdout == "runtime created\n"
    assert f"cannot open the plugins: {tmp_path}/libtrt_razor_plugins_trt10.so" in done.stderr
