"""DuoAttention's shape: retrieval heads keep everything, the others a window that never grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trt_razor.errors import UsageError
from trt_razor.evaluation.methods.budget import check_budget
from trt_razor.evaluation.methods.heads import HeadOptions
from trt_razor.evaluation.methods.interface import METHODS, Kept, Read
from trt_razor.evaluation.methods.razor import razor_caches
from trt_razor.policy import RazorPolicy


@METHODS.add("duo")
@dataclass(frozen=True, kw_only=True)
class Duo(HeadOptions):
    """Constant sinks and window, no compensation (DuoAttention, Xiao et al. 2024,
    https://arxiv.org/abs/2410.10819).

    Its head lists are trained; ``heads`` takes one (``trt-razor heads import``), or the heads come
    from our scores as for ``razor``. The window stays what it is while more tokens come.

    Attributes:
        budget: share of the dense cache at the context's length: the largest window that fits.
        sink_tokens: first tokens that local heads keep.
    """

    budget: float
    sink_tokens: int = 4

    name: ClassVar[str]
    queries: ClassVar[str] = "recent"
    query_aware: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        if self.sink_tokens < 0:
            raise UsageError(f"sink_tokens: expected >= 0, found {self.sink_tokens}")

    def compress(self, read: Read) -> list[Kept]:
        """See ``Method.compress``."""
        policy = RazorPolicy(sink_tokens=self.sink_tokens, compression=None, comp_tokens=0)
        return razor_caches(read, self.retrieval_heads(read), policy, self.budget)
