"""GraphOptions: what a graph is built for. Needs no ONNX package, so that plans can use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trt_razor.cache_layout import CacheTensor, cache_tensors
from trt_razor.errors import UsageError
from trt_razor.headmap import HeadMap
from trt_razor.models.spec import ModelSpec
from trt_razor.planner import check_seq_len
from trt_razor.policy import RazorPolicy

if TYPE_CHECKING:
    from trt_razor.graph.operator import RazorAttention


@dataclass(frozen=True)
class GraphOptions:
    """What a graph is built for.

    Attributes:
        head_map: retrieval heads; None = dense attention in every head.
        max_seq_len: capacity of a slot in tokens.
        dtype: of weights, activations and KV rows: float32, float16 or bfloat16.
    """

    policy: RazorPolicy
    head_map: HeadMap | None
    max_seq_len: int
    dtype: str = "float32"

    def attention(self, spec: ModelSpec, layer: int) -> RazorAttention:
        from trt_razor.graph.operator import RazorAttention

        if self.head_map is None:
            heads = tuple(range(spec.num_kv_heads))
        else:
            heads = self.head_map.retrieval_heads[layer]
        return RazorAttention(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            retrieval_heads=heads,
            policy=self.policy,
            max_seq_len=self.max_seq_len,
            position=spec.position,
            dtype=self.dtype,
        )

    def caches(self, spec: ModelSpec) -> list[CacheTensor]:
        return cache_tensors(spec, self.head_map, self.policy, self.max_seq_len, self.dtype)

    def validate(self, spec: ModelSpec) -> None:
        """Raises UsageError for combinations that have no defined result."""
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise UsageError(f"dtype: expected float32, float16 or bfloat16, found {self.dtype!r}")
        if self.max_seq_len < 2:
            raise UsageError(f"max_seq_len: expected at least 2 tokens, found {self.max_seq_len}")
        check_seq_len(spec, self.max_seq_len)
        if self.head_map is not None:
            self.head_map.check_model(spec.fingerprint(), spec.name, "head map")
            if spec.position == "alibi" and self.policy.comp_tokens > 1:
                raise UsageError(
                    f"comp_tokens: {self.policy.comp_tokens} with ALiBi ({spec.name}): only 0 or 1 "
                    f"is defined there, because a cluster has no position; use --comp-tokens 1"
                )
            if spec.position == "alibi" and self.policy.heavy_hitters:
                raise UsageError(
                    f"heavy_hitters: {self.policy.heavy_hitters} with ALiBi ({spec.name}): their "
                    f"rows carry no position; use --heavy-hitters 0"
                )


def weight_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of all weights in ``dtype``, as the graph stores them."""
    return spec.num_parameters() * (4 if dtype == "float32" else 2)
