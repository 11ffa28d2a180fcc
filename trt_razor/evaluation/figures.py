"""Pictures of a run: needle grids, accuracy and KL against what is kept, KL behind the context."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trt_razor.errors import MissingExtra
from trt_razor.evaluation.aggregate import ALL, Row
from trt_razor.evaluation.config import DENSE
from trt_razor.evaluation.curves import Curve
from trt_razor.evaluation.method_rows import MANY, method_rows
from trt_razor.evaluation.nearness import SPAN
from trt_razor.evaluation.records import Record
from trt_razor.evaluation.statistics import Estimate
from trt_razor.files import write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_DEPTHS = 11
"""More different depths than these (random ones) are put into ten bins."""
# Eight colours that people with colour blindness can tell apart (Okabe and Ito 2008).
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b4c9a", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p")
TICKS = (1, 2, 5, 10, 15, 20, 30, 40, 60, 100)


def draw_figures(
    rows: Sequence[Row],
    followed: Sequence[Curve],
    records: Sequence[Record],
    names: Mapping[str, str],
    folder: Path,
) -> list[str]:
    """Write a run's PNGs into ``folder``, atomically; returns their names.

    Args:
        names: method label → name; equal names share a colour.

    Raises:
        MissingExtra: matplotlib is not installed. RazorError: a file cannot be written.
    """
    written: list[str] = []

    def save(figure: Figure | None, name: str) -> None:
        if figure is None:
            return
        data = io.BytesIO()
        # No software version in the file: the same records give the same bytes.
        figure.savefig(data, format="png", dpi=120, metadata={"Software": None})
        file = unique(name, written)
        write_bytes_atomic(folder / file, data.getvalue())
        written.append(file)

    for task in dict.fromkeys(r.task for r in rows):
        mine = [r for r in rows if r.task == task]
        save(needle_grid(task, [r for r in records if r.task == task], list(names)), f"{task}-grid")
        draw = method_rows if len(names) > MANY else against_kept
        save(draw(task, mine, names, "score"), f"{task}-accuracy")
        save(draw(task, mine, names, "kl"), f"{task}-kl")
        save(behind(task, [c for c in followed if c.task == task], list(names)), f"{task}-curve")
    return written


def unique(name: str, taken: Sequence[str]) -> str:
    """A file name of plain characters that no other figure has."""
    base = re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-.")[:60] or "figure"
    file, i = f"{base}.png", 2
    while file in taken:
        file, i = f"{base}-{i}.png", i + 1
    return file


# Needle grid --------------------------------------------------------------------------------------
def needle_grid(task: str, records: Sequence[Record], methods: Sequence[str]) -> Figure | None:
    """Score over depth (down) and length (across), a panel a method; None without both in ``meta``."""
    placed = [
        r for r in records if r.score is not None and _number(r, "depth") and _number(r, "length")
    ]
    methods = [m for m in methods if any(r.method == m for r in placed)]
    lengths = sorted({r.meta["length"] for r in placed})
    if not methods or len({r.meta["depth"] for r in placed}) < 2:
        return None
    depths, labels = _depth_bins(sorted({float(r.meta["depth"]) for r in placed}))
    columns = min(len(methods), max(2, 12 // max(2, len(lengths))))
    lines = math.ceil(len(methods) / columns)
    width, height = 1.5 + 0.62 * len(lengths), 1.0 + 0.3 * len(labels)
    width = max(width, 2.4)
    figure = _figure((columns * width + 0.9, lines * height + 0.8))
    figure.suptitle(f"{task}: score by depth and length", fontsize=11)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    image: Any = None
    for i, ax in enumerate(axes.flat):
        if i >= len(methods):
            ax.set_axis_off()
            continue
        total, count = np.zeros((2, len(labels), len(lengths)))
        for r in placed:
            if r.method == methods[i]:
                cell = _bin(depths, float(r.meta["depth"])), lengths.index(r.meta["length"])
                total[cell] += r.score
                count[cell] += 1
        grid = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        image = ax.imshow(grid, cmap="RdYlBu", vmin=0, vmax=1, aspect="auto")
        _fill_in(ax, grid)
        ax.set_title(_short(methods[i], 26), fontsize=9)
        ax.set_xticks(range(len(lengths)), [_tokens(n) for n in lengths])
        ax.set_yticks(range(len(labels)), labels)
        ax.tick_params(labelsize=7)
    figure.supxlabel("context length in tokens", fontsize=9)
    figure.supylabel("depth of the needle", fontsize=9)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02).ax.tick_params(labelsize=7)
    return figure


def _fill_in(ax: Axes, grid: np.ndarray) -> None:
    for (y, x), value in np.ndenumerate(grid):
        if not math.isnan(value):
            # Light colours in the middle take black letters, the dark ends of the scale white ones.
            colour = "white" if value < 0.15 or value > 0.85 else "black"
            ax.text(x, y, f"{value:.0%}"[:-1], ha="center", va="center", fontsize=7, color=colour)


def _depth_bins(depths: Sequence[float]) -> tuple[list[float], list[str]]:
    """(upper edges, labels) of the rows."""
    if len(depths) <= MAX_DEPTHS:
        return list(depths), [f"{d:.0%}" for d in depths]
    edges = [(i + 1) / 10 for i in range(10)]
    return edges, [f"{i * 10} – {i * 10 + 10}%" for i in range(10)]


def _bin(edges: Sequence[float], depth: float) -> int:
    return next((i for i, e in enumerate(edges) if depth <= e), len(edges) - 1)


def _number(record: Record, name: str) -> bool:
    value = record.meta.get(name)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# Against what is kept -----------------------------------------------------------------------------
def against_kept(
    task: str, rows: Sequence[Row], names: Mapping[str, str], what: str
) -> Figure | None:
    """Score or KL (log axis) against KV kept (log axis), a panel a group, with 95 % intervals.

    Args:
        what: "score" or "kl".
    """
    rows = [r for r in rows if r.group != ALL and r.kv_ratio and _value(r, what) is not None]
    shown = [r for r in rows if what == "score" or r.method != DENSE]
    groups = list(dict.fromkeys(r.group for r in shown))
    methods = [m for m in names if any(r.method == m for r in shown)]
    if not any(m != DENSE for m in methods):
        return None
    styles = _styles(methods, names)
    title = "score" if what == "score" else "KL(dense ‖ method)"
    figure, axes = _panels(f"{_short(task, 40)}: {title}", groups, styles, 3.4)
    for group, ax in zip(groups, axes, strict=True):
        here = [r for r in shown if r.group == group]
        for row, x in _side_by_side(here, [r for r in shown if r.kv_ratio]):
            _point(ax, row, x, what, styles[row.method])
        ax.set_xlabel("KV cache kept (dense: 100%)", fontsize=8)
    _kept_scale(axes[0], shown)
    if what == "score":
        axes[0].set_ylim(-0.03, 1.03)
    else:
        _kl_scale(axes[0], [r.kl for r in shown if r.kl])
    figure.supylabel("mean score" if what == "score" else "KL in nats per token", fontsize=9)
    return figure


def _value(row: Row, what: str) -> float | None:
    estimate = row.score if what == "score" else row.kl
    return None if estimate is None else estimate.mean


def _side_by_side(rows: Sequence[Row], shown: Sequence[Row]) -> list[tuple[Row, float]]:
    """Rows and where they stand, in percent: equal budgets would lie on each other, so points nearer
    than 1.2 % of the axis are spread around their middle."""
    kept = [float(r.kv_ratio or 0) for r in shown]
    step = max(2.0, max(kept) / min(kept)) ** 0.012
    clusters: list[list[Row]] = []
    for row in sorted(rows, key=lambda r: float(r.kv_ratio or 0)):
        if clusters and float(row.kv_ratio or 0) < step * float(clusters[-1][-1].kv_ratio or 0):
            clusters[-1].append(row)
        else:
            clusters.append([row])
    placed = []
    for cluster in clusters:
        middle = math.exp(sum(math.log(float(r.kv_ratio or 1)) for r in cluster) / len(cluster))
        for i, row in enumerate(cluster):
            placed.append((row, 100 * middle * step ** (i - (len(cluster) - 1) / 2)))
    return placed


def _point(ax: Axes, row: Row, x: float, what: str, style: dict[str, Any]) -> None:
    estimate = row.score if what == "score" else row.kl
    assert estimate is not None
    if what == "kl" and estimate.mean <= 0:
        return  # equal to dense: no place on a log axis
    y = estimate.mean
    if what == "score" and row.method == DENSE and estimate.low is not None:
        ax.axhspan(estimate.low, estimate.high or 0.0, color="#000000", alpha=0.07, linewidth=0)
        ax.axhline(y, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
    if estimate.low is not None and estimate.high is not None:
        low = estimate.low if what == "score" else max(estimate.low, y / 1e3)
        ax.plot([x, x], [low, estimate.high], color=style["color"], linewidth=0.9, alpha=0.7)
    ax.plot([x], [y], linestyle="none", markersize=5.5, markeredgewidth=0.6, **style)


def _styles(methods: Sequence[str], names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """A colour for each method's name, a marker for each of its labels."""
    colours = {
        n: COLOURS[i % len(COLOURS)]
        for i, n in enumerate(dict.fromkeys(names[m] for m in methods if m != DENSE))
    }
    used: dict[str, int] = {}
    styles = {}
    for m in methods:
        # Names that share a colour do not share a marker either.
        key = colours.get(names[m], "#000000")
        number = used.get(key, 0)
        used[key] = number + 1
        styles[m] = {
            "marker": MARKERS[number % len(MARKERS)],
            "color": key,
            "markeredgecolor": "#222222" if number >= len(MARKERS) else "white",
        }
    return styles


