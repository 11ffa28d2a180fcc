"""How much the choice depends on the random tokens of the probe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from trt_razor.heads.selection import Heads


@dataclass(frozen=True)
class Stability:
    """Agreement of the choices that single seeds would have made.

    Attributes:
        seeds: the seeds compared (at least two).
        overlaps: for every pair of seeds, (seed a, seed b, Jaccard |A ∩ B| / |A ∪ B|).
        frequency: (layer, KV head) → share of the seeds that choose it, for heads chosen at all.
    """

    seeds: tuple[int, ...]
    overlaps: tuple[tuple[int, int, float], ...]
    frequency: dict[tuple[int, int], float]

    @property
    def mean(self) -> float:
        return sum(j for _, _, j in self.overlaps) / len(self.overlaps)

    @property
    def min(self) -> float:
        return min(j for _, _, j in self.overlaps)

    def to_json(self) -> dict[str, Any]:
        """JSON values; heads are written ``layer.head``, those that every seed chooses left out."""
        return {
            "seeds": list(self.seeds),
            "mean_jaccard": round(self.mean, 4),
            "min_jaccard": round(self.min, 4),
            "jaccard": {f"{a}-{b}": round(j, 4) for a, b, j in self.overlaps},
            "chosen_by_all": sum(f == 1 for f in self.frequency.values()),
            "chosen_by_some": {
                f"{layer}.{head}": round(f, 4)
                for (layer, head), f in sorted(self.frequency.items())
                if f < 1
            },
        }

    def table(self) -> str:
        """A few lines for a terminal."""
        lines = [f"stability over seeds {', '.join(map(str, self.seeds))}"]
        lines += [f"  seeds {a} and {b}: overlap (Jaccard) {j:.3f}" for a, b, j in self.overlaps]
        lines.append(f"  mean {self.mean:.3f}, least {self.min:.3f}")
        always = sum(f == 1 for f in self.frequency.values())
        lines.append(f"  {always} head{'s' * (always != 1)} chosen by every seed")
        unsure = [
            f"{layer}.{head} ({f:.0%})"
            for (layer, head), f in sorted(self.frequency.items())
            if f < 1
        ]
        if unsure:
            lines.append(f"  by some only (layer.head): {', '.join(unsure)}")
        return "\n".join(lines)


def stability(seeds: Sequence[int], choices: Sequence[Heads]) -> Stability:
    """Compare the choices of single seeds (two or more, in the order of ``seeds``)."""
    sets = [{(layer, h) for layer, row in enumerate(c) for h in row} for c in choices]
    overlaps = tuple(
        (seeds[a], seeds[b], jaccard(sets[a], sets[b]))
        for a, b in combinations(range(len(seeds)), 2)
    )
    counts = Counter(head for chosen in sets for head in chosen)
    return Stability(tuple(seeds), overlaps, {h: c / len(sets) for h, c in counts.items()})


def jaccard(a: set[tuple[int, int]], b: set[tuple[int, int]]) -> float:
    """|A ∩ B| / |A ∪ B|; two empty sets agree."""
    return len(a & b) / len(a | b) if a | b else 1.0
