"""Plans of engines: cache layers, windows, bytes counted by hand, what TensorRT-LLM is told."""

from __future__ import annotations

import dataclasses

import pytest
from engine_plans import OLD, POLICY, SPEC, WIDE, plan
from hypothesis import given, settings
from hypothesis import strategies as st

from trt_razor.errors import UsageError
from trt_razor.headmap import HeadMap
from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy
from trt_razor.trtllm.engine_config import (
    LayerPlan,
    TrtLlmOptions,
    build_arguments,
    plan_engine,
    razor_section,
    shortest_cycle,
)
from trt_razor.trtllm.ranks import equalise, rank_layout
from trt_razor.trtllm.release import LocalCache


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
    """Beside a token of each other sequence, which come first."""
    a = build_arguments(1000, 4, TrtLlmOptions(), 0)
    assert (a.max_num_tokens, a.max_input_len) == (1003, 999)
    assert (a.max_seq_len, a.max_batch_size) == (1000, 4)
    assert not a.chunked
    assert build_arguments(1000, 4, TrtLlmOptions(), 1000) == a  # a chunk that long is no chunk
    assert build_arguments(1000, 2000, TrtLlmOptions(), 0).max_num_tokens == 2999
    short = build_arguments(1000, 4, TrtLlmOptions(max_num_tokens=300), 0)
    assert (short.max_num_tokens, short.max_input_len) == (300, 300)


def test_chunks_make_steps_small_and_prompts_long() -> None:
    a = build_arguments(1000, 4, TrtLlmOptions(tokens_per_block=16), 64)
    assert (a.max_num_tokens, a.max_input_len, a.chunked) == (67, 999, True)
    assert build_arguments(1000, 100, TrtLlmOptions(), 64).max_num_tokens == 163
    assert build_arguments(1000, 4, TrtLlmOptions(max_num_tokens=512), 64).max_num_tokens == 512


def test_steps_that_are_too_small() -> None:
    words = (
        r"max_num_tokens: expected at least 64, one token of a prompt beside .* 63 other.*found 63"
    )
    with pytest.raises(UsageError, match=words):
        build_arguments(1000, 64, TrtLlmOptions(max_num_tokens=63), 0)
    assert build_arguments(1000, 64, TrtLlmOptions(max_num_tokens=64), 0).max_num_tokens == 64
    # A chunk is cut to whole blocks: with less than one left no prompt would ever be read.
    with pytest.raises(UsageError, match=r"expected at least 35, a block of 32 .* found 34"):
        build_arguments(1000, 4, TrtLlmOptions(), 31)
    assert build_arguments(1000, 4, TrtLlmOptions(), 32).max_num_tokens == 35


def test_chunks_take_blocks_beyond_the_window() -> None:
    """A long prompt gets the blocks of a chunk more in local layers, while it is read."""
    cyclic = plan(max_seq_len=4096)
    assert cyclic.temporary_rows(build_arguments(4096, 1, TrtLlmOptions(), 0)) == 0
    chunks = build_arguments(4096, 1, TrtLlmOptions(), 512)
    assert cyclic.temporary_rows(chunks) == 512
    # W = 4 sinks and 64 rows, a bubble of 28: 3 blocks; 512 rows more: 19. Nothing for a short prompt.
    row = next(i for i, w in enumerate(cyclic.windows) if w == 68)
    assert (cyclic.blocks(row, 4096), cyclic.blocks(row, 4096, 512)) == (3, 19)
    assert cyclic.blocks(row, 68, 512) == 3
    full = cyclic.windows.index(4096)
    assert cyclic.blocks(full, 4096, 512) == cyclic.blocks(full, 4096) == 129
    # Never more than the longest prompt needs.
    nearly = dataclasses.replace(chunks, max_num_tokens=100_000)
    assert cyclic.temporary_rows(nearly) == 4095 - 68
    more = cyclic.pool_bytes(4096, 512) - cyclic.pool_bytes(4096)
    local = sum(layer.num_local for layer in cyclic.layers)
    assert more == 16 * cyclic.block_bytes(local)
    assert plan("1.2.1", max_seq_len=4096).temporary_rows(chunks) == 0


def test_what_the_builder_is_told() -> None:
    a = build_arguments(1000, 4, TrtLlmOptions(tokens_per_block=64, gather_logits=True), 128)
    assert a.build_config() == {
        "max_batch_size": 4,
        "max_input_len": 999,
        "max_seq_len": 1000,
        "max_num_tokens": 131,
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
