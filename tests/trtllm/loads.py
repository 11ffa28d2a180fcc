"""Engines, servers and their load, and the calls that the emulated runtime makes of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from cache_manager import CacheConfig, CacheManager, OffsetTable, blocks_of_memory, clamp_windows
from in_flight import Batch, Graphs, InFlightBatching, Request

from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy
from trt_razor.trtllm.engine_config import (
    RazorPlan,
    RazorSection,
    TrtLlmOptions,
    build_arguments,
    plan_engine,
)
from trt_razor.trtllm.release import LocalCache, release_of


@dataclass(frozen=True)
class Case:
    """An engine, a server, and its load.

    Attributes:
        retrieval: R of each layer, of ``num_kv_heads``: of a rank.
        stage: of pp_size, the one that runs here.
        chunk: prompts are read in pieces of at most so many tokens; 0 = in one go.
        max_num_tokens: of a step; None = as much as the longest prompt.
        memory: of the pools, in sequences of the greatest length.
        evict: requests are paused when the pools are full; else they wait until theirs fits.
        graphs: cuda_graph_mode.
        poison: blocks that nobody has are filled with NaN. Else they keep what they held.
        requests, burst: how many come, and how many at most between two steps.
    """

    local_cache: LocalCache
    release: str = "1.0.0"
    retrieval: tuple[int, ...] = (1, 0, 3, 2)
    num_kv_heads: int = 3
    group: int = 2
    head_dim: int = 64
    dtype: str = "float16"
    fp8: bool = False
    position: str = "rope"
    policy: RazorPolicy = RazorPolicy(4, 11, None, 1)  # noqa: RUF009 (frozen)
    tokens_per_block: int = 8
    max_seq_len: int = 72
    tp_size: int = 1
    pp_size: int = 1
    stage: int = 0
    max_batch: int = 4
    chunk: int = 0
    max_num_tokens: int | None = None
    memory: float = 4
    evict: bool = True
    graphs: bool = False
    poison: bool = True
    requests: int = 8
    burst: int = 2
    seed: int = 0

    @property
    def options(self) -> TrtLlmOptions:
        return TrtLlmOptions(
            tp_size=self.tp_size,
            pp_size=self.pp_size,
            kv_dtype="fp8" if self.fp8 else "auto",
            tokens_per_block=self.tokens_per_block,
            max_num_tokens=self.max_num_tokens,
            local_cache=self.local_cache,
        )

    def plan(self) -> RazorPlan:
        heads = self.num_kv_heads * self.group * self.tp_size
        spec = ModelSpec(
            name="small",
            architecture="baichuan" if self.position == "alibi" else "llama",
            num_layers=len(self.retrieval),
            hidden_size=heads * self.head_dim,
            intermediate_size=64,
            num_heads=heads,
            num_kv_heads=self.num_kv_heads * self.tp_size,
            head_dim=self.head_dim,
            vocab_size=64,
            max_positions=self.max_seq_len,
            rms_norm_eps=1e-5,
            position=self.position,
        )
        section = RazorSection(spec.fingerprint(), "", self.tp_size, self.retrieval, self.policy)
        release = release_of(self.release)
        return plan_engine(
            spec, section, self.max_seq_len, self.dtype, self.options, release, self.chunk
        )

    @property
    def numbers(self) -> range:
        """Layers of the stage."""
        each = len(self.retrieval) // self.pp_size
        return range(self.stage * each, (self.stage + 1) * each)

    def rows(self, plan: RazorPlan) -> list[int]:
        """Cache layers of the stage, counted over the whole model."""
        layers = [plan.layers[i] for i in self.numbers]
        return [row for p in layers for row in (p.full_row, p.local_row) if row >= 0]

    def cache_config(self, plan: RazorPlan) -> CacheConfig:
        """What the server makes of the engine and its settings."""
        engine = build_arguments(self.max_seq_len, self.max_batch, self.options, self.chunk)
        return CacheConfig(
            heads=tuple(plan.kv_heads[row] // plan.tp_size for row in self.rows(plan)),
            head_dim=plan.head_dim,
            element_bytes=plan.element_bytes,
            tokens_per_block=plan.tokens_per_block,
            max_seq_len=engine.max_seq_len,
            max_num_sequences=self.max_batch,
            windows=tuple(plan.window_list()),
            sink_tokens=plan.sink_token_length,
            linear=self.release != "1.0.0",
            paged_context=engine.chunked,
            max_num_tokens=engine.max_num_tokens,
            max_input_len=engine.max_input_len,
        )

    def manager(self, plan: RazorPlan) -> CacheManager:
        config = self.cache_config(plan)
        memory = int(self.memory * plan.pool_bytes(self.max_seq_len))
        return CacheManager(*clamp_windows(config, blocks_of_memory(config, memory)))


# Calls --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """An enqueue: its sequences, the arrays as the runtime fills them, and who has which blocks.

    Attributes:
        replay: made by replaying a graph.
        owned: blocks of each of its sequences, by window. freed: blocks that nobody has since the
            last call.
    """

    batch: Batch
    arrays: dict[str, np.ndarray]
    replay: bool
    owned: dict[int, list[list[int]]]
    freed: dict[int, list[int]]


@dataclass
class Trace:
    """All calls, and how often things happened.

    Attributes:
        chunks: pieces of prompts that are not the last. replays: of graphs.
        dropped: generated tokens that were made again, as no prompt may be that long.
        moved: sequences that came back to another slot.
        stale: entries of the table behind a sequence's own that are not 0; astray: those of them that lead
            out of their pool.
    """

    calls: list[Call]
    steps: int
    pauses: int
    chunks: int
    dropped: int
    replays: int
    moved: int
    stale: int
    astray: int


def arrivals(case: Case, max_input_len: int) -> Iterator[list[Request]]:
    """Requests with prompts of any length; some generate a single token, some to the very end."""
    rng = random.Random(case.seed)
    number, most = 0, case.max_seq_len
    while number < case.requests:
        new = []
        for _ in range(min(rng.randint(0, case.burst), case.requests - number)):
            longest = min(max_input_len, most - 1)
            prompt = rng.choice([rng.randint(1, longest), rng.randint(1, min(12, longest))])
            room = most - prompt
            max_new = rng.choice([1, room, rng.randint(1, room), rng.randint(1, min(room, 20))])
            new.append(Request(number, prompt, max_new))
            number += 1
        yield new


def trace(case: Case, manager: CacheManager) -> Trace:
    """All calls until the last request has ended."""
    fused = (
        case.local_cache is LocalCache.CYCLIC
    )  # hybrid models have contexts and generations apart
    batching = InFlightBatching(manager, case.max_batch, case.evict, case.chunk > 0, fused)
    tables = {kind: OffsetTable(manager) for kind in (True, False)}
    graphs = Graphs(case.max_seq_len)
    free: dict[int, set[int]] = {w.window: set(w.free) for w in manager.windows}
    calls: list[Call] = []
    steps = 0
    for batches in batching.run(arrivals(case, manager.config.max_input_len)):
        steps += bool(batches)
        for batch in batches:
            arrays: dict[str, np.ndarray] = dict(batch.arrays())
            # Un-fused calls of either kind have buffers of their own.
            table = tables[fused or batch.parts[0].context]
            sequences = [part.sequence for part in batch.parts]
            host, device = table.fill(sequences)
            arrays["host_kv_cache_block_offsets"] = host.copy()
            arrays["kv_cache_block_offsets"] = device.copy()
            now = {w.window: set(w.free) for w in manager.windows}
            calls.append(
                Call(
                    batch,
                    arrays,
                    case.graphs and graphs.apply(batch, arrays),
                    {
                        w.window: [w.owned(s, manager.removed[s]) for s in sequences]
                        for w in manager.windows
                    },
                    {window: sorted(blocks - free[window]) for window, blocks in now.items()},
                )
            )
            free = now
    for window in manager.windows:
        assert len(window.free) == window.blocks, "blocks are lost"
    slots: dict[int, set[int]] = defaultdict(set)
    stale = astray = 0
    for call in calls:
        for part, slot in zip(call.batch.parts, call.arrays["slot_mapping"].tolist(), strict=True):
            slots[part.sequence].add(slot)
        for pool, table in zip(manager.pools, call.arrays["kv_cache_block_offsets"], strict=True):
            for row, blocks in zip(table, call.owned[pool.window], strict=True):
                behind = row[:, len(blocks) :]
                stale += int((behind != 0).sum())
                astray += int((behind >= pool.entry(pool.blocks, False)).sum())
    return Trace(
        calls=calls,
        steps=steps,
        pauses=batching.pauses,
        chunks=batching.chunks,
        dropped=batching.dropped,
        replays=sum(call.replay for call in calls),
        moved=sum(len(used) - 1 for used in slots.values()),
        stale=stale,
        astray=astray,
    )
