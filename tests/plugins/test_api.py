"""The C API's checks: every wrong field is refused with its line, before anything is enqueued.

Through the CPU shim library; addresses are made up, since a refused call never reads them.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trt_razor.errors import RazorError
from trt_razor.kernels import Caches, RazorKernels, structs
from trt_razor.kernels.layer import LayerConfig, Limits
from trt_razor.kernels.library import Library, find_library
from trt_razor.policy import RazorPolicy

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "plugins" / "include" / "razor" / "razor.h"

POLICY = RazorPolicy(sink_tokens=4, min_window=28, compression=5, comp_tokens=2)
LAYER = LayerConfig(8, 4, 128, 256, POLICY, (1, 3))  # ring of ceil(256 / 5) + 1 = 53 rows
BATCH = 3


@pytest.fixture(scope="module")
def library(shim_library: Path) -> Library:
    return Library(shim_library)


def layer_struct(config: LayerConfig = LAYER) -> structs.RazorLayer:
    """A copy that a test may spoil."""
    out = structs.RazorLayer()
    ctypes.pointer(out)[0] = config.c_struct
    return out


def contiguous(heads: int, rows: int, dim: int = 128, address: int = 0x100000) -> structs.RazorView:
    out = structs.RazorView()
    out.kind, out.capacity = structs.VIEW_CONTIGUOUS, rows
    out.k, out.v = address, 2 * address
    out.slot_stride, out.head_stride = heads * rows * dim, rows * dim
    return out


def paged(heads: int, rows: int, tokens: int = 32, dim: int = 128) -> structs.RazorView:
    blocks = -(-rows // tokens)
    out = structs.RazorView()
    out.kind, out.capacity, out.tokens_per_block = structs.VIEW_PAGED, rows, tokens
    out.pool, out.block_offsets, out.block_bytes = 0x400000, 0x800000, heads * tokens * dim * 2
    out.key_value_stride, out.sequence_stride = blocks, 2 * blocks
    return out


def packed_call(contexts: int = 1, tokens: int = 40) -> structs.RazorCall:
    """One context of up to 40 tokens and two generations of LAYER, contiguous caches."""
    call = structs.new_call()
    call.batch, call.num_contexts, call.num_context_tokens = BATCH, contexts, tokens
    call.max_chunk, call.max_past = tokens, 200
    call.qkv, call.out, call.past, call.chunk = 0x10000, 0x20000, 0x30000, 0x30100
    call.cos_sin, call.num_positions = 0x40000, 256
    call.full, call.local = contiguous(2, 256), contiguous(2, 57)
    call.comp.kind = structs.COMP_CONTIGUOUS
    call.comp.comp, call.comp.log_weight, call.comp.count = 0x50000, 0x60000, 0x70000
    call.comp.comp_slot_stride, call.comp.weight_slot_stride = 2 * 2 * 2 * 128, 2 * 2
    return call


def padded_call(tokens: int) -> structs.RazorCall:
    call = packed_call(BATCH, tokens)
    call.tokens_per_sequence, call.num_context_tokens = tokens, 0
    return call


def bubble(
    call: structs.RazorCall, layer: structs.RazorLayer, offset: int, tokens: int = 32
) -> None:
    """TensorRT-LLM's local pool: the ring begins behind a bubble, which holds the means."""
    layer.local_ring_offset = offset
    call.local = paged(2, offset + layer.ring_rows, tokens)
    call.comp.kind = structs.COMP_IN_BUBBLE


def attend(
    library: Library,
    layer: structs.RazorLayer,
    call: structs.RazorCall,
    workspace: int | None = 0x1000000,
    size: int = 0,
) -> tuple[int, str]:
    """Status and message. With a workspace of no bytes the size is the last thing to be refused."""
    status = library._c.razor_attention(
        ctypes.byref(layer), ctypes.byref(call), workspace, size, None
    )
    return status, library.last_error


def accepted(library: Library, layer: structs.RazorLayer, call: structs.RazorCall) -> None:
    status, message = attend(library, layer, call)
    assert status == structs.WORKSPACE_TOO_SMALL, message


