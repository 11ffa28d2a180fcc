"""Razor with a token-dropping method inside its retrieval heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trt_razor.errors import UsageError, did_you_mean
from trt_razor.evaluation.methods.budget import allowed_bits, check_budget, rows_within
from trt_razor.evaluation.methods.dropping import HeavyScore, Score, SnapScore, take_rows
from trt_razor.evaluation.methods.heads import HeadOptions
from trt_razor.evaluation.methods.interface import METHODS, Kept, Read, ReadLayer
from trt_razor.evaluation.methods.kept import (
    RazorKept,
    RowsKept,
    SplitKept,
    razor_bits,
    row_bits,
)
from trt_razor.evaluation.methods.razor import filled, read_policy
from trt_razor.policy import RazorPolicy

SCORES: dict[str, type[Any]] = {"snapkv": SnapScore, "h2o": HeavyScore}


@METHODS.add("inside")
@dataclass(frozen=True, kw_only=True)
class Inside(HeadOptions):
    """Local heads as Razor has them, retrieval heads under SnapKV or H2O.

    Razor leaves retrieval heads whole, so they are nearly all of a small cache. Local heads go on
    dropping and folding; retrieval heads are compressed once, after the context, and keep
    everything that comes later.

    Attributes:
        score: ``{name: options}`` of ``snapkv`` (window, kernel, pooling) or ``h2o`` (none).
        retrieval_budget: share of the context's tokens that a retrieval head keeps; or
        budget: share of the dense cache for the whole, at the context's length: retrieval heads get
            what the policy's local heads leave. One of the two.
        policy: as of ``razor``.
    """

    score: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"snapkv": {}})
    retrieval_budget: float | None = None
    budget: float | None = None
    policy: str | Mapping[str, Any] = "paper"

    name: ClassVar[str]
    query_aware: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [b for b in (self.retrieval_budget, self.budget) if b is not None]
        if len(given) != 1:
            raise UsageError("budget: expected either retrieval_budget or budget")
        check_budget(given[0])
        read_policy(self.policy)
        self._score()

    @property
    def queries(self) -> str:
        """See ``Method.queries``."""
        return "all" if isinstance(self._score(), HeavyScore) else "recent"

    def compress(self, read: Read) -> list[Kept]:
        """See ``Method.compress``."""
        heads, policy, score = self.retrieval_heads(read), read_policy(self.policy), self._score()
        rows = self._rows(read, sum(len(h) for h in heads), policy, score.least)
        return [_layer(x, h, rows, score, policy) for x, h in zip(read.layers, heads, strict=True)]

    def _rows(self, read: Read, retrieval: int, policy: RazorPolicy, least: int) -> int:
        """Rows of a retrieval head."""
        n, dim = read.layers[0].n, read.layers[0].k.shape[2]
        if self.budget is None:
            return rows_within(self.retrieval_budget or 1.0, n, 0, 1, least)
        total = len(read.layers) * len(read.layers[0].k)
        left = allowed_bits(self.budget, total, n, dim) - razor_bits(
            0, total - retrieval, dim, policy, n
        )
        rows = min(n, math.floor(left / (max(1, retrieval) * row_bits(dim))))
        if rows < min(least, n):
            raise UsageError(
                f"budget: local heads leave {max(0, rows)} of {n} rows to a retrieval head, expected "
                f"{least} or more; give a larger budget or the policy a smaller window"
            )
        return rows

    def _score(self) -> Score:
        if not isinstance(self.score, Mapping) or len(self.score) != 1:
            raise UsageError(f"score: expected one {{name: options}}, found {self.score!r}")
        ((name, options),) = self.score.items()
        if name not in SCORES:
            raise UsageError(f"score '{name}': {did_you_mean(str(name), SCORES)}")
        try:
            made: Score = SCORES[name](**(options or {}))
        except TypeError as e:
            raise UsageError(f"score.{name}: {e}") from None
        return made


def _layer(
    layer: ReadLayer, retrieval: tuple[int, ...], rows: int, score: Score, policy: RazorPolicy
) -> Kept:
    local = tuple(h for h in range(len(layer.k)) if h not in retrieval)
    parts: list[tuple[tuple[int, ...], Kept]] = []
    if retrieval:
        mine = list(retrieval)
        group = take_rows(layer, score.kept(layer, rows, mine), mine)
        parts.append((retrieval, RowsKept([group], layer.n, layer.scale)))
    if local:
        parts.append((local, RazorKept(filled(layer.of_heads(local), (), policy))))
    return SplitKept(parts)
