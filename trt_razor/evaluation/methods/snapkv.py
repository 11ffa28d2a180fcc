"""SnapKV: the tokens that the last queries of the prompt look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trt_razor.evaluation.methods.budget import check_budget
from trt_razor.evaluation.methods.dropping import SnapScore, drop_tokens
from trt_razor.evaluation.methods.interface import METHODS, Kept, Read


@METHODS.add("snapkv")
@dataclass(frozen=True)
class SnapKv:
    """SnapKV (Li et al. 2024, https://arxiv.org/abs/2404.14469).

    Per KV head, the last ``window`` tokens and those with the most attention from their queries
    (summed over the window and the group's query heads), pooled over neighbours. Compresses once,
    after the context, and keeps everything that comes later.

    Attributes:
        budget: share of the dense cache: floor(budget · n) rows a head, the window included.
        window, kernel, pooling: see ``SnapScore``; 32, 7 and max are the paper's for LongBench.
        query_aware: the first question is read before compression, as in the paper's own tests.
    """

    budget: float
    window: int = 32
    kernel: int = 7
    pooling: str = "max"
    query_aware: bool = False

    name: ClassVar[str]
    queries: ClassVar[str] = "recent"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        SnapScore(self.window, self.kernel, self.pooling)

    def compress(self, read: Read) -> list[Kept]:
        """See ``Method.compress``."""
        score = SnapScore(self.window, self.kernel, self.pooling)
        return drop_tokens(read, score, self.budget)
