"""The planner: exact cache bytes, the published ratios, splits over GPUs, refusals, the table."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from trt_razor import planner, sharding
from trt_razor.errors import UsageError
from trt_razor.gpus import ALIASES, GPUS, find_gpu
from trt_razor.headmap import HeadMap
from trt_razor.models.spec import ModelSpec
from trt_razor.planner import cache_bytes, cache_tensors, check_seq_len, kept_share, kv_at, plan
from trt_razor.policy import PRESETS, RazorPolicy

GIB = 1 << 30
PAPER = PRESETS["paper"]

LLAMA3_8B = ModelSpec("llama3-8b", "llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192, 1e-5)
QWEN_72B = ModelSpec(
    "qwen-72b", "qwen2", 80, 8192, 24576, 64, 64, 128, 152064, 32768, 1e-6, qkv_bias=True
)
TINY = ModelSpec("tiny", "llama", 3, 64, 96, 8, 4, 16, 100, 512, 1e-5)


def head_map(spec: ModelSpec, heads: list[list[int]]) -> HeadMap:
    return HeadMap(
        spec.name,
        spec.fingerprint(),
        spec.num_layers,
        spec.num_kv_heads,
        tuple(tuple(h) for h in heads),
        "test",
        "test",
    )


def longer(spec: ModelSpec, max_positions: int = 1 << 20) -> ModelSpec:
    return dataclasses.replace(spec, max_positions=max_positions)


# Capacity ---------------------------------------------------------------------------------------
def test_layout_of_every_kind_of_layer() -> None:
    policy = RazorPolicy(sink_tokens=2, min_window=8, compression=4, comp_tokens=3)
    tensors = cache_tensors(TINY, head_map(TINY, [[1], [], [0, 1, 2, 3]]), policy, 100, "float32")
    rows = 2 + 25 + 1  # sinks, the window of 100 tokens, one row to write before folding
    assert [(t.name, t.layer, t.shape, t.dtype) for t in tensors] == [
        ("full_k_0", 0, (1, 100, 16), "float32"),
        ("full_v_0", 0, (1, 100, 16), "float32"),
        ("local_k_0", 0, (3, rows, 16), "float32"),
        ("local_v_0", 0, (3, rows, 16), "float32"),
        ("comp_0", 0, (3, 3, 2, 16), "float32"),
        ("comp_log_weight_0", 0, (3, 3), "float32"),
        ("comp_count_0", 0, (3, 3), "float32"),
        ("local_k_1", 1, (4, rows, 16), "float32"),
        ("local_v_1", 1, (4, rows, 16), "float32"),
        ("comp_1", 1, (4, 3, 2, 16), "float32"),
        ("comp_log_weight_1", 1, (4, 3), "float32"),
        ("comp_count_1", 1, (4, 3), "float32"),
        ("full_k_2", 2, (4, 100, 16), "float32"),
        ("full_v_2", 2, (4, 100, 16), "float32"),
    ]


def test_means_stay_float32_in_a_16_bit_cache() -> None:
    policy = RazorPolicy(min_window=8, comp_tokens=1)
    tensors = cache_tensors(TINY, head_map(TINY, [[0]] * 3), policy, 100, "bfloat16")
    dtypes = {t.kind: t.dtype for t in tensors}
    assert dtypes == {
        **dict.fromkeys(("full_k", "full_v", "local_k", "local_v"), "bfloat16"),
        **dict.fromkeys(("comp", "comp_log_weight", "comp_count"), "float32"),
    }


def test_dense_cache_of_llama3_8b() -> None:
    dense = cache_bytes(LLAMA3_8B, None, None, 8192, batch=3, kv_dtype="float16")
    assert dense.by_kind == {"full_k": GIB // 2, "full_v": GIB // 2}
    assert dense.per_slot == GIB  # 2 · 32 layers · 8 heads · 8192 tokens · 128 · 2 bytes
    assert dense.total == 3 * GIB
    # A head map of nothing but retrieval heads is dense too, and a policy does not change that.
    everything = head_map(LLAMA3_8B, [list(range(8))] * 32)
    assert cache_bytes(LLAMA3_8B, everything, PAPER, 8192).per_slot == GIB
    assert cache_bytes(LLAMA3_8B, None, PAPER, 8192, kv_dtype="float32").per_slot == 2 * GIB


def test_razor_cache_of_llama3_8b() -> None:
    razor = cache_bytes(LLAMA3_8B, head_map(LLAMA3_8B, [[0]] * 32), PAPER, 8192)
    assert razor.by_kind == {
        "full_k": 32 * 8192 * 256,
        "full_v": 32 * 8192 * 256,
        "local_k": 32 * 7 * 4005 * 256,
        "local_v": 32 * 7 * 4005 * 256,
        "comp": 32 * 7 * 2 * 128 * 4,
        "comp_log_weight": 32 * 7 * 4,
        "comp_count": 32 * 7 * 4,
    }
    assert razor.per_slot == sum(razor.by_kind.values()) == razor.total


def test_no_compensation_tokens_means_no_such_tensors() -> None:
    kinds = cache_bytes(
        TINY, head_map(TINY, [[0]] * 3), RazorPolicy(min_window=8, comp_tokens=0), 100
    ).by_kind
    assert set(kinds) == {"full_k", "full_v", "local_k", "local_v"}


policies = st.builds(
    RazorPolicy,
    sink_tokens=st.integers(0, 6),
    min_window=st.integers(1, 60),
    compression=st.none() | st.integers(2, 8),
    comp_tokens=st.integers(0, 5),
    heavy_hitters=st.sampled_from([0, 0, 1, 7]),
)
head_sets = st.lists(st.sets(st.integers(0, 3)).map(sorted), min_size=3, max_size=3)


@settings(deadline=None)
@given(head_sets, policies, st.integers(1, 512), st.sampled_from(["float32", "float16"]))
def test_cache_bytes_are_those_of_the_arrays(
    heads: list[list[int]], policy: RazorPolicy, n_max: int, dtype: str
) -> None:
    import numpy as np

    m = head_map(TINY, heads)
    arrays = [np.empty(t.shape, t.dtype) for t in cache_tensors(TINY, m, policy, n_max, dtype)]
    assert cache_bytes(TINY, m, policy, n_max, 1, dtype).per_slot == sum(a.nbytes for a in arrays)
    # Capacity is never less than need, at any length up to the capacity.
    for n in {1, n_max // 2 or 1, n_max}:
        need = kv_at(TINY, m, policy, n, dtype).razor_bytes
        assert need <= sum(a.nbytes for a in arrays)


def test_cache_refusals() -> None:
    razor = head_map(TINY, [[0]] * 3)
    with pytest.raises(UsageError, match=r"expected 32 layers x 8 KV heads .* found 3 x 4"):
        cache_tensors(LLAMA3_8B, razor, PAPER, 100)
    with pytest.raises(UsageError, match="policy: missing"):
        cache_tensors(TINY, razor, None, 100)
    with pytest.raises(UsageError, match=r"dtype 'flaot16': unknown; did you mean float16"):
        cache_tensors(TINY, razor, PAPER, 100, "flaot16")
    with pytest.raises(UsageError, match="max_seq_len"):
        cache_tensors(TINY, razor, PAPER, 0)
    with pytest.raises(UsageError, match="batch"):
        cache_bytes(TINY, razor, PAPER, 100, batch=0)


# Need -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("share", "policy", "n", "saved", "tolerance"),
    [
        (0.15, PAPER, 8192, 1.77, 0.005),
        (0.15, PAPER, 16384, 2.80, 0.006),  # 2.795 with sinks and means, 2.797 without
        (0.15, PAPER, 20480, 3.12, 0.005),
        (0.15, PAPER, 131072, 3.12, 0.005),
        (0.325, PAPER, 131072, 2.17, 0.005),
        (0.15, PAPER.with_(compression=None), 131072, 5.7, 0.05),
    ],
)
def test_published_ratios(
    share: float, policy: RazorPolicy, n: int, saved: float, tolerance: float
) -> None:
    assert 1 / kept_share(share, policy, n) == pytest.approx(saved, abs=tolerance)
    # Bytes say the same: 64 x 80 heads make the shares exact.
    need = kv_at(longer(QWEN_72B), share, policy, n)
    assert need.ratio == pytest.approx(saved, abs=tolerance)
    assert 1 / need.kept == pytest.approx(need.ratio, rel=1e-4)


def test_ratio_stays_at_3_12_from_20k_up() -> None:
    ratios = [1 / kept_share(0.15, PAPER, n) for n in range(20480, 300_000, 997)]
    assert min(ratios) > 3.12
    assert max(ratios) < 3.125  # the paper's 1 / 0.32


def test_need_before_and_after_the_first_drop() -> None:
    policy = RazorPolicy(sink_tokens=2, min_window=8, compression=None, comp_tokens=2)
    row = 2 * 16 * 2  # k and v, 16 numbers of 2 bytes
    mean = 2 * 16 * 4 + 8  # two fp32 means, a log-weight and a count
    assert kv_at(TINY, 0.0, policy, 10).razor_bytes == 12 * 10 * row
    assert kv_at(TINY, 0.0, policy, 11).razor_bytes == 12 * (10 * row + mean)
    assert kv_at(TINY, 0.0, policy, 500).razor_bytes == 12 * (10 * row + 2 * mean)
    assert kv_at(TINY, 0.25, policy, 500).razor_bytes == 3 * 500 * row + 9 * (10 * row + 2 * mean)
    assert kv_at(TINY, 0.0, policy, 500).full_bytes == 12 * 500 * row
    assert kept_share(0.0, policy, 10) == 1.0
    assert kept_share(0.5, policy, 100) == pytest.approx(0.5 + 0.5 * (2 + 4 + 8) / 100, rel=1e-12)


def test_need_with_heavy_hitters() -> None:
    policy = RazorPolicy(2, 8, None, comp_tokens=2, heavy_hitters=3)
    row, mean = 2 * 16 * 2, 2 * 16 * 4 + 8
    # Positions 2, 3 and 4 keep a row of their own; position 5 opens a cluster, position 6 another.
    assert kv_at(TINY, 0.0, policy, 13).razor_bytes == 12 * 13 * row
    assert kv_at(TINY, 0.0, policy, 14).razor_bytes == 12 * (13 * row + mean)
    assert kv_at(TINY, 0.0, policy, 500).razor_bytes == 12 * (13 * row + 2 * mean)
    assert kv_at(TINY, 0.0, policy.with_(comp_tokens=0), 500).razor_bytes == 12 * 13 * row
    assert kept_share(0.0, policy, 13) == 1.0
    assert kept_share(0.5, policy, 100) == pytest.approx(0.5 + 0.5 * (2 + 3 + 4 + 8) / 100)


@pytest.mark.parametrize("compression", [None, 2, 3])
@pytest.mark.parametrize("heavy", [0, 1, 7, 64])
def test_compression_starts_where_the_first_token_loses_its_row(
    heavy: int, compression: int | None
) -> None:
    policy = RazorPolicy(2, 8, compression, 1, heavy)
    n = plan(TINY, policy, 400).compression_starts
    assert n is not None
    assert (policy.dropped(n - 1), policy.dropped(n)) == (heavy, heavy + 1)


def test_heavy_hitters_in_capacity_table_and_refusals() -> None:
    policy = RazorPolicy(2, 8, 4, 3, 5)
    razor = head_map(TINY, [[1], [], [0, 1, 2, 3]])
    tensors = {t.name: t for t in cache_tensors(TINY, razor, policy, 100)}
    assert tensors["local_k_0"].shape == (3, 2 + 5 + 25 + 1, 16)
    assert [t.name for t in tensors.values() if t.reserved] == [
        "local_k_0", "local_v_0", "local_k_1", "local_v_1"
    ]  # fmt: skip
    assert tensors["local_v_1"].reserved == 5
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(planner.render(plan(TINY, policy, 100)))
    text = console.export_text()
    assert "2 sinks, 5 heavy hitters, window 25 of 100 tokens, 3 compensation tokens" in text
    assert (
        plan(TINY, policy, 15)
        .warnings[0]
        .startswith(
            "Razor saves nothing at 15 tokens: sinks, window and heavy hitters cover them all; the "
            "first token is dropped at 16;"
        )
    )
    alibi = dataclasses.replace(TINY, position="alibi")
    with pytest.raises(UsageError, match="heavy_hitters: expected 0 for 'tiny', an ALiBi model"):
        plan(alibi, policy.with_(comp_tokens=1), 100)


def test_need_of_a_head_map_counts_its_heads() -> None:
    policy = RazorPolicy(min_window=8, compression=None)
    m = head_map(TINY, [[0, 1], [3], []])
    assert kv_at(TINY, m, policy, 300) == kv_at(TINY, 3 / 12, policy, 300)


@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan, math.inf])
def test_share_outside_0_1_is_refused(share: float) -> None:
    for call in (
        lambda: kept_share(share, PAPER, 100),
        lambda: kv_at(TINY, share, PAPER, 100),
        lambda: plan(TINY, PAPER, 100, retrieval_share=share),
    ):
        with pytest.raises(UsageError, match=r"retrieval share: expected 0\.\.1"):
            call()


# Splits over GPUs ---------------------------------------------------------------------------------
@given(st.floats(0, 1), st.integers(1, 50), st.integers(1, 16))
def test_spread_is_even_and_complete(share: float, layers: int, heads: int) -> None:
    counts = [r for r, _ in sharding.spread(share, layers, heads)]
    assert sum(counts) == pytest.approx(share * layers * heads, abs=1)
    assert sum(counts) >= share * layers * heads - 1e-6
    assert max(counts) - min(counts) <= 1
    assert max(counts) <= heads


def test_share_written_in_decimals_is_not_rounded_up_twice() -> None:
    for heads in range(1, 2000):
        for k in (1, heads // 3, heads):
            assert sharding.count_heads(k / heads, heads) == k
    assert sharding.count_heads(0.15, 640) == 96
    assert sharding.count_heads(0.07 * 3, 100) == 21  # 0.21000000000000002


@pytest.mark.parametrize(
    ("split", "tp", "expected"),
    [
        ((2, 6), 2, (1, 3)),
        ((3, 5), 2, (2, 2)),
        ((1, 7), 8, (1, 0)),  # one KV head per rank cannot mix
        ((0, 8), 8, (0, 1)),
        ((1, 7), 16, (1, 0)),  # KV heads are replicated
        ((8, 0), 4, (2, 0)),
        ((1, 9), 4, (1, 2)),  # uneven: the fullest rank
    ],
)
def test_rank_split(split: tuple[int, int], tp: int, expected: tuple[int, int]) -> None:
    assert sharding.rank_split([split], tp) == [expected]


def test_stages_cover_all_layers() -> None:
    assert sharding.stages(10, 3) == [(0, 4), (4, 7), (7, 10)]
    assert sharding.stages(4, 4) == [(0, 1), (1, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize("tied", [False, True])
def test_weights_over_ranks_and_stages_add_up(tied: bool) -> None:
    spec = dataclasses.replace(TINY, tie_embeddings=tied, qkv_bias=True, qk_norm=True, o_bias=True)
    total = spec.num_parameters()
    assert sharding.weight_elements(spec, 1, 0, 3) == total
    # Four ranks hold every weight once, and norms and the output bias four times.
    replicated = sum(
        math.prod(shape)
        for name, shape in spec.tensors().items()
        if "norm" in name or name.endswith("o_proj.bias")
    )
    assert 4 * sharding.weight_elements(spec, 4, 0, 3) == total + 3 * replicated
    # Stages hold every layer once; a tied embedding sits on the first and on the last.
    parts = sum(sharding.weight_elements(spec, 1, a, b) for a, b in [(0, 2), (2, 3)])
    assert parts == total + (100 * 64 if tied else 0)
    # KV heads beyond the rank count are copied: 8 ranks, 4 KV heads.
    kv = 2 * 3 * (64 + 1) * 16 * 4
    assert 8 * sharding.weight_elements(spec, 8, 0, 3) == pytest.approx(
        total + 7 * replicated + kv,
        abs=2 * 8 * 64,  # the vocabulary of 100 is padded to 104
    )


def test_decode_reads_all_weights_but_the_input_embedding() -> None:
    embed = 128256 * 4096
    assert sharding.decode_weight_elements(LLAMA3_8B, 1) == LLAMA3_8B.num_parameters() - embed
    tied = dataclasses.replace(LLAMA3_8B, tie_embeddings=True)
    assert sharding.decode_weight_elements(tied, 1) == tied.num_parameters()


# The plan -----------------------------------------------------------------------------------------
def test_plan_of_llama3_8b_on_one_gpu() -> None:
    p = plan(LLAMA3_8B, PAPER, 8192, "h100-80gb")
    assert p.parameters == 8_030_261_248
    assert p.weight_bytes == p.weight_bytes_per_gpu == 2 * 8_030_261_248
    assert p.kv_full_bytes == p.kv_full_bytes_per_gpu == GIB
    assert p.retrieval_share == p.rank_share == 39 / 256
    local = 217 * (4005 * 512 + 256 * 4 + 8)
    assert p.kv_razor_bytes == 39 * 8192 * 512 + local
    assert p.activation_bytes_per_gpu == GIB + 8192 * 2 * (3 * 4096 + 2 * 40 * 128 + 2 * 14336)
    free = 72 * 10**9 - p.weight_bytes - p.activation_bytes_per_gpu
    assert p.kv_budget_bytes_per_gpu == free
    assert p.max_batch_full == free // GIB == 50
    assert p.max_batch_razor == free // p.kv_razor_bytes == 88
    read = 39 * 8192 * 512 + 217 * (4004 * 512 + 256 * 4 + 8)
    assert p.attention_speedup == pytest.approx(GIB / read, rel=1e-12)
    assert p.attention_speedup == pytest.approx(1.76, abs=0.005)
    weights = 2 * (8_030_261_248 - 128256 * 4096)
    assert p.tokens_s_full == pytest.approx(50 * 3.35e12 / (weights + 50 * GIB), rel=1e-12)
    assert p.tokens_s_razor == pytest.approx(88 * 3.35e12 / (weights + 88 * read), rel=1e-12)
    assert p.compression_starts == 4005
    assert p.warnings == ()
    assert any("spread evenly" in a for a in p.assumptions)
    assert any("not measured" in a for a in p.assumptions)


def test_plan_of_qwen_72b_on_four_gpus() -> None:
    p = plan(QWEN_72B, PAPER, 32768, "h100-80gb", tp_size=4)
    assert p.kv_full_bytes == 80 * GIB
    assert p.kv_full_bytes_per_gpu == 20 * GIB
    assert p.retrieval_share == pytest.approx(0.15, abs=0)
    assert p.rank_share == 3 / 16  # 9 or 10 of 64 heads: 3 of 16 on every rank
    assert p.kv_razor_bytes_per_gpu == 80 * (3 * 32768 * 512 + 13 * (6559 * 512 + 256 * 4 + 8))
    assert p.kv_ratio == pytest.approx(2.86, abs=0.005)
    assert (p.max_batch_full, p.max_batch_razor) == (1, 4)
    assert any("15.0% to 18.8%" in w for w in p.warnings)
    replicated = (80 * 2 + 1) * 8192
    assert 4 * p.weight_bytes_per_gpu == 2 * (QWEN_72B.num_parameters() + 3 * replicated)


def test_head_map_replaces_the_assumption() -> None:
    m = head_map(TINY, [[0], [], [1, 2]])
    policy = RazorPolicy(min_window=8, compression=None)
    p = plan(TINY, policy, 512, head_map=m, retrieval_share=0.9)
    assert p.retrieval_share == 0.25
    assert p.kv_razor_bytes == cache_bytes(TINY, m, policy, 512).per_slot
    assert not any("spread evenly" in a for a in p.assumptions)
    with pytest.raises(UsageError, match="this head map is of model"):
        plan(dataclasses.replace(TINY, qkv_bias=True), policy, 512, head_map=m)


def test_pipeline_stages_hold_their_own_layers() -> None:
    m = head_map(TINY, [[0], [], [1, 2]])
    policy = RazorPolicy(min_window=8, compression=None)
    p = plan(TINY, policy, 512, "l4", head_map=m, pp_size=3)
    layers: dict[int, int] = {}
    for t in cache_tensors(TINY, m, policy, 512):
        layers[t.layer] = layers.get(t.layer, 0) + t.nbytes
    assert p.kv_razor_bytes_per_gpu == max(layers.values()) == layers[2]
    assert p.kv_full_bytes_per_gpu == 2 * 4 * 512 * 16 * 2
    assert any("pp_size > 1 need the same number" in w for w in p.warnings)
    assert p.tokens_s_full is None
    assert plan(TINY, policy, 512, retrieval_share=0.25, pp_size=3).warnings == ()


def test_batch_that_fits_and_batch_that_does_not() -> None:
    p = plan(LLAMA3_8B, PAPER, 8192, "h100-80gb", batch=60)
    assert p.tokens_s_full is None  # 50 fit
    assert p.tokens_s_razor is not None
    assert p.warnings == ()
    p = plan(LLAMA3_8B, PAPER, 8192, "h100-80gb", batch=89)
    assert p.tokens_s_razor is None
    assert any("batch 89 does not fit: Razor holds 88" in w for w in p.warnings)


def test_model_too_large_for_the_gpu() -> None:
    p = plan(QWEN_72B, PAPER, 32768, "l4")
    assert (p.max_batch_full, p.max_batch_razor) == (0, 0)
    assert p.kv_budget_bytes_per_gpu is not None
    assert p.kv_budget_bytes_per_gpu < 0
    assert any("not one sequence fits" in w and "it fits with tp_size 16" in w for w in p.warnings)
    assert plan(QWEN_72B, PAPER, 32768, "l4", tp_size=16).max_batch_razor == 5
    assert plan(QWEN_72B, PAPER, 32768, "l4", tp_size=8).max_batch_razor == 0
    hopeless = dataclasses.replace(LLAMA3_8B, hidden_size=1 << 20)
    assert any("use more GPUs" in w for w in plan(hopeless, PAPER, 8192, "l4").warnings)


def test_without_gpu_there_is_no_batch() -> None:
    p = plan(LLAMA3_8B, PAPER, 8192)
    assert (p.gpu, p.kv_budget_bytes_per_gpu, p.max_batch_full, p.max_batch_razor) == (None,) * 4
    assert (p.tokens_s_full, p.tokens_s_razor) == (None, None)


@pytest.mark.parametrize(
    ("kwargs", "warning"),
    [
        ({"policy": PAPER, "max_seq_len": 4004}, "saves nothing at 4004 tokens.*dropped at 4005"),
        ({"policy": PAPER.with_(compression=1)}, "compression = 1 keeps every token"),
        ({"policy": PAPER, "retrieval_share": 1.0}, "saves no memory here.*100% retrieval"),
        ({"policy": RazorPolicy(min_window=8100, comp_tokens=256)}, "saves no memory here"),
        ({"policy": PAPER, "tp_size": 8}, "one KV head per rank.*TensorRT-LLM builds refuse"),
        ({"policy": PAPER, "tp_size": 16}, "8 KV heads on 16 ranks: each is stored 2 times"),
        ({"policy": PAPER, "tp_size": 4}, "raise the retrieval heads from 15.2% to 50.0%"),
    ],
)
def test_warnings(kwargs: dict[str, Any], warning: str) -> None:
    import re

    p = plan(LLAMA3_8B, **{"max_seq_len": 8192, **kwargs})
    assert any(re.search(warning, w) for w in p.warnings), p.warnings


def test_one_token_past_the_window_is_no_warning() -> None:
    assert not any("nothing" in w for w in plan(LLAMA3_8B, PAPER, 4005).warnings)


def test_uneven_kv_heads_are_warned_of() -> None:
    spec = dataclasses.replace(TINY, num_heads=12, num_kv_heads=4)
    assert any("4 KV heads do not divide" in w for w in plan(spec, PAPER, 100, tp_size=3).warnings)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_seq_len": 0}, "max_seq_len: expected an integer >= 1"),
        ({"tp_size": 3}, "tp_size: expected a divisor of the 32 attention heads"),
        ({"tp_size": 0}, "tp_size: expected an integer >= 1"),
        ({"tp_size": True}, "tp_size: expected an integer >= 1"),
        ({"pp_size": 33}, "pp_size: expected at most 32"),
        ({"pp_size": -1}, "pp_size: expected an integer >= 1"),
        ({"batch": 0}, "batch: expected an integer >= 1"),
        ({"gpu": "h1000"}, r"gpu 'h1000': unknown; did you mean.*h100"),
        ({"kv_dtype": "int8"}, "dtype 'int8': unknown"),
        ({"weight_dtype": "fp16"}, "dtype 'fp16': unknown; did you mean float16"),
    ],
)
def test_refusals(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as e:
        plan(LLAMA3_8B, **{"policy": PAPER, "max_seq_len": 8192, **kwargs})
    assert "\n" not in str(e.value)
    assert e.value.exit_code == 2


def test_alibi_takes_one_compensation_token() -> None:
    spec = dataclasses.replace(TINY, position="alibi")
    assert plan(spec, PAPER, 512).parameters == spec.num_parameters()
    with pytest.raises(UsageError, match=r"policy\.comp_tokens: expected 0 or 1"):
        plan(spec, PAPER.with_(comp_tokens=2), 512)


def test_a_plan_beyond_the_positions_warns_and_a_build_refuses() -> None:
    assert not any("beyond" in w for w in plan(LLAMA3_8B, PAPER, 8192).warnings)
    assert any(
        "8193 tokens are beyond the 8192 positions of 'llama3-8b'" in w
        for w in plan(LLAMA3_8B, PAPER, 8193).warnings
    )
    check_seq_len(LLAMA3_8B, 8192)
    with pytest.raises(UsageError, match=r"at most 8192, the positions.*found 8193.*rope_scaling"):
        check_seq_len(LLAMA3_8B, 8193)
    with pytest.raises(UsageError, match="not made for more"):
        check_seq_len(dataclasses.replace(TINY, position="alibi"), 513)


@settings(deadline=None)
@given(
    policies,
    st.integers(1, 512),
    st.floats(0, 1),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 3),
    st.sampled_from([None, "l4", "h200"]),
)
def test_every_plan_is_consistent(
    policy: RazorPolicy, n: int, share: float, tp: int, pp: int, gpu: str | None
) -> None:
    p = plan(TINY, policy, n, gpu, tp, retrieval_share=share, pp_size=pp)
    assert p.rank_share >= p.retrieval_share - 1e-12
    assert p.weight_bytes_per_gpu <= p.weight_bytes
    assert p.kv_full_bytes <= p.kv_full_bytes_per_gpu * tp * pp
    assert p.attention_speedup > 0
    if policy.dropped(n) == 0:
        assert p.attention_speedup == 1
        assert any("nothing" in w for w in p.warnings)
    if gpu is not None:
        budget, largest = p.kv_budget_bytes_per_gpu, p.max_batch_razor
        assert budget is not None
        assert largest is not None
        assert largest * p.kv_razor_bytes_per_gpu <= budget + p.weight_bytes
        if pp == 1:
            assert largest == budget // p.kv_razor_bytes_per_gpu
    assert json.loads(json.dumps(planner.plan_to_json(p))) == planner.plan_to_json(p)


# Printing -----------------------------------------------------------------------------------------
def printed(p: planner.Plan, width: int = 100) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(planner.render(p))
    return capture.get()


def test_table_shows_the_figures() -> None:
    text = printed(plan(QWEN_72B, PAPER, 32768, "h100-80gb", tp_size=4))
    rows = {
        cells[1].strip(): [c.strip() for c in cells[2:5]]
        for cells in (line.split("│") for line in text.splitlines())
        if len(cells) == 6
    }
    assert "qwen-72b · 32,768 tokens · 4 × h100-80gb" in text
    assert rows["KV per sequence, float16"] == ["80.00 GiB", "25.62 GiB", "3.12×"]
    assert rows["KV per sequence and GPU"] == ["20.00 GiB", "7.00 GiB", "2.86×"]
    assert rows["largest batch"] == ["1", "4", "4.00×"]
    assert rows["decode attention, expected"] == ["", "", "2.86×"]
    lines = " ".join(text.split())
    assert "window 6,554 of 32,768 tokens, 1 compensation token; compression starts at" in lines
    assert "not measured" in text
    assert "warning: equal counts" in text


def test_table_without_gpu_and_with_markup_in_the_name() -> None:
    spec = dataclasses.replace(LLAMA3_8B, name="[red]me[/red]")
    text = printed(plan(spec, PAPER.with_(compression=1), 8192, batch=2))
    assert "[red]me[/red]" in text
    assert "compression starts never" in text
    assert "KV per GPU, batch 2" in text
    assert "largest batch" not in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_table_fits_the_console(width: int) -> None:
    text = printed(plan(QWEN_72B, PAPER, 32768, "l4", tp_size=8, batch=4), width)
    assert max(len(line) for line in text.splitlines()) <= width


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (GIB, "1.00 GiB"),
        (5 << 50, "5,120.00 TiB"),
    ],
)
def test_human_bytes(n: int, text: str) -> None:
    assert planner.human_bytes(n) == text


# GPUs ---------------------------------------------------------------------------------------------
def test_gpu_names_and_aliases() -> None:
    assert find_gpu("h100") is GPUS["h100-80gb"]
    assert find_gpu(" H100 SXM ") is GPUS["h100-80gb"]
    assert find_gpu("RTX_4090") is GPUS["rtx-4090"]
    assert find_gpu("h200").memory_bytes == 141 * 10**9
    assert find_gpu("a100-40gb").bandwidth_bytes_s == pytest.approx(1.555e12)
    for name, gpu in GPUS.items():
        assert gpu.name == name
        assert find_gpu(name) is gpu
        assert 10 <= gpu.memory_gb <= 300
        assert 0.2 <= gpu.bandwidth_tb_s <= 10
        assert 7.5 <= float(gpu.compute_capability) <= 13
    assert not set(ALIASES) & set(GPUS)
    assert set(ALIASES.values()) <= set(GPUS)


def test_unknown_gpu_suggests() -> None:
    with pytest.raises(UsageError, match=r"gpu 'h100-80g': unknown; did you mean .*h100-80gb"):
        find_gpu("h100-80g")
    with pytest.raises(UsageError, match="known: "):
        find_gpu("zzzzzz")


def test_planning_needs_neither_numpy_nor_torch() -> None:
    code = (
        "import sys; from trt_razor.planner import plan, render; "
        "bad = {'numpy', 'torch', 'onnx'} & set(sys.modules); sys.exit(f'imported: {bad}' if bad else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
