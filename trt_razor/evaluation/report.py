"""A run's report from its records: results.json, report.md and pictures."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trt_razor.errors import RazorError
from trt_razor.evaluation.aggregate import ALL, Row, aggregate, compare, in_order, settings_of
from trt_razor.evaluation.config import DENSE, ENGINE
from trt_razor.evaluation.curves import Curve, curves
from trt_razor.evaluation.figures import draw_figures
from trt_razor.evaluation.nearness import SPAN
from trt_razor.evaluation.records import Record, read_records, read_run
from trt_razor.files import write_text_atomic

RESULTS_FILE, REPORT_FILE = "results.json", "report.md"
_OWN_PNG = re.compile(r"[a-z0-9][a-z0-9.-]*\.png")


def write_report(folder: Path, comparisons: Sequence[Sequence[str]] | None = None) -> Path:
    """Draw the report of a results folder from its records; returns ``report.md``.

    Args:
        comparisons: pairs of labels, instead of those stored with the run.

    Raises:
        UsageError: no run there, or no records yet. MissingExtra: matplotlib is not installed.
        RazorError: damaged records, or a file cannot be written.
    """
    about, records = read_run(folder), read_records(folder)
    if not records:
        raise RazorError(f"{folder}: no records yet: the run stopped before its first result")
    config = about["config"]
    try:
        tasks = [str(t["label"]) for t in config["tasks"]]
        names = {label: name for label, name, _, _ in settings_of(config)}
    except (KeyError, TypeError, StopIteration):
        raise RazorError(
            f"{folder}: damaged: run.json's config is none of trt-razor eval"
        ) from None
    if config.get("engine") is not None:
        names[ENGINE] = ENGINE
    records = in_order(records, tasks, list(names), _groups(about))
    rows = aggregate(records, tasks, list(names))
    pairs = config.get("compare") or [] if comparisons is None else comparisons
    compared = compare(records, tasks, pairs)
    followed = curves(records, tasks, list(names))
    remove_report(folder)
    figures = draw_figures(rows, followed, records, names, folder)
    results = {
        "run": about["run"],
        "config": config,
        "environments": about.get("environments", []),
        "seconds": round(_seconds(records), 1),
        "records": len(records),
        "planned": about.get("planned", 0),
        "query_aware": about.get("query_aware", []),
        "errors": errors_of(records),
        "results": [r.to_json() for r in rows],
        "curves": [c.to_json() for c in followed],
        "compare": compared,
        "figures": figures,
    }
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    write_text_atomic(folder / RESULTS_FILE, text + "\n")
    write_text_atomic(folder / REPORT_FILE, _markdown(results, rows, followed))
    return folder / REPORT_FILE


def remove_report(folder: Path) -> None:
    """Delete an earlier report and the pictures it names."""
    with suppress(OSError, ValueError, RecursionError, AttributeError, TypeError):
        for name in json.loads((folder / RESULTS_FILE).read_bytes()).get("figures", []):
            if _OWN_PNG.fullmatch(name):
                (folder / name).unlink(missing_ok=True)
    for name in (RESULTS_FILE, REPORT_FILE):
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)


def errors_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Methods that refused samples: task, method, how many, and the first reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for r in records:
        if r.error is not None:
            found.setdefault((r.task, r.method), []).append(r.error)
    return [
        {"task": task, "method": method, "samples": len(reasons), "reason": reasons[0]}
        for (task, method), reasons in found.items()
    ]


def _groups(about: Mapping[str, Any]) -> dict[str, list[str]]:
    """Each task's groups in the order of the run; older results do not have them."""
    groups = about.get("groups")
    if not isinstance(groups, dict) or not all(isinstance(v, list) for v in groups.values()):
        return {}
    return {str(task): [str(g) for g in names] for task, names in groups.items()}


def _seconds(records: Sequence[Record]) -> float:
    """Of reading (once for all methods of a sample), compressing and asking."""
    read: dict[tuple[str, str], float] = {}
    for r in records:
        read[r.task, r.sample] = max(read.get((r.task, r.sample), 0.0), r.read_seconds)
    return sum(r.seconds for r in records) + sum(read.values())


