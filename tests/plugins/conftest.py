"""The kernels as a CPU library, built through the shim once per session."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from trt_razor.kernels import RazorKernels

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "librazor_shim.so"


def build_shim(folder: Path, *options: str) -> Path:
    """Configure (once) and build the shim library; only what changed is compiled.

    Safe to call from several processes. Skips the test where compiler or CMake are missing, which is a
    failure where CI is set.
    """
    missing = [tool for tool in ("g++", "cmake") if shutil.which(tool) is None]
    if missing:
        reason = f"needs {' and '.join(missing)} to compile the kernels for the CPU"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "CMakeCache.txt").exists():
            generator = ["-G", "Ninja"] if shutil.which("ninja") else []
            source = ROOT / "tests" / "plugins"
            _run(["cmake", "-S", str(source), "-B", str(folder), *generator, *options])
        _run(["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)])
    return folder / LIBRARY


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}:\n{done.stdout[-6000:]}", pytrace=False)


def build_folder() -> Path:
    """build/ of the checkout, or $RAZOR_SHIM_BUILD."""
    return Path(os.environ.get("RAZOR_SHIM_BUILD") or ROOT / "build")


@pytest.fixture(scope="session")
def shim_library() -> Path:
    """librazor_shim.so: the kernels and the C API for the CPU. $RAZOR_SHIM_LIBRARY is taken as it is."""
    ready = os.environ.get("RAZOR_SHIM_LIBRARY")
    if ready:
        return Path(ready)
    return build_shim(build_folder() / "shim")


@pytest.fixture(scope="session")
def kernels(shim_library: Path) -> RazorKernels:
    """The shim library behind the Python binding; a device of 4 multiprocessors."""
    from trt_razor.kernels import RazorKernels

    return RazorKernels(shim_library)


@pytest.fixture(scope="session")
def kernels_on(
    shim_library: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], RazorKernels]:
    """The same on a device of that many multiprocessors.

    The library asks for the number once; every number gets a copy of the file, which is a library of
    its own to the loader.
    """
    folder = tmp_path_factory.mktemp("shim")

    @cache
    def load(multiprocessors: int) -> RazorKernels:
        import ctypes

        from trt_razor.kernels import RazorKernels

        copy = folder / f"{multiprocessors}-{LIBRARY}"
        shutil.copy(shim_library, copy)
        ctypes.CDLL(str(copy)).razor_shim_set_device(multiprocessors, 227 * 1024)
        return RazorKernels(copy)

    return load
