"""Building the plugins over the CPU shim: CMakeLists.txt of this folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


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


def build_plugins(folder: Path, include: Path, shim: Path) -> Build:
    """Configure and build; only what changed is compiled. Safe to call from several processes."""
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