# Layer ---------------------------------------------------------------------------------------------
WRONG_LAYERS = [
    ({"num_kv_heads": 0}, "num_kv_heads: expected 1..256, found 0"),
    ({"num_kv_heads": 257}, "num_kv_heads: expected 1..256, found 257"),
    ({"num_heads": 0}, "num_heads: expected a multiple of 4 KV heads, at most 16384, found 0"),
    ({"num_heads": 10}, "num_heads: expected a multiple of 4 KV heads, at most 16384, found 10"),
    (
        {"num_heads": 16388},
        "num_heads: expected a multiple of 4 KV heads, at most 16384, found 16388",
    ),
    ({"head_dim": 80}, "head_dim: expected 64, 96, 128 or 256, found 80"),
    ({"num_retrieval": 5}, "num_retrieval: expected 0..4, found 5"),
    ({"num_retrieval": -1}, "num_retrieval: expected 0..4, found -1"),
    ({"dtype": 3}, "dtype: expected RAZOR_FP16 (1) or RAZOR_BF16 (2), found 3"),
    ({"dtype": 80}, "dtype: expected RAZOR_FP16 (1) or RAZOR_BF16 (2), found 80"),
    ({"cache_dtype": 2}, "cache_dtype: expected dtype (1) or RAZOR_FP8_E4M3 (3), found 2"),
    ({"position": 0}, "position: expected a razor_position (1..4), found 0"),
    ({"position": 5}, "position: expected a razor_position (1..4), found 5"),
    (
        {"rope_table": 0},
        "rope_table: expected RAZOR_TABLE_SPLIT (1) or RAZOR_TABLE_PAIRS (2), found 0",
    ),
    (
        {"rotary_dim": 63},
        "rotary_dim: expected an even number of at most 128 elements, or 0 for all, found 63",
    ),
    (
        {"rotary_dim": 130},
        "rotary_dim: expected an even number of at most 128 elements, or 0 for all, found 130",
    ),
    ({"scale": 0.0}, "scale: expected a positive number, found 0"),
    ({"scale": float("inf")}, "scale: expected a positive number, found inf"),
    ({"scale": float("nan")}, "scale: expected a positive number, found nan"),
    ({"max_seq_len": 0}, "max_seq_len: expected 1..536870912, found 0"),
    ({"max_seq_len": 2**31 - 1}, "max_seq_len: expected 1..536870912, found 2147483647"),
    ({"sink_tokens": -1}, "sink_tokens: expected 0..536870912, found -1"),
    ({"min_window": 0}, "min_window: expected >= 1, found 0"),
    ({"compression": -1}, "compression: expected >= 1, or 0 for a fixed window, found -1"),
    ({"comp_tokens": 257}, "comp_tokens: expected 0..256, found 257"),
    ({"comp_tokens": -1}, "comp_tokens: expected 0..256, found -1"),
    (
        {"position": structs.ALIBI},
        "comp_tokens: expected 0 or 1 with ALiBi, found 2: a cluster has no single position",
    ),
    ({"heavy_hitters": -1}, "heavy_hitters: expected 0..1024, found -1"),
    (
        {"heavy_hitters": 1},
        "local_ring_offset: expected at least sink_tokens + heavy_hitters (4 + 1), found 4",
    ),
    (
        {"heavy_hitters": 2, "comp_tokens": 1, "position": structs.ALIBI},
        "heavy_hitters: expected 0 with ALiBi, found 2: their rows carry no position",
    ),
    (
        {"ring_rows": 52},
        "ring_rows: expected at least 53 (razor_ring_rows) for this policy and max_seq_len 256, "
        "found 52",
    ),
    (
        {"local_ring_offset": 3},
        "local_ring_offset: expected at least sink_tokens + heavy_hitters (4 + 0), found 3",
    ),
    ({"full_ring_offset": 0}, "full_ring_offset: expected at least sink_tokens (4), found 0"),
]


@pytest.mark.parametrize(
    "fields, message",
    WRONG_LAYERS,
    ids=[" ".join(f"{k}={v}" for k, v in f.items()) for f, _ in WRONG_LAYERS],
)
def test_wrong_layer(library: Library, fields: dict[str, float], message: str) -> None:
    layer = layer_struct()
    for name, value in fields.items():
        setattr(layer, name, value)
    assert library._c.razor_check_layer(ctypes.byref(layer)) == structs.INVALID_ARGUMENT
    assert library.last_error == message
    assert attend(library, layer, packed_call()) == (structs.INVALID_ARGUMENT, message)


@pytest.mark.parametrize(
    "heads, message",
    [
        ((3, 1), "retrieval_heads[1]: expected ascending KV heads, here one of 4..3, found 1"),
        ((1, 1), "retrieval_heads[1]: expected ascending KV heads, here one of 2..3, found 1"),
        ((1, 4), "retrieval_heads[1]: expected ascending KV heads, here one of 2..3, found 4"),
        ((-1, 2), "retrieval_heads[0]: expected ascending KV heads, here one of 0..3, found -1"),
    ],
)
def test_wrong_retrieval_heads(library: Library, heads: tuple[int, ...], message: str) -> None:
    layer = LayerConfig(8, 4, 128, 256, POLICY, heads).c_struct
    assert library._c.razor_check_layer(ctypes.byref(layer)) == structs.INVALID_ARGUMENT
    assert library.last_error == message


