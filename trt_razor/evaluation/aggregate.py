"""From records to the numbers of a report: for each task, group and method."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trt_razor.evaluation.config import DENSE, METHOD_KEYS
from trt_razor.evaluation.records import Record
from trt_razor.evaluation.statistics import (
    Estimate,
    accuracy,
    difference_of,
    mcnemar,
    mean_of,
    ratio_of,
)

ALL = "all"
"""Group of all groups of a task."""


@dataclass(frozen=True)
class Difference:
    """Scores of one method less those of another on the same trials.

    Attributes:
        estimate: mean difference with its interval.
        lost, won: trials only the other, and only this one, got right; p: McNemar's, exact. None where
            scores are not just right or wrong.
    """

    estimate: Estimate
    lost: int | None
    won: int | None
    p: float | None

    def to_json(self) -> dict[str, Any]:
        return {**self.estimate.to_json(), "lost": self.lost, "won": self.won, "p": self.p}


@dataclass(frozen=True)
class Row:
    """One method on one group of a task; None = not measured.

    Attributes:
        samples, contexts, errors: numbers of records, contexts, and samples the method refused.
        kv_ratio: kept after compression, of the dense 16-bit cache, mean over samples; kv_most: the
            largest of any sample at any time.
        binary: every score is right or wrong.
        score, difference: mean score, and against dense on the same trials.
        kl, agree, nll: means over tokens; perplexity = exp(nll); perplexity_ratio: to dense.
        seconds: sum over samples.
    """

    task: str
    group: str
    method: str
    samples: int
    contexts: int
    errors: int
    kv_ratio: float | None = None
    kv_most: float | None = None
    binary: bool = True
    score: Estimate | None = None
    difference: Difference | None = None
    tokens: int = 0
    kl: Estimate | None = None
    agree: Estimate | None = None
    nll: Estimate | None = None
    perplexity: float | None = None
    perplexity_ratio: Estimate | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            k: v.to_json() if isinstance(v, (Estimate, Difference)) else v
            for k, v in self.__dict__.items()
        }


def in_order(
    records: Sequence[Record],
    tasks: Sequence[str],
    methods: Sequence[str],
    groups: Mapping[str, Sequence[str]],
) -> list[Record]:
    """Records as their run plans them, in whatever order they were written.

    Sums and bootstraps of the same records are then the same to the last digit.

    Args:
        tasks, methods: labels in their order; unknown ones come last.
        groups: those of each task in their order; unknown ones come last, by their names.
    """
    task_at, method_at = ({label: i for i, label in enumerate(x)} for x in (tasks, methods))
    group_at = {(task, g): i for task, names in groups.items() for i, g in enumerate(names)}

    def place(r: Record) -> tuple[Any, ...]:
        return (
            task_at.get(r.task, len(task_at)),
            r.task,
            group_at.get((r.task, r.group), len(group_at)),
            _natural(r.group),
            _natural(r.context),
            _natural(r.sample),
            method_at.get(r.method, len(method_at)),
            r.method,
        )

    return sorted(records, key=place)


def _natural(name: str) -> list[Any]:
    """For sorting: 9 before 10. Every second part is a number."""
    return [int(x) if i % 2 else x for i, x in enumerate(re.split(r"(\d{1,18})", name))]


def groups_of(records: Sequence[Record], task: str) -> list[str]:
    """Groups of a task: numbers in their order, else as they came; ``all`` last if there are several."""
    found = list(dict.fromkeys(r.group for r in records if r.task == task))
    if all(g.isdigit() for g in found):
        found.sort(key=int)
    return [*found, ALL] if len(found) > 1 and ALL not in found else found


def aggregate(records: Sequence[Record], tasks: Sequence[str], methods: Sequence[str]) -> list[Row]:
    """Rows in the order of tasks, groups, methods; methods without any record are left out."""
    rows = []
    for task in tasks:
        for group in groups_of(records, task):
            by = by_method(records, task, group)
            dense = by.get(DENSE, [])
            rows += [_row(task, group, m, by[m], dense) for m in methods if m in by]
    return rows


def compare(
    records: Sequence[Record], tasks: Sequence[str], pairs: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """For each pair (a, b) of methods and each group: a's KL over b's, a's scores less b's."""
    out = []
    for a, b in pairs:
        for task in tasks:
            for group in groups_of(records, task):
                by = by_method(records, task, group)
                mine, other = paired(by.get(a, []), by.get(b, []))
                if not mine:
                    continue
                both = [
                    (x, y) for x, y in zip(mine, other, strict=True) if x.tokens == y.tokens > 0
                ]
                with_kl = [(x, y) for x, y in both if x.kl is not None and y.kl is not None]
                ratio = ratio_of(
                    [x.kl * x.tokens for x, _ in with_kl],  # type: ignore[operator]
                    [y.kl * y.tokens for _, y in with_kl],  # type: ignore[operator]
                    [x.context for x, _ in with_kl],
                )
                difference = _difference(mine, other)
                out.append(
                    {
                        "task": task,
                        "group": group,
                        "method": a,
                        "against": b,
                        "samples": len(mine),
                        "kl_ratio": ratio.to_json() if ratio else None,
                        "difference": difference.to_json() if difference else None,
                    }
                )
    return out


def by_method(records: Sequence[Record], task: str, group: str) -> dict[str, list[Record]]:
    """A group's records of each method."""
    found: dict[str, list[Record]] = {}
    for r in records:
        if r.task == task and group in (r.group, ALL):
            found.setdefault(r.method, []).append(r)
    return found


