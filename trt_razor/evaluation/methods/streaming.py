"""StreamingLLM: the first tokens and the last ones, the same for all heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from trt_razor.errors import UsageError
from trt_razor.evaluation.methods.budget import check_budget, rows_within
from trt_razor.evaluation.methods.interface import METHODS, Kept, Read
from trt_razor.evaluation.methods.kept import KeptRows, RowsKept


@METHODS.add("streaming")
@dataclass(frozen=True)
class Streaming:
    """Sinks and a recent window (Xiao et al. 2023, https://arxiv.org/abs/2309.17453).

    Compresses once, after the context, and keeps everything that comes later. Keys keep the
    positions they were read at (the paper renumbers them inside the cache, which matters for texts
    longer than the model's positions only).

    Attributes:
        budget: share of the dense cache: sinks and window together have floor(budget · n) rows.
        sink_tokens: first tokens kept.
    """

    budget: float
    sink_tokens: int = 4

    name: ClassVar[str]
    queries: ClassVar[str] = "recent"
    query_aware: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.sink_tokens < 0:
            raise UsageError(f"sink_tokens: expected >= 0, found {self.sink_tokens}")

    def compress(self, read: Read) -> list[Kept]:
        """See ``Method.compress``."""
        kept: list[Kept] = []
        for x in read.layers:
            rows = rows_within(self.budget, x.n, 0, 1, self.sink_tokens + 1)
            sinks = min(self.sink_tokens, rows)
            k, v = (
                torch.cat([t[:, :sinks], t[:, x.n - rows + sinks :]], dim=1) for t in (x.k, x.v)
            )
            kept.append(RowsKept([KeptRows.of(range(len(k)), k, v)], x.n, x.scale))
        return kept
