"""The operator ``trt_razor::RazorAttention``: its interface and its body as an ONNX function.

The node carries the attributes that the TensorRT plugin of the same name reads; the function body
is what every other executor runs. Both follow docs/semantics.md. One function per set of
retrieval heads: the ``overload`` of the function names the set.

Interface (B = slots, S = tokens of the chunk, right padded; D = head_dim; T = dtype of the model)

=================  ==========================  =======  =============================================
input              shape                       dtype    meaning
=================  ==========================  =======  =============================================
qkv                [B, S, (Hq + 2 Hkv) D]      T        before RoPE, after QK-norm
past               [B]                         int32    tokens already cached, n
chunk              [B]                         int32    valid tokens of this chunk; 0 = idle row
past_span          [P]                         int8     only P counts: P >= 1 and P >= max(past)
cos_sin            [positions, D]              float32  RoPE: cos (D/2) then sin (D/2)
alibi_slopes       [Hq]                        float32  ALiBi, in place of cos_sin
full_k, full_v     [B, R, N_max, D]            T        if R > 0
local_k, local_v   [B, Lh, N0 + H + W_cap, D]  T        if Lh > 0
comp               [B, Lh, M, 2, D]            float32  if Lh > 0 and M > 0
comp_log_weight    [B, Lh, M]                  float32  ln N_m, −inf = unused
comp_count         [B, Lh, M]                  float32  N_m
=================  ==========================  =======  =============================================

Outputs: ``out`` [B, S, Hq D], then the caches in the same order, updated. An executor may give an
output the memory of its input (updated in place): every read of an old cache happens before its
write, by data dependence and not by luck (``OperatorBody._update_local``, ``._read_comp``).

With n tokens cached, rows N0 .. N0 + h(n) − 1 of local_k and local_v hold heavy hitters
(graph/heavy.py); H = 0 has no node of that.

A row with ``chunk = 0`` changes nothing that is valid, provided ``past < N_max``. Unused rows of a
cache must hold finite numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx
from onnx import helper

from trt_razor.graph.nodes import OPSET
from trt_razor.policy import RazorPolicy

DOMAIN = "trt_razor"
OPERATOR = "RazorAttention"
PLUGIN_VERSION = "1"


@dataclass(frozen=True)
class RazorAttention:
    """One layer's attention: head counts, which heads retrieve, and the policy.

    Attributes:
        retrieval_heads: ascending KV head indices; all of them = dense attention.
        max_seq_len: N_max, capacity of a slot in tokens.
        position: ``rope`` or ``alibi``.
        dtype: T, ``float32``, ``float16`` or ``bfloat16``.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    retrieval_heads: tuple[int, ...]
    policy: RazorPolicy
    max_seq_len: int
    position: str = "rope"
    dtype: str = "float32"

    @property
    def local_heads(self) -> tuple[int, ...]:
        keep = set(self.retrieval_heads)
        return tuple(h for h in range(self.num_kv_heads) if h not in keep)

    @property
    def overload(self) -> str:
        """Name of the variant, unique per set of retrieval heads."""
        return "_".join(["retrieval", *map(str, self.retrieval_heads)])

    @property
    def has_comp(self) -> bool:
        return bool(self.local_heads) and self.policy.comp_tokens > 0

    def cache_names(self) -> list[str]:
        """Cache inputs in order; outputs have the same order."""
        names: list[str] = []
        if self.retrieval_heads:
            names += ["full_k", "full_v"]
        if self.local_heads:
            names += ["local_k", "local_v"]
        if self.has_comp:
            names += ["comp", "comp_log_weight", "comp_count"]
        return names

    def input_names(self) -> list[str]:
        table = "cos_sin" if self.position == "rope" else "alibi_slopes"
        return ["qkv", "past", "chunk", "past_span", table, *self.cache_names()]

    def output_names(self) -> list[str]:
        return ["out", *(f"{n}_out" for n in self.cache_names())]

    def attributes(self) -> dict[str, Any]:
        """Attributes of the node, as the plugin reads them."""
        p = self.policy
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "retrieval_heads": list(self.retrieval_heads),
            "max_seq_len": self.max_seq_len,
            "sink_tokens": p.sink_tokens,
            "min_window": p.min_window,
            "compression": p.compression or 0,  # 0 = fixed window
            "comp_tokens": p.comp_tokens,
            "heavy_hitters": p.heavy_hitters,
            "scale": self.head_dim**-0.5,
            "plugin_namespace": DOMAIN,
            "plugin_version": PLUGIN_VERSION,
        }

    def node(self, name: str, inputs: list[str], outputs: list[str]) -> onnx.NodeProto:
        """The node for one layer; ``inputs`` and ``outputs`` in the order of the name lists."""
        attrs = self.attributes()
        heads = attrs.pop("retrieval_heads")
        node = helper.make_node(
            OPERATOR, inputs, outputs, name=name, domain=DOMAIN, overload=self.overload, **attrs
        )
        node.attribute.append(
            helper.make_attribute("retrieval_heads", heads, attr_type=onnx.AttributeProto.INTS)
        )
        return node

    def function(self) -> onnx.FunctionProto:
        """The body, specialised for this variant."""
        from trt_razor.graph.body import OperatorBody

        body = OperatorBody(self)
        body.build()
        return helper.make_function(
            DOMAIN,
            OPERATOR,
            self.input_names(),
            self.output_names(),
            body.n.list,
            [helper.make_opsetid("", OPSET)],
            attributes=sorted(self.attributes()),
            overload=self.overload,
            doc_string="RazorAttention, arXiv 2407.15891: split-head KV cache attention",
        )