def _kept_scale(ax: Axes, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    kept = [100 * r.kv_ratio for r in rows if r.kv_ratio]
    # At least a factor of two: a few points side by side would leave no room for the ticks.
    low = min(min(kept) * 0.9, max(kept) * 0.55)
    high = max(max(kept) * 1.1, low * 2)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ticks: list[float] = [t for t in TICKS if low <= t <= high]
    if len(ticks) < 2:
        ticks = sorted({float(f"{v:.3g}") for v in (min(kept), max(kept))})
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}%"))


# Behind the context -------------------------------------------------------------------------------
def behind(task: str, followed: Sequence[Curve], methods: Sequence[str]) -> Figure | None:
    """KL (log axis) over the tokens since the compression, a panel a group, with 95 % bands.

    Args:
        methods: labels, in the order of the legend; each has a colour of its own.
    """
    followed = [c for c in followed if c.group != ALL]
    methods = [m for m in methods if any(c.method == m for c in followed)]
    if not methods:
        return None
    groups = list(dict.fromkeys(c.group for c in followed))
    styles = _styles(methods, {m: m for m in methods})
    figure, axes = _panels(f"{_short(task, 40)}: KL(dense ‖ method)", groups, styles, 4.6)
    for group, ax in zip(groups, axes, strict=True):
        for curve in (c for c in followed if c.group == group):
            _line(ax, curve, styles[curve.method])
        ax.set_xlabel(f"tokens behind the context (means of {SPAN})", fontsize=8)
    most = max(len(c.kl) for c in followed)
    axes[0].set_xlim(0, most * SPAN)
    step = SPAN * math.ceil(most / 4)
    axes[0].set_xticks(range(0, most * SPAN + 1, step))
    _kl_scale(axes[0], [e for c in followed for e in c.kl])
    figure.supylabel("KL in nats per token", fontsize=9)
    return figure