def test_what_is_not_used_may_hold_anything(library: Library) -> None:
    """The policy without local heads, RoPE's fields without RoPE, a view without heads."""
    layer = layer_struct(LayerConfig(8, 4, 128, 256))
    for name in ("min_window", "compression", "comp_tokens", "heavy_hitters", "ring_rows"):
        setattr(layer, name, -7)
    layer.local_ring_offset = -7
    call = packed_call()
    call.full = contiguous(4, 256)
    call.local.kind = call.comp.kind = 77
    accepted(library, layer, call)
    layer.position, layer.rope_table, layer.rotary_dim = structs.NO_POSITION, 99, 99
    call.cos_sin = call.num_positions = 0
    accepted(library, layer, call)

    local_only = layer_struct(LayerConfig(8, 4, 128, 256, POLICY.with_(comp_tokens=0), ()))
    local_only.full_ring_offset = -7
    call = packed_call()
    call.local = contiguous(4, 57)
    call.full.kind = call.comp.kind = 77
    accepted(library, local_only, call)


@pytest.mark.parametrize("compression", [None, 1, 2, 5, 256, 257, 2**31 - 1])
@pytest.mark.parametrize("sinks, window", [(0, 1), (4, 28), (4, 300), (300, 1), (7, 2**31 - 1)])
def test_ring_rows_are_the_policy_s(
    library: Library, compression: int | None, sinks: int, window: int
) -> None:
    policy = RazorPolicy(sinks, window, compression, 1)
    for length in (1, 2, 5, 32, 33, 256, 1000, 2**29):
        layer = LayerConfig(8, 4, 64, length, policy, ())
        assert library.ring_rows(layer.c_struct) == policy.ring_rows(length)
        library.check_layer(layer.c_struct)


def test_ring_rows_of_a_wrong_policy(library: Library) -> None:
    layer = layer_struct()
    layer.min_window = 0
    assert library._c.razor_ring_rows(ctypes.byref(layer)) == 0
    assert library.last_error == "min_window: expected >= 1, found 0"


# Call ----------------------------------------------------------------------------------------------
Change = Callable[[structs.RazorCall], None]


def field(path: str, value: int | None) -> Change:
    def change(call: structs.RazorCall) -> None:
        *parents, name = path.split(".")
        target: ctypes.Structure = call
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, value)

    return change


WRONG_CALLS = [
    ("batch", 0, "batch: expected 1..65535, found 0"),
    ("batch", 65536, "batch: expected 1..65535, found 65536"),
    ("num_contexts", -1, "num_contexts: expected 0..3 (batch), found -1"),
    ("num_contexts", 4, "num_contexts: expected 0..3 (batch), found 4"),
    ("tokens_per_sequence", -1, "tokens_per_sequence: expected >= 0, found -1"),
    (
        "tokens_per_sequence",
        2**29,
        "tokens_per_sequence: expected batch * tokens <= 536870912, found 3 * 536870912",
    ),
    ("max_past", -1, "max_past: expected 0..256 (max_seq_len), found -1"),
    ("max_past", 257, "max_past: expected 0..256 (max_seq_len), found 257"),
    ("max_chunk", 0, "max_chunk: expected 1..256 (max_seq_len), found 0"),
    ("max_chunk", 257, "max_chunk: expected 1..256 (max_seq_len), found 257"),
    ("max_chunk", 41, "max_chunk: expected 1..40 (num_context_tokens), found 41"),
    ("num_context_tokens", 0, "num_context_tokens: expected 1..536805377 for 1 contexts, found 0"),
    (
        "num_context_tokens",
        2**29,
        "num_context_tokens: expected 1..536805377 for 1 contexts, found 536870912",
    ),
    ("qkv", None, "qkv: expected a device pointer, found NULL"),
    ("qkv", 0x10008, "qkv: expected an address on a multiple of 16 bytes, found 0x10008"),
    ("out", None, "out: expected a device pointer, found NULL"),
    ("out", 0x20004, "out: expected an address on a multiple of 16 bytes, found 0x20004"),
    ("past", None, "past: expected past or total, found NULL for both"),
    ("past", 0x30002, "past: expected an address on a multiple of 4 bytes, found 0x30002"),
    ("total", 0x30002, "total: expected an address on a multiple of 4 bytes, found 0x30002"),
    ("chunk", None, "chunk: expected a device pointer for 1 contexts, found NULL"),
    ("cos_sin", None, "cos_sin: expected a device pointer, found NULL"),
    ("num_positions", 239, "num_positions: expected at least 240 rows of cos_sin, found 239"),
    (
        "full.kind",
        0,
        "full.kind: expected RAZOR_VIEW_CONTIGUOUS (1) or RAZOR_VIEW_PAGED (2) for a layer with 2 "
        "retrieval heads, found 0",
    ),
    (
        "local.kind",
        3,
        "local.kind: expected RAZOR_VIEW_CONTIGUOUS (1) or RAZOR_VIEW_PAGED (2) for a layer with 2 "
        "local heads, found 3",
    ),
    ("full.capacity", 239, "full.capacity: expected at least 240 rows, found 239"),
    ("local.capacity", 56, "local.capacity: expected at least 57 rows, found 56"),
    ("full.k", None, "full.k: expected a device pointer, found NULL"),
    ("full.v", 0x200008, "full.v: expected an address on a multiple of 16 bytes, found 0x200008"),
    ("local.v", None, "local.v: expected a device pointer, found NULL"),
    ("local.slots", 2, "local.slots: expected an address on a multiple of 4 bytes, found 0x2"),
    (
        "full.slot_stride",
        65540,
        "full.slot_stride: expected a multiple of 8 in 0..4398046511104, found 65540",
    ),
    (
        "full.head_stride",
        -32768,
        "full.head_stride: expected a multiple of 8 in 0..4398046511104, found -32768",
    ),
    (
        "full.slot_stride",
        65528,
        "full: slots and heads overlap: expected strides that step over 256 rows of 128 elements, "
        "found head_stride 32768 (2 heads) and slot_stride 65528 (batch 3)",
    ),
    (
        "local.head_stride",
        0,
        "local: slots and heads overlap: expected strides that step over 57 rows of 128 elements, "
        "found head_stride 0 (2 heads) and slot_stride 14592 (batch 3)",
    ),
    (
        "comp.kind",
        0,
        "comp.kind: expected RAZOR_COMP_CONTIGUOUS (1) or RAZOR_COMP_IN_BUBBLE (2) for comp_tokens 2, "
        "found 0",
    ),
    ("comp.kind", 2, "comp.kind: RAZOR_COMP_IN_BUBBLE needs a paged local view"),
    ("comp.comp", None, "comp.comp: expected a device pointer, found NULL"),
    (
        "comp.comp",
        0x50004,
        "comp.comp: expected an address on a multiple of 16 bytes, found 0x50004",
    ),
    ("comp.log_weight", None, "comp.log_weight: expected a device pointer, found NULL"),
    ("comp.count", None, "comp.count: expected a device pointer, found NULL"),
    (
        "comp.comp_slot_stride",
        1020,
        "comp.comp_slot_stride: expected at least 1024 elements (2 heads x 2 tokens x 2 x 128), "
        "found 1020",
    ),
    (
        "comp.comp_slot_stride",
        1026,
        "comp.comp_slot_stride: expected a multiple of 4 in 0..4398046511104, found 1026",
    ),
    (
        "comp.weight_slot_stride",
        3,
        "comp.weight_slot_stride: expected at least 4 elements (2 heads x 2 tokens), found 3",
    ),
]


