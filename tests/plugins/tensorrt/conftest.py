"""The TensorRT plugins over the CPU shim, built against a stand-in for TensorRT's headers and, where
TENSORRT_ROOT says so, against the real ones."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

if TYPE_CHECKING:
    from fake_host import Host


@dataclass(frozen=True)
class Build:
    """A build folder: plugins, preload library, fake host."""

    folder: Path
    major: int

    @property
    def plugins(self) -> Path:
        return self.folder / f"libtrt_razor_plugins_trt{self.major}.so"

    @property
    def preload(self) -> Path:
        return self.folder / f"libtrt_razor_preload_trt{self.major}.so"


def _build(folder: Path, include: Path, shim: Path) -> Build:
    folder.mkdir(parents=True, exist_ok=True)
    options = [f"-DRAZOR_SHIM_LIBRARY={shim}", f"-DRAZOR_TENSORRT_INCLUDE={include}"]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "CMakeCache.txt").exists():
            generator = []
        _run(["cmake", "-S", str(HERE), "-B", str(folder), *generator, *options])
        _run(["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)])
    found = next(folder.glob("libtrt_razor_plugins_trt*.so"))
    return Build(folder, int(found.stem.rpartition("trt")[2]))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}:\n{done.stdout[-6000:]}", pytrace=False)


@pytest.fixture(scope="session")
def stand_in(shim_library: Path) -> Build:
    """Built against fake_trt/."""
    # Beside the shim library that it links: another place of that means another folder here.
    return _build(shim_library.parent / "plugins-stand-in", HERE / "fake_trt", shim_library)


@pytest.fixture(scope="session", params=["stand-in", "TENSORRT_ROOT"])
def build(request: pytest.FixtureRequest, shim_library: Path) -> Build:
    """Built against either kind of headers."""
    if request.param == "stand-in":
        return request.getfixturevalue("stand_in")
    root = os.environ.get("TENSORRT_ROOT")
    if not root:
        pytest.skip("TENSORRT_ROOT is not set: a folder with TensorRT's include/NvInferRuntime.h")
    folders = [f for f in (Path(root, "include"), Path(root)) if (f / "NvInferRuntime.h").is_file()]
    if not folders:
        pytest.fail(f"TENSORRT_ROOT={root}: expected include/NvInferRuntime.h, found none")
    include = folders[0].resolve()
    name = "-".join(include.parts[-3:-1] if include.name == "include" else include.parts[-2:])
    return _build(shim_library.parent / f"plugins-{name}", include, shim_library)


@pytest.fixture(scope="session")
def host(build: Build) -> Host:
    from fake_host import Host

    return Host(build.folder / "libfake_host.so", build.plugins)