def _line(ax: Axes, curve: Curve, style: dict[str, Any]) -> None:
    x = [(i + 0.5) * SPAN for i in range(len(curve.kl))]
    # Equal to dense: no place on a log axis.
    y = [e.mean if e.mean > 0 else math.nan for e in curve.kl]
    if all(e.low is not None and e.high is not None for e in curve.kl):
        low = [max(e.low or 0.0, e.mean / 1e3) for e in curve.kl]
        high = [e.high or 0.0 for e in curve.kl]
        ax.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
    ax.plot(x, y, linewidth=1.2, markersize=4.5, markeredgewidth=0.5, **style)


# Both ---------------------------------------------------------------------------------------------
def _panels(
    title: str, groups: Sequence[str], styles: Mapping[str, dict[str, Any]], width: float
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel a group, all with the same axes, and a legend below."""
    columns = min(4, len(groups))
    lines = math.ceil(len(groups) / columns)
    size = columns * width + 0.6
    # The legend stands below in as many columns as fit: no label ever lies on another.
    across = max(1, int(size * 10.5 / (8 + max(len(_short(m, 34)) for m in styles))))
    legend_height = 0.24 * math.ceil(len(styles) / across) + 0.2
    figure = _figure((size, lines * 2.9 + 0.7 + legend_height))
    end = ", " if columns > 1 else "\n"
    figure.suptitle(f"{title}{end}95 % intervals", fontsize=10)
    axes = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)
    for ax in axes[len(groups) :]:
        ax.set_axis_off()
    for group, ax in zip(groups, axes, strict=False):
        ax.set_title(_group_title(group), fontsize=9)
        ax.grid(which="major", color="#e6e6e6", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=7, labelbottom=True)
    figure.legend(
        handles=[_handle(m, style) for m, style in styles.items()],
        loc="outside lower center",
        ncols=across,
        fontsize=7,
        frameon=False,
    )
    return figure, axes[: len(groups)]


def _kl_scale(ax: Axes, estimates: Sequence[Estimate]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    values = [v for e in estimates for v in (e.low, e.mean, e.high) if v]
    wide = bool(values) and max(values) > 300 * min(values)
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _handle(label: str, style: dict[str, Any]) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", markersize=5.5, label=_short(label, 34), **style)


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingExtra("matplotlib", "eval", "the pictures of a report") from None
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    return figure


def _group_title(group: str) -> str:
    return f"{_tokens(int(group))} tokens" if group.isdigit() else _short(group, 40)


def _tokens(n: float) -> str:
    return f"{int(n) // 1024}K" if n >= 1024 and n % 1024 == 0 else f"{n:g}"


def _short(text: str, most: int) -> str:
    # $ would start a formula.
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")
