"""The kernel tests of tests/plugins on a GPU.

Their buffers are plain memory that NumPy compares byte by byte. Here the same buffers are managed
memory, which the GPU reads and writes at the same addresses; every call ends with a wait for the GPU.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

PLUGIN_TESTS = Path(__file__).resolve().parents[1] / "plugins"
sys.path.insert(0, str(PLUGIN_TESTS))

import harness  # noqa: E402
import razor_memory  # noqa: E402

from trt_razor.errors import RazorError  # noqa: E402
from trt_razor.kernels import RazorKernels, find_library  # noqa: E402

_ATTACH_GLOBAL = 1


def missing() -> str | None:
    """Why nothing here can run, or None."""
    if not torch.cuda.is_available():
        why = (
            "this torch is built without CUDA" if torch.version.cuda is None else "torch sees none"
        )
        return f"needs an NVIDIA GPU: {why}"
    if not os.environ.get("TRT_RAZOR_LIBRARY"):
        try:
            find_library()
        except RazorError as e:
            return f"needs librazor.so: {e}"
    return None


def skip_without_gpu() -> None:
    """For the top of a module: nothing in it is collected where there is no GPU."""
    if reason := missing():
        pytest.skip(reason, allow_module_level=True)


def compute_sanitizer() -> str | None:
    """Its path, or None."""
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )


class ManagedMemory:
    """What razor_memory asks of the C library, answered by the CUDA driver."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")  # makes the context that torch works in
        self._driver = ctypes.CDLL("libcuda.so.1")
        for name, arguments in (
            ("cuMemAllocManaged", [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]),
            ("cuMemFree_v2", [ctypes.c_void_p]),
        ):
            getattr(self._driver, name).argtypes = arguments

    def posix_memalign(self, pointer: Any, alignment: int, size: int) -> int:
        status = self._driver.cuMemAllocManaged(pointer, size, _ATTACH_GLOBAL)
        if status == 0:
            address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_void_p)).contents.value or 0
            assert address % alignment == 0
        return int(status)

    def free(self, pointer: Any) -> None:
        self._driver.cuMemFree_v2(pointer)


class _Bytes:
    """Memory as torch takes it without a copy; ``owner`` keeps it alive as long as the tensor."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def _tensor(self: razor_memory.Buffer, dtype: torch.dtype, *shape: int) -> Tensor:
    if self.nbytes == 0:
        flat = torch.empty(0, dtype=dtype, device="cuda")
    else:
        flat = torch.as_tensor(_Bytes(self.pointer, self.nbytes, self.array), device="cuda").view(
            dtype
        )
    return flat.view(*shape) if shape else flat


class WaitingKernels(RazorKernels):
    """Waits for the GPU around a call, so that the CPU may look at its memory."""

    def attention(self, *args: Any, **kwargs: Any) -> Tensor:
        torch.cuda.synchronize()
        out = super().attention(*args, **kwargs)
        torch.cuda.synchronize()
        return out


@contextmanager
def buffers_on_gpu() -> Iterator[None]:
    """Within the block razor_memory and harness work in managed memory."""
    run = harness.Rig._run

    def run_and_fetch(self: harness.Rig, *args: Any, **kwargs: Any) -> Tensor:
        return run(self, *args, **kwargs).cpu()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(razor_memory, "_libc", ManagedMemory())
        patch.setattr(razor_memory.Buffer, "tensor", _tensor)
        patch.setattr(harness.Rig, "_run", run_and_fetch)
        yield
        torch.cuda.synchronize()
