"""The operator alone, one node, run by ONNX Runtime: for tests of single rules on keys made by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from trt_razor.graph.inline import inline_graph
from trt_razor.graph.nodes import DTYPES, IR_VERSION, OPSET
from trt_razor.graph.operator import DOMAIN, RazorAttention

State = dict[str, np.ndarray]


def operator_model(op: RazorAttention, extra_outputs: tuple[str, ...] = ()) -> onnx.ModelProto:
    """One node of the operator as a flattened model."""
    info = helper.make_tensor_value_info
    i32, i8, f32 = onnx.TensorProto.INT32, onnx.TensorProto.INT8, onnx.TensorProto.FLOAT
    r, lh, d = len(op.retrieval_heads), len(op.local_heads), op.head_dim
    m, rows = op.policy.comp_tokens, op.policy.local_rows(op.max_seq_len)
    shapes = {
        "full_k": (r, op.max_seq_len, d),
        "full_v": (r, op.max_seq_len, d),
        "local_k": (lh, rows, d),
        "local_v": (lh, rows, d),
        "comp": (lh, m, 2, d),
        "comp_log_weight": (lh, m),
        "comp_count": (lh, m),
    }
    width = (op.num_heads + 2 * op.num_kv_heads) * d
    inputs = [
        info("qkv", DTYPES[op.dtype], ["b", "s", width]),
        info("past", i32, ["b"]),
        info("chunk", i32, ["b"]),
        info("past_span", i8, ["p"]),
        info("cos_sin", f32, [op.max_seq_len, d]),
    ]
    outputs = [info("out", DTYPES[op.dtype], ["b", "s", op.num_heads * d])]
    for name in op.cache_names():
        dtype = f32 if name.startswith("comp") else DTYPES[op.dtype]
        inputs.append(info(name, dtype, ["b", *shapes[name]]))
        outputs.append(info(f"{name}_out", dtype, ["b", *shapes[name]]))
    graph = helper.make_graph(
        [op.node("node", op.input_names(), op.output_names())], "operator", inputs, outputs
    )
    model = helper.make_model(
        graph,
        functions=[op.function()],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=IR_VERSION,
    )
    flat = inline_graph(model, in_place=True)
    flat.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra_outputs)
    return flat


class Operator:
    """Runs the node for a batch of one or more slots and keeps their caches."""

    def __init__(self, op: RazorAttention, slots: int = 1) -> None:
        self.op = op
        self.session = ort.InferenceSession(
            operator_model(op).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        self.state: State = {}
        for i in self.session.get_inputs()[5:]:
            empty = -np.inf if i.name == "comp_log_weight" else 0
            self.state[i.name] = np.full(
                (slots, *i.shape[1:]), empty, np.float16 if "float16" in i.type else np.float32
            )
        self.past = np.zeros(slots, np.int32)

    def run(self, qkv: np.ndarray, chunk: list[int]) -> np.ndarray:
        """qkv [slots, S, (Hq + 2 Hkv) D]; returns out."""
        table = np.zeros((self.op.max_seq_len, self.op.head_dim), np.float32)
        table[:, : self.op.head_dim // 2] = 1.0  # cos = 1, sin = 0: keys are cached as given
        feeds = {
            "qkv": qkv.astype(self.op.dtype),
            "past": self.past,
            "chunk": np.array(chunk, np.int32),
            "past_span": np.zeros(max(1, self.past.max()), np.int8),
            "cos_sin": table,
        }
        out, *caches = self.session.run(None, {**feeds, **self.state})
        self.state = dict(zip(self.state, caches, strict=True))
        self.past = self.past + np.array(chunk, np.int32)
        return out
