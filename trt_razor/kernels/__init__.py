"""The CUDA kernels from Python: a thin ctypes binding of the C API (plugins/include/razor/razor.h).

    kernels = RazorKernels()
    layer = LayerConfig(num_heads=32, num_kv_heads=8, head_dim=128, max_seq_len=32768,
                        policy=RazorPolicy(), retrieval_heads=(0, 5), dtype="bfloat16")
    caches = Caches.empty(layer, slots=4)
    out = kernels.attention(layer, qkv, caches, past=past, chunk=chunk, cos_sin=table)

torch CUDA tensors in, torch CUDA tensors out, no copies; caches are updated in place. The library
is built by ``make plugin``. torch itself is imported when the first tensor is used.
"""

from trt_razor.kernels.attention import RazorKernels
from trt_razor.kernels.caches import (
    BUBBLE,
    Bubble,
    Caches,
    Compensation,
    ContiguousView,
    PagedView,
)
from trt_razor.kernels.layer import LayerConfig, Limits
from trt_razor.kernels.library import find_library

__all__ = [
    "BUBBLE",
    "Bubble",
    "Caches",
    "Compensation",
    "ContiguousView",
    "LayerConfig",
    "Limits",
    "PagedView",
    "RazorKernels",
    "find_library",
]