def _row(
    task: str, group: str, method: str, records: Sequence[Record], dense: Sequence[Record]
) -> Row:
    good = [r for r in records if r.error is None]
    contexts = {(r.group, r.context) for r in records}
    row = Row(task, group, method, len(good), len(contexts), len(records) - len(good))
    if not good:
        return row
    kept = [r.kv_ratio for r in good if r.kv_ratio is not None]
    scores = [s for r in good for s in r.scores]
    mine, other = paired(good, dense) if method != DENSE else ([], [])
    nll = _over_tokens(good, "nll")
    return replace(
        row,
        kv_ratio=sum(kept) / len(kept) if kept else None,
        kv_most=max((r.kv_most for r in good if r.kv_most is not None), default=None),
        binary=all(s in (0, 1) for s in scores),
        score=accuracy(scores, [r.context for r in good for _ in r.scores]) if scores else None,
        difference=_difference(mine, other),
        tokens=sum(r.tokens for r in good),
        kl=_over_tokens(good, "kl"),
        agree=_over_tokens(good, "agree"),
        nll=nll,
        perplexity=math.exp(min(nll.mean, 700.0)) if nll else None,
        perplexity_ratio=_perplexity_ratio(mine, other),
        seconds=sum(r.seconds for r in good),
    )


def _over_tokens(records: Sequence[Record], name: str) -> Estimate | None:
    """Mean over tokens of a field that is a mean over each sample's tokens."""
    have = [r for r in records if r.tokens and getattr(r, name) is not None]
    if not have:
        return None
    values = [getattr(r, name) for r in have]
    return mean_of(values, [r.context for r in have], [r.tokens for r in have])


def paired(a: Sequence[Record], b: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Records of both methods for the same samples, without errors."""
    other = {r.sample: r for r in b if r.error is None}
    mine = [r for r in a if r.error is None and r.sample in other]
    return mine, [other[r.sample] for r in mine]


def _difference(mine: Sequence[Record], other: Sequence[Record]) -> Difference | None:
    trials = [
        (x, y, r.context)
        for r, o in zip(mine, other, strict=True)
        if len(r.scores) == len(o.scores)
        for x, y in zip(r.scores, o.scores, strict=True)
    ]
    if not trials:
        return None
    found = difference_of([t[0] for t in trials], [t[1] for t in trials], [t[2] for t in trials])
    if any(v not in (0, 1) for x, y, _ in trials for v in (x, y)):
        return Difference(found, None, None, None)
    lost, won = sum(x < y for x, y, _ in trials), sum(x > y for x, y, _ in trials)
    return Difference(found, lost, won, mcnemar(lost, won))


def _perplexity_ratio(mine: Sequence[Record], other: Sequence[Record]) -> Estimate | None:
    pairs = [
        (a, b)
        for a, b in zip(mine, other, strict=True)
        if a.nll is not None and b.nll is not None and a.tokens == b.tokens > 0
    ]
    if not pairs:
        return None
    e = mean_of(
        [a.nll - b.nll for a, b in pairs],  # type: ignore[operator]
        [a.context for a, _ in pairs],
        [a.tokens for a, _ in pairs],
    )
    low, high = (None if v is None else math.exp(min(v, 700.0)) for v in (e.low, e.high))
    return replace(e, mean=math.exp(min(e.mean, 700.0)), low=low, high=high)


def settings_of(config: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any], list[str]]]:
    """(label, name, options, which samples) of the methods in a run's stored settings."""
    out = []
    for entry in config.get("methods", []):
        name = next(k for k in entry if k not in METHOD_KEYS)
        which = []
        if entry.get("trials"):
            which.append(f"first {entry['trials']} samples of each group")
        if entry.get("groups"):
            which.append(f"groups {', '.join(entry['groups'])}")
        out.append((str(entry["label"]), str(name), entry[name], which))
    return out
