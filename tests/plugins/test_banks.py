"""Shared memory is laid out so that ldmatrix meets no bank conflict, whatever the head dimension."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import pytest
import torch

from trt_razor.kernels import Caches, LayerConfig
from trt_razor.policy import RazorPolicy

if TYPE_CHECKING:
    from pathlib import Path

    from trt_razor.kernels import RazorKernels

POLICY = RazorPolicy(sink_tokens=4, min_window=40, compression=None, comp_tokens=2)


@pytest.mark.parametrize("cache_dtype", ["float16", "float8_e4m3fn"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_matrix_loads_are_free_of_conflicts(
    kernels: RazorKernels, shim_library: Path, head_dim: int, cache_dtype: str
) -> None:
    conflicts = ctypes.CDLL(str(shim_library)).razor_shim_bank_conflicts
    conflicts.restype = ctypes.c_uint64
    layer = LayerConfig(8, 2, head_dim, 160, POLICY, (0,), position="none", cache_dtype=cache_dtype)
    caches = Caches.empty(layer, 1, "cpu")
    for past, chunk in ((0, 90), (90, 1)):
        before = conflicts()
        kernels.attention(
            layer,
            torch.randn(1, chunk, layer.qkv_width).half(),
            caches,
            past=torch.tensor([past], dtype=torch.int32),
            chunk=torch.tensor([chunk], dtype=torch.int32),
        )
        assert conflicts() == before, "prefill" if chunk > 1 else "decode"
