"""Decoder-only models as one ONNX graph for prefill, chunked prefill and decode.

Inputs: ``input_ids`` [B, S] int32, right padded; ``past`` [B] and ``chunk`` [B] int32;
``past_span`` [P] int8 (only its length is read, see graph/operator.py); ``logits_index`` [B, T]
int32, the places of the chunk whose logits are wanted; then the caches of
``planner.cache_tensors``, each with a leading batch axis.

Outputs: ``logits`` [B, T, vocab] float32, and every cache again with ``_out`` behind its name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from trt_razor import __version__
from trt_razor.files import write_bytes_atomic
from trt_razor.graph.nodes import DTYPES, IR_VERSION, OPSET, Nodes
from trt_razor.graph.operator import DOMAIN
from trt_razor.graph.options import GraphOptions
from trt_razor.graph.weights import WeightFile
from trt_razor.models.checkpoint import Checkpoint
from trt_razor.models.positions import alibi_slopes, rope_table
from trt_razor.models.stored import convert

GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"


def export_decoder(
    checkpoint: Checkpoint,
    options: GraphOptions,
    directory: Path,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write ``model.onnx`` and ``model.onnx.data`` into ``directory``.

    Weights are read, converted and written one by one, so that memory does not grow with the
    model. Linear weights keep their [out, in] layout (Gemm with transB); q, k, v and gate, up are
    joined.

    Args:
        progress: called with the bytes written since the last call; they add up to about
            ``weight_bytes``.

    Returns:
        Path of the graph file.

    Raises:
        UsageError: impossible options. RazorError: weights that do not fit the dtype.
        OSError: the folder cannot be written.
    """
    spec = checkpoint.spec
    options.validate(spec)
    with WeightFile(directory / WEIGHTS_FILE, progress) as weights:
        writer = _DecoderWriter(checkpoint, options, weights)
        model = writer.model()
    path = directory / GRAPH_FILE
    write_bytes_atomic(path, model.SerializeToString(deterministic=True))
    return path


