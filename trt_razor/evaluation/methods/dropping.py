"""Token-dropping methods: a score for each token, and the best ones stay.

``h2o`` and ``snapkv`` apply one to all heads, ``inside`` to Razor's retrieval heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trt_razor.errors import UsageError, did_you_mean
from trt_razor.evaluation.methods.budget import rows_within
from trt_razor.evaluation.methods.interface import RECENT_QUERIES, Kept, Read, ReadLayer
from trt_razor.evaluation.methods.kept import KeptRows, RowsKept
from trt_razor.evaluation.methods.scores import accumulated_attention, window_attention

POOLINGS: dict[str, Callable[..., Tensor]] = {
    "max": torch.nn.functional.max_pool1d,
    "avg": torch.nn.functional.avg_pool1d,
}


@dataclass(frozen=True)
class SnapScore:
    """SnapKV's choice: the tokens that the last queries attend to, with their neighbours.

    Attributes:
        window: last tokens, whose queries vote and which are kept themselves.
        kernel: odd width of the pooling over neighbours; 1 = none.
        pooling: "max" or "avg".
    """

    window: int = 32
    kernel: int = 7
    pooling: str = "max"

    def __post_init__(self) -> None:
        if not 1 <= self.window <= RECENT_QUERIES:
            raise UsageError(f"window: expected 1..{RECENT_QUERIES} queries, found {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(f"kernel: expected an odd number >= 1, found {self.kernel}")
        if self.pooling not in POOLINGS:
            raise UsageError(f"pooling '{self.pooling}': {did_you_mean(self.pooling, POOLINGS)}")

    @property
    def least(self) -> int:
        """Fewest rows that make sense."""
        return self.window + 1

    def kept(self, layer: ReadLayer, rows: int, heads: list[int]) -> Tensor:
        """Positions kept, int64 [len(heads), rows], ascending: the window and the best others."""
        window = min(self.window, layer.queries.shape[1], rows)
        score = window_attention(layer, window, heads)[:, : layer.n - window]
        if score.shape[1]:
            pad = self.kernel // 2
            score = POOLINGS[self.pooling](score[None], self.kernel, 1, pad)[0]
        return _best_and_last(score, rows, layer.n)


@dataclass(frozen=True)
class HeavyScore:
    """H2O's choice: half the rows for the last tokens, half for those with most attention ever."""

    @property
    def least(self) -> int:
        """Fewest rows that make sense."""
        return 2

    def kept(self, layer: ReadLayer, rows: int, heads: list[int]) -> Tensor:
        """Positions kept, int64 [len(heads), rows], ascending."""
        recent = min(layer.n, rows - rows // 2)
        score = accumulated_attention(layer, heads)[:, : layer.n - recent]
        return _best_and_last(score, rows, layer.n)


Score = SnapScore | HeavyScore


def drop_tokens(read: Read, score: Score, budget: float) -> list[Kept]:
    """All heads of all layers keep floor(budget · n) rows, the best by a score.

    Raises:
        UsageError: that is less than the score's least.
    """
    out: list[Kept] = []
    for x in read.layers:
        rows, heads = rows_within(budget, x.n, 0, 1, score.least), list(range(len(x.k)))
        group = take_rows(x, score.kept(x, rows, heads), heads)
        out.append(RowsKept([group], x.n, x.scale))
    return out


def take_rows(layer: ReadLayer, positions: Tensor, heads: list[int]) -> KeptRows:
    """The rows of some heads at positions [len(heads), P], for a ``RowsKept`` of these heads."""
    index = positions[..., None].expand(-1, -1, layer.k.shape[2])
    k, v = (t[heads].gather(1, index) for t in (layer.k, layer.v))
    return KeptRows.of(range(len(heads)), k, v)


def _best_and_last(score: Tensor, rows: int, n: int) -> Tensor:
    """Positions of the best scores [H, n - last] and all ``last`` positions behind them."""
    last = n - score.shape[1]
    best = score.topk(rows - last, dim=1).indices.sort(1).values
    recent = torch.arange(n - last, n, device=score.device).expand(len(score), -1)
    return torch.cat([best, recent], 1)
