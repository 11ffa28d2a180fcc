"""Two head maps of one model side by side: do other probes, seeds or methods choose other heads?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.headmap import HeadMap
from trt_razor.heads.selection import Heads
from trt_razor.heads.stability import jaccard

Head = tuple[int, int]
"""(layer, KV head)."""

BAR = "█"
"""One chosen head in :func:`depth_bars`."""


@dataclass(frozen=True)
class Comparison:
    """What two choices have in common.

    Attributes:
        names: what the two are called.
        both, only_a, only_b: chosen (layer, KV head), ascending.
        total: KV heads of the model.
        correlations: (score of a, score of b, Spearman's rank correlation over all KV heads).
        a, b: the choices.
    """

    names: tuple[str, str]
    both: tuple[Head, ...]
    only_a: tuple[Head, ...]
    only_b: tuple[Head, ...]
    total: int
    correlations: tuple[tuple[str, str, float], ...]
    a: Heads
    b: Heads

    @property
    def jaccard(self) -> float:
        """|A ∩ B| / |A ∪ B|."""
        both = set(self.both)
        return jaccard(both | set(self.only_a), both | set(self.only_b))

    @property
    def by_chance(self) -> float:
        """Heads that two random choices of these sizes have in common on average."""
        a, b = (len(self.both) + len(only) for only in (self.only_a, self.only_b))
        return a * b / self.total

    def to_json(self) -> dict[str, Any]:
        """JSON values; heads are written ``layer.head``."""
        return {
            "names": list(self.names),
            "both": _written(self.both),
            "only_a": _written(self.only_a),
            "only_b": _written(self.only_b),
            "jaccard": round(self.jaccard, 4),
            "common_by_chance": round(self.by_chance, 2),
            "rank_correlation": [[a, b, round(r, 4)] for a, b, r in self.correlations],
        }

    def table(self) -> str:
        """Some lines for a terminal."""
        counts = [len(self.both) + len(only) for only in (self.only_a, self.only_b)]
        lines = [
            f"{mark}: {name}, {count} of {self.total} KV heads"
            for mark, name, count in zip("AB", self.names, counts, strict=True)
        ]
        lines.append(
            f"in both: {len(self.both)} (two random choices: {self.by_chance:.1f}), "
            f"overlap (Jaccard) {self.jaccard:.3f}"
        )
        for mark, only in (("A", self.only_a), ("B", self.only_b)):
            if only:
                lines.append(f"only {mark} (layer.head): {', '.join(_written(only))}")
        for a, b, r in self.correlations:
            what = a if a == b else f"{a} of A, {b} of B"
            lines.append(f"rank correlation of scores (Spearman), {what}: {r:.3f}")
        lines += ["", depth_bars([self.a, self.b], ("A", "B"))]
        return "\n".join(lines)


def compare(a: HeadMap, b: HeadMap, names: tuple[str, str]) -> Comparison:
    """Compare two maps of one architecture.

    Scores of the same name are compared, and, where the maps were ranked by different scores, each
    measured effect of one map with every score of the other.

    Raises:
        UsageError: maps of different models.
    """
    if a.fingerprint != b.fingerprint:
        raise UsageError(
            f"{names[1]}: a head map of '{b.model}' ({b.fingerprint[:12]}), expected one of "
            f"'{a.model}' ({a.fingerprint[:12]}) as in {names[0]}"
        )
    shape = (a.num_layers, a.num_kv_heads)
    if shape != (b.num_layers, b.num_kv_heads):
        raise UsageError(
            f"{names[1]}: expected {shape[0]} layers of {shape[1]} KV heads as in {names[0]}, found "
            f"{b.num_layers} of {b.num_kv_heads}"
        )
    first, second = _heads(a.retrieval_heads), _heads(b.retrieval_heads)
    pairs = [(name, name) for name in a.scores if name in b.scores]
    for name in a.scores:
        for other in b.scores:
            # Scores that only one of the maps has: how do they rank beside the other's?
            if name != other and (name not in b.scores or other not in a.scores):
                pairs.append((name, other))
    correlations = tuple((x, y, rank_correlation(a.scores[x], b.scores[y])) for x, y in pairs)
    return Comparison(
        names,
        tuple(sorted(first & second)),
        tuple(sorted(first - second)),
        tuple(sorted(second - first)),
        a.num_layers * a.num_kv_heads,
        correlations,
        a.retrieval_heads,
        b.retrieval_heads,
    )


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's ρ of two tables of scores: Pearson's r of their ranks, ties sharing a mean rank.

    0 if all scores of one table are equal.
    """
    x, y = (_ranks(np.asarray(t, dtype=np.float64).ravel()) for t in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else 0.0


def depth_bars(choices: list[Heads], marks: tuple[str, ...] = ("",)) -> str:
    """Chosen heads of each layer as bars of text, one column a choice.

    ::

        layer  A       B
            0  ██ 2    █ 1
    """
    width = max((len(row) for c in choices for row in c), default=0) + 4
    lines = [f"layer  {''.join(f'{mark:<{width}}' for mark in marks)}".rstrip()]
    for layer, rows in enumerate(zip(*choices, strict=True)):
        bars = (f"{BAR * len(row)} {len(row)}" if row else "·" for row in rows)
        lines.append(f"{layer:>5}  {''.join(f'{bar:<{width}}' for bar in bars)}".rstrip())
    return "\n".join(lines)


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: np.ndarray = (last - (counts - 1) / 2)[place]
    return ranks


def _heads(chosen: Heads) -> set[Head]:
    return {(layer, h) for layer, row in enumerate(chosen) for h in row}


def _written(heads: tuple[Head, ...]) -> list[str]:
    return [f"{layer}.{h}" for layer, h in heads]