class _DecoderWriter:
    def __init__(self, checkpoint: Checkpoint, options: GraphOptions, weights: WeightFile) -> None:
        self.ckpt = checkpoint
        self.spec = checkpoint.spec
        self.options = options
        self.weights = weights
        self.n = Nodes("")
        self.functions: dict[str, onnx.FunctionProto] = {}
        self.half = options.dtype != "float32"

    # Weights ----------------------------------------------------------------------------------
    def _weight(self, *names: str, as_name: str | None = None) -> str:
        """One initialiser from one or more tensors joined along their first axis."""
        parts = [convert(self.ckpt.tensor(x), self.options.dtype, x) for x in names]
        value = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self.weights.add(as_name or names[0], value)

    def _linear(self, x: str, where: str, projections: tuple[str, ...], bias: bool) -> str:
        """x [tokens, in] → [tokens, out]; several projections are computed as one."""
        joined = f"{where}.{'_'.join(projections)}"
        names = [f"{where}.{p}" for p in projections]
        inputs = [x, self._weight(*(f"{w}.weight" for w in names), as_name=f"{joined}.weight")]
        if bias:
            inputs.append(self._weight(*(f"{w}.bias" for w in names), as_name=f"{joined}.bias"))
        return self.n.op("Gemm", *inputs, transB=1)

    def _norm(self, x: str, name: str) -> str:
        """RMSNorm over the last axis, in float32."""
        n = self.n
        weight = self._weight(name)
        if self.half:
            x = n.cast(x, "float32")
        square = n.op("Pow", x, n.f32(2.0))
        mean = n.op("ReduceMean", square, n.i64s([-1]), keepdims=1)
        root = n.op("Sqrt", n.add(mean, n.f32(self.spec.rms_norm_eps)))
        y = n.div(x, root)
        if self.half:
            y = n.cast(y, self.options.dtype)
        return n.mul(y, weight)

    # Layers -----------------------------------------------------------------------------------
    def _attention(self, layer: int, x: str, table: str, caches: dict[str, list[str]]) -> str:
        n, s = self.n, self.spec
        where = f"model.layers.{layer}.self_attn"
        qkv = self._linear(x, where, ("q_proj", "k_proj", "v_proj"), s.qkv_bias)
        total = s.num_heads + 2 * s.num_kv_heads
        if s.qk_norm:
            qkv = n.reshape(qkv, -1, total, s.head_dim)
            q, k, v = n.split(qkv, [s.num_heads, s.num_kv_heads, s.num_kv_heads], axis=1)
            q = self._norm(q, f"{where}.q_norm.weight")
            k = self._norm(k, f"{where}.k_norm.weight")
            qkv = n.concat(q, k, v, axis=1)
        qkv = n.reshape(qkv, self.batch, self.seq, total * s.head_dim)
        attention = self.options.attention(s, layer)
        if attention.overload not in self.functions:
            self.functions[attention.overload] = attention.function()
        mine = caches[str(layer)]
        out = f"layer_{layer}_attention"
        n.list.append(
            attention.node(
                f"layer_{layer}_RazorAttention",
                [qkv, "past", "chunk", "past_span", table, *mine],
                [out, *(f"{c}_out" for c in mine)],
            )
        )
        out = n.reshape(out, -1, s.q_size)
        return self._linear(out, where, ("o_proj",), s.o_bias)

    def _mlp(self, layer: int, x: str) -> str:
        n, s = self.n, self.spec
        where = f"model.layers.{layer}.mlp"
        both = self._linear(x, where, ("gate_proj", "up_proj"), s.mlp_bias)
        gate, up = n.split(both, [s.intermediate_size, s.intermediate_size], axis=1)
        x = n.mul(n.mul(gate, n.op("Sigmoid", gate)), up)
        return self._linear(x, where, ("down_proj",), s.mlp_bias)

    def model(self) -> onnx.ModelProto:
        n, s, options = self.n, self.spec, self.options
        self.batch, self.seq = n.dim("input_ids", 0), n.dim("input_ids", 1)
        if s.position == "rope":
            table = self.weights.add("cos_sin", rope_table(s, options.max_seq_len))
        else:
            table = self.weights.add("alibi_slopes", alibi_slopes(s.num_heads))
        caches: dict[str, list[str]] = {}
        for t in options.caches(s):
            caches.setdefault(str(t.layer), []).append(t.name)

        embedding = self._weight("model.embed_tokens.weight")
        x = n.reshape(n.op("Gather", embedding, "input_ids", axis=0), -1, s.hidden_size)
        for i in range(s.num_layers):
            where = f"model.layers.{i}"
            y = self._attention(i, self._norm(x, f"{where}.input_layernorm.weight"), table, caches)
            x = n.add(x, y)
            x = n.add(x, self._mlp(i, self._norm(x, f"{where}.post_attention_layernorm.weight")))

        # Only the wanted rows go through the vocabulary matrix.
        first = n.mul(n.unsqueeze(n.arange(self.batch), 1), n.scalar(self.seq))
        rows = n.reshape(n.add(n.cast("logits_index", "int64"), first), -1)
        x = self._norm(n.op("Gather", x, rows, axis=0), "model.norm.weight")
        head = embedding if s.tie_embeddings else self._weight("lm_head.weight")
        logits = n.op("Gemm", x, head, transB=1)
        if self.half:
            logits = n.cast(logits, "float32")
        n.reshape(
            logits, n.dim("logits_index", 0), n.dim("logits_index", 1), s.vocab_size, out="logits"
        )

        info = helper.make_tensor_value_info
        i32, i8, f32 = onnx.TensorProto.INT32, onnx.TensorProto.INT8, onnx.TensorProto.FLOAT
        inputs = [
            info("input_ids", i32, ["batch", "seq"]),
            info("past", i32, ["batch"]),
            info("chunk", i32, ["batch"]),
            info("past_span", i8, ["past_span"]),
            info("logits_index", i32, ["batch", "wanted"]),
        ]
        outputs = [info("logits", f32, ["batch", "wanted", s.vocab_size])]
        for t in options.caches(s):
            inputs.append(info(t.name, DTYPES[t.dtype], ["batch", *t.shape]))
            outputs.append(info(f"{t.name}_out", DTYPES[t.dtype], ["batch", *t.shape]))
        name = s.name.encode("ascii", "replace").decode()
        graph = helper.make_graph(n.list, name, inputs, outputs, self.weights.initializers)
        model = helper.make_model(
            graph,
            functions=list(self.functions.values()),
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
            ir_version=IR_VERSION,
            producer_name="trt_razor",
            producer_version=__version__,
        )
        return model
