"""Which heads a method takes for retrieval heads: options that several methods share."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trt_razor.errors import UsageError, did_you_mean
from trt_razor.evaluation.methods.interface import Read
from trt_razor.headmap import HeadMap
from trt_razor.heads.selection import (
    MEASURED,
    SelectionOptions,
    check_share,
    select,
    share_count,
    with_share,
)
from trt_razor.heads.selection import METHODS as RANKINGS
from trt_razor.recipes import recipe_of

Heads = tuple[tuple[int, ...], ...]

SHIPPED = "shipped"
RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Retrieval heads of a model.

    Attributes:
        heads: a head map file, or "shipped": the one that comes with the package for this model.
        ranking: how heads are chosen anew from the map's scores (``heads.selection``): paper,
            combined, echo, induction, effect, gradient or greedy; "random" needs no scores; None:
            the map's own choice.
        share: of all KV heads, rounded up; of ``paper``, the share by induction. None: what
            ``SelectionOptions`` says.
        echo_share: of ``paper``, the share by echo.
        min_echo: fewest heads that ``paper`` chooses by echo; None: what ``SelectionOptions`` says.
        seed: of ``random``.
    """

    heads: str = SHIPPED
    ranking: str | None = None
    share: float | None = None
    echo_share: float | None = None
    min_echo: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        known = (*RANKINGS, RANDOM)
        if self.ranking is not None and self.ranking not in known:
            raise UsageError(f"ranking '{self.ranking}': {did_you_mean(self.ranking, known)}")
        for name in ("share", "echo_share"):
            if getattr(self, name) is not None:
                check_share(name, getattr(self, name))
        if self.ranking is None and self.share is not None:
            raise UsageError(
                f"share: {self.share} needs a ranking; without one the map's own choice is taken"
            )
        if self.ranking != "paper" and (self.echo_share, self.min_echo) != (None, None):
            raise UsageError("echo_share, min_echo: only the ranking 'paper' has them")
        if self.ranking == RANDOM and self.share is None:
            raise UsageError("share: missing; random heads need one")

    def retrieval_heads(self, read: Read) -> Heads:
        """Per layer the retrieval KV heads, ascending.

        Raises:
            UsageError: no map for this model, a map of another model, or one without scores.
        """
        layers, kv = len(read.layers), len(read.layers[0].k)
        if self.ranking == RANDOM:
            return _random(layers, kv, self.share or 0.0, self.seed)
        found = _load(self.heads, read.fingerprint, read.model)
        if read.fingerprint is not None:
            found.check_model(read.fingerprint, read.model, f"heads: {self.heads}")
        if (found.num_layers, found.num_kv_heads) != (layers, kv):
            raise UsageError(
                f"heads: {self.heads}: expected {layers} layers x {kv} KV heads, found "
                f"{found.num_layers} x {found.num_kv_heads}"
            )
        if self.ranking is None:
            return found.retrieval_heads
        needs = {self.ranking} if self.ranking in MEASURED else {"echo", "induction"}
        if not needs <= set(found.scores):
            raise UsageError(
                f"heads: {self.heads}: ranking '{self.ranking}' needs the scores "
                f"{' and '.join(sorted(needs))}, found {', '.join(found.scores) or 'none'}"
            )
        scores = {name: np.array(table) for name, table in found.scores.items()}
        return select(scores, self._selection()).heads

    def _selection(self) -> SelectionOptions:
        fields: dict[str, Any] = {"method": self.ranking}
        if self.ranking == "echo":
            fields["min_echo"] = 0  # the share alone decides
        if self.min_echo is not None:
            fields["min_echo"] = self.min_echo
        if self.ranking != "paper":
            options = SelectionOptions(**fields)
            return options if self.share is None else with_share(options, self.share)
        # Of the paper's two shares each is said by itself.
        if self.share is not None:
            fields["induction_share"] = self.share
        if self.echo_share is not None:
            fields["echo_share"] = self.echo_share
        return SelectionOptions(**fields)


def _load(heads: str, fingerprint: str | None, model: str) -> HeadMap:
    if heads != SHIPPED:
        path = Path(heads).expanduser()
        stamp = path.stat().st_mtime_ns if path.exists() else 0
        return _file(path, stamp)
    found = None if fingerprint is None else _shipped(fingerprint)
    if found is None:
        raise UsageError(
            f"heads: no head map is shipped for '{model}'; find its heads with trt-razor heads and "
            f"give the file"
        )
    return found


@functools.lru_cache(maxsize=32)
def _file(path: Path, stamp: int) -> HeadMap:
    """One context after another asks for the same file; a changed one is read again."""
    return HeadMap.load(path)


@functools.lru_cache(maxsize=32)
def _shipped(fingerprint: str) -> HeadMap | None:
    found = recipe_of(fingerprint)
    return None if found is None else found[1]


def _random(layers: int, kv: int, share: float, seed: int) -> Heads:
    total = layers * kv
    chosen = np.random.default_rng(seed).permutation(total)[: share_count(share, total)]
    return tuple(
        tuple(sorted(int(c) % kv for c in chosen if c // kv == layer)) for layer in range(layers)
    )
