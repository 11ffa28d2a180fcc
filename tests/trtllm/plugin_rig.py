"""A small model whose attention layers are the real plugins, on the tables of the emulated cache manager.

``trace`` lets requests arrive, be read, generate, be paused and end, and notes every call that the runtime
would make; which tokens there are decides nothing about it. ``Rig`` makes these calls in every layer and
compares each row of the output with the float64 reference of its own sequence, begun anew after each
pause. It also checks that a call writes into blocks and slots of its own sequences only.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from cache_manager import CacheConfig, CacheManager, OffsetTable, blocks_of_memory, clamp_windows
from drivers import CallSizes, HostArrays, gpt_inputs, rebuild
from fake_host import BUILD, FieldValue, Host, Plugin, Tensor
from harness import MAX_ABS_FACTOR, OUTPUT_TOLERANCE
from in_flight import Batch, Graphs, InFlightBatching, Part, Request
from razor_layers import Layer, TieError, Tokens, draw_tokens, no_ties
from razor_memory import Buffer
from torch import Tensor as TorchTensor

from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy
from trt_razor.reference import LayerCache
from trt_razor.trtllm.engine_config import (
    RazorPlan,
    RazorSection,
    TrtLlmOptions,
    build_arguments,
    plan_engine,
)
from trt_razor.trtllm.release import LocalCache, release_of

NAME = "RazorGptAttention"


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
    requests: int = 12
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

    def cache_config(self, plan: RazorPlan) -> CacheConfig:
        """What the server makes of the engine and its settings."""
        layers = [plan.layers[i] for i in self.numbers]
        rows = [row for p in layers for row in (p.full_row, p.local_row) if row >= 0]
        engine = build_arguments(self.max_seq_len, self.max_batch, self.options, self.chunk)
        return CacheConfig(
            heads=tuple(plan.kv_heads[row] // plan.tp_size for row in rows),
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


# The model ----------------------------------------------------------------------------------------


class Rig:
    """See the module.

    Attributes:
        worst: largest output error so far, in tolerances.
    """

    def __init__(self, host: Host, case: Case, manager: CacheManager | None = None) -> None:
        self.host, self.case = host, case
        self.plan = plan = case.plan()
        self.manager = manager or case.manager(plan)
        self.layers = [_layer(case, plan, r) for r in case.retrieval]
        self.plugins = {i: self._plugin(i) for i in case.numbers}
        self.pools = [Buffer(f"pool {i}", p.nbytes) for i, p in enumerate(self.manager.pools)]
        # One allocation for the states of all layers, never cleaned.
        state, slots = plan.state_config(), self.manager.config.max_num_sequences
        self._state_bytes = {
            "conv_state_ptr": slots * 2 * state["rnn_conv_dim_size"],
            "rnn_state_ptr": slots * 4 * state["rnn_hidden_size"],
        }
        count = plan.layer_types.count("recurrent")
        self.states = {name: Buffer(name, count * n) for name, n in self._state_bytes.items()}
        self.worst = 0.0

    def _plugin(self, number: int) -> Plugin:
        layer, plan = self.layers[number], self.plan
        attention: Mapping[str, int | float] = {
            "num_heads": layer.num_heads,
            "num_kv_heads": layer.num_kv_heads,
            "head_dim": layer.head_dim,
            "position": 3 if layer.position == "alibi" else 1,
            "rotary_dim": 0 if layer.position == "alibi" else layer.head_dim,
            "scale": layer.logit_scale,
        }
        fields: dict[str, FieldValue] = {
            name: np.array([value], np.int64) if name.endswith("slot_bytes") else value
            for name, value in plan.plugin_fields(number, self.case.numbers[0], attention).items()
        }
        made = self.host.create(NAME, fields, BUILD, f"layers.{number}.attention")
        assert made is not None, self.host.log()
        return made

    def _inputs(self, number: int, sizes: CallSizes, data: Mapping[str, int]) -> list[Tensor]:
        design = self.case.local_cache.value
        return list(gpt_inputs(self.layers[number], design, sizes, data).values())

    # What comes out -------------------------------------------------------------------------------
    def expect(
        self, calls: list[Call], number: int
    ) -> tuple[dict[tuple[int, int], TorchTensor], dict[int, Tokens]]:
        """Reference outputs [Hq, n, D] by call and batch index, and the tokens of each request."""
        parts: dict[int, list[tuple[int, int, Part]]] = defaultdict(list)
        for i, call in enumerate(calls):
            for b, part in enumerate(call.batch.parts):
                parts[part.sequence].append((i, b, part))
        outputs: dict[tuple[int, int], TorchTensor] = {}
        tokens: dict[int, Tokens] = {}
        for sequence, mine in parts.items():
            for attempt in range(20):
                seed = ((self.case.seed * 20 + attempt) * 64 + number) * 1000 + sequence
                drawn = draw_tokens(self.layers[number], seed)
                try:
                    outputs |= self._attend(number, drawn, mine)
                except TieError:
                    continue
                tokens[sequence] = drawn
                break
            else:
                raise AssertionError("no tokens without ties between clusters in 20 attempts")
        return outputs, tokens

    def _attend(
        self, number: int, tokens: Tokens, parts: list[tuple[int, int, Part]]
    ) -> dict[tuple[int, int], TorchTensor]:
        layer, out, life = self.layers[number], {}, 0
        cache: LayerCache | None = None
        for i, b, part in parts:
            if part.life != life:
                life = part.life
                cache = LayerCache(
                    layer.policy,
                    layer.retrieval,
                    layer.num_heads,
                    layer.num_kv_heads,
                    layer.head_dim,
                    layer.n_max,
                    torch.float64,
                    slopes=layer.slopes(),
                    scale=layer.logit_scale,
                )
            assert cache is not None
            assert cache.n == part.begin
            span = slice(part.begin, part.total)
            with no_ties():
                out[i, b] = cache.attend(
                    *(x[:, span] for x in (tokens.ref_q, tokens.ref_k, tokens.ref_v))
                )
        return out

    # Running --------------------------------------------------------------------------------------
    def run(self, calls: list[Call]) -> None:
        """All calls, layer after layer: the layers do not see each other's output."""
        for number in self.case.numbers:
            for pool in self.pools:
                pool.array[:] = 0xFF
            outputs, tokens = self.expect(calls, number)
            runtime = rebuild(self.plugins[number], NAME)
            workspace = Buffer("workspace", self._workspace_size(number))
            for i, call in enumerate(calls):
                if self.case.poison:
                    self._poison(call.freed)
                qkv = torch.cat(
                    [
                        torch.cat([x[:, p.begin : p.total] for x in (t.q, t.k, t.v)])
                        .transpose(0, 1)
                        .flatten(1)
                        for p in call.batch.parts
                        for t in [tokens[p.sequence]]
                    ]
                )
                before = self._snapshot()
                try:
                    out = self.enqueue(runtime, number, call, qkv, workspace)
                    self._check_outputs(number, call, out, outputs, i)
                    self._check_writes(number, call, before)
                except AssertionError as error:
                    kinds = [
                        f"{p.sequence}.{p.life}:{p.begin}+{p.tokens}" for p in call.batch.parts
                    ]
                    raise AssertionError(f"layer {number}, call {i} ({kinds}): {error}") from error

    def _workspace_size(self, number: int) -> int:
        """As TensorRT asks for it: for the largest shapes of the engine."""
        config = self.manager.config
        sizes = CallSizes(
            config.max_num_sequences,
            config.max_num_tokens,
            len(config.heads),
            config.table_width,
            len(config.heads),
            config.max_num_sequences,
        )
        inputs, plugin = self._inputs(number, sizes, {}), self.plugins[number]
        outputs = [Tensor(inputs[0].dtype, [sizes.tokens, 1])]
        assert plugin.configure(inputs, outputs), self.host.log()
        size = plugin.workspace_size(inputs, outputs)
        assert size > 0, self.host.log()
        return size

    def enqueue(
        self,
        runtime: Plugin,
        number: int,
        call: Call,
        qkv: TorchTensor,
        workspace: Buffer,
        change: Mapping[str, object] | None = None,
    ) -> TorchTensor:
        """The rows [tokens, Hq, D] of a call. ``change``: other values of inputs, for tests."""
        layer, manager, config = self.layers[number], self.manager, self.manager.config
        content = Buffer("qkv", 2 * qkv.numel(), qkv.contiguous().view(torch.int16).numpy())
        out = Buffer("out", len(qkv) * layer.num_heads * layer.head_dim * 2)
        data = {"qkv": content.pointer}
        host = HostArrays(data)
        arrays: dict[str, object] = {
            **call.arrays,
            "host_max_attention_window_sizes": manager.window_sizes(),
            "host_sink_token_length": np.array([config.sink_tokens], np.int32),
            "host_kv_cache_pool_pointers": manager.pool_pointers([p.pointer for p in self.pools]),
            "host_kv_cache_pool_mapping": manager.pool_mapping(),
            "kv_orig_quant_scale": np.ones(1, np.float32),
            "kv_quant_orig_scale": np.ones(1, np.float32),
            "host_context_progress": np.zeros(1, np.int64),
            "host_runtime_perf_knobs": np.array([1, 0, *[-1] * 14], np.int64),
        }
        if layer.position == "half":
            arrays["rotary_cos_sin"] = layer.cos_sin()
        slopes = layer.slopes()
        if slopes is not None:
            arrays["alibi_slopes"] = slopes.numpy()
        recurrent = self._recurrent(number)
        if recurrent is not None:
            for name, state in self.states.items():
                address = state.pointer + recurrent * self._state_bytes[name]
                arrays[name] = np.array([address], np.int64)
        for name, values in (arrays | dict(change or {})).items():
            host.add(name, np.asarray(values))
        pools, batch, _, blocks = call.arrays["kv_cache_block_offsets"].shape
        sizes = CallSizes(
            batch, len(qkv), pools, blocks, len(config.heads), config.max_num_sequences
        )
        inputs = self._inputs(number, sizes, data)
        outputs = [
            Tensor(inputs[0].dtype, [len(qkv), layer.num_heads * layer.head_dim], out.pointer)
        ]
        assert runtime.shape_change(inputs, outputs), self.host.log()
        done = runtime.enqueue(inputs, outputs, workspace.pointer)
        log = self.host.log()
        assert done, log
        assert log == ""
        for buffer in (out, workspace, *self.pools, *self.states.values()):
            buffer.check_guards()
        content.check()
        return out.tensor(layer.dtype).view(len(qkv), layer.num_heads, layer.head_dim)

    def _recurrent(self, number: int) -> int | None:
        """Which of the recurrent layers is this one's."""
        state = self.plan.layers[number].state_layer
        return None if state < 0 else self.plan.layer_types[:state].count("recurrent")

    def _check_outputs(
        self,
        number: int,
        call: Call,
        out: TorchTensor,
        outputs: dict[tuple[int, int], TorchTensor],
        i: int,
    ) -> None:
        tolerance, first = OUTPUT_TOLERANCE[self.layers[number].dtype], 0
        for b, part in enumerate(call.batch.parts):
            found = out[first : first + part.tokens].transpose(0, 1).double()
            reference = outputs[i, b]
            first += part.tokens
            where = f"batch index {b}"
            assert bool(torch.isfinite(found).all()), f"{where}: out is not finite"
            difference = found - reference
            error = difference.flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
            largest = difference.abs().amax((1, 2)) / reference.abs().amax((1, 2))
            measure = float(torch.maximum(error, largest / MAX_ABS_FACTOR).max()) / tolerance
            self.worst = max(self.worst, measure)
            assert measure <= 1, f"{where}: {measure:.1f} times the tolerance of {tolerance}"

    # Memory ---------------------------------------------------------------------------------------
    def _poison(self, freed: Mapping[int, list[int]]) -> None:
        for pool, buffer in zip(self.manager.pools, self.pools, strict=True):
            if freed[pool.window]:
                buffer.array.reshape(pool.blocks, -1)[freed[pool.window]] = 0xFF

    def _snapshot(self) -> list[np.ndarray]:
        return [b.array.copy() for b in (*self.pools, *self.states.values())]

    def _check_writes(self, number: int, call: Call, before: list[np.ndarray]) -> None:
        """Only blocks and slots of the call's sequences changed, and of this layer."""
        mapping, mine = self.manager.pool_mapping(), self.plan.layers[number]
        first = min(
            row
            for i in self.case.numbers
            for row in (self.plan.layers[i].full_row, self.plan.layers[i].local_row)
            if row >= 0
        )
        rows = [row - first for row in (mine.full_row, mine.local_row) if row >= 0]
        for i, (pool, buffer) in enumerate(zip(self.manager.pools, self.pools, strict=True)):
            shape = pool.blocks, len(pool.layers), -1
            changed = (buffer.array != before[i]).reshape(shape).any(-1)
            for layer_in_pool in [mapping[row, 1] for row in rows if mapping[row, 0] == i]:
                changed[sum(call.owned[pool.window], []), layer_in_pool] = False
            places = np.argwhere(changed).tolist()
            assert not places, f"pool {i}: blocks of others were written (block, layer): {places}"
        slots, config = call.arrays["slot_mapping"], self.manager.config
        for state, old in zip(self.states.values(), before[len(self.pools) :], strict=True):
            if state.nbytes == 0:
                continue
            shape = self.plan.layer_types.count("recurrent"), config.max_num_sequences, -1
            changed = (state.array != old).reshape(shape).any(-1)
            recurrent = self._recurrent(number)
            if recurrent is not None:
                changed[recurrent, slots] = False
            places = np.argwhere(changed).tolist()
            assert not places, f"{state.name}: slots of others were written (layer, slot): {places}"


def _layer(case: Case, plan: RazorPlan, retrieval: int) -> Layer:
    layer = Layer(
        num_kv_heads=case.num_kv_heads,
        group=case.group,
        head_dim=case.head_dim,
        retrieval=tuple(range(retrieval)),
        dtype=getattr(torch, case.dtype),
        fp8=case.fp8,
        position="alibi" if case.position == "alibi" else "half",
        table="pairs",
        policy=case.policy,
        n_max=case.max_seq_len,
        k_scale=1.0 if case.fp8 else None,
        v_scale=1.0 if case.fp8 else None,
        bubble=plan.bubble,
    )
    spare = plan.window - layer.policy.sink_tokens - layer.ring_rows if plan.window else 0
    return replace(layer, spare_rows=spare)
