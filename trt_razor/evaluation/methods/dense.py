"""Everything is kept: what all others are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trt_razor.evaluation.methods.interface import METHODS, Kept, Read
from trt_razor.evaluation.methods.kept import KeptRows, RowsKept


@METHODS.add("dense")
@dataclass(frozen=True)
class Dense:
    """Full attention over every token."""

    name: ClassVar[str]
    queries: ClassVar[str] = "recent"
    query_aware: ClassVar[bool] = False

    def compress(self, read: Read) -> list[Kept]:
        """See ``Method.compress``; rows are shared with the context, not copied."""
        return [
            RowsKept([KeptRows.of(range(len(x.k)), x.k, x.v)], x.n, x.scale) for x in read.layers
        ]
