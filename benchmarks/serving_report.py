"""Figures of benchmarks/serving.py: medians and spreads, Markdown, the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latency_report import KINDS, NAMES, count

FIGURES = {
    # name: (title, factor, digits)
    "ttft_p50_s": ("first token p50, ms", 1e3, 0),
    "ttft_p99_s": ("first token p99, ms", 1e3, 0),
    "itl_p50_s": ("between tokens p50, ms", 1e3, 1),
    "itl_p99_s": ("between tokens p99, ms", 1e3, 1),
    "tokens_per_s": ("output tokens/s", 1.0, 1),
    "requests_per_s": ("requests/s", 1.0, 2),
}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of the rounds."""
    ordered = sorted(values)
    n = len(ordered)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return {"median": middle, "min": ordered[0], "max": ordered[-1], "n": n}


def summarise(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """All rounds of one engine in one cell of the grid."""
    found: dict[str, Any] = {name: summary([r[name] for r in rounds]) for name in FIGURES}
    found["requests"] = int(sum(r["requests"] for r in rounds))
    found["uneven"] = int(sum(r["uneven"] for r in rounds))
    return found


def cell(value: Mapping[str, float], factor: float = 1.0, digits: int = 1) -> str:
    """``median (min – max)``."""
    low, middle, high = (f"{value[k] * factor:.{digits}f}" for k in ("min", "median", "max"))
    return f"{middle} ({low} – {high})" if value["n"] > 1 else middle


def megabytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:,.1f}"


def markdown(document: Mapping[str, Any]) -> str:
    """Machine and method, the table, both probes, what was left out and what failed."""
    lines = [
        f"{document['model']}, {document['backend']}, on {where(document)}; "
        f"{document['machine']['versions']}. {document['method']}",
        "",
    ]
    titles = ["at a time", "prompt", "output", "engine", *(f[0] for f in FIGURES.values())]
    titles += ["KV MB used, peak", "KV MB allocated"]
    lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in document["rows"]:
        for kind in document["kinds"]:
            if kind not in row:
                continue
            found, kv = row[kind], row[kind]["kv"]
            cells = [str(row["concurrency"]), count(row["prompt"]), count(row["output"])]
            cells += [NAMES[kind]]
            cells += [cell(found[n], factor, digits) for n, (_, factor, digits) in FIGURES.items()]
            cells += [megabytes(kv.get("used_bytes")), megabytes(kv.get("allocated_bytes"))]
            lines.append("| " + " | ".join(cells) + " |")
    for kind in document["kinds"]:
        lines += ["", *probe_lines(kind, document["probe"].get(kind, {}))]
    uneven = sum(r[k]["uneven"] for r in document["rows"] for k in KINDS if k in r)
    if uneven:
        lines += ["", f"Requests whose responses were not one per token: {uneven}; their times between "
                  "tokens are times between responses."]  # fmt: skip
    for title, texts in (("Left out", document["left_out"]), ("Failed", document["failed"])):
        if texts:
            lines += ["", f"{title}:", "", *(f"* {text}" for text in texts)]
    return "\n".join(lines).rstrip() + "\n"


def probe_lines(kind: str, probe: Mapping[str, Any]) -> list[str]:
    """The two probes of one engine as sentences."""
    lines = []
    if "batching" in probe:
        b = probe["batching"]
        lines.append(
            f"{NAMES[kind]}, {b['streams']} streams at a time against one, {b['tokens']} tokens each: "
            f"{cell(b['many'])} against {cell(b['one'])} output tokens/s, "
            f"{cell(b['ratio'], digits=2)} times."
        )
    if "waiting" in probe:
        w = probe["waiting"]
        unit = ""
        if "chunks" in w:
            unit = (
                f", {cell(w['chunks'], digits=2)} times one chunk of {w['chunk']} tokens "
                f"({cell(w['chunk_s'], 1e3, 0)} ms)"
            )
        lines.append(
            f"{NAMES[kind]}, first token of a {count(w['short_tokens'])}-token prompt while one of "
            f"{count(w['long_tokens'])} tokens is read: {cell(w['waits_s'], 1e3, 0)} ms{unit}; alone "
            f"{cell(w['alone_s'], 1e3, 0)} ms; the long one alone {cell(w['long_s'], 1e3, 0)} ms."
        )
    return [text for line in lines for text in (line, "")][:-1]


def where(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    gpu = f"{machine['gpu']}, driver {machine['driver']}, " if machine["gpu"] else ""
    return f"{gpu}{machine['cpu']}"


def draw(document: Mapping[str, Any], path: Path) -> None:
    """A panel for each figure over the concurrency; a colour for each prompt and output length, dense
    dashed. Bars are the lowest and highest round. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = document["rows"]
    styles: dict[str, Any] = {
        "dense": {"linestyle": "--", "marker": "s"},
        "razor": {"linestyle": "-", "marker": "o"},
    }
    figure, axes = pyplot.subplots(2, 4, figsize=(15, 7))
    panels = list(axes.flat)
    lengths = sorted({(r["prompt"], r["output"]) for r in rows})
    for i, (prompt, output) in enumerate(lengths):
        for kind in document["kinds"]:
            line = [r for r in rows if (r["prompt"], r["output"]) == (prompt, output) and kind in r]
            line.sort(key=lambda r: r["concurrency"])
            x = [r["concurrency"] for r in line]
            style = dict(styles[kind], color=f"C{i}", markersize=4)
            label = f"{NAMES[kind]}, prompt {count(prompt)}, output {count(output)}"
            for ax, (name, (_, factor, _)) in zip(panels, FIGURES.items(), strict=False):
                found = [r[kind][name] for r in line]
                middle = [v["median"] * factor for v in found]
                spread = [
                    [(v["median"] - v["min"]) * factor for v in found],
                    [(v["max"] - v["median"]) * factor for v in found],
                ]
                ax.errorbar(x, middle, yerr=spread, capsize=2, label=label, **style)
            kv = [(r["concurrency"], r[kind]["kv"].get("used_bytes")) for r in line]
            kv = [(n, v) for n, v in kv if v is not None]
            if kv:
                panels[6].plot([n for n, _ in kv], [v / 1e6 for _, v in kv], **style)
    allocated = []
    for kind in document["kinds"]:
        each = [r[kind]["kv"].get("allocated_bytes") for r in rows if kind in r]
        if any(each):
            allocated.append(f"{NAMES[kind]} {megabytes(max(v for v in each if v))}")
    titles = [title for title, _, _ in FIGURES.values()] + ["KV MB used, peak"]
    ticks = sorted({r["concurrency"] for r in rows})
    for ax, title in zip(panels, titles, strict=False):
        ax.set_title(title, fontsize=10)
        ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
        ax.grid(alpha=0.3)
        if len(ticks) > 1:
            ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [str(n) for n in ticks])
        ax.minorticks_off()
    for ax in panels[3:7]:
        ax.set_xlabel("requests at a time")
    if not panels[6].lines:
        panels[6].axis("off")
        panels[6].set_title("")
    panels[7].axis("off")
    handles, labels = panels[0].get_legend_handles_labels()
    panels[7].legend(handles, labels, fontsize=9, loc="center")
    if allocated:
        panels[7].set_title(f"KV MB allocated: {', '.join(allocated)}", fontsize=10)
    machine = document["machine"]
    name = f"{document['model']}, {document['backend']}, {machine['gpu'] or machine['cpu']}"
    figure.suptitle(name, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
