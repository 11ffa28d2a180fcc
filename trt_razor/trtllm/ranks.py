"""Which KV heads a tensor-parallel rank holds, and in which order: its retrieval heads first.

TensorRT-LLM gives every rank an equal share of a layer's KV heads, with one number of heads for each
cache layer. So every rank of a layer must hold equally many retrieval heads. Their number is rounded
up by adding the next best heads, never down by dropping one; then heads move, each with its query
group. The order of heads is no part of what a model computes, so the model stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.headmap import HeadMap
from trt_razor.models.spec import ModelSpec
from trt_razor.sharding import ceil_div


@dataclass(frozen=True)
class RankLayout:
    """The KV heads of every layer in the order in which the ranks hold them.

    Attributes:
        tp_size: tensor-parallel ranks.
        order: per layer, all KV heads: rank 0's first, and within a rank its retrieval heads first.
        num_retrieval: per layer, R of every rank.
    """

    tp_size: int
    order: tuple[tuple[int, ...], ...]
    num_retrieval: tuple[int, ...]

    @property
    def heads_per_rank(self) -> int:
        return len(self.order[0]) // self.tp_size

    @property
    def num_local(self) -> tuple[int, ...]:
        """Lh of every rank, per layer."""
        return tuple(self.heads_per_rank - r for r in self.num_retrieval)

    def head_map(self, original: HeadMap) -> HeadMap:
        """The map after the permutation: which positions of the new order retrieve."""
        size = self.heads_per_rank
        heads = tuple(
            tuple(rank * size + i for rank in range(self.tp_size) for i in range(r))
            for r in self.num_retrieval
        )
        return replace(original, retrieval_heads=heads, scores={})


def check_ranks(spec: ModelSpec, tp_size: int, razor: bool) -> None:
    """Raises UsageError for a number of ranks that these heads cannot be shared out to."""
    if tp_size < 1 or spec.num_heads % tp_size:
        raise UsageError(
            f"tp_size: expected a divisor of the {spec.num_heads} attention heads of '{spec.name}', "
            f"found {tp_size}"
        )
    heads = spec.num_kv_heads
    if not razor:
        if heads % tp_size and tp_size % heads:
            raise UsageError(
                f"tp_size: expected a divisor or a multiple of the {heads} KV heads of "
                f"'{spec.name}', found {tp_size}"
            )
        return
    if heads % tp_size:
        raise UsageError(
            f"tp_size: expected a divisor of the {heads} KV heads of '{spec.name}', found {tp_size}: "
            f"ranks that share a KV head cannot compress it; use a smaller --tp-size"
        )
    if tp_size > 1 and heads == tp_size:
        raise UsageError(
            f"tp_size: {tp_size} leaves each rank one of the {heads} KV heads of '{spec.name}', which "
            f"cannot both retrieve and be local; use at most --tp-size {_below(spec, heads)}"
        )


def _below(spec: ModelSpec, heads: int) -> int:
    """The largest number of ranks with more than one KV head each."""
    return max(n for n in range(1, heads) if heads % n == 0 and spec.num_heads % n == 0)


def equalise(head_map: HeadMap, tp_size: int, every_layer: bool = False) -> HeadMap:
    """Raise the retrieval heads of each layer to a multiple of ``tp_size``.

    The heads that are added are the best of those left, by the map's scores; without scores, those
    with the lowest index.

    Args:
        every_layer: the same number in every layer, too (pipeline parallelism needs it).

    Returns:
        a map whose retrieval heads contain the given ones; the same map if nothing was added.
    """
    counts = [ceil_div(len(heads), tp_size) * tp_size for heads in head_map.retrieval_heads]
    if every_layer:
        counts = [max(counts)] * len(counts)
    scores = ranking(head_map)
    grown = []
    for heads, count, row in zip(head_map.retrieval_heads, counts, scores, strict=True):
        left = [h for h in range(head_map.num_kv_heads) if h not in heads]
        left.sort(key=lambda h: -row[h])  # stable: ties go to the lower index
        grown.append(tuple(sorted((*heads, *left[: count - len(heads)]))))
    if tuple(grown) == head_map.retrieval_heads:
        return head_map
    added = sum(map(len, grown)) - head_map.num_retrieval
    return replace(
        head_map,
        retrieval_heads=tuple(grown),
        options={**head_map.options, "added_for_ranks": added, "tp_size": tp_size},
    )


def ranking(head_map: HeadMap) -> np.ndarray:
    """[layers, KV heads] float64: how much a head deserves its whole cache, by the map's scores.

    The larger of its scores, each divided by its largest over the model, so that scores of several
    kinds compare (as in the selection ``combined``, docs/heads.md). 0 without scores.
    """
    best = np.zeros((head_map.num_layers, head_map.num_kv_heads))
    for table in head_map.scores.values():
        score = np.asarray(table, np.float64)
        top = score.max()
        if top > 0:
            best = np.maximum(best, score / top)
    return best


def rank_layout(head_map: HeadMap, tp_size: int) -> RankLayout:
    """Share the heads of an equalised map out to ranks.

    Heads keep their order within a class, so the layout of one rank with its retrieval heads in
    front already is the identity.

    Raises:
        UsageError: a layer's retrieval heads, or its KV heads, do not divide by ``tp_size``.
    """
    if head_map.num_kv_heads % tp_size:
        raise UsageError(
            f"tp_size: expected a divisor of {head_map.num_kv_heads} KV heads, found {tp_size}"
        )
    order, counts = [], []
    for layer, retrieval in enumerate(head_map.retrieval_heads):
        if len(retrieval) % tp_size:
            raise UsageError(
                f"layer {layer}: expected a multiple of {tp_size} retrieval heads, found "
                f"{len(retrieval)}"
            )
        local = head_map.local_heads(layer)
        r, lh = len(retrieval) // tp_size, len(local) // tp_size
        heads: list[int] = []
        for rank in range(tp_size):
            heads += retrieval[rank * r : (rank + 1) * r]
            heads += local[rank * lh : (rank + 1) * lh]
        order.append(tuple(heads))
        counts.append(r)
    return RankLayout(tp_size, tuple(order), tuple(counts))


def dense_layout(spec: ModelSpec, tp_size: int) -> RankLayout:
    """The layout of a dense engine: heads stay where they are, all of them retrieve."""
    every = tuple(range(spec.num_kv_heads))
    per_rank = max(1, spec.num_kv_heads // tp_size)
    return RankLayout(tp_size, (every,) * spec.num_layers, (per_rank,) * spec.num_layers)


def query_heads(kv_heads: Sequence[int], group: int) -> list[int]:
    """Query heads of KV heads in that order: ``group`` of them each."""
    return [h * group + i for h in kv_heads for i in range(group)]
