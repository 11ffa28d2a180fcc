"""A small model whose attention layers are the real plugins, on the tables of the emulated cache manager.

A ``Rig`` makes the calls of a trace (``loads``) in every layer and compares each row of the output with the
float64 reference of its own sequence, begun anew after each pause. It also checks that a call writes into
blocks and slots of its own sequences only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from cache_manager import CacheManager
from drivers import CallSizes, HostArrays, gpt_inputs, rebuild
from fake_host import BUILD, FieldValue, Host, Plugin, Tensor
from harness import MAX_ABS_FACTOR, OUTPUT_TOLERANCE
from in_flight import Part
from loads import Call, Case
from razor_layers import Layer, TieError, Tokens, draw_tokens, no_ties
from razor_memory import Buffer
from torch import Tensor as TorchTensor

from trt_razor.reference import LayerCache
from trt_razor.trtllm.engine_config import RazorPlan

NAME = "RazorGptAttention"


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
        first = min(self.case.rows(self.plan))
        rows = [row - first for row in (mine.full_row, mine.local_row) if row >= 0]
        for i, (pool, buffer) in enumerate(zip(self.manager.pools, self.pools, strict=True)):
            shape = pool.blocks, len(pool.layers), -1
            changed = (buffer.array != before[i]).reshape(shape).any(-1)
            for layer_in_pool in [mapping[row, 1] for row in rows if mapping[row, 0] == i]:
                owned = [block for blocks in call.owned[pool.window] for block in blocks]
                changed[owned, layer_in_pool] = False
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
