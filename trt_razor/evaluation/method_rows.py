"""A picture of many methods: a row each, score or KL across, a panel a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trt_razor.evaluation.aggregate import ALL, Row
from trt_razor.evaluation.config import DENSE
from trt_razor.evaluation.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY = 10
"""Methods from which on points in a plane would hide each other, and each gets a row."""
COLOUR, OTHER = "#d55e00", "#0072b2"


def method_rows(
    task: str, rows: Sequence[Row], names: Mapping[str, str], what: str
) -> Figure | None:
    """Means with 95 % intervals, methods in the order of the run; beside each what it keeps.

    Args:
        names: method label → name; those with razor in either have a colour of their own.
        what: "score" (with a line at dense attention's) or "kl" (log axis, without dense).
    """
    rows = [r for r in rows if r.group != ALL and _estimate(r, what) is not None]
    groups = list(dict.fromkeys(r.group for r in rows))
    methods = [m for m in names if m != DENSE and any(r.method == m for r in rows)]
    if not methods:
        return None
    from matplotlib.figure import Figure

    title = "score" if what == "score" else "KL(dense ‖ method), nats a token"
    size = (2.0 + 2.7 * len(groups), 1.1 + 0.2 * len(methods))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{task[:40]}: {title}, 95 % intervals", fontsize=10)
    axes = figure.subplots(1, len(groups), squeeze=False, sharey=True, sharex=True)[0]
    for group, ax in zip(groups, axes, strict=True):
        _panel(ax, [r for r in rows if r.group == group], methods, names, what)
        ax.set_title(f"{group} tokens" if group.isdigit() else group[:40], fontsize=9)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].set_ylim(len(methods) - 0.4, -0.6)
    if what == "score":
        axes[0].set_xlim(-0.03, 1.15)
    else:
        axes[0].set_xscale("log")
        low, high = axes[0].get_xlim()
        axes[0].set_xlim(low, high * (high / low) ** 0.1)  # room for what is kept, at the right
    return figure


def _panel(
    ax: Axes, rows: Sequence[Row], methods: Sequence[str], names: Mapping[str, str], what: str
) -> None:
    for row in rows:
        e = _estimate(row, what)
        assert e is not None
        if row.method == DENSE:
            if what == "score":
                ax.axvline(e.mean, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
            continue
        y = methods.index(row.method)
        colour = COLOUR if "razor" in names[row.method] + row.method else OTHER
        if what == "kl" and e.mean <= 0:
            continue  # equal to dense: no place on a log axis
        if e.low is not None and e.high is not None:
            low = e.low if what == "score" else max(e.low, e.mean / 1e2)
            ax.plot([low, e.high], [y, y], color=colour, linewidth=1.2, alpha=0.6)
        ax.plot([e.mean], [y], "o", color=colour, markersize=4.5)
        if row.kv_ratio is not None:
            right = ax.get_yaxis_transform()
            ax.text(
                0.985, y, f"{row.kv_ratio:.0%}", transform=right, ha="right", va="center",
                fontsize=6, color="#666666",
            )  # fmt: skip
    ax.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=7.5)


def _estimate(row: Row, what: str) -> Estimate | None:
    return row.score if what == "score" else row.kl