@pytest.mark.parametrize(
    "path, value, message", WRONG_CALLS, ids=[f"{path}={value}" for path, value, _ in WRONG_CALLS]
)
def test_wrong_call(library: Library, path: str, value: int | None, message: str) -> None:
    call = packed_call()
    accepted(library, LAYER.c_struct, call)
    field(path, value)(call)
    assert attend(library, LAYER.c_struct, call) == (structs.INVALID_ARGUMENT, message)


WRONG_PAGED = [
    (
        "tokens_per_block",
        24,
        "full.tokens_per_block: expected a power of two in 8..1024, found 24",
    ),
    ("tokens_per_block", 4, "full.tokens_per_block: expected a power of two in 8..1024, found 4"),
    ("pool", None, "full.pool: expected a device pointer, found NULL"),
    ("block_offsets", None, "full.block_offsets: expected a device pointer, found NULL"),
    (
        "layer_offset",
        -16,
        "full.layer_offset: expected a multiple of 16 in 0..4398046511104, found -16",
    ),
    (
        "block_bytes",
        16383,
        "full.block_bytes: expected a multiple of 16 in 0..4398046511104, found 16383",
    ),
    (
        "block_bytes",
        16368,
        "full.block_bytes: expected at least 16384 for 2 heads of 32 tokens, found 16368",
    ),
    (
        "key_value_stride",
        7,
        "full: rows of block_offsets overlap: expected strides that step over 8 blocks, found "
        "key_value_stride 7 and sequence_stride 16 (batch 3)",
    ),
    (
        "sequence_stride",
        15,
        "full: rows of block_offsets overlap: expected strides that step over 8 blocks, found "
        "key_value_stride 8 and sequence_stride 15 (batch 3)",
    ),
]


@pytest.mark.parametrize(
    "name, value, message", WRONG_PAGED, ids=[f"{name}={value}" for name, value, _ in WRONG_PAGED]
)
def test_wrong_paged_view(library: Library, name: str, value: int | None, message: str) -> None:
    call = packed_call()
    call.full = paged(2, 256)
    accepted(library, LAYER.c_struct, call)
    setattr(call.full, name, value)
    assert attend(library, LAYER.c_struct, call) == (structs.INVALID_ARGUMENT, message)


