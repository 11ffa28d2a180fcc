"""The plugins through in-flight batching: random loads on the emulated cache manager.

The emulator follows TensorRT-LLM's public sources (``cache_manager``, ``in_flight``); TensorRT-LLM itself is
not here. Tolerances are those of the kernel tests: two units of roundoff of the model's type for a row
of the output. ``RAZOR_FUZZ=N`` runs N more loads in all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cache_manager import CacheManager, blocks_of_memory, clamp_windows
from fake_host import Host
from loads import Call, Case, trace
from plugin_build import HERE, build_plugins
from plugin_rig import Rig
from shim_build import build_folder, build_shim

from trt_razor.errors import UsageError
from trt_razor.policy import RazorPolicy
from trt_razor.trtllm.release import LocalCache

CYCLIC, SLOTS = LocalCache.CYCLIC, LocalCache.SLOTS
FUZZ = int(os.environ.get("RAZOR_FUZZ", "0"))

COMPENSATED = RazorPolicy(4, 23, None, 5)
FIXED_TOO_LONG = RazorPolicy(4, 59, None, 1)
"""Sinks and ring in whole blocks of 8 are 68 tokens."""

CASES = {
    # Two cache layers for a layer of the model.
    "cyclic": Case(
        CYCLIC,
        requests=18,
        memory=2,
        max_seq_len=96,
        max_num_tokens=40,
        burst=3,
        retrieval=(1, 0, 2),
    ),
    "cyclic-short-prompts": Case(CYCLIC, memory=1.8, max_num_tokens=24, requests=8),
    "cyclic-ample": Case(CYCLIC, tokens_per_block=16, evict=False, poison=False),
    "cyclic-no-eviction": Case(CYCLIC, memory=1.3, evict=False),
    "cyclic-chunks": Case(CYCLIC, chunk=24, memory=2.2, requests=12, dtype="bfloat16"),
    "cyclic-clusters": Case(
        CYCLIC, tokens_per_block=32, policy=COMPENSATED, head_dim=128, memory=2, group=1
    ),
    "cyclic-bf16": Case(
        CYCLIC, dtype="bfloat16", policy=RazorPolicy(4, 5, 3, 1), tokens_per_block=16, chunk=32
    ),
    "cyclic-fp8": Case(CYCLIC, fp8=True, tokens_per_block=32, memory=2, requests=8),
    "cyclic-alibi": Case(CYCLIC, position="alibi", head_dim=96, tokens_per_block=32, requests=8),
    "cyclic-nothing-compensated": Case(CYCLIC, policy=RazorPolicy(8, 11, None, 0), memory=2),
    "cyclic-many-sinks": Case(CYCLIC, policy=RazorPolicy(18, 7, None, 0), memory=2),
    "cyclic-one-window": Case(
        CYCLIC,
        policy=FIXED_TOO_LONG,
        max_seq_len=68,
        num_kv_heads=4,
        retrieval=(2, 1, 0),
        group=1,
    ),
    "cyclic-one-pool": Case(
        CYCLIC, policy=FIXED_TOO_LONG, max_seq_len=68, num_kv_heads=4, retrieval=(2, 2), group=1
    ),
    "cyclic-graphs": Case(CYCLIC, graphs=True, memory=2),
    "cyclic-two-ranks-two-stages": Case(
        CYCLIC, retrieval=(1, 1, 1, 1), tp_size=2, pp_size=2, stage=1, memory=2
    ),
    # Local heads in state slots: on 1.0, and on the linear manager.
    "slots-1.0": Case(SLOTS, memory=2),
    "slots": Case(
        SLOTS,
        "1.2.1",
        requests=18,
        memory=1.5,
        max_seq_len=96,
        max_num_tokens=48,
        retrieval=(2, 3, 0),
    ),
    "slots-no-eviction": Case(SLOTS, "1.1.0", memory=1.3, evict=False, poison=False),
    "slots-clusters": Case(
        SLOTS, "1.2.1", policy=COMPENSATED, head_dim=128, group=1, dtype="bfloat16"
    ),
    "slots-fp8": Case(SLOTS, "1.2.1", fp8=True, tokens_per_block=32, memory=2, requests=8),
    "slots-alibi": Case(SLOTS, "1.2.1", position="alibi", head_dim=96, requests=8, memory=2),
    "slots-nothing-compensated": Case(SLOTS, "1.2.1", policy=RazorPolicy(0, 9, 4, 0), memory=2),
    "slots-graphs": Case(SLOTS, "1.2.1", graphs=True, max_num_tokens=72, memory=2),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The reference's tensors are too small to share out; threads that wait for each other take longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def host() -> Host:
    """The plugins over the CPU build of the kernels."""
    ready = os.environ.get("RAZOR_SHIM_LIBRARY")
    shim = Path(ready) if ready else build_shim(build_folder() / "shim")
    build = build_plugins(shim.parent / "plugins-stand-in", HERE / "fake_trt", shim)
    return Host(build.folder / "libfake_host.so", build.plugins)


@pytest.mark.parametrize("name", CASES)
def test_every_row_is_that_of_its_own_sequence(host: Host, name: str) -> None:
    for seed in range(1 + FUZZ // len(CASES)):
        case = replace(CASES[name], seed=CASES[name].seed + seed)
        rig = Rig(host, case)
        rig.run(trace(case, rig.manager).calls)


# name of the case, what happens in it
HAPPENS = [
    ("cyclic", "pauses"),
    ("cyclic-short-prompts", "dropped"),
    ("cyclic", "stale"),
    ("cyclic", "astray"),
    ("cyclic-chunks", "chunks"),
    ("cyclic-chunks", "pauses"),
    ("cyclic-graphs", "replays"),
    ("slots-1.0", "pauses"),
    ("slots", "pauses"),
    ("slots", "dropped"),
    ("slots", "moved"),
    ("slots", "stale"),
    ("slots-graphs", "replays"),
]


@pytest.mark.parametrize("name, what", HAPPENS)
def test_loads_meet_what_they_are_made_for(name: str, what: str) -> None:
    case = CASES[name]
    found = trace(case, case.manager(case.plan()))
    assert getattr(found, what) > 0


def test_loads_are_long() -> None:
    for name in ("cyclic", "slots"):
        case = CASES[name]
        assert trace(case, case.manager(case.plan())).steps > 200


# The tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cyclic", "cyclic-chunks", "cyclic-many-sinks", "slots"])
def test_entries_behind_a_sequences_blocks_are_not_read(host: Host, name: str) -> None:
    """They lead into other sequences' blocks, or nowhere."""
    case = replace(CASES[name], requests=3)
    rig = Rig(host, case)
    found = trace(case, rig.manager)
    for call in found.calls:
        for pool, table in zip(
            rig.manager.pools, call.arrays["kv_cache_block_offsets"], strict=True
        ):
            for row, blocks in zip(table, call.owned[pool.window], strict=True):
                row[:, len(blocks) :] = 0x7FFFFFFF
        call.arrays["host_kv_cache_block_offsets"][:] = 0x7FFFFFFF  # not read at all
    rig.run(found.calls)


