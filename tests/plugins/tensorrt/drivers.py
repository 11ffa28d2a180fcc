"""The plugins in the place of the kernels' Python binding: the harness of the kernel tests drives them.

A driver takes a plugin through its whole life (fields, types, shapes, aliasing, formats, profile,
plan, a clone attached to a context) and has ``workspace_size`` and ``attention`` as
``trt_razor.kernels.RazorKernels`` does, so that ``harness.Rig`` compares its calls with the
reference and every byte of the caches with what they must hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from fake_host import BUILD, RUNTIME, FieldValue, Host, Plugin, Tensor, dtype_name
from pages import PagedRows, bubble
from razor_layers import Layer
from razor_memory import (
    Buffer,
    CompPlaces,
    ContiguousComp,
    ContiguousRows,
    LayerStore,
    Place,
    Slots,
    classes,
)
from torch import Tensor as TorchTensor

from trt_razor.graph.operator import RazorAttention
from trt_razor.kernels import Caches, Compensation, ContiguousView, LayerConfig, Limits, PagedView

# Stores -------------------------------------------------------------------------------------------


def dense_store(layer: Layer, slots: int) -> LayerStore:
    """Caches as graphs have them: a tensor each, without gaps, slot = sequence."""
    of = Slots(slots)
    rows = {kind: ContiguousRows(layer, kind, of, gap_rows=0) for kind in classes(layer)}
    comp = layer.local and layer.policy.comp_tokens
    return LayerStore(rows, ContiguousComp(layer, of, gap=0) if comp else None, of)


class StateRows:
    """Local heads in state slots: keys, then values of all heads, then room that is not used."""

    def __init__(self, layer: Layer, slots: Slots, spare: int = 32) -> None:
        self.slots, self.size, self.rows = slots, layer.row_bytes, layer.rows("local")
        heads = len(layer.local)
        self.half = heads * self.rows * self.size
        self.slot_bytes = 2 * self.half + spare
        self.state = Buffer("conv state", slots.count * self.slot_bytes)
        self.buffers = [self.state]
        flat = self.state.tensor(layer.cache_dtype)
        element, dim = layer.cache_dtype.itemsize, layer.head_dim
        strides = self.slot_bytes // element, self.rows * dim, dim, 1
        self._k, self._v = (
            flat[start:].as_strided((slots.count, heads, self.rows, dim), strides)
            for start in (0, self.half // element)
        )

    def view(self, batch: Sequence[int]) -> ContiguousView:
        return ContiguousView(self._k, self._v, self.slots.table(batch))

    def grow(self, sequence: int, tokens: int) -> None:
        pass

    def finish(self, sequence: int) -> None:
        pass

    def row(self, sequence: int, head: int, row: int) -> tuple[Place, Place]:
        start = self.slots.of(sequence) * self.slot_bytes + (head * self.rows + row) * self.size
        return Place(self.state, start, self.size), Place(self.state, start + self.half, self.size)


class StateComp(ContiguousComp):
    """Compensation tokens in state slots: means, then log-weights, then counts."""

    def __init__(self, layer: Layer, slots: Slots, spare: int = 4) -> None:
        heads, self.m, self.dim = len(layer.local), layer.policy.comp_tokens, layer.head_dim
        self.slots, self.weights = slots, heads * self.m
        self.means = self.weights * 2 * self.dim
        total = self.means + 2 * self.weights
        self.slot = total + -total % 4 + spare
        self.state = Buffer("rnn state", 4 * slots.count * self.slot)
        self.buffers = [self.state]

    def view(self, batch: Sequence[int]) -> Compensation:
        flat, count = self.state.tensor(torch.float32), self.slots.count
        heads = self.weights // self.m
        comp = flat.as_strided(
            (count, heads, self.m, 2, self.dim),
            (self.slot, self.m * 2 * self.dim, 2 * self.dim, self.dim, 1),
        )
        log_weight, counts = (
            flat[start:].as_strided((count, heads, self.m), (self.slot, self.m, 1))
            for start in (self.means, self.means + self.weights)
        )
        return Compensation(comp, log_weight, counts, self.slots.table(batch))

    def places(self, sequence: int, head: int) -> CompPlaces:
        row, slot = 4 * self.dim, 4 * self.slots.of(sequence) * self.slot
        start = slot + head * self.m * 2 * row
        weight = slot + 4 * (self.means + head * self.m)
        return CompPlaces(
            [Place(self.state, start + 2 * row * i, row) for i in range(self.m)],
            [Place(self.state, start + 2 * row * i + row, row) for i in range(self.m)],
            Place(self.state, weight + 4 * self.weights, 4 * self.m),
            Place(self.state, weight, 4 * self.m),
        )


def state_store(layer: Layer, tokens_per_block: int, slots: int, seed: int = 0) -> LayerStore:
    """Retrieval heads in a pool, local heads in state slots."""
    of = Slots(slots, list(reversed(range(slots))))
    rows: dict[str, PagedRows | StateRows] = {}
    if layer.retrieval:
        blocks = slots * -(-layer.rows("full") // tokens_per_block) + 2
        rows["full"] = PagedRows(layer, "full", tokens_per_block, blocks, seed)
    if layer.local:
        rows["local"] = StateRows(layer, of)
    comp = layer.local and layer.policy.comp_tokens
    return LayerStore(rows, StateComp(layer, of) if comp else None, of)


# Drivers ------------------------------------------------------------------------------------------


def policy_fields(layer: Layer) -> dict[str, FieldValue]:
    policy = layer.policy
    return {
        "num_heads": layer.num_heads,
        "num_kv_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "max_seq_len": layer.n_max,
        "sink_tokens": policy.sink_tokens,
        "min_window": policy.min_window,
        "compression": policy.compression or 0,
        "comp_tokens": policy.comp_tokens,
        "heavy_hitters": policy.heavy_hitters,
        "scale": float(layer.logit_scale),
    }


def rebuild(plugin: Plugin, name: str) -> Plugin:
    """Into a plan, out of it, and attached to a context."""
    found = plugin.host.create(name, plugin.clone().serialise(), RUNTIME)
    assert found is not None, plugin.host.log()
    return found.attach()


class Driver:
    """See the module."""

    name: str

    def __init__(self, host: Host, layer: Layer, fields: dict[str, FieldValue]) -> None:
        self.host, self.layer, self.fields = host, layer, fields
        made = host.create(self.name, fields, BUILD)
        assert made is not None, host.log()
        self.builder = made
        self.runtime = rebuild(made, self.name)
        self._built = False

    def outputs(self, inputs: Sequence[Tensor], out: int) -> list[Tensor]:
        """Outputs of a call, by what the plugin says of them."""
        types, shapes = self.builder.output_types(inputs), self.builder.output_shapes(inputs)
        assert types is not None, self.host.log()
        assert shapes is not None, self.host.log()
        alias = [self.builder.aliased_input(i) for i in range(len(types))]
        assert alias[0] == -1
        pointers = [out, *(inputs[i].data for i in alias[1:])]
        return [Tensor(t, s, p) for t, s, p in zip(types, shapes, pointers, strict=True)]

    def run(self, inputs: list[Tensor], out: int, workspace: int) -> None:
        outputs = self.outputs(inputs, out)
        if not self._built:
            assert self.builder.refused_format(inputs, outputs) == -1
            assert self.builder.configure(inputs, outputs), self.host.log()
            self._built = True
        assert self.runtime.shape_change(inputs, outputs), self.host.log()
        done = self.runtime.enqueue(inputs, outputs, workspace)
        log = self.host.log()
        assert done, log
        assert log == ""


class AttentionDriver(Driver):
    """RazorAttention: padded calls over the caches of a ``dense_store``."""

    name = "RazorAttention"

    def __init__(self, host: Host, layer: Layer) -> None:
        operator = RazorAttention(
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_dim,
            layer.retrieval,
            layer.policy,
            layer.n_max,
            "alibi" if layer.position == "alibi" else "rope",
            dtype_name(layer.dtype),
        )
        fields = operator.attributes()
        # The parser looks the plugin up by these; they are no fields.
        assert f"{self.name} {fields.pop('plugin_version')} {fields.pop('plugin_namespace')}" in (
            host.creators()
        )
        assert sorted(fields) == sorted(host.field_names(self.name))
        fields["retrieval_heads"] = np.array(fields["retrieval_heads"], np.int32)
        fields["scale"] = layer.logit_scale
        super().__init__(host, layer, fields)
        self.input_names = operator.input_names()
        assert self.builder.num_outputs == len(operator.output_names())

    def tensors(
        self, batch: int, chunk: int, past_span: int, data: dict[str, int] | None = None
    ) -> list[Tensor]:
        """Inputs of a call."""
        layer, data = self.layer, data or {}
        full, local, m, d = (
            len(layer.retrieval),
            len(layer.local),
            layer.policy.comp_tokens,
            layer.head_dim,
        )
        cache = dtype_name(layer.cache_dtype)
        width = (layer.num_heads + 2 * layer.num_kv_heads) * d
        rows = layer.policy.local_rows(layer.n_max)
        shapes: dict[str, tuple[str, list[int]]] = {
            "qkv": (dtype_name(layer.dtype), [batch, chunk, width]),
            "past": ("int32", [batch]),
            "chunk": ("int32", [batch]),
            "past_span": ("int8", [past_span]),
            "cos_sin": ("float32", [layer.n_max, d]),
            "alibi_slopes": ("float32", [layer.num_heads]),
            "full_k": (cache, [batch, full, layer.n_max, d]),
            "full_v": (cache, [batch, full, layer.n_max, d]),
            "local_k": (cache, [batch, local, rows, d]),
            "local_v": (cache, [batch, local, rows, d]),
            "comp": ("float32", [batch, local, m, 2, d]),
            "comp_log_weight": ("float32", [batch, local, m]),
            "comp_count": ("float32", [batch, local, m]),
        }
        return [Tensor(*shapes[name], data.get(name, 0)) for name in self.input_names]

    def workspace_size(self, config: LayerConfig, limits: Limits) -> int:
        chunk = limits.max_chunk if limits.max_context_tokens else 1
        inputs = self.tensors(limits.max_batch, chunk, max(1, limits.max_past))
        return self.builder.workspace_size(inputs, self.outputs(inputs, 0))

    def attention(
        self,
        config: LayerConfig,
        qkv: TorchTensor,
        caches: Caches,
        *,
        past: TorchTensor,
        chunk: TorchTensor,
        max_past: int,
        out: TorchTensor,
        workspace: TorchTensor,
        cos_sin: TorchTensor | None = None,
        alibi_slopes: TorchTensor | None = None,
        **_: object,
    ) -> None:
        tensors = {
            "qkv": qkv,
            "past": past,
            "chunk": chunk,
            "cos_sin": cos_sin,
            "alibi_slopes": alibi_slopes,
        }
        for kind in ("full", "local"):
            view = getattr(caches, kind)
            if view is not None:
                assert view.slots is None
                tensors |= {f"{kind}_k": view.k, f"{kind}_v": view.v}
        if isinstance(caches.comp, Compensation):
            tensors |= {
                "comp": caches.comp.comp,
                "comp_log_weight": caches.comp.log_weight,
                "comp_count": caches.comp.count,
            }
        data = {name: t.data_ptr() for name, t in tensors.items() if t is not None}
        inputs = self.tensors(qkv.shape[0], qkv.shape[1], max(1, max_past), data)
        for tensor, name in zip(inputs, self.input_names, strict=True):
            if name in tensors:  # caches without gaps: the shapes are the whole truth
                found = tensors[name]
                assert found is not None
                assert list(found.shape) == list(tensor.shape), name
                assert found.is_contiguous(), name
        self.run(inputs, out.data_ptr(), workspace.data_ptr())


CYCLIC, STATE = 1, 2
"""Field local_cache."""


@dataclass(frozen=True)
class CallSizes:
    """Sizes of a call of RazorGptAttention.

    Attributes:
        pools, blocks: of the block offsets. cache_layers: of the engine.
    """

    batch: int
    tokens: int
    pools: int
    blocks: int
    cache_layers: int
    max_batch: int


def gpt_inputs(
    layer: Layer, design: int, sizes: CallSizes, data: Mapping[str, int]
) -> dict[str, Tensor]:
    """Inputs of RazorGptAttention by name, in their order; ``data``: addresses."""
    batch, pools, rows = sizes.batch, sizes.pools, sizes.cache_layers
    width = (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim
    shapes: list[tuple[str, str, list[int]]] = [
        ("qkv", dtype_name(layer.dtype), [sizes.tokens, width]),
        ("sequence_length", "int32", [batch]),
        ("host_past_key_value_lengths", "int32", [batch]),
        ("host_max_attention_window_sizes", "int32", [rows]),
        ("host_sink_token_length", "int32", [1]),
        ("context_lengths", "int32", [batch]),
        ("cache_indirection", "int32", [sizes.max_batch, 1, layer.n_max]),
        ("host_request_types", "int32", [batch]),
        ("kv_cache_block_offsets", "int32", [pools, batch, 2, sizes.blocks]),
        ("host_kv_cache_block_offsets", "int32", [pools, batch, 2, sizes.blocks]),
        ("host_kv_cache_pool_pointers", "int64", [pools, 2]),
        ("host_kv_cache_pool_mapping", "int32", [rows, 2]),
    ]
    if layer.fp8:
        shapes += [
            ("kv_orig_quant_scale", "float32", [1]),
            ("kv_quant_orig_scale", "float32", [1]),
        ]
    if layer.position in ("half", "interleaved"):
        dim = layer.rotary_dim or layer.head_dim
        shapes += [
            ("rotary_inv_freq", "float32", [dim // 2]),
            ("rotary_cos_sin", "float32", [1, layer.n_max * dim]),
        ]
    if layer.position == "alibi":
        shapes.append(("alibi_slopes", "float32", [layer.num_heads]))
    shapes += [
        ("host_context_lengths", "int32", [batch]),
        ("host_runtime_perf_knobs", "int64", [16]),
        ("host_context_progress", "int64", [1]),
    ]
    if design == STATE:
        shapes += [
            ("slot_mapping", "int32", [batch]),
            ("conv_state_ptr", "int64", [1]),
            ("rnn_state_ptr", "int64", [1]),
        ]
    return {name: Tensor(dtype, dims, data.get(name, 0)) for name, dtype, dims in shapes}


class GptDriver(Driver):
    """RazorGptAttention: packed calls over the caches of a ``cyclic_store`` or ``state_store``.

    Attributes:
        change: what a test does to the inputs of a call, by name, before the plugin sees them.
    """

    name = "RazorGptAttention"
    LAYER = 3  # of the model; its cache layers are 6 and 7 of 10
    MAX_BATCH = 8  # of the server

    def __init__(self, host: Host, layer: Layer, tokens_per_block: int, design: int) -> None:
        assert layer.retrieval == tuple(range(len(layer.retrieval))), "retrieval heads come first"
        self.design, self.tokens_per_block = design, tokens_per_block
        super().__init__(host, layer, gpt_fields(layer, tokens_per_block, design))
        self.change: dict[str, Tensor] = {}

    @property
    def window(self) -> int:
        return self.layer.policy.sink_tokens + self.layer.ring_rows

    def workspace_size(self, config: LayerConfig, limits: Limits) -> int:
        tokens = limits.max_context_tokens + limits.max_batch
        inputs = self.tensors(limits.max_batch, tokens, 1, {})
        return self.builder.workspace_size(inputs, self.outputs(inputs, 0))

    def tensors(
        self, batch: int, tokens: int, blocks: int, data: dict[str, int], pools: int = 2
    ) -> list[Tensor]:
        sizes = CallSizes(batch, tokens, pools, blocks, cache_layers=10, max_batch=self.MAX_BATCH)
        inputs = gpt_inputs(self.layer, self.design, sizes, data)
        self.input_names = list(inputs)
        return list(inputs.values())

    def attention(
        self,
        config: LayerConfig,
        qkv: TorchTensor,
        caches: Caches,
        *,
        total: TorchTensor,
        num_contexts: int,
        out: TorchTensor,
        workspace: TorchTensor,
        chunk: TorchTensor | None = None,
        cos_sin: TorchTensor | None = None,
        alibi_slopes: TorchTensor | None = None,
        k_scale: TorchTensor | None = None,
        **_: object,
    ) -> None:
        layer, batch = self.layer, len(total)
        contexts = range(num_contexts)
        # Of a generation TensorRT-LLM says how long its prompt was; nothing that matters.
        chunks = [int(chunk[b]) if chunk is not None and b in contexts else 5 for b in range(batch)]
        totals = total.tolist()
        data: dict[str, int] = {"qkv": qkv.data_ptr()}
        host = HostArrays(data)
        host.add("sequence_length", totals, np.int32)
        host.add("context_lengths", chunks, np.int32)
        host.add("host_context_lengths", chunks, np.int32)
        past = [n if b in contexts else n - 1 for b, n in enumerate(totals)]
        host.add("host_past_key_value_lengths", past, np.int32)
        host.add("host_request_types", [int(b not in contexts) for b in range(batch)], np.int32)
        cyclic = self.design == CYCLIC
        host.add("host_sink_token_length", [layer.policy.sink_tokens if cyclic else 0], np.int32)
        windows = [layer.n_max, self.window if cyclic else layer.n_max] * 5
        host.add("host_max_attention_window_sizes", windows, np.int32)
        pools = [v for v in (caches.full, caches.local) if isinstance(v, PagedView)]
        blocks = max((v.block_offsets.shape[2] for v in pools), default=1)
        offsets = np.full((max(1, len(pools)), batch, 2, blocks), 0x7FFFFF, np.int32)
        pointers, mapping = np.zeros((len(offsets), 2), np.int64), np.zeros((10, 2), np.int32)
        for i, view in enumerate(pools):
            table = view.block_offsets.numpy()
            offsets[i, :, :, : table.shape[2]] = table
            pointers[i, 0] = view.pool.data_ptr()
            row = 2 * self.LAYER + (view is caches.local)
            assert view.block_bytes is not None
            mapping[row] = i, view.layer_offset // (2 * view.block_bytes)
        host.add("kv_cache_block_offsets", offsets)
        host.add("host_kv_cache_pool_pointers", pointers)
        host.add("host_kv_cache_pool_mapping", mapping)
        if cos_sin is not None:
            data["rotary_cos_sin"] = cos_sin.data_ptr()
        if alibi_slopes is not None:
            data["alibi_slopes"] = alibi_slopes.data_ptr()
        if layer.fp8:
            assert layer.k_scale == layer.v_scale
            host.add("kv_quant_orig_scale", [layer.k_scale or 1.0], np.float32)
        if isinstance(caches.local, ContiguousView):
            assert caches.local.slots is not None
            host.add("slot_mapping", caches.local.slots.numpy())
            host.add("conv_state_ptr", [caches.local.k.data_ptr()], np.int64)
            comp = caches.comp.comp.data_ptr() if isinstance(caches.comp, Compensation) else 0
            host.add("rnn_state_ptr", [comp], np.int64)
        inputs = self.tensors(batch, qkv.shape[0], blocks, data, len(offsets))
        inputs = [
            self.change.get(name, t) for name, t in zip(self.input_names, inputs, strict=True)
        ]
        self.run(inputs, out.data_ptr(), workspace.data_ptr())


class HostArrays:
    """Small arrays that live as long as this object; addresses go to ``data``."""

    def __init__(self, data: dict[str, int]) -> None:
        self._data, self._buffers = data, []

    def add(
        self, name: str, values: Sequence[float] | np.ndarray, dtype: type | None = None
    ) -> None:
        array = np.ascontiguousarray(values, dtype)
        self._buffers.append(Buffer(name, array.nbytes, array))
        self._data[name] = self._buffers[-1].pointer


POSITIONS = {"half": 1, "interleaved": 2, "alibi": 3, "none": 4}
"""razor_position."""


def gpt_fields(layer: Layer, tokens_per_block: int, design: int) -> dict[str, FieldValue]:
    """Fields of RazorGptAttention."""
    cyclic, local = design == CYCLIC, len(layer.local)
    if cyclic:
        assert layer.bubble == bubble(layer.policy.sink_tokens, tokens_per_block)
    ring = comp = 0
    if not cyclic and local:
        ring = 2 * local * layer.rows("local") * layer.row_bytes + 32
        m = layer.policy.comp_tokens
        comp = 4 * local * m * (2 * layer.head_dim + 2)
        comp += (-comp % 16 + 16) if m else 0
    return policy_fields(layer) | {
        "num_retrieval": len(layer.retrieval),
        "position": POSITIONS[layer.position],
        "rotary_dim": layer.rotary_dim or layer.head_dim
        if layer.position in ("half", "interleaved")
        else 0,
        "kv_cache_fp8": int(layer.fp8),
        "tokens_per_block": tokens_per_block,
        "local_cache": design,
        "layer_full": 2 * GptDriver.LAYER if layer.retrieval else -1,
        "layer_local": 2 * GptDriver.LAYER + 1 if cyclic and local else -1,
        "window": layer.policy.sink_tokens + layer.ring_rows if cyclic and local else 0,
        "ring_slot_bytes": np.array([ring], np.int64),
        "comp_slot_bytes": np.array([comp], np.int64),
    }