def test_strides_in_other_orders(library: Library) -> None:
    """Heads outside slots; keys of all sequences before the values; unused strides."""
    call = packed_call()
    rows = 256 * 128
    call.full.slot_stride, call.full.head_stride = rows, BATCH * rows
    accepted(library, LAYER.c_struct, call)
    call.full.head_stride -= 8
    assert attend(library, LAYER.c_struct, call)[0] == structs.INVALID_ARGUMENT
    call.full = paged(2, 256)
    call.full.sequence_stride, call.full.key_value_stride = 8, 8 * BATCH
    accepted(library, LAYER.c_struct, call)

    single = packed_call(0, 0)
    single.batch = 1
    single.full.slot_stride = single.local.slot_stride = -1
    single.comp.comp_slot_stride = single.comp.weight_slot_stride = -1
    accepted(library, LAYER.c_struct, single)
    single.full.slots = 0x90000  # now they are used
    assert attend(library, LAYER.c_struct, single)[1].startswith("full.slot_stride: expected")


def test_full_heads_behind_a_bubble_need_its_rows(library: Library) -> None:
    layer, call = layer_struct(), packed_call()
    layer.full_ring_offset = 32  # positions from 4 on begin at row 32
    call.full.capacity = 240 + 28
    call.full.head_stride, call.full.slot_stride = 268 * 128, 2 * 268 * 128
    accepted(library, layer, call)
    call.full.capacity -= 1
    assert attend(library, layer, call)[1] == "full.capacity: expected at least 268 rows, found 267"


def test_means_in_the_bubble(library: Library) -> None:
    # 2 means and their counts and log-weights: 2 * (128 + 2) * 4 bytes, 5 rows of 256 bytes.
    layer, call = layer_struct(), packed_call()
    bubble(call, layer, 32)
    call.comp.comp = call.comp.log_weight = call.comp.count = None
    accepted(library, layer, call)
    bubble(call, layer, 9)
    accepted(library, layer, call)
    bubble(call, layer, 8)
    assert attend(library, layer, call) == (
        structs.INVALID_ARGUMENT,
        "comp.kind: 2 compensation tokens need 5 rows between sinks, heavy hitters and ring, found 4 "
        "(local_ring_offset 8 - sink_tokens 4 - heavy_hitters 0)",
    )
    bubble(call, layer, 32, tokens=8)
    assert attend(library, layer, call) == (
        structs.INVALID_ARGUMENT,
        "comp.kind: 5 rows of compensation tokens from row 4 on do not lie inside one block of 8 tokens",
    )


def test_means_behind_heavy_hitters(library: Library) -> None:
    layer, call = layer_struct(), packed_call()
    layer.heavy_hitters = 23
    bubble(call, layer, 32)
    call.comp.comp = call.comp.log_weight = call.comp.count = None
    accepted(library, layer, call)  # rows 27 .. 31
    layer.heavy_hitters = 24
    assert attend(library, layer, call) == (
        structs.INVALID_ARGUMENT,
        "comp.kind: 2 compensation tokens need 5 rows between sinks, heavy hitters and ring, found 4 "
        "(local_ring_offset 32 - sink_tokens 4 - heavy_hitters 24)",
    )
    bubble(call, layer, 64)
    assert attend(library, layer, call) == (
        structs.INVALID_ARGUMENT,
        "comp.kind: 5 rows of compensation tokens from row 28 on do not lie inside one block of 32 tokens",
    )


def test_padded_calls(library: Library) -> None:
    for contexts in (0, BATCH):  # one token each: both mean the same
        call = padded_call(1)
        call.num_contexts = contexts
        call.chunk = None
        accepted(library, LAYER.c_struct, call)
    call = padded_call(1)
    call.num_contexts = 1
    message = "num_contexts: expected 0 or 3 (batch) in a padded call, found 1"
    assert attend(library, LAYER.c_struct, call) == (structs.INVALID_ARGUMENT, message)

    call = padded_call(7)
    accepted(library, LAYER.c_struct, call)
    call.num_contexts = 0
    message = "num_contexts: expected 3 (batch) in a padded call with 7 tokens a sequence, found 0"
    assert attend(library, LAYER.c_struct, call) == (structs.INVALID_ARGUMENT, message)
    call = padded_call(7)
    call.max_chunk = 8
    message = "max_chunk: expected 7 (tokens_per_sequence) in a padded call, found 8"
    assert attend(library, LAYER.c_struct, call) == (structs.INVALID_ARGUMENT, message)


def test_generations_alone(library: Library) -> None:
    call = packed_call(0, 0)
    call.max_chunk, call.chunk = -7, None  # not read
    accepted(library, LAYER.c_struct, call)
    call.num_context_tokens = 2
    message = "num_context_tokens: expected 0 without contexts, found 2"
    assert attend(library, LAYER.c_struct, call) == (structs.INVALID_ARGUMENT, message)


def test_a_call_of_too_many_blocks_is_unsupported(library: Library) -> None:
    layer = LayerConfig(256, 256, 64, 2**20, RazorPolicy(), ())
    call = packed_call(60000, 2**20)
    call.batch, call.max_past, call.num_positions = 60000, 0, 2**20
    status, message = attend(library, layer.c_struct, call)
    assert status == structs.UNSUPPORTED
    assert message == (
        "num_contexts: 60000 contexts of up to 1048576 tokens with 256 local heads are too many for "
        "one call; split it"
    )


