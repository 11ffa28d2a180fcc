"""The structs and enumerators of razor.h as ctypes has them, field for field and in its order.

The layout is documented once, in plugins/include/razor/razor.h. A library refuses a struct of
another size or version; tests/plugins/test_api.py compares every offset with a C compiler's.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_uint32, c_void_p

from trt_razor.errors import UsageError

API_VERSION = 2

# razor_status
OK = 0
INVALID_ARGUMENT = 1
UNSUPPORTED = 2
WORKSPACE_TOO_SMALL = 3
CUDA_ERROR = 4
VERSION_MISMATCH = 5

# razor_dtype, razor_position, razor_rope_table, razor_view_kind, razor_comp_kind
FP16, BF16, FP8_E4M3 = 1, 2, 3
ROPE_HALF, ROPE_INTERLEAVED, ALIBI, NO_POSITION = 1, 2, 3, 4
TABLE_SPLIT, TABLE_PAIRS = 1, 2
VIEW_NONE, VIEW_CONTIGUOUS, VIEW_PAGED = 0, 1, 2
COMP_NONE, COMP_CONTIGUOUS, COMP_IN_BUBBLE = 0, 1, 2


class RazorLayer(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("version", c_uint32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("num_retrieval", c_int32),
        ("retrieval_heads", POINTER(c_int32)),
        ("dtype", c_int32),
        ("cache_dtype", c_int32),
        ("position", c_int32),
        ("rope_table", c_int32),
        ("rotary_dim", c_int32),
        ("scale", c_float),
        ("max_seq_len", c_int32),
        ("sink_tokens", c_int32),
        ("min_window", c_int32),
        ("compression", c_int32),
        ("comp_tokens", c_int32),
        ("heavy_hitters", c_int32),
        ("ring_rows", c_int32),
        ("local_ring_offset", c_int32),
        ("full_ring_offset", c_int32),
    ]


class RazorView(Structure):
    _fields_ = [
        ("kind", c_int32),
        ("capacity", c_int32),
        ("k", c_void_p),
        ("v", c_void_p),
        ("slot_stride", c_int64),
        ("head_stride", c_int64),
        ("slots", c_void_p),
        ("pool", c_void_p),
        ("layer_offset", c_int64),
        ("block_bytes", c_int64),
        ("block_offsets", c_void_p),
        ("sequence_stride", c_int64),
        ("key_value_stride", c_int64),
        ("tokens_per_block", c_int32),
    ]


class RazorComp(Structure):
    _fields_ = [
        ("kind", c_int32),
        ("comp", c_void_p),
        ("log_weight", c_void_p),
        ("count", c_void_p),
        ("comp_slot_stride", c_int64),
        ("weight_slot_stride", c_int64),
        ("slots", c_void_p),
    ]


class RazorLimits(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("version", c_uint32),
        ("max_batch", c_int32),
        ("max_context_tokens", c_int32),
        ("max_chunk", c_int32),
        ("max_past", c_int32),
    ]


class RazorCall(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("version", c_uint32),
        ("batch", c_int32),
        ("num_contexts", c_int32),
        ("tokens_per_sequence", c_int32),
        ("num_context_tokens", c_int32),
        ("max_chunk", c_int32),
        ("max_past", c_int32),
        ("qkv", c_void_p),
        ("out", c_void_p),
        ("past", c_void_p),
        ("total", c_void_p),
        ("chunk", c_void_p),
        ("generation_chunk_is_one", c_int32),
        ("num_positions", c_int32),
        ("cos_sin", c_void_p),
        ("alibi_slopes", c_void_p),
        ("k_scale", c_void_p),
        ("v_scale", c_void_p),
        ("full", RazorView),
        ("local", RazorView),
        ("comp", RazorComp),
    ]


def new_layer() -> RazorLayer:
    """RAZOR_LAYER_INIT."""
    return RazorLayer(ctypes.sizeof(RazorLayer), API_VERSION)


def new_limits() -> RazorLimits:
    """RAZOR_LIMITS_INIT."""
    return RazorLimits(ctypes.sizeof(RazorLimits), API_VERSION)


def new_call() -> RazorCall:
    """RAZOR_CALL_INIT."""
    return RazorCall(ctypes.sizeof(RazorCall), API_VERSION)


def fill(struct: Structure, **values: int) -> None:
    """Set integer fields. Raises UsageError for a number the field cannot hold.

    ctypes itself would silently cut it off.
    """
    for name, value in values.items():
        setattr(struct, name, value)
        if getattr(struct, name) != value:
            bits = 8 * getattr(type(struct), name).size
            raise UsageError(f"{name}: expected an integer of {bits} bits, found {value!r}")
