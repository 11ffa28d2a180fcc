"""Razor: retrieval heads keep everything, the others sinks, a window and compensation tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from trt_razor.errors import UsageError, did_you_mean
from trt_razor.evaluation.methods.budget import allowed_bits, check_budget
from trt_razor.evaluation.methods.heads import HeadOptions
from trt_razor.evaluation.methods.interface import METHODS, Kept, Read, ReadLayer
from trt_razor.evaluation.methods.kept import ROOM, RazorKept, razor_bits, row_bits
from trt_razor.policy import PRESETS, RazorPolicy
from trt_razor.reference.attention import group_queries
from trt_razor.reference.cache import LayerCache


@METHODS.add("razor")
@dataclass(frozen=True, kw_only=True)
class Razor(HeadOptions):
    """RazorAttention (Tang et al. 2024, https://arxiv.org/abs/2407.15891) as docs/semantics.md has it.

    The context is one chunk (dense prefill, then compression). Later tokens go through the same
    cache: it goes on dropping and folding.

    Attributes:
        policy: name of a preset, or fields of ``RazorPolicy``; fields that are not named are those
            of the preset ``paper``.
        budget: share of the dense cache at the context's length. The policy's window is then
            replaced by the largest fixed one that fits.
    """

    policy: str | Mapping[str, Any] = "paper"
    budget: float | None = None

    name: ClassVar[str]
    queries: ClassVar[str] = "recent"
    query_aware: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        read_policy(self.policy)
        if self.budget is not None:
            check_budget(self.budget)

    def compress(self, read: Read) -> list[Kept]:
        """See ``Method.compress``."""
        return razor_caches(read, self.retrieval_heads(read), read_policy(self.policy), self.budget)


def read_policy(policy: str | Mapping[str, Any]) -> RazorPolicy:
    """A preset by name, or the preset ``paper`` with some fields changed.

    Raises:
        UsageError: an unknown preset or field, or a wrong value.
    """
    if isinstance(policy, str):
        if policy not in PRESETS:
            raise UsageError(f"policy '{policy}': {did_you_mean(policy, PRESETS)}")
        return PRESETS[policy]
    if not isinstance(policy, Mapping):
        raise UsageError(f"policy: expected a preset or its fields, found {policy!r}")
    return RazorPolicy.from_json({**PRESETS["paper"].to_json(), **policy})


def razor_caches(
    read: Read,
    heads: tuple[tuple[int, ...], ...],
    policy: RazorPolicy,
    budget: float | None,
) -> list[Kept]:
    """A Razor cache a layer, with the context in it.

    Raises:
        UsageError: no window fits the budget.
    """
    if budget is not None:
        policy = solve_window(read, heads, policy, budget)
    return [RazorKept(filled(x, h, policy)) for x, h in zip(read.layers, heads, strict=True)]


def filled(layer: ReadLayer, heads: tuple[int, ...], policy: RazorPolicy) -> LayerCache:
    """Razor's cache of one layer after the context, which came as one chunk."""
    k, v = layer.k, layer.v
    cache = LayerCache(
        policy,
        heads,
        len(layer.queries),
        len(k),
        k.shape[2],
        (layer.n // ROOM + 1) * ROOM,
        k.dtype,
        k.device,
        scale=layer.scale,
    )
    if cache.full is not None:
        cache.full.update(k[list(heads)], v[list(heads)])
    if cache.local is not None:
        local = list(cache.local_heads)
        queries = group_queries(layer.queries.to(k.dtype), len(k))
        cache.local.update(k[local], v[local], queries[local])
    cache.set_length(layer.n)
    return cache


def solve_window(
    read: Read, heads: tuple[tuple[int, ...], ...], policy: RazorPolicy, budget: float
) -> RazorPolicy:
    """The policy with the largest fixed window whose bits fit the budget at this context's length.

    Raises:
        UsageError: not even a window of one token fits.
    """
    n, dim, kv = read.layers[0].n, read.layers[0].k.shape[2], len(read.layers[0].k)
    retrieval = sum(len(h) for h in heads)
    total = len(heads) * kv
    local = total - retrieval
    allowed = allowed_bits(budget, total, n, dim)

    def bits(window: int) -> int:
        wanted = policy.with_(min_window=window, compression=None)
        return razor_bits(retrieval, local, dim, wanted, n)

    # A window that drops fewer tokens than there are heavy hitters and compensation rows can need
    # less than the next smaller one; below those, bits grow with the window and halving finds the largest.
    whole = max(1, n - policy.sink_tokens)
    low, high = 0, max(0, whole - policy.comp_tokens - policy.heavy_hitters)
    for window in range(whole, high, -1):
        if bits(window) <= allowed:
            return policy.with_(min_window=window, compression=None)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bits(middle) <= allowed else (low, middle - 1)
    if low < 1:
        raise UsageError(
            f"budget: {budget} of {n} tokens is less than {retrieval} of {total} heads keep, "
            f"compensation and sinks of the others included; expected more than "
            f"{bits(1) / (total * n * row_bits(dim)):.3f}"
        )
    return policy.with_(min_window=low, compression=None)