def test_alibi_and_scales(library: Library) -> None:
    layer = layer_struct()
    layer.position, layer.comp_tokens = structs.ALIBI, 1
    call = packed_call()
    message = "alibi_slopes: expected a device pointer, found NULL"
    assert attend(library, layer, call) == (structs.INVALID_ARGUMENT, message)
    call.alibi_slopes, call.cos_sin = 0x80000, None
    accepted(library, layer, call)
    layer.cache_dtype = structs.FP8_E4M3
    call.k_scale = 0x80002
    message = "k_scale: expected an address on a multiple of 4 bytes, found 0x80002"
    assert attend(library, layer, call) == (structs.INVALID_ARGUMENT, message)
    call.k_scale = 0x80004
    accepted(library, layer, call)


# Versions, NULL ------------------------------------------------------------------------------------
def test_structs_of_another_version(library: Library) -> None:
    for name, offset in (("struct_size", 8), ("version", 1)):
        layer, call, limits = layer_struct(), packed_call(), Limits(1, 1, 1, 0).c_struct
        setattr(layer, name, getattr(layer, name) + offset)
        status, message = attend(library, layer, call)
        assert status == structs.VERSION_MISMATCH
        assert re.match(
            r"razor_layer: expected \d+ bytes of API version 2, found \d+ bytes", message
        )
        assert library._c.razor_check_layer(ctypes.byref(layer)) == structs.VERSION_MISMATCH
        assert library._c.razor_ring_rows(ctypes.byref(layer)) == 0
        setattr(call, name, getattr(call, name) + offset)
        status, message = attend(library, LAYER.c_struct, call)
        assert status == structs.VERSION_MISMATCH
        assert "razor_call:" in message
        assert "RAZOR_CALL_INIT" in message
        setattr(limits, name, getattr(limits, name) + offset)
        with pytest.raises(RazorError, match="razor_limits: expected"):
            library.workspace_size(LAYER.c_struct, limits)


def test_null_is_refused(library: Library) -> None:
    c, layer, call = library._c, LAYER.c_struct, packed_call()
    limits, size = Limits(1, 1, 1, 0).c_struct, ctypes.c_size_t()
    byref = ctypes.byref
    for message, status in (
        ("razor_layer: expected a struct, found NULL", c.razor_check_layer(None)),
        (
            "razor_layer: expected a struct, found NULL",
            c.razor_attention(None, byref(call), None, 0, None),
        ),
        (
            "razor_call: expected a struct, found NULL",
            c.razor_attention(byref(layer), None, None, 0, None),
        ),
        (
            "razor_limits: expected a struct, found NULL",
            c.razor_workspace_size(byref(layer), None, byref(size)),
        ),
        (
            "bytes: expected a pointer, found NULL",
            c.razor_workspace_size(byref(layer), byref(limits), None),
        ),
    ):
        assert status == structs.INVALID_ARGUMENT, message
    assert library.last_error == "bytes: expected a pointer, found NULL"
    assert c.razor_ring_rows(None) == 0


def test_workspace_must_be_there_aligned_and_large_enough(library: Library) -> None:
    layer, call = LAYER.c_struct, packed_call()
    message = "workspace: expected a device pointer, found NULL"
    assert attend(library, layer, call, None) == (structs.INVALID_ARGUMENT, message)
    message = "workspace: expected an address on a multiple of 256 bytes, found 0x1000010"
    assert attend(library, layer, call, 0x1000010) == (structs.INVALID_ARGUMENT, message)
    status, message = attend(library, layer, call, size=1000)
    assert status == structs.WORKSPACE_TOO_SMALL
    needed = re.match(r"workspace: expected at least (\d+) bytes, found 1000; ", message)
    assert needed
    limits = Limits(BATCH, 40, 40, 200).c_struct
    assert int(needed[1]) <= library.workspace_size(layer, limits)


def needed(library: Library, layer: structs.RazorLayer, call: structs.RazorCall) -> int:
    status, message = attend(library, layer, call)
    assert status == structs.WORKSPACE_TOO_SMALL, message
    return int(message.split()[4])


