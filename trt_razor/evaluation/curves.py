"""How a method fares while more and more tokens come after the compressed context, span by span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trt_razor.evaluation.aggregate import by_method, groups_of, paired
from trt_razor.evaluation.config import DENSE
from trt_razor.evaluation.nearness import SPAN
from trt_razor.evaluation.records import Record
from trt_razor.evaluation.statistics import Estimate, mean_of, ratio_of


@dataclass(frozen=True)
class Curve:
    """One method on one group of a task.

    Attributes:
        kl: of each span of ``nearness.SPAN`` tokens behind the context, in order.
        nll: less the dense model's on the same tokens; nats per token.
        change: KL of the last span over that of the first; None if the first has none.
    """

    task: str
    group: str
    method: str
    kl: list[Estimate]
    nll: list[Estimate]
    change: Estimate | None

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "group": self.group,
            "method": self.method,
            "span": SPAN,
            "kl": [e.to_json() for e in self.kl],
            "nll": [e.to_json() for e in self.nll],
            "change": self.change.to_json() if self.change else None,
        }


def curves(records: Sequence[Record], tasks: Sequence[str], methods: Sequence[str]) -> list[Curve]:
    """Curves in the order of tasks, groups, methods; none of dense and of short continuations."""
    out = []
    for task in tasks:
        for group in groups_of(records, task):
            by = by_method(records, task, group)
            for method in methods:
                if method != DENSE:
                    mine, dense = paired(by.get(method, []), by.get(DENSE, []))
                    found = _curve(task, group, method, mine, dense)
                    out += [found] if found else []
    return out


def _curve(
    task: str, group: str, method: str, mine: Sequence[Record], dense: Sequence[Record]
) -> Curve | None:
    pairs = [
        (m, d)
        for m, d in zip(mine, dense, strict=True)
        if m.kl_curve and len(m.kl_curve) == len(m.nll_curve) == len(d.nll_curve)
    ]
    if not pairs:
        return None
    # Only spans that all have: each point is a mean over the same texts.
    spans = range(min(len(m.kl_curve) for m, _ in pairs))
    contexts = [m.context for m, _ in pairs]
    return Curve(
        task,
        group,
        method,
        [mean_of([m.kl_curve[i] for m, _ in pairs], contexts) for i in spans],
        [mean_of([m.nll_curve[i] - d.nll_curve[i] for m, d in pairs], contexts) for i in spans],
        ratio_of(
            [m.kl_curve[spans[-1]] for m, _ in pairs], [m.kl_curve[0] for m, _ in pairs], contexts
        ),
    )
