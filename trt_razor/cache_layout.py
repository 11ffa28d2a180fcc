"""The KV cache of an engine: which tensors, which shapes, how many bytes.

Two kinds of figures, never mixed:

* capacity: what the cache of an engine allocates per slot for ``max_seq_len`` tokens
  (``cache_tensors``, ``cache_bytes``): exact to the byte, one definition for graph, backends and
  planner;
* need: what a sequence of ``n`` tokens really keeps and a decode step reads (``kv_at``).

Pure Python: no NumPy, no torch, no weights. See docs/planning.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from trt_razor.errors import UsageError, did_you_mean
from trt_razor.headmap import HeadMap
from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy
from trt_razor.sharding import HeadSplit, check_share, count_heads

DTYPE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


def dtype_bytes(name: str) -> int:
    """Bytes per element. Raises UsageError for a dtype that engines do not have."""
    if name not in DTYPE_BYTES:
        raise UsageError(f"dtype {name!r}: unknown; {did_you_mean(name, DTYPE_BYTES)}")
    return DTYPE_BYTES[name]


def check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name}: expected an integer >= 1, found {value!r}")


# Capacity: the cache of an engine --------------------------------------------------------------
@dataclass(frozen=True)
class CacheTensor:
    """One cache tensor of an engine: a graph input and output.

    Attributes:
        shape: without the batch.
        reserved: rows of a head that no position fills by itself, those of heavy hitters: a
            sequence of n tokens has written to the first n + ``reserved`` rows at most.
    """

    name: str
    layer: int
    shape: tuple[int, ...]
    dtype: str
    reserved: int = 0

    @property
    def kind(self) -> str:
        """The name without its layer: ``full_k``, ``local_k``, ``comp`` …"""
        return self.name.rpartition("_")[0]

    @property
    def nbytes(self) -> int:
        """Bytes per slot."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a cache: per slot and kind of tensor, per slot, and for all ``batch`` slots."""

    by_kind: dict[str, int]
    per_slot: int
    batch: int

    @property
    def total(self) -> int:
        return self.per_slot * self.batch


def cache_tensors(
    spec: ModelSpec,
    head_map: HeadMap | None,
    policy: RazorPolicy | None,
    max_seq_len: int,
    kv_dtype: str = "float16",
) -> list[CacheTensor]:
    """The cache of an engine: every tensor, layer by layer, in the order of the graph's inputs.

    Per layer with R retrieval and Lh local KV heads, D = ``head_dim``, M = ``comp_tokens``:
    ``full_k, full_v`` [R, max_seq_len, D]; ``local_k, local_v`` [Lh, policy.local_rows, D], both in
    ``kv_dtype``; ``comp`` [Lh, M, 2, D], ``comp_log_weight`` [Lh, M] and ``comp_count`` [Lh, M] in
    float32. Tensors without elements do not exist. ``head_map`` None = dense: all heads are full.

    Raises:
        UsageError: the head map has another shape than the model, a head map without a policy, an
            unknown dtype, or a length below 1.
    """
    return layer_tensors(head_split(spec, head_map), spec.head_dim, policy, max_seq_len, kv_dtype)


def cache_bytes(
    spec: ModelSpec,
    head_map: HeadMap | None,
    policy: RazorPolicy | None,
    max_seq_len: int,
    batch: int = 1,
    kv_dtype: str = "float16",
) -> CacheBytes:
    """Bytes that the cache of an engine with ``batch`` slots allocates (see ``cache_tensors``)."""
    check_positive("batch", batch)
    return sum_bytes(cache_tensors(spec, head_map, policy, max_seq_len, kv_dtype), batch)


def layer_tensors(
    split: HeadSplit, head_dim: int, policy: RazorPolicy | None, max_seq_len: int, kv_dtype: str
) -> list[CacheTensor]:
    check_positive("max_seq_len", max_seq_len)
    dtype_bytes(kv_dtype)
    out: list[CacheTensor] = []
    for i, (retrieval, local) in enumerate(split):
        if local and policy is None:
            raise UsageError("policy: missing; a head map with local heads needs one")
        rows = policy.local_rows(max_seq_len) if policy else 0
        comp = policy.comp_tokens if policy else 0
        heavy = policy.heavy_hitters if policy else 0
        for name, shape, dtype in (
            ("full_k", (retrieval, max_seq_len, head_dim), kv_dtype),
            ("full_v", (retrieval, max_seq_len, head_dim), kv_dtype),
            ("local_k", (local, rows, head_dim), kv_dtype),
            ("local_v", (local, rows, head_dim), kv_dtype),
            ("comp", (local, comp, 2, head_dim), "float32"),
            ("comp_log_weight", (local, comp), "float32"),
            ("comp_count", (local, comp), "float32"),
        ):
            if math.prod(shape):
                reserved = heavy if name.startswith("local") else 0
                out.append(CacheTensor(f"{name}_{i}", i, shape, dtype, reserved))
    return out