def _swap_blocks(call: Call, pool: int) -> None:
    table = call.arrays["kv_cache_block_offsets"][pool, 0]
    table[:, [0, 1]] = table[:, [1, 0]]


def _change(name: str, by: int) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        call.arrays[name][0] += by

    return change


WRONG: dict[str, tuple[str, Callable[[Call], None], str]] = {
    "full-blocks": ("cyclic", lambda call: _swap_blocks(call, -1), "tolerance|not finite"),
    "local-blocks": ("cyclic", lambda call: _swap_blocks(call, 0), "tolerance|not finite"),
    "length": ("cyclic", _change("sequence_length", -1), "tolerance|not finite"),
    "slot": ("slots", _change("slot_mapping", 1), "tolerance|not finite|slots of others"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_table_is_noticed(host: Host, what: str) -> None:
    """A generation with two blocks, given something else than the emulator says."""
    name, change, reason = WRONG[what]
    case = replace(CASES[name], requests=4)
    rig = Rig(host, case)
    calls = trace(case, rig.manager).calls
    long = next(
        i
        for i, call in enumerate(calls)
        if not call.batch.parts[0].context and call.batch.parts[0].begin > case.tokens_per_block + 4
    )
    change(calls[long])
    with pytest.raises(AssertionError, match=reason):
        rig.run(calls[: long + 9])


# What a server may do wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cyclic", "slots"])
def test_windows_clamped_for_lack_of_memory_are_refused(host: Host, name: str) -> None:
    case = replace(CASES[name], memory=0.8)
    plan = case.plan()
    config = case.cache_config(plan)
    blocks = blocks_of_memory(config, int(0.8 * plan.pool_bytes(case.max_seq_len)))
    clamped, blocks = clamp_windows(config, blocks)
    assert clamped.windows != config.windows
    assert max(clamped.windows) < case.max_seq_len
    rig = Rig(host, case, CacheManager(clamped, blocks))
    calls = trace(
        replace(case, requests=1, max_seq_len=max(clamped.windows) // 2), rig.manager
    ).calls
    with pytest.raises(
        AssertionError, match=r"host_max_attention_window_sizes\[0\] .*expected at least"
    ):
        rig.run(calls)


@pytest.mark.parametrize("name", ["slots", "cyclic-nothing-compensated"])
def test_a_reused_prefix_is_refused(host: Host, name: str) -> None:
    """A new sequence whose first tokens the manager believes to have in its blocks already."""
    case = replace(CASES[name], requests=1)
    rig = Rig(host, case)
    calls = trace(case, rig.manager).calls
    for array in ("host_past_key_value_lengths", "sequence_length"):
        calls[0].arrays[array][0] += case.tokens_per_block
    with pytest.raises(AssertionError, match="disable KV cache reuse"):
        rig.run(calls)


# What a plan refuses, because the manager's rules would break it ----------------------------------


@pytest.mark.parametrize(
    "policy, chunk, reason",
    [
        (RazorPolicy(12, 11, None, 1), 0, "sink_tokens: at most tokens_per_block = 8 with compens"),
        (
            RazorPolicy(8, 11, None, 0),
            24,
            "prefill_chunk: 24 with 8 sinks, whole blocks of 8 tokens",
        ),
    ],
)
def test_plans_that_the_manager_would_break(policy: RazorPolicy, chunk: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Case(CYCLIC, policy=policy, chunk=chunk).plan()
    assert Case(CYCLIC, policy=policy.with_(comp_tokens=0)).plan().window
    assert Case(SLOTS, policy=policy).plan().ring_slot_bytes
