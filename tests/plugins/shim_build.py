"""Building the kernels as a CPU library: CMake, once, only what changed."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

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