def sum_bytes(tensors: Iterable[CacheTensor], batch: int) -> CacheBytes:
    by_kind: dict[str, int] = {}
    for t in tensors:
        by_kind[t.kind] = by_kind.get(t.kind, 0) + t.nbytes
    return CacheBytes(by_kind, sum(by_kind.values()), batch)


def head_split(spec: ModelSpec, head_map: HeadMap | None) -> list[tuple[int, int]]:
    if head_map is None:
        return [(spec.num_kv_heads, 0)] * spec.num_layers
    found = (head_map.num_layers, head_map.num_kv_heads)
    if found != (spec.num_layers, spec.num_kv_heads):
        raise UsageError(
            f"head map of '{head_map.model}': expected {spec.num_layers} layers x "
            f"{spec.num_kv_heads} KV heads for model '{spec.name}', found {found[0]} x {found[1]}"
        )
    return [(len(heads), spec.num_kv_heads - len(heads)) for heads in head_map.retrieval_heads]


# Need: what a sequence of n tokens keeps -------------------------------------------------------
@dataclass(frozen=True)
class KvNeed:
    """KV of one sequence of ``tokens`` tokens, whole model.

    Attributes:
        full_bytes, razor_bytes: bytes kept (and read by one decode step), dense and Razor.
        kept: the share r + (1 - r)·(N0 + H + 2M + L(n))/n of ``kept_share``, for 16-bit caches.
    """

    tokens: int
    full_bytes: int
    razor_bytes: int
    kept: float

    @property
    def ratio(self) -> float:
        """Dense bytes / Razor bytes."""
        return self.full_bytes / self.razor_bytes


def kept_share(share: float, policy: RazorPolicy, n: int) -> float:
    """KV kept / full KV at ``n`` tokens: r + (1 - r)·(N0 + H + 2M + L(n))/n.

    1 while every token has a row of its own, D(n) <= H. ``share`` is r, retrieval heads / KV
    heads. 2M because means are fp32 beside a 16-bit cache.
    """
    check_positive("n", n)
    check_share(share)
    if policy.dropped(n) == policy.heavy(n):
        return 1.0
    rows = policy.kept_rows + 2 * policy.comp_tokens + policy.window(n)
    return share + (1 - share) * rows / n


def kv_at(
    spec: ModelSpec,
    share_or_map: float | HeadMap,
    policy: RazorPolicy,
    n: int,
    kv_dtype: str = "float16",
) -> KvNeed:
    """Bytes that a sequence of ``n`` tokens really needs: not capacity, no unused row.

    ``share_or_map``: a head map, or r in 0..1 (the number of retrieval heads is rounded up).
    Compensation rows count once tokens are folded: a row of k and v means, its log-weight and its
    count, all fp32; at most D(n) - h(n) rows are in use.
    """
    check_positive("n", n)
    if isinstance(share_or_map, HeadMap):
        head_split(spec, share_or_map)
        retrieval, share = share_or_map.num_retrieval, share_or_map.share
    else:
        share = share_or_map
        retrieval = count_heads(share, spec.num_layers * spec.num_kv_heads)
    heads = spec.num_layers * spec.num_kv_heads
    return KvNeed(
        tokens=n,
        full_bytes=need_bytes(heads, 0, spec.head_dim, policy, n, kv_dtype),
        razor_bytes=need_bytes(retrieval, heads - retrieval, spec.head_dim, policy, n, kv_dtype),
        kept=kept_share(share, policy, n),
    )


def need_bytes(
    retrieval: int, local: int, head_dim: int, policy: RazorPolicy, n: int, kv_dtype: str
) -> int:
    folded = policy.dropped(n) - policy.heavy(n)
    row = 2 * head_dim * dtype_bytes(kv_dtype)
    comp = min(policy.comp_tokens, folded) * (2 * head_dim + 2) * DTYPE_BYTES["float32"]
    return retrieval * n * row + local * ((n - folded) * row + comp)
