"""H2O: the heavy hitters of all queries, and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trt_razor.evaluation.methods.budget import check_budget
from trt_razor.evaluation.methods.dropping import HeavyScore, drop_tokens
from trt_razor.evaluation.methods.interface import METHODS, Kept, Read


@METHODS.add("h2o")
@dataclass(frozen=True)
class H2o:
    """Heavy-Hitter Oracle (Zhang et al. 2023, https://arxiv.org/abs/2306.14048).

    Per KV head, half the rows are the most recent tokens and half those with the most attention
    accumulated over all queries of the context and the group's query heads. Chosen once, after the
    context, from the full map (the paper evicts token by token, and so scores later tokens by what
    earlier evictions left); everything that comes later is kept.

    Attributes:
        budget: share of the dense cache: floor(budget · n) rows a head.
    """

    budget: float

    name: ClassVar[str]
    queries: ClassVar[str] = "all"
    query_aware: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_budget(self.budget)

    def compress(self, read: Read) -> list[Kept]:
        """See ``Method.compress``."""
        return drop_tokens(read, HeavyScore(), self.budget)