# Markdown -----------------------------------------------------------------------------------------
def _markdown(results: Mapping[str, Any], rows: Sequence[Row], followed: Sequence[Curve]) -> str:
    config = results["config"]
    lines = [f"# {config['name']}", "", *_about(results), "", "## Methods", "", *_methods(results)]
    for task in dict.fromkeys(r.task for r in rows):
        lines += ["", f"## {task}", ""]
        mine = [r for r in rows if r.task == task]
        for group in dict.fromkeys(r.group for r in mine):
            here = [r for r in mine if r.group == group]
            title = "all groups" if group == ALL else _cell(group)
            lines += [f"### {title}", "", *_group(here, results["query_aware"]), ""]
            lines += _curves([c for c in followed if (c.task, c.group) == (task, group)])
        base = re.sub(r"[^a-z0-9.-]+", "-", task.lower()).strip("-.")
        for figure in results["figures"]:
            if re.fullmatch(re.escape(base) + r"-(grid|accuracy|kl|curve)(-\d+)?\.png", figure):
                lines += [f"![{figure[:-4]}]({figure})", ""]
    if results["compare"]:
        lines += ["## Compared", "", *_compared(results["compare"]), ""]
    if results["errors"]:
        lines += ["## Errors", ""]
        lines += [
            f"* {_cell(e['method'])} on {_cell(e['task'])}: {e['samples']} "
            f"sample{'s' * (e['samples'] > 1)}: {_cell(e['reason'])}"
            for e in results["errors"]
        ]
    lines += ["", *_notes(rows, followed)]
    return "\n".join(lines).rstrip() + "\n"


def _about(results: Mapping[str, Any]) -> list[str]:
    config = results["config"]
    lines = []
    for e in results["environments"]:
        versions = ", ".join(f"{k} {v}" for k, v in e["versions"].items())
        lines.append(
            f"* {_cell(', '.join(e['runners']))}; {versions}; {e['cpu']}, {e['cores']} cores"
        )
    scoring = {
        "forced": "an answer is right if each of its tokens is the most probable one",
        "generate": "greedy decoding, each task's metric",
    }[config["scoring"]]
    done, planned = results["records"], results["planned"]
    lines += [
        f"* seed {config['seed']}; {scoring}",
        f"* {done:,} results in {results['seconds']:,.0f} s; run {results['run']}",
    ]
    if done < planned:
        lines.append(f"* **Not complete**: {done:,} of {planned:,} results")
    return lines


def _methods(results: Mapping[str, Any]) -> list[str]:
    body = []
    for label, name, options, note in settings_of(results["config"]):
        note += ["reads the first question before it compresses"] * (
            label in results["query_aware"]
        )
        shown = ", ".join(f"{k} {json.dumps(v)}" for k, v in options.items() if v is not None)
        body.append([label, name, shown, "; ".join(note)])
    if results["config"].get("engine") is not None:
        body.append([ENGINE, "engine", str(results["config"]["engine"]), "as it is built"])
    return _table(["method", "kind", "options", "note"], body, numbers=0)


def _group(rows: Sequence[Row], query_aware: Sequence[str]) -> list[str]:
    """One group's table; columns without any number are left out."""
    binary = all(r.binary for r in rows)
    columns = {
        "KV kept": lambda r: _percent(r.kv_ratio),
        "at most": lambda r: _percent(r.kv_most),
        ("accuracy" if binary else "score") + " [95 %]": lambda r: _share(r.score),
        "less dense [95 %]": lambda r: _points(r.difference.estimate if r.difference else None),
        "lost / won, p": lambda r: (
            f"{r.difference.lost} / {r.difference.won}, {r.difference.p:.2g}"
            if r.difference and r.difference.p is not None
            else ""
        ),
        "KL [95 %]": lambda r: _plain(r.kl) if r.method != DENSE else "",
        "same token": lambda r: _percent(r.agree.mean) if r.agree and r.method != DENSE else "",
        "perplexity": lambda r: f"{r.perplexity:.3f}" if r.perplexity and not r.score else "",
        "× dense [95 %]": lambda r: "" if r.score else _plain(r.perplexity_ratio, ".4f"),
        "n": lambda r: _count(r),
    }
    cells = {name: [f(r) for r in rows] for name, f in columns.items()}
    shown = [name for name, values in cells.items() if any(values)]
    body = [
        [r.method + (" †" if r.method in query_aware else ""), *(cells[n][i] for n in shown)]
        for i, r in enumerate(rows)
    ]
    return _table(["method", *shown], body)


