"""Figures of benchmarks/latency.py: medians and spreads, Markdown tables, the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("dense", "razor")
NAMES = {"dense": "dense", "razor": "Razor"}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    low, middle, high = np.percentile(values, (10, 50, 90))
    return {"median": float(middle), "p10": float(low), "p90": float(high), "n": len(values)}


def summarise(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All rounds of one engine at one length and batch: seconds, and tokens per second."""
    return {
        "ttft_s": summary([t for trial in trials for t in trial["ttft"]]),
        "tpot_s": summary([t for trial in trials for t in trial["tpot"]]),
        "tokens_per_s": summary([trial["tokens"] / trial["seconds"] for trial in trials]),
        "blocks": max((trial["blocks"] for trial in trials if trial["blocks"]), default=None),
        "rounds": len(trials),
    }


def count(n: int) -> str:
    return f"{n // 1024}K" if n >= 1024 and n % 1024 == 0 else str(n)


def _cell(value: Mapping[str, float], scale: float, digits: int) -> str:
    low, middle, high = (value[k] * scale for k in ("p10", "median", "p90"))
    return f"{middle:.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"


def markdown(document: Mapping[str, Any]) -> str:
    """Machine and method, times, KV memory, what was left out and why."""
    machine = document["machine"]
    gpu = f"{machine['gpu']}, driver {machine['driver']}, " if machine["gpu"] else ""
    lines = [
        f"{document['model']}, {document['backend']}, on {gpu}{machine['cpu']}; {machine['versions']}. "
        f"{document['method']}",
        "",
        "| prompt | batch | first token, ms: dense | Razor | per token, ms: dense | Razor | speed-up "
        "| tokens/s: dense | Razor |",
        "|" + "---|" * 9,
    ]
    for row in document["rows"]:
        cells = [count(row["length"]), str(row["batch"])]
        for name, scale, digits in (("ttft_s", 1e3, 1), ("tpot_s", 1e3, 2)):
            cells += [_cell(row[kind][name], scale, digits) for kind in KINDS]
        cells.append(f"{speed_up(row):.2f}")
        cells += [_cell(row[kind]["tokens_per_s"], 1, 1) for kind in KINDS]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| prompt | KV MB of a sequence: dense | Razor | × smaller | sequences that fit: dense | Razor |",
        "|" + "---|" * 6,
    ]
    for row in document["memory"]:
        dense, razor = (row[kind]["sequence_bytes"] for kind in KINDS)
        cells = [count(row["length"]), f"{dense / 1e6:.1f}", f"{razor / 1e6:.1f}"]
        cells.append(f"{dense / razor:.2f}")
        cells += [str(row[kind].get("fit_in_pools", row[kind]["fit"])) for kind in KINDS]
        lines.append("| " + " | ".join(cells) + " |")
    pools = [f"{NAMES[k]} {document['pools'][k] / 1e6:,.0f} MB" for k in KINDS]
    lines += ["", f"KV memory set aside: {', '.join(pools)}."]
    if document["left_out"]:
        lines += ["", "Left out:", "", *(f"* {text}" for text in document["left_out"])]
    return "\n".join(lines) + "\n"


def speed_up(row: Mapping[str, Any]) -> float:
    """Of a token, Razor over dense."""
    return float(row["dense"]["tpot_s"]["median"] / row["razor"]["tpot_s"]["median"])


def draw(document: Mapping[str, Any], path: Path) -> None:
    """First token, time per token, throughput and KV memory over the length; a colour for each batch,
    dense dashed. Bars are 10th and 90th percentile. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, memory = document["rows"], document["memory"]
    figure, axes = pyplot.subplots(2, 2, figsize=(9.5, 7), sharex=True)
    panels = (
        (axes[0][0], "ttft_s", 1e3, "time to first token, ms"),
        (axes[0][1], "tpot_s", 1e3, "time per output token, ms"),
        (axes[1][0], "tokens_per_s", 1.0, "output tokens per second"),
    )
    styles = {
        "dense": {"linestyle": "--", "marker": "s"},
        "razor": {"linestyle": "-", "marker": "o"},
    }
    for ax, name, scale, label in panels:
        for i, batch in enumerate(sorted({r["batch"] for r in rows})):
            line = sorted((r for r in rows if r["batch"] == batch), key=lambda r: r["length"])
            for kind in KINDS:
                found = [r[kind][name] for r in line]
                middle = [v["median"] * scale for v in found]
                spread = [
                    [m - v["p10"] * scale for m, v in zip(middle, found, strict=True)],
                    [v["p90"] * scale - m for m, v in zip(middle, found, strict=True)],
                ]
                ax.errorbar(
                    [r["length"] for r in line],
                    middle,
                    yerr=spread,
                    color=f"C{i}",
                    markersize=4,
                    capsize=2,
                    label=f"{NAMES[kind]}, batch {batch}",
                    **styles[kind],
                )
        ax.set_title(label, fontsize=10)
        ax.set_ylim(bottom=0)
    last = axes[1][1]
    for kind in KINDS:
        values = [row[kind]["sequence_bytes"] / 1e6 for row in memory]
        last.plot([row["length"] for row in memory], values, color="black", markersize=4,
                  label=NAMES[kind], **styles[kind])  # fmt: skip
    last.set_title("KV memory of a sequence, MB", fontsize=10)
    last.set_ylim(bottom=0)
    last.legend(fontsize=8)
    lengths = sorted({row["length"] for row in memory})
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        if len(lengths) > 1:
            ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [count(n) for n in lengths])
        ax.minorticks_off()
    for ax in axes[1]:
        ax.set_xlabel("tokens of the prompt")
    if rows:
        axes[0][0].legend(fontsize=8)
    machine = document["machine"]
    where = machine["gpu"] or machine["cpu"]
    figure.suptitle(f"{document['model']}, {document['backend']}, {where}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
