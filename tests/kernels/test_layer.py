"""LayerConfig: what Python says and what the C struct gets."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from trt_razor.errors import UsageError
from trt_razor.kernels import LayerConfig, Limits, structs
from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy

POLICY = RazorPolicy(sink_tokens=4, min_window=100, compression=5, comp_tokens=3)


def test_every_field_reaches_the_struct() -> None:
    layer = LayerConfig(
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_seq_len=4096,
        policy=POLICY.with_(heavy_hitters=7),
        retrieval_heads=(1, 6),
        dtype="bfloat16",
        cache_dtype="float8_e4m3fn",
        position="rope_interleaved",
        rope_table="pairs",
        rotary_dim=64,
        scale=0.25,
        ring_rows=900,
        local_ring_offset=32,
        full_ring_offset=31,
    )
    c = layer.c_struct
    found = {name: getattr(c, name) for name, _ in c._fields_}
    heads = found.pop("retrieval_heads")
    assert [heads[i] for i in range(2)] == [1, 6]
    assert found == {
        "struct_size": 96,
        "version": 2,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "num_retrieval": 2,
        "dtype": structs.BF16,
        "cache_dtype": structs.FP8_E4M3,
        "position": structs.ROPE_INTERLEAVED,
        "rope_table": structs.TABLE_PAIRS,
        "rotary_dim": 64,
        "scale": 0.25,
        "max_seq_len": 4096,
        "sink_tokens": 4,
        "min_window": 100,
        "compression": 5,
        "comp_tokens": 3,
        "heavy_hitters": 7,
        "ring_rows": 900,
        "local_ring_offset": 32,
        "full_ring_offset": 31,
    }
    assert (layer.group, layer.num_retrieval, layer.num_local) == (4, 2, 6)
    assert layer.local_heads == (0, 2, 3, 4, 5, 7)
    assert (layer.qkv_width, layer.out_width) == (48 * 128, 32 * 128)
    assert layer.local_rows == 932
    assert layer.full_rows == 4096 + 27


def test_defaults_are_the_layout_of_the_semantics() -> None:
    layer = LayerConfig(32, 8, 128, 4096, POLICY, ())
    c = layer.c_struct
    assert c.scale == pytest.approx(1 / math.sqrt(128))
    assert (c.dtype, c.cache_dtype, c.position) == (structs.FP16, structs.FP16, structs.ROPE_HALF)
    assert c.ring_rows == POLICY.ring_rows(4096)
    assert c.local_ring_offset == c.full_ring_offset == 4
    heavy = replace(layer, policy=POLICY.with_(heavy_hitters=9))
    assert (heavy.c_struct.local_ring_offset, heavy.c_struct.full_ring_offset) == (13, 4)
    assert heavy.local_rows == 13 + POLICY.ring_rows(4096)
    assert not c.retrieval_heads
    assert layer.local_rows == POLICY.local_rows(4096)
    assert layer.full_rows == 4096
    fixed = LayerConfig(32, 8, 128, 4096, POLICY.with_(compression=None), ())
    assert fixed.c_struct.compression == 0


def test_dense_layers_need_no_policy() -> None:
    layer = LayerConfig(32, 8, 128, 4096)
    assert (layer.num_retrieval, layer.num_local, layer.comp_tokens) == (8, 0, 0)
    assert (layer.local_heads, layer.local_rows) == ((), 0)
    with pytest.raises(UsageError, match="policy: missing; 7 of 8 KV heads are local"):
        LayerConfig(32, 8, 128, 4096, retrieval_heads=(3,))


@pytest.mark.parametrize(
    "field, value, hint",
    [
        ("dtype", "float15", "did you mean float16"),
        ("dtype", "float8_e4m3fn", "known"),
        ("cache_dtype", "int8", "known"),
        ("position", "ropes", "did you mean rope"),
        ("rope_table", "pair", "did you mean pairs"),
    ],
)
def test_unknown_names(field: str, value: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"^{field} '{value}': unknown; .*"):
        LayerConfig(32, 8, 128, 4096, **{field: value})  # type: ignore[arg-type]


def test_numbers_that_c_cannot_hold_are_not_cut_off() -> None:
    with pytest.raises(
        UsageError, match="max_seq_len: expected an integer of 32 bits, found 4294967297"
    ):
        _ = LayerConfig(32, 8, 128, 2**32 + 1).c_struct
    with pytest.raises(UsageError, match="max_past: expected an integer of 32 bits"):
        _ = Limits(1, 1, 1, 2**40).c_struct


def test_from_spec() -> None:
    spec = ModelSpec("m", "llama", 2, 512, 1024, 8, 2, 64, 100, 4096, 1e-5)
    layer = LayerConfig.from_spec(spec, POLICY, [1], 2048, dtype="bfloat16")
    assert layer == LayerConfig(8, 2, 64, 2048, POLICY, (1,), "bfloat16")
    assert LayerConfig.from_spec(spec, None, None, 2048).num_local == 0