@pytest.mark.parametrize("comp_tokens", [0, 1, 2, 32])
@pytest.mark.parametrize("retrieval", [(), (1, 3), None])
@pytest.mark.parametrize("group", [1, 4, 40])
def test_workspace_covers_every_call_within_the_limits(
    library: Library, comp_tokens: int, retrieval: tuple[int, ...] | None, group: int
) -> None:
    policy = POLICY.with_(comp_tokens=comp_tokens)
    layer = LayerConfig(4 * group, 4, 128, 256, policy, retrieval).c_struct
    batch, tokens, chunk, past = 5, 90, 33, 200
    size = library.workspace_size(layer, Limits(batch, tokens, chunk, past).c_struct)
    for b in range(1, batch + 1):
        for contexts in range(b + 1):
            for context_tokens in (1, 33, 90) if contexts else (0,):
                for max_past in (0, 17, 200):
                    call = packed_call(contexts, context_tokens)
                    call.batch, call.max_past = b, max_past
                    call.max_chunk = min(context_tokens, chunk)
                    call.full, call.local = contiguous(4, 256), contiguous(4, 57)
                    call.comp.comp_slot_stride = call.comp.weight_slot_stride = 1 << 20
                    assert needed(library, layer, call) <= size
        call = padded_call(18)
        call.batch = call.num_contexts = b
        call.full, call.local = contiguous(4, 256), contiguous(4, 57)
        call.comp.comp_slot_stride = call.comp.weight_slot_stride = 1 << 20
        assert needed(library, layer, call) <= size


@pytest.mark.parametrize("cache_dtype", ["float16", "float8_e4m3fn"])
def test_workspace_never_falls_when_a_limit_grows(library: Library, cache_dtype: str) -> None:
    layer = LayerConfig(
        32, 8, 128, 2**20, RazorPolicy(comp_tokens=8), (0, 3), cache_dtype=cache_dtype
    )
    base = {"max_batch": 2, "max_context_tokens": 4096, "max_chunk": 512, "max_past": 5000}
    for name, values in {
        "max_batch": (1, 2, 3, 8, 64, 65535),
        "max_context_tokens": (512, 513, 4096, 100_000, 2**29),
        "max_chunk": (1, 15, 16, 17, 511, 512, 513, 4096),
        "max_past": (0, 1, 4000, 5000, 131072, 2**20),
    }.items():
        sizes = [
            library.workspace_size(layer.c_struct, Limits(**{**base, name: v}).c_struct)
            for v in values
        ]
        assert sizes == sorted(sizes), name
        assert all(size > 0 for size in sizes)


@pytest.mark.parametrize(
    "limits, message",
    [
        (Limits(0, 1, 1, 0), "max_batch: expected 1..65535, found 0"),
        (Limits(65536, 1, 1, 0), "max_batch: expected 1..65535, found 65536"),
        (Limits(1, -1, 1, 0), "max_context_tokens: expected 0..536870912, found -1"),
        (
            Limits(1, 8, 0, 0),
            "max_chunk: expected 1..8 (max_context_tokens 8, max_seq_len 256), found 0",
        ),
        (
            Limits(1, 8, 9, 0),
            "max_chunk: expected 1..8 (max_context_tokens 8, max_seq_len 256), found 9",
        ),
        (Limits(1, 8, 8, 257), "max_past: expected 0..256 (max_seq_len), found 257"),
    ],
)
def test_wrong_limits(library: Library, limits: Limits, message: str) -> None:
    with pytest.raises(RazorError, match=re.escape(f"workspace size: {message}")):
        library.workspace_size(LAYER.c_struct, limits.c_struct)


def test_limits_without_contexts_need_no_chunk(library: Library) -> None:
    assert library.workspace_size(LAYER.c_struct, Limits(4, 0, 0, 256).c_struct) > 0


