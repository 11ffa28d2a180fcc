"""Plans of engines: cache layers, windows, bytes counted by hand, and everything that is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trt_razor.errors import UsageError
from trt_razor.headmap import HeadMap
from trt_razor.models.spec import ModelSpec, RopeSpec
from trt_razor.policy import RazorPolicy
from trt_razor.trtllm.engine_config import (
    LayerPlan,
    RazorPlan,
    RazorSection,
    TrtLlmOptions,
    build_arguments,
    check_engine,
    check_policy,
    plan_engine,
    razor_section,
    shortest_cycle,
)
from trt_razor.trtllm.ranks import equalise, rank_layout
from trt_razor.trtllm.release import LocalCache, release_of

OLD, NEW = release_of("1.0.0"), release_of("1.2.1")
SPEC = ModelSpec("tiny", "llama", 4, 1024, 256, 8, 4, 128, 300, 4096, 1e-5)
WIDE = dataclasses.replace(SPEC, num_heads=16, num_kv_heads=16)
# L = 63, so the ring has 64 rows: two blocks of 32.
POLICY = RazorPolicy(sink_tokens=4, min_window=63, compression=None, comp_tokens=1)
COUNTS = (1, 4, 0, 2)
"""Retrieval heads of 4: beside local ones, alone, none, and half of them."""


def section(
    counts: tuple[int, ...] = COUNTS,
    policy: RazorPolicy = POLICY,
    tp_size: int = 1,
    spec: ModelSpec = SPEC,
) -> RazorSection:
    return RazorSection(spec.fingerprint(), "heads", tp_size, counts, policy)


def plan(
    version: str = "1.0.0",
    counts: tuple[int, ...] = COUNTS,
    spec: ModelSpec = SPEC,
    max_seq_len: int = 1000,
    dtype: str = "float16",
    chunk: int = 0,
    policy: RazorPolicy = POLICY,
    **options: Any,
) -> RazorPlan:
    wanted = TrtLlmOptions(**options)
    razor = section(counts, policy, wanted.tp_size, spec)
    return plan_engine(spec, razor, max_seq_len, dtype, wanted, release_of(version), chunk)


# Cache layers -------------------------------------------------------------------------------------
def test_cyclic_kinds_without_heads_get_no_cache_layer() -> None:
    p = plan()
    assert p.local_cache is LocalCache.CYCLIC
    assert p.layers == (
        LayerPlan(1, 3, 0, 1, -1),
        LayerPlan(4, 0, 2, -1, -1),
        LayerPlan(0, 4, -1, 3, -1),
        LayerPlan(2, 2, 4, 5, -1),
    )
    assert p.layer_types == ("attention",) * 6
    assert p.kv_heads == (1, 3, 4, 4, 2, 2)
    assert p.window == 4 + 64
    assert p.windows == (1000, 68, 1000, 68, 1000, 68)
    assert p.window_list() == [1000, 68]
    assert (p.sink_token_length, p.bubble, p.attention_layers) == (4, 28, 6)
    assert (p.ring_slot_bytes, p.comp_slot_bytes, p.slot_bytes()) == (0, 0, 0)


def test_windows_that_do_not_repeat_are_told_one_by_one() -> None:
    p = plan(counts=(1, 4, 4, 2))
    assert p.window_list() == [1000, 68, 1000, 1000, 1000, 68] == list(p.windows)


@pytest.mark.parametrize("version", ["1.1.0", "1.2.1"])
def test_slots_have_a_recurrent_layer_behind_the_attention_layer(version: str) -> None:
    p = plan(version)
    assert p.local_cache is LocalCache.SLOTS
    assert p.layer_types == (
        *("attention", "recurrent"),
        "attention",
        "recurrent",
        *("attention", "recurrent"),
    )
    assert p.layers == (
        LayerPlan(1, 3, 0, -1, 1),
        LayerPlan(4, 0, 1, -1, -1),
        LayerPlan(0, 4, -1, -1, 3),
        LayerPlan(2, 2, 2, -1, 5),
    )
    assert p.kv_heads == (1, 4, 2)
    assert (p.window, p.windows, p.window_list()) == (0, (1000,) * 3, [1000])
    assert (p.sink_token_length, p.bubble, p.attention_layers) == (0, 0, 3)


def test_the_old_release_has_both_caches_and_takes_the_one_asked_for() -> None:
    assert plan("1.0.0").local_cache is LocalCache.CYCLIC
    slots = plan("1.0.0", local_cache=LocalCache.SLOTS)
    assert slots == plan("1.2.1") == plan("1.2.1", local_cache=LocalCache.SLOTS)


@pytest.mark.parametrize(
    ("tp_size", "kv_heads"),
    [
        (1, (1, 15, 1, 15, 16, 2, 14)),
        (2, (2, 14, 2, 14, 16, 4, 12)),
        (8, (8, 8, 8, 8, 16, 16)),  # two heads on a rank: the last layer has no local ones
    ],
)
def test_counts_for_the_runtime_are_those_of_all_ranks(
    tp_size: int, kv_heads: tuple[int, ...]
) -> None:
    counts = (1, 1, 0, 2)
    p = plan(counts=counts, spec=WIDE, tp_size=tp_size)
    assert p.kv_heads == kv_heads
    assert [x.num_local for x in p.layers] == [16 // tp_size - r for r in counts]
    slots = plan("1.1.0", counts=counts, spec=WIDE, tp_size=tp_size)
    assert slots.kv_heads == tuple(r * tp_size for r in counts if r)
    most = 2 * (16 // tp_size) * 68 * 128 * 2  # the layer without retrieval heads
    assert slots.ring_slot_bytes == most


def test_the_plan_of_a_head_map_is_that_of_its_equalised_layout() -> None:
    heads = HeadMap("tiny", WIDE.fingerprint(), 4, 16, ((0,), (3, 7, 9), (), (15,)), "test", "hand")
    even = equalise(heads, 2)
    razor = razor_section(WIDE, even, rank_layout(even, 2), POLICY)
    assert razor.num_retrieval == (1, 2, 0, 1)
    assert (razor.model, razor.heads) == (WIDE.fingerprint(), even.digest())
    p = plan_engine(WIDE, razor, 1000, "float16", TrtLlmOptions(tp_size=2), OLD)
    assert p.kv_heads == (2, 14, 4, 12, 16, 2, 14)


# Bytes --------------------------------------------------------------------------------------------
def test_bytes_of_paged_pools_counted_by_hand() -> None:
    p = plan(counts=(1, 1, 1, 1))
    block = 2 * 32 * 128 * 2  # K and V, tokens, D, bytes: one head
    assert [p.block_bytes(n) for n in (1, 3)] == [block, 3 * block]
    # 28 rows of bubble: 1000 tokens take 33 blocks, 68 of a window 3.
    assert (p.blocks(0, 1000), p.blocks(1, 1000)) == (33, 3)
    assert p.pool_bytes(1000) == 4 * (33 * block + 3 * 3 * block) == p.sequence_bytes(1000)
    # The last token that still fits into 32 blocks, and the next one.
    assert [p.blocks(0, n) for n in (1, 4, 5, 996, 997)] == [1, 1, 2, 32, 33]
    assert p.dense_bytes(1000) == 4 * 32 * 4 * block
    assert p.dense_bytes(992) == 4 * 31 * 4 * block


def test_bytes_of_state_slots_counted_by_hand() -> None:
    p = plan("1.2.1", counts=(1, 1, 1, 1))
    ring = 2 * 3 * (4 + 64) * 128 * 2  # K and V, local heads, sinks + ring, D, bytes
    comp = 4 * 3 * 1 * (2 * 128 + 2)  # float32: means of K and V, log-weight, count
    assert (ring, comp) == (104448, 3096)
    assert (p.ring_slot_bytes, p.comp_slot_bytes) == (104448, 3104)  # multiples of 16
    assert p.state_config() == {
        "conv_kernel": 2,
        "rnn_conv_dim_size": 52224,
        "state_size": 1,
        "rnn_hidden_size": 776,
    }
    assert p.slot_bytes() == 4 * (104448 + 3104)
    block = 2 * 32 * 128 * 2
    assert [p.blocks(0, n) for n in (992, 993)] == [31, 32]  # no bubble
    assert p.sequence_bytes(1000) == 4 * 32 * block + p.slot_bytes()


def test_fp8_halves_caches_but_not_means() -> None:
    p = plan("1.2.1", counts=(1, 1, 1, 1), kv_dtype="fp8")
    assert p.fp8
    assert p.element_bytes == 1
    assert p.block_bytes(1) == 2 * 32 * 128
    assert (p.ring_slot_bytes, p.comp_slot_bytes) == (52224, 3104)
    assert p.state_config()["rnn_conv_dim_size"] == 26112  # conv_state stays float16
    assert plan(kv_dtype="fp8").block_bytes(3) == 3 * 2 * 32 * 128


def test_all_slots_have_the_size_of_the_largest() -> None:
    p = plan("1.2.1", counts=(3, 1, 0, 4))
    assert p.ring_slot_bytes == 2 * 4 * 68 * 128 * 2
    assert p.slot_bytes() == 3 * (
        p.ring_slot_bytes + p.comp_slot_bytes
    )  # 3 layers have local heads


def test_without_compensation_a_state_is_small_but_not_empty() -> None:
    p = plan("1.2.1", policy=POLICY.with_(comp_tokens=0))
    assert p.comp_slot_bytes == 16
    assert p.state_config()["rnn_hidden_size"] == 4


def test_slots_take_only_the_rows_that_a_short_sequence_can_have() -> None:
    p = plan("1.2.1", max_seq_len=68, counts=(1, 1, 1, 1))
    assert p.ring_slot_bytes == 2 * 3 * 68 * 128 * 2
    grown = plan("1.2.1", max_seq_len=1000, policy=POLICY.with_(compression=5), counts=(1, 1, 1, 1))
    assert grown.ring_slot_bytes == 2 * 3 * (4 + 201) * 128 * 2  # L(1000) + 1 = 201 rows


# Boundaries ---------------------------------------------------------------------------------------
def test_the_window_may_be_exactly_max_seq_len() -> None:
    assert plan(max_seq_len=68).window == 68
    low = POLICY.with_(min_window=60)  # 61 rows in two blocks; from 65 tokens on one is dropped
    assert plan(max_seq_len=68, policy=low).window == 68
    with pytest.raises(
        UsageError, match=r"window of local heads, 68 tokens .* must not exceed it, found 67"
    ):
        plan(max_seq_len=67, policy=low)


def test_compression_begins_with_the_first_dropped_token() -> None:
    with pytest.raises(UsageError, match="max_seq_len: 67 tokens all fit into sinks and window"):
        plan(max_seq_len=67)
    with pytest.raises(UsageError, match="max_seq_len: 67 tokens all fit"):
        plan("1.2.1", max_seq_len=67)
    assert plan("1.2.1", max_seq_len=68).layer_types.count("recurrent") == 3


@pytest.mark.parametrize(
    ("sinks", "kv_dtype", "spec", "room"),
    [
        (4, "auto", SPEC, 13),  # 28 rows x 128 x 2 bytes / (4 x 130) = 13.8
        (4, "fp8", SPEC, 6),
        (4, "auto", dataclasses.replace(SPEC, head_dim=64), 13),  # 3584 / 264 = 13.6
        (31, "auto", SPEC, 0),  # one row: 256 bytes of 520
        (30, "auto", SPEC, 0),
        (29, "auto", SPEC, 1),
        (0, "auto", SPEC, 0),
        (32, "auto", SPEC, 0),
    ],
)
def test_compensation_tokens_fill_the_bubble_exactly(
    sinks: int, kv_dtype: str, spec: ModelSpec, room: int
) -> None:
    full = POLICY.with_(sink_tokens=sinks, comp_tokens=room)
    p = plan(policy=full, kv_dtype=kv_dtype, spec=spec)
    assert p.bubble == (32 - sinks) % 32
    assert 4 * room * (spec.head_dim + 2) <= p.bubble * spec.head_dim * p.element_bytes
    with pytest.raises(UsageError, match=f"comp_tokens: at most {room} fit behind {sinks} sinks"):
        plan(policy=full.with_(comp_tokens=room + 1), kv_dtype=kv_dtype, spec=spec)
    # Slots have room for any number.
    many = full.with_(comp_tokens=room + 1)
    assert plan("1.2.1", policy=many, kv_dtype=kv_dtype, spec=spec).comp_slot_bytes > 16


@pytest.mark.parametrize("block", [8, 16, 32, 64, 128])
def test_a_ring_is_whole_blocks(block: int) -> None:
    p = plan(tokens_per_block=block, policy=POLICY.with_(comp_tokens=0, min_window=100))
    ring = p.window - 4
    assert ring % block == 0
    assert ring - block < 101 <= ring
    assert p.bubble == (-4) % block


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(0, 4), min_size=4, max_size=4),
    sinks=st.integers(0, 40),
    window=st.integers(1, 300),
    compression=st.sampled_from([None, 2, 5]),
    length=st.integers(2, 4096),
    cache=st.sampled_from(list(LocalCache)),
    block=st.sampled_from([8, 32, 128]),
)
def test_every_plan_holds_together(
    counts: list[int],
    sinks: int,
    window: int,
    compression: int | None,
    length: int,
    cache: LocalCache,
    block: int,
) -> None:
    """Of any plan that is not refused: rows are numbered without gaps, and all that is kept has a place."""
    policy = RazorPolicy(sinks, window, compression, comp_tokens=0)
    try:
        p = plan(
            counts=tuple(counts),
            policy=policy,
            max_seq_len=length,
            local_cache=cache,
            tokens_per_block=block,
        )
    except UsageError:
        return
    rows = [r for x in p.layers for r in (x.full_row, x.local_row) if r >= 0]
    assert rows == list(range(len(p.kv_heads)))
    attention = [i for i, kind in enumerate(p.layer_types) if kind == "attention"]
    assert len(attention) == len(rows) == len(p.windows)
    states = [x.state_layer for x in p.layers if x.state_layer >= 0]
    assert sorted([*attention, *states]) == list(range(len(p.layer_types)))
    told = p.window_list()
    assert [told[i % len(told)] for i in range(len(rows))] == list(p.windows)
    for x in p.layers:
        assert x.num_retrieval + x.num_local == 4
        assert (x.full_row >= 0) == (x.num_retrieval > 0)
        assert (x.local_row >= 0 or x.state_layer >= 0) == (x.num_local > 0)
        if x.full_row >= 0:
            assert (p.kv_heads[x.full_row], p.windows[x.full_row]) == (x.num_retrieval, length)
        if x.local_row >= 0:
            assert (p.kv_heads[x.local_row], p.windows[x.local_row]) == (x.num_local, p.window)
            assert policy.local_rows(length) <= p.window <= length
            assert p.blocks(x.local_row, length) * block >= p.window + p.bubble
        if x.state_layer >= 0:
            kept = 2 * x.num_local * policy.local_rows(length) * 128 * 2
            assert p.ring_slot_bytes >= kept
    assert p.sequence_bytes(length) <= p.dense_bytes(length) + 2 * len(rows) * p.block_bytes(4) + (
        p.slot_bytes()
    )


# What is refused ----------------------------------------------------------------------------------
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no retrieval heads": (
        {"counts": (0,) * 4},
        "head map: no retrieval heads at all.*at least one",
    ),
    "only retrieval heads": (
        {"counts": (4,) * 4},
        r"every KV head retrieves .*on 1 ranks.*build without --razor",
    ),
    "nothing dropped": (
        {"policy": POLICY.with_(min_window=4000)},
        "1000 tokens all fit.*--min-window",
    ),
    "compression 1": ({"policy": POLICY.with_(compression=1)}, "1000 tokens all fit"),
    "too few counts": (
        {"counts": (1, 1, 1)},
        r"num_retrieval: expected 4 counts of 0..4, found \[1, 1, 1\]",
    ),
    "too many heads": ({"counts": (1, 1, 1, 5)}, "num_retrieval: expected 4 counts of 0..4"),
    "positions": ({"max_seq_len": 4097}, "max_seq_len: expected at most 4096.*found 4097"),
    "no length": ({"max_seq_len": 0}, "max_seq_len: expected an integer >= 1, found 0"),
    "float32": ({"dtype": "float32"}, "dtype: expected float16 or bfloat16 .* found float32"),
    "int8 caches": ({"kv_dtype": "int8"}, "kv_dtype: expected auto or fp8, found 'int8'"),
    "block of 4": ({"tokens_per_block": 4}, r"tokens_per_block: .*8..1024, found 4"),
    "block of 48": ({"tokens_per_block": 48}, "tokens_per_block: expected a power of two"),
    "block of 2048": ({"tokens_per_block": 2048}, r"8..1024, found 2048"),
    "no tokens": ({"max_num_tokens": 0}, "max_num_tokens: expected >= 1, found 0"),
    "yarn": (
        {"spec": dataclasses.replace(SPEC, rope=RopeSpec(scaling="yarn", factor=2.0))},
        "rope scaling 'yarn'.*use --backend",
    ),
    "head_dim": (
        {"spec": dataclasses.replace(SPEC, head_dim=80)},
        "head_dim: the plugin has kernels for 64, 96, 128, 256, found 80",
    ),
    "no stage": ({"pp_size": 0}, "pp_size: expected >= 1, found 0"),
    "uneven stages": ({"pp_size": 3}, "pp_size: expected a divisor of the 4 layers"),
    "unequal layers": ({"pp_size": 2}, r"pp_size: 2 needs the same number.*found 0..4 of 4"),
    "stages without retrieval": (
        {"pp_size": 2, "counts": (0, 1, 0, 1)},
        "pp_size: 2 needs the same number",
    ),
    "stages of baichuan": (
        {"pp_size": 2, "spec": dataclasses.replace(SPEC, architecture="baichuan")},
        "Baichuan has no pipeline parallelism",
    ),
    "fp8 in chunks": ({"kv_dtype": "fp8", "chunk": 64}, "prefill_chunk: .*FP8.*--prefill-chunk 0"),
    "ranks": ({"tp_size": 3}, "tp_size: expected a divisor of the 8 attention heads"),
    "one head on a rank": ({"tp_size": 4}, "leaves each rank one of the 4 KV heads"),
    "shared heads": ({"tp_size": 8}, "ranks that share a KV head"),
    "alibi": (
        {
            "spec": dataclasses.replace(SPEC, position="alibi"),
            "policy": POLICY.with_(comp_tokens=2),
        },
        "comp_tokens: 2 with ALiBi.*--comp-tokens 1",
    ),
}
REFUSED_SLOTS: dict[str, tuple[dict[str, Any], str]] = {
    "cyclic": (
        {"local_cache": LocalCache.CYCLIC},
        r"local_cache: TensorRT-LLM 1\.2\.1 has no cyclic cache.*leave --local-cache out",
    ),
    "stages": (
        {"pp_size": 2, "counts": (1,) * 4},
        "pp_size: 2 with local heads in state slots.*--tp-size, or TensorRT-LLM 1.0",
    ),
    "chunks": (
        {"chunk": 512},
        "prefill_chunk: 512 with local heads in state slots.*--prefill-chunk 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_every_release(case: str) -> None:
    changes, message = REFUSED[case]
    for version in ("1.0.0", "1.1.0"):
        if version == "1.1.0" and changes.get("pp_size") == 2:
            continue  # refused for another reason there
        with pytest.raises(UsageError, match=message) as e:
            plan(version, **changes)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("case", REFUSED_SLOTS)
def test_refused_with_state_slots(case: str) -> None:
    changes, message = REFUSED_SLOTS[case]
    with pytest.raises(UsageError, match=message):
        plan("1.2.1", **changes)
    assert plan("1.0.0", **changes).local_cache is LocalCache.CYCLIC


def test_refused_for_a_checkpoint_of_another_model_or_number_of_ranks() -> None:
    other = section(spec=WIDE)
    with pytest.raises(UsageError, match="ordered for another model than 'tiny'; convert it again"):
        plan_engine(SPEC, other, 1000, "float16", TrtLlmOptions(), OLD)
    for tp_size in (1, 2):
        found = section((1, 1, 1, 1), tp_size=3 - tp_size)
        options = TrtLlmOptions(tp_size=tp_size)
        match = (
            f"tp_size: the checkpoint's heads are ordered for {3 - tp_size} ranks, found {tp_size}"
        )
        with pytest.raises(UsageError, match=match):
            plan_engine(SPEC, found, 1000, "float16", options, OLD)


def test_refused_for_slots_beyond_what_the_runtime_can_count() -> None:
    long = dataclasses.replace(SPEC, max_positions=1 << 24)
    limit = (1 << 31) // (2 * 3 * 128) - 4 - 1  # rows of 3 local heads; one more is a row too many
    fits = RazorPolicy(4, limit - 1, None, 1)
    p = plan("1.2.1", counts=(1,) * 4, spec=long, max_seq_len=1 << 23, policy=fits)
    assert p.state_config()["rnn_conv_dim_size"] <= (1 << 31) - 1
    with pytest.raises(
        UsageError, match=r"max_seq_len: the window of 3 local heads takes [\d,]+ bytes"
    ):
        plan(
            "1.2.1",
            counts=(1,) * 4,
            spec=long,
            max_seq_len=1 << 23,
            policy=fits.with_(min_window=limit + 1),
        )


def test_pipeline_stages_with_equal_layers_number_their_rows_from_0() -> None:
    p = plan(counts=(1, 1, 1, 1), pp_size=2)
    assert (p.pp_size, len(p.kv_heads)) == (2, 8)
    fields = [p.plugin_fields(i, first_layer=2 * (i // 2), attention={}) for i in range(4)]
    assert [(f["layer_full"], f["layer_local"]) for f in fields] == [(0, 1), (2, 3)] * 2
    # A GPU has the caches of its own stage only.
    whole = plan(counts=(1, 1, 1, 1))
    for tokens in (10, 1000):
        assert 2 * p.sequence_bytes(tokens) == whole.sequence_bytes(tokens)
        assert 2 * p.dense_bytes(tokens) == whole.dense_bytes(tokens)


def test_a_dense_engine_may_have_what_a_razor_engine_may_not() -> None:
    def check(spec: ModelSpec = SPEC, chunk: int = 0, **options: Any) -> None:
        check_engine(spec, 1000, "bfloat16", TrtLlmOptions(**options), NEW, False, chunk)

    check(dataclasses.replace(SPEC, head_dim=80))
    check(tp_size=4)
    check(tp_size=8)
    check(chunk=512)
    check(pp_size=2)
    for changes, message in (
        ({"tp_size": 3}, "tp_size"),
        ({"pp_size": 3}, "pp_size"),
        ({"kv_dtype": "int8"}, "kv_dtype"),
        ({"kv_dtype": "fp8", "chunk": 4}, "prefill_chunk"),
        ({"spec": dataclasses.replace(SPEC, rope=RopeSpec(scaling="yarn"))}, "yarn"),
    ):
        with pytest.raises(UsageError, match=message):
            check(**changes)


# What TensorRT-LLM and the plugin are told --------------------------------------------------------
def test_the_runtime_is_told_of_cache_layers() -> None:
    config = {"architecture": "LlamaForCausalLM", "num_hidden_layers": 4, "vocab_size": 300}
    assert plan().pretrained_config(config) == {
        "architecture": "LlamaForCausalLM",
        "num_hidden_layers": 6,
        "vocab_size": 300,
        "num_kv_heads_per_layer": [1, 3, 4, 4, 2, 2],
        "runtime_defaults": {"max_attention_window": [1000, 68], "sink_token_length": 4},
    }
    slots = plan("1.1.0")
    told = slots.pretrained_config(config)
    assert told == {
        "architecture": "RecurrentGemmaForCausalLM",
        "razor_architecture": "LlamaForCausalLM",
        "num_hidden_layers": 6,
        "vocab_size": 300,
        "num_kv_heads_per_layer": [1, 4, 2],
        "layer_types": list(slots.layer_types),
        "runtime_defaults": {"max_attention_window": [1000]},  # sinks of 0 are refused at load
        "conv_kernel": 2,
        "rnn_conv_dim_size": 2 * 4 * 68 * 128,
        "state_size": 1,
        "rnn_hidden_size": 4 * 258,
    }
    assert config["num_hidden_layers"] == 4  # not changed in place
    for p in (plan(), slots):
        assert p.pretrained_config(p.pretrained_config(config)) == p.pretrained_config(config)


def test_state_slots_need_their_plugin_switched_on() -> None:
    wrote = {"mamba_conv1d_plugin": None, "paged_state": False, "gemm_plugin": "auto"}
    assert plan().plugin_config(wrote) == wrote
    told = plan("1.1.0", dtype="bfloat16").plugin_config(wrote)
    assert told == {"mamba_conv1d_plugin": "bfloat16", "paged_state": True, "gemm_plugin": "auto"}


def test_fields_of_the_plugin_of_every_kind_of_layer() -> None:
    common = {
        "num_heads": 8,
        "max_seq_len": 1000,
        "sink_tokens": 4,
        "min_window": 63,
        "compression": 0,
        "comp_tokens": 1,
        "heavy_hitters": 0,
        "kv_cache_fp8": 0,
        "tokens_per_block": 32,
    }
    names = (
        "num_retrieval",
        "layer_full",
        "layer_local",
        "window",
        "ring_slot_bytes",
        "comp_slot_bytes",
    )
    cyclic = [plan().plugin_fields(i, 0, {"num_heads": 8}) for i in range(4)]
    assert [tuple(f[n] for n in names) for f in cyclic] == [
        (1, 0, 1, 68, 0, 0),
        (4, 2, -1, 0, 0, 0),
        (0, -1, 3, 68, 0, 0),
        (2, 4, 5, 68, 0, 0),
    ]
    p = plan("1.2.1", kv_dtype="fp8", policy=POLICY.with_(compression=20))
    slots = [p.plugin_fields(i, 0, {"num_heads": 8}) for i in range(4)]
    sizes = 2 * 4 * 68 * 128, 4 * 4 * 258
    assert [tuple(f[n] for n in names) for f in slots] == [
        (1, 0, -1, 0, *sizes),
        (4, 1, -1, 0, 0, 0),
        (0, -1, -1, 0, *sizes),
        (2, 2, -1, 0, *sizes),
    ]
    rest = {n: v for n, v in cyclic[0].items() if n not in names}
    assert rest == {**common, "local_cache": 1}
    rest = {n: v for n, v in slots[0].items() if n not in names}
    assert rest == {**common, "local_cache": 2, "kv_cache_fp8": 1, "compression": 20}


def test_shortest_cycle() -> None:
    cases: list[tuple[list[int], list[int]]] = [
        ([], []),
        ([5], [5]),
        ([5, 5, 5], [5]),
        ([8, 4, 8, 4], [8, 4]),
        ([8, 4, 8], [8, 4, 8]),
        ([1, 1, 2, 1, 1, 2], [1, 1, 2]),
    ]
    for values, expected in cases:
        assert shortest_cycle(values) == expected


# Build arguments ----------------------------------------------------------------------------------
def test_a_step_takes_the_longest_prompt_whole() -> None:
    a = build_arguments(1000, 4, TrtLlmOptions(), 0)
    assert (a.max_num_tokens, a.max_input_len, a.max_seq_len, a.max_batch_size) == (
        1000,
        999,
        1000,
        4,
    )
    assert not a.chunked
    assert build_arguments(1000, 4, TrtLlmOptions(), 1000) == a  # a chunk that long is no chunk
    assert build_arguments(1000, 2000, TrtLlmOptions(), 0).max_num_tokens == 2000
    short = build_arguments(1000, 4, TrtLlmOptions(max_num_tokens=300), 0)
    assert (short.max_num_tokens, short.max_input_len) == (300, 300)


def test_chunks_make_steps_small_and_prompts_long() -> None:
    a = build_arguments(1000, 4, TrtLlmOptions(tokens_per_block=16), 64)
    assert (a.max_num_tokens, a.max_input_len, a.chunked) == (64, 999, True)
    assert build_arguments(1000, 100, TrtLlmOptions(), 64).max_num_tokens == 100
    assert build_arguments(1000, 4, TrtLlmOptions(max_num_tokens=512), 64).max_num_tokens == 512


def test_steps_that_are_too_small() -> None:
    with pytest.raises(
        UsageError, match=r"max_num_tokens: expected at least max_batch_size = 64.*found 63"
    ):
        build_arguments(1000, 64, TrtLlmOptions(max_num_tokens=63), 0)
    assert build_arguments(1000, 64, TrtLlmOptions(max_num_tokens=64), 0).max_num_tokens == 64
    with pytest.raises(
        UsageError, match="max_num_tokens: expected at least a block of 32 tokens, found 31"
    ):
        build_arguments(1000, 4, TrtLlmOptions(), 31)
    assert build_arguments(1000, 4, TrtLlmOptions(), 32).max_num_tokens == 32


def test_what_the_builder_is_told() -> None:
    a = build_arguments(1000, 4, TrtLlmOptions(tokens_per_block=64, gather_logits=True), 128)
    assert a.build_config() == {
        "max_batch_size": 4,
        "max_input_len": 999,
        "max_seq_len": 1000,
        "max_num_tokens": 128,
        "max_beam_width": 1,
        "gather_context_logits": True,
    }
    plugins = a.plugin_config()
    assert plugins["tokens_per_block"] == 64
    assert plugins["use_paged_context_fmha"] is True
    whole = build_arguments(1000, 4, TrtLlmOptions(), 0).plugin_config()
    assert whole["use_paged_context_fmha"] is False  # reuse of cached prompts hangs on it
    on = {n for n, v in whole.items() if v is True}
    assert on == {"remove_input_padding", "context_fmha"}
    assert {whole[n] for n in ("gpt_attention_plugin", "gemm_plugin")} == {"auto"}


# The section of a checkpoint ----------------------------------------------------------------------
def test_a_section_survives_json() -> None:
    for policy in (POLICY, RazorPolicy(), POLICY.with_(comp_tokens=32, compression=7)):
        one = section(policy=policy, tp_size=2)
        text = json.dumps(one.to_json())
        assert RazorSection.from_json(json.loads(text)) == one
    assert len(json.dumps(section((3,) * 80).to_json())) < 700  # a line of a log


DAMAGED: dict[str, tuple[Any, str]] = {
    "nothing": (None, "razor: expected an object, found NoneType; convert"),
    "a list": ([1], "razor: expected an object, found list"),
    "version": (
        {"version": 2},
        r"razor\.version: expected 1, found 2; convert the checkpoint again",
    ),
    "no version": ({"version": None}, r"razor\.version: expected 1, found None"),
    "model": ({"model": 5}, r"razor\.model: expected str, found 5"),
    "heads": ({"heads": None}, r"razor\.heads: expected str, found None"),
    "tp_size": ({"tp_size": "2"}, r"razor\.tp_size: expected int, found '2'"),
    "true is no number": ({"tp_size": True}, r"razor\.tp_size: expected int, found True"),
    "policy": ({"policy": [4]}, r"razor\.policy: expected Mapping, found \[4\]"),
    "counts": ({"num_retrieval": 3}, r"razor\.num_retrieval: expected a list of counts, found 3"),
    "negative": ({"num_retrieval": [1, -1]}, r"razor\.num_retrieval: .*found \[1, -1\]"),
    "fraction": ({"num_retrieval": [1.0]}, r"razor\.num_retrieval: .*found \[1\.0\]"),
    "flag": ({"num_retrieval": [True]}, r"razor\.num_retrieval"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_section_is_named(case: str) -> None:
    change, message = DAMAGED[case]
    data = {**section().to_json(), **change} if isinstance(change, dict) else change
    with pytest.raises(UsageError, match=f"^a/config.json: {message}"):
        RazorSection.from_json(data, "a/config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sink_tokens": -1}, r"sink_tokens: expected >= 0, found -1"),
        ({"comp_tokens": 1000}, r"comp_tokens: expected 0..256"),
        ({"more": 1}, r"razor\.policy\.more: unknown field"),
        ({"min_window": "63"}, "min_window: expected an integer"),
    ],
)
def test_a_damaged_policy_is_named(change: dict[str, Any], message: str) -> None:
    data = section().to_json()
    data["policy"] = {**data["policy"], **change}
    with pytest.raises(UsageError, match=message):
        RazorSection.from_json(data)
    del data["policy"]["min_window"]
    data["policy"].pop("more", None)
    with pytest.raises(UsageError, match=r"razor\.policy\.min_window: missing"):
        RazorSection.from_json(data)


@pytest.mark.parametrize("name", ["model", "heads", "tp_size", "num_retrieval", "policy"])
def test_a_section_without_a_field_is_refused(name: str) -> None:
    data = section().to_json()
    del data[name]
    with pytest.raises(UsageError, match=rf"razor\.{name}: expected"):
        RazorSection.from_json(data)


def test_chunks_without_a_bubble_are_refused() -> None:
    """Only the bubble keeps TensorRT-LLM from reusing blocks when paged context attention is on."""
    policy = RazorPolicy(32, 100, None, 0)
    options = TrtLlmOptions(local_cache=LocalCache.CYCLIC)
    asked = SPEC, policy, 4096, "float16", options, OLD
    check_policy(*asked)
    with pytest.raises(UsageError, match=r"prefill_chunk: 512 with 32 sinks, whole blocks of 32"):
        check_policy(*asked, prefill_chunk=512)
    check_policy(SPEC, policy.with_(sink_tokens=4), *asked[2:], prefill_chunk=512)
