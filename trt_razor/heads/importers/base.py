"""What every format gives, and how heads are chosen from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.heads.importers.source import Source
from trt_razor.heads.selection import Heads, check_share, share_count
from trt_razor.models.spec import ModelSpec

RAZOR_SHARE = 0.15
"""The paper's 14 % induction heads and 1 % echo heads, for scores without a rule of their own."""


@dataclass(frozen=True)
class Cut:
    """How much of a ranking is kept: the top ``share`` of all KV heads, or scores >= ``threshold``."""

    share: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.share is not None and self.threshold is not None:
            raise UsageError("share, threshold: expected one of them, found both")
        if self.share is not None:
            check_share("share", self.share)
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UsageError(f"threshold: expected a finite number, found {self.threshold!r}")

    @property
    def empty(self) -> bool:
        return self.share is None and self.threshold is None


@dataclass(frozen=True)
class Imported:
    """A file's content as tables of [layers, KV heads].

    Attributes:
        scores: name → float64 table.
        listed: the file's own choice, where it is a list of heads; then there is nothing to rank.
        ranked: otherwise the name of the score that ranks the heads.
        cut: otherwise how much of the ranking is kept unless the user says.
        checkpoint: identity of the scored weights, where the file knows it.
        options: what else is worth keeping, JSON values.
        notes: sentences for the user.
    """

    scores: Mapping[str, np.ndarray]
    listed: Heads | None = None
    ranked: str | None = None
    cut: Cut = field(default_factory=lambda: Cut(share=RAZOR_SHARE))
    checkpoint: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Importer:
    """One format.

    Attributes:
        name: for ``--format``.
        what: a line for people.
        kind: ``torch``, ``json`` or ``text``: the files it is found in.
        fits: whether a file of that kind looks like it; may raise UsageError for a damaged one.
        read: the tables of a file for a model; raises UsageError where they do not fit it.
    """

    name: str
    what: str
    kind: str
    fits: Callable[[Source], bool]
    read: Callable[[Source, ModelSpec], Imported]


def per_kv_head(table: np.ndarray, spec: ModelSpec, where: str) -> tuple[np.ndarray, bool]:
    """A table by KV head: as it is, or from query heads the largest of those that share a KV head.

    Args:
        table: finite numbers [layers, KV heads] or [layers, query heads].

    Returns:
        [layers, KV heads], and whether it was by query head.

    Raises:
        UsageError: another shape: the file is of another model.
    """
    layers, kv = spec.num_layers, spec.num_kv_heads
    if table.shape == (layers, kv):
        return table, False
    if table.shape == (layers, spec.num_heads):
        return table.reshape(layers, kv, spec.group).max(axis=2), True
    raise wrong_model(spec, where, " x ".join(str(n) for n in table.shape) or "a single number")


def wrong_model(spec: ModelSpec, where: str, found: str) -> UsageError:
    by_query = "" if spec.group == 1 else f" or {spec.num_layers} x {spec.num_heads} (query heads)"
    return UsageError(
        f"{where}: expected {spec.num_layers} x {spec.num_kv_heads} (layers x KV heads){by_query}, as "
        f"'{spec.name}' has, found {found}; these are the heads of another model"
    )


def choose(imported: Imported, cut: Cut, where: str) -> tuple[Heads, dict[str, Any], list[str]]:
    """The retrieval heads, the settings that chose them, and notes.

    Raises:
        UsageError: a share or threshold for a list, which has no order.
    """
    if imported.listed is not None:
        if not cut.empty:
            raise UsageError(
                f"{where}: a list of heads, not scores: it has no order to take a share or a threshold "
                "of; leave --share and --threshold out"
            )
        return imported.listed, {}, []
    assert imported.ranked is not None
    table = imported.scores[imported.ranked]
    by_default = cut.empty
    cut = imported.cut if by_default else cut
    notes = []
    if cut.threshold is not None:
        mask = table >= cut.threshold
        settings: dict[str, Any] = {"threshold": cut.threshold}
    else:
        assert cut.share is not None
        count = share_count(cut.share, table.size)
        flat = np.argsort(-table.ravel(), kind="stable")[:count]  # ties: lower layer, lower head
        mask = np.zeros(table.size, dtype=bool)
        mask[flat] = True
        mask = mask.reshape(table.shape)
        settings = {"share": cut.share}
        lowest = table.ravel()[flat[-1]] if count else math.inf
        tied = int((table == lowest).sum())
        taken = int((table[mask] == lowest).sum())
        if taken < tied:
            settings["tied"] = [taken, tied]
            # Rounded down: a share rounds up to whole heads.
            everyone = math.floor((count - taken + tied) / table.size * 1e6) / 1e6
            notes.append(
                f"{tied} heads tie at the cut (score {lowest:.6g}), {taken} of them taken, lowest layers "
                f"first; --share {everyone:g} takes them all"
            )
    if by_default:
        name, value = next(iter(settings.items()))
        notes.append(f"heads chosen by the default --{name} {value:g} of this format")
    settings["ranked_by"] = imported.ranked
    return heads_of(mask), settings, notes


def heads_of(mask: np.ndarray) -> Heads:
    """Indices of the true entries of [layers, KV heads], by layer, ascending."""
    return tuple(tuple(int(h) for h in np.flatnonzero(row)) for row in mask)