def _curves(here: Sequence[Curve]) -> list[str]:
    """One group's tables over the text behind the context: KL, and NLL less the dense model's."""
    if not here:
        return []
    most = max(len(c.kl) for c in here)
    head = [f"{i * SPAN + 1:,} – {(i + 1) * SPAN:,}" for i in range(most)]
    lines = []
    for title, form, values, last in (
        ("KL by tokens behind the context [95 %]", ".3g", [c.kl for c in here], True),
        ("NLL less dense's, same tokens [95 %]", "+.3f", [c.nll for c in here], False),
    ):
        body = [
            [
                c.method,
                *(_plain(e, form) for e in v),
                *[""] * (most - len(v)),
                *([_plain(c.change, ".2f")] if last else []),
            ]
            for c, v in zip(here, values, strict=True)
        ]
        lines += [title, "", *_table(["method", *head, *["last : first"] * last], body), ""]
    return lines


def _compared(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    body = []
    for c in pairs:
        kl, d = c["kl_ratio"], c["difference"]
        p = "" if d is None or d["p"] is None else f"{d['lost']} / {d['won']}, {d['p']:.2g}"
        body.append(
            [
                c["task"],
                c["group"],
                f"{c['method']} : {c['against']}",
                "" if kl is None else f"{kl['mean']:.3f}{_interval(kl, '.3f')}",
                "" if d is None else f"{100 * d['mean']:+.1f}{_interval(d, '+.1f', 100)}",
                p,
                str(c["samples"]),
            ]
        )
    head = ["task", "group", "methods", "KL ratio [95 %]", "points [95 %]", "lost / won, p", "n"]
    return _table(head, body, numbers=4)


def _notes(rows: Sequence[Row], followed: Sequence[Curve]) -> list[str]:
    kinds = Counter(r.score.interval for r in rows if r.score)
    notes = [
        "KV kept: bits of the cache after compression over those of a dense 16-bit one, mean over "
        "samples; at most: the largest while a sample was asked, new tokens included. Intervals of "
        "95 %; contexts, not samples, count as independent. Differences and ratios are of the same "
        "samples; lost / won: trials that only dense, and only the method, got right, and McNemar's "
        "exact p.",
    ]
    if kinds["wilson"]:
        notes.append("Accuracies have Wilson's interval, all else the bootstrap's (4,000 draws).")
    notes.append("KL: KL(dense ‖ method), nats per predicted token.")
    if followed:
        notes.append(
            "By tokens behind the context: the first of them is predicted right after the "
            "compression; last : first is the ratio of the two spans' KL. Spans are different "
            "text: compare methods in a span, and each method's change with the others'."
        )
    notes.append("Pictures: methods with nearly equal KV stand side by side.")
    if any(r.errors for r in rows):
        notes.append("n (+ e): e samples that the method refused; they are in no mean.")
    return ["---", "", *notes]


def _count(row: Row) -> str:
    trials = row.score.n if row.score else row.samples
    return f"{trials:,}" + (f" (+ {row.errors})" if row.errors else "")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def _share(e: Any) -> str:
    if e is None:
        return ""
    return f"{100 * e.mean:.1f}%{_interval(e.to_json(), '.1f', 100)}"


def _points(e: Any) -> str:
    return "" if e is None else f"{100 * e.mean:+.1f}{_interval(e.to_json(), '+.1f', 100)}"


def _plain(e: Any, form: str = ".3g") -> str:
    return "" if e is None else f"{e.mean:{form}}{_interval(e.to_json(), form)}"


def _interval(e: Mapping[str, Any], form: str, scale: float = 1.0) -> str:
    if e["low"] is None or e["high"] is None:
        return ""
    return f" [{scale * e['low']:{form}}, {scale * e['high']:{form}}]"


def _table(
    head: Sequence[str], body: Sequence[Sequence[str]], numbers: int | None = None
) -> list[str]:
    """Markdown table; ``numbers``: the last so many columns stand right (None: all but the first)."""
    right = len(head) - 1 if numbers is None else numbers
    rule = ["---"] * (len(head) - right) + ["---:"] * right
    rows = [[_cell(c) for c in row] for row in body]
    return ["| " + " | ".join(r) + " |" for r in [list(head), rule, *rows]]


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
