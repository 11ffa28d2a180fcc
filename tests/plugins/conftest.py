"""The kernels as a CPU library, built through the shim once per session."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from shim_build import LIBRARY, build_folder, build_shim

if TYPE_CHECKING:
    from trt_razor.kernels import RazorKernels


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