# Failures ------------------------------------------------------------------------------------------
def test_last_error_belongs_to_the_thread(library: Library) -> None:
    """Threads that fail at the same time each read their own line; one that did not fails none."""
    layer = layer_struct()
    layer.head_dim = 80
    assert library._c.razor_check_layer(ctypes.byref(layer)) == structs.INVALID_ARGUMENT
    start = threading.Barrier(8)
    wrong: list[str] = []

    def run(thread: int) -> None:
        if library.last_error:
            wrong.append(f"thread {thread} began with {library.last_error!r}")
        mine = layer_struct()
        mine.head_dim = 1000 + thread
        start.wait()
        for _ in range(500):
            library._c.razor_check_layer(ctypes.byref(mine))
            expected = f"head_dim: expected 64, 96, 128 or 256, found {1000 + thread}"
            if library.last_error != expected:
                wrong.append(library.last_error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert library.last_error == "head_dim: expected 64, 96, 128 or 256, found 80"


def test_no_device_is_cuda_s_error(library: Library) -> None:
    shim = library._c
    shim.razor_shim_set_device(0, 232448)
    try:
        status, message = attend(library, LAYER.c_struct, packed_call(), size=1 << 30)
    finally:
        shim.razor_shim_set_device(4, 232448)
    assert status == structs.CUDA_ERROR
    assert re.fullmatch(r"device: CUDA error \d+: .+", message)


def test_a_failed_launch_names_its_step(kernels: RazorKernels) -> None:
    """The first, second … launch of a call fails: the steps in order, and the next call is well."""
    shim, found = kernels._library._c, []
    caches = Caches.empty(LAYER, 2, "cpu")
    qkv = torch.zeros(6, LAYER.qkv_width, dtype=torch.float16)
    numbers = {
        "past": torch.zeros(2, dtype=torch.int32),
        "chunk": torch.tensor([5, 1], dtype=torch.int32),
        "cos_sin": torch.zeros(256, 128),
    }
    for launch in range(1, 100):
        shim.razor_shim_fail_launch(launch)
        try:
            kernels.attention(LAYER, qkv, caches, num_contexts=1, **numbers)
        except RazorError as e:
            found.append(str(e))
        else:
            break
    shim.razor_shim_fail_launch(0)
    matches = [re.fullmatch(r"attention: (\w+): CUDA error 719: .+", line) for line in found]
    assert all(matches), found
    steps = dict.fromkeys(m[1] for m in matches if m)
    assert list(steps) == ["append", "prefill", "decode", "compact"]
    kernels.attention(LAYER, qkv, caches, num_contexts=1, **numbers)


# Against the compiler and without a driver ----------------------------------------------------------
STRUCTS = {
    "razor_layer": structs.RazorLayer,
    "razor_view": structs.RazorView,
    "razor_comp": structs.RazorComp,
    "razor_limits": structs.RazorLimits,
    "razor_call": structs.RazorCall,
}


@pytest.mark.parametrize("language", ["c", "c++"])
def test_ctypes_structs_are_the_header_s(tmp_path: Path, language: str) -> None:
    """Sizes, offsets, field counts; and razor.h is plain C99 and C++ without warnings."""
    compiler = shutil.which("gcc" if language == "c" else "g++")
    if compiler is None:
        pytest.skip(f"needs a compiler for {language}")
    lines = ['#include "razor/razor.h"', "#include <stdio.h>", "int main(void) {"]
    expected = []
    for name, mirror in STRUCTS.items():
        lines.append(f'    printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(mirror)}")
        for member in (m[0] for m in mirror._fields_):
            lines.append(
                f'    printf("{name}.{member} %zu %zu\\n", offsetof({name}, {member}), '
                f"sizeof((({name} *)0)->{member}));"
            )
            descriptor = getattr(mirror, member)
            expected.append(f"{name}.{member} {descriptor.offset} {descriptor.size}")
    for name, kind in (("RAZOR_LAYER_INIT", "razor_layer"), ("RAZOR_CALL_INIT", "razor_call")):
        lines.append(f'    {{ {kind} x = {name}; printf("%u %u\\n", x.struct_size, x.version); }}')
        expected.append(f"{ctypes.sizeof(STRUCTS[kind])} {structs.API_VERSION}")
    lines += ["    return 0;", "}"]
    source = tmp_path / ("probe.c" if language == "c" else "probe.cpp")
    source.write_text("\n".join(lines) + "\n")
    standard = "-std=c99" if language == "c" else "-std=c++17"
    program = tmp_path / "probe"
    flags = ["-pedantic", "-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers"]
    subprocess.run(
        [compiler, standard, *flags, "-I", str(HEADER.parents[1]), str(source), "-o", str(program)],
        check=True,
    )
    found = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    assert found.splitlines() == expected


def test_constants_are_the_header_s() -> None:
    text = HEADER.read_text()
    for name in ("OK", "INVALID_ARGUMENT", "UNSUPPORTED", "WORKSPACE_TOO_SMALL", "CUDA_ERROR"):
        assert f"RAZOR_{name} = {getattr(structs, name)}," in text
    for name in (
        "FP16",
        "BF16",
        "FP8_E4M3",
        "ROPE_HALF",
        "ROPE_INTERLEAVED",
        "ALIBI",
        "NO_POSITION",
    ):
        assert re.search(rf"\bRAZOR_{name} = {getattr(structs, name)}\b", text)
    for name in ("TABLE_SPLIT", "TABLE_PAIRS", "VIEW_NONE", "VIEW_CONTIGUOUS", "VIEW_PAGED"):
        assert re.search(rf"\bRAZOR_{name} = {getattr(structs, name)}\b", text)
    for name in ("COMP_NONE", "COMP_CONTIGUOUS", "COMP_IN_BUBBLE", "VERSION_MISMATCH"):
        assert re.search(rf"\bRAZOR_{name} = {getattr(structs, name)}\b", text)
    assert f"#define RAZOR_API_VERSION {structs.API_VERSION}\n" in text


def test_the_cuda_library_without_a_driver() -> None:
    """librazor.so loads, checks and sizes without a driver; a launch says what CUDA says."""
    try:
        path = find_library()
    except RazorError as e:
        pytest.skip(str(e))
    library = Library(path)
    if "CUDA" not in library.build_info:
        pytest.skip(f"{path} was not built with nvcc: {library.build_info}")
    layer = LAYER.c_struct
    library.check_layer(layer)
    assert library.workspace_size(layer, Limits(BATCH, 40, 40, 200).c_struct) > 0
    assert library.ring_rows(layer) == 53
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(RazorError, match=r"attention: device: CUDA error \d+: .*driver"):
            library.attention(layer, packed_call(), 0x1000000, 1 << 40, 0)
