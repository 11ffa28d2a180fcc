"""From records to numbers, tables and pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

sys.path.insert(0, str(Path(__file__).parent))

from trt_razor.errors import RazorError, UsageError
from trt_razor.evaluation.aggregate import aggregate, compare, groups_of
from trt_razor.evaluation.environment import cpu_name
from trt_razor.evaluation.figures import against_kept, needle_grid, unique
from trt_razor.evaluation.method_rows import MANY, method_rows
from trt_razor.evaluation.records import RUN_FILE, Record, RecordFolder
from trt_razor.evaluation.report import write_report

METHODS = ["dense", "razor", "razor $x_1$ | none", "h2o"]


def needle(
    method: str, sample: int, score: float, kl: float, group: str = "1024", **more: Any
) -> Record:
    return Record(
        "needle", method, f"{group}-{sample}", f"{group}-{sample // 2}", group, int(group),
        1.0 if method == "dense" else 0.2, 1.0, score, [score], [], 4,
        0.5 + kl, kl, 1.0 - kl, 1.0, 2.0,
        meta={"depth": (sample % 5) / 4, "length": int(group)}, **more,
    )  # fmt: skip


def write(folder: Path, records: list[Record], labels: list[str], **config: Any) -> None:
    settings = {
        "name": "toy", "scoring": "forced", "seed": 1, "engine": None, "compare": [],
        "tasks": [{t: {}, "label": t} for t in dict.fromkeys(r.task for r in records)],
        "methods": [{m.split()[0]: {"a": "x|y"}, "label": m, "trials": None} for m in labels],
        **config,
    }  # fmt: skip
    with RecordFolder(folder, "f" * 16, settings, True) as out:
        where = {"runners": ["toy"], "versions": {"python": "3.11"}, "cpu": "abacus", "cores": 2}
        out.describe(where, len(records), ["h2o"])
        for r in records:
            out.add(r)


def test_numbers_of_a_row() -> None:
    records = [needle("dense", i, float(i != 0), 0.0) for i in range(8)]
    records += [needle("razor", i, float(i not in (0, 1, 2)), 0.1 * i) for i in range(8)]
    dense, razor = aggregate(records, ["needle"], ["dense", "razor", "never ran"])
    assert dense.score is not None
    assert (dense.score.mean, dense.difference, dense.perplexity_ratio) == (7 / 8, None, None)
    assert razor.score is not None
    assert (razor.score.mean, razor.score.n, razor.score.clusters) == (5 / 8, 8, 4)
    assert razor.difference is not None
    assert (razor.difference.lost, razor.difference.won, razor.difference.p) == (2, 0, 0.5)
    assert razor.difference.estimate.mean == -2 / 8
    assert razor.kl is not None
    assert razor.kl.mean == pytest.approx(0.35)
    assert razor.perplexity == pytest.approx(math.exp(0.85))
    assert razor.perplexity_ratio is not None
    assert razor.perplexity_ratio.mean == pytest.approx(math.exp(0.35))
    assert (razor.samples, razor.contexts, razor.errors, razor.tokens) == (8, 4, 0, 32)
    assert razor.seconds == 8


def test_the_order_of_records_does_not_matter(tmp_path: Path) -> None:
    """Several processes write them as they come: sums and bootstraps are the same to the last digit."""
    records = [
        needle(m, i, float((i + len(m)) % 3 != 0), 0.0 if m == "dense" else 0.1 / (i + 3), group)
        for group in ("1024", "512")
        for i in range(12)
        for m in ("dense", "h2o")
    ]
    records = [dataclasses.replace(r, group=f"g{r.group}") for r in records]
    found = []
    for order in range(3):
        random.Random(order).shuffle(records)
        write(tmp_path, records, ["dense", "h2o"], compare=[["h2o", "dense"]])
        about = json.loads((tmp_path / RUN_FILE).read_text(encoding="utf-8"))
        about["groups"] = {"needle": ["g1024", "g512"]}
        (tmp_path / RUN_FILE).write_text(json.dumps(about), encoding="utf-8")
        write_report(tmp_path)
        found.append(json.loads((tmp_path / "results.json").read_text(encoding="utf-8")))
    assert found[1:] == found[:1] * 2
    assert [r["group"] for r in found[0]["results"][::2]] == ["g1024", "g512", "all"]
    for groups in (None, [], {"needle": 3}):  # of an older version, or damaged
        (tmp_path / RUN_FILE).write_text(json.dumps({**about, "groups": groups}), encoding="utf-8")
        write_report(tmp_path)
        other = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
        assert [r["group"] for r in other["results"][::2]] == ["g512", "g1024", "all"]


def test_means_are_over_tokens() -> None:
    records = [
        Record("p", "dense", str(i), str(i), "g", 9, 1.0, 1.0, tokens=t, nll=1.0, kl=0.0, agree=1.0)
        for i, t in enumerate((1, 3))
    ]
    records += [
        Record("p", "m", str(i), str(i), "g", 9, 0.2, 0.3, tokens=t, nll=n, kl=k, agree=0.5)
        for i, (t, n, k) in enumerate(((1, 5.0, 4.0), (3, 1.0, 0.0)))
    ]
    _, row = aggregate(records, ["p"], ["dense", "m"])
    assert row.kl is not None
    assert (row.kl.mean, row.kl.low, row.kl.high) == (1.0, 0.0, 4.0)
    assert row.perplexity == pytest.approx(math.exp(2))
    assert (row.kv_ratio, row.kv_most) == (pytest.approx(0.2), 0.3)


def test_every_turn_is_a_trial() -> None:
    def record(method: str, scores: list[float]) -> Record:
        return Record("t", method, "s", "c", "g", 9, 1.0, 1.0, sum(scores) / len(scores), scores)

    records = [record("dense", [1.0, 1.0, 0.0]), record("m", [1.0, 0.0, 1.0])]
    row = aggregate(records, ["t"], ["dense", "m"])[1]
    assert row.score is not None
    assert (row.score.n, row.score.mean) == (3, pytest.approx(2 / 3))
    assert row.difference is not None
    assert (row.difference.lost, row.difference.won) == (1, 1)


def test_only_equal_samples_are_compared() -> None:
    records = [needle("dense", i, 1.0, 0.0) for i in range(8)]
    records += [needle("razor", i, 0.0, 0.2) for i in range(2)]
    records += [needle("h2o", i, 0.0, 0.4) for i in range(1, 4)]
    row = aggregate(records, ["needle"], ["dense", "razor"])[1]
    assert row.difference is not None
    assert row.difference.lost == 2
    (pair,) = compare(records, ["needle"], [("razor", "h2o")])
    assert (pair["samples"], pair["kl_ratio"]["mean"]) == (1, pytest.approx(0.5))


def test_errors_are_in_no_mean() -> None:
    records = [needle("dense", i, 1.0, 0.0) for i in range(4)]
    records += [needle("h2o", 0, 1.0, 0.1)]
    records += [
        Record("needle", "h2o", f"1024-{i}", "c", "1024", 1024, error="too long") for i in (1, 2, 3)
    ]
    row = aggregate(records, ["needle"], ["dense", "h2o"])[1]
    assert row.score is not None
    assert (row.samples, row.errors, row.score.mean, row.score.n) == (1, 3, 1.0, 1)


def test_groups_are_in_order() -> None:
    records = [needle("dense", 0, 1.0, 0.0, g) for g in ("4096", "1024", "2048")]
    assert groups_of(records, "needle") == ["1024", "2048", "4096", "all"]
    assert groups_of(records[:1], "needle") == ["4096"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    rng = random.Random(0)
    records = []
    for group in ("1024", "2048"):
        for i in range(10):
            for m in METHODS:
                if m == "h2o" and group == "2048":
                    context = f"2048-{i // 2}"
                    reason = "h2o: a|b too long"
                    records.append(
                        Record("needle", m, f"2048-{i}", context, group, 2048, error=reason)
                    )
                else:
                    kl = 0.0 if m == "dense" else rng.random()
                    records.append(needle(m, i, float(rng.random() < 0.8), kl, group))
    for m in METHODS[:2]:
        for i in range(3):
            kl = 0.0 if m == "dense" else 0.1
            records.append(
                Record(
                    "text", m, str(i), str(i), "512", 512, 0.5, 0.6, None, [], [], 30, 2.0, kl, 0.9
                )
            )
    write(path, records, METHODS, compare=[["razor", "h2o"]])
    write_report(path)
    return path


def test_report_files(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["run"] == "f" * 16
    assert results["environments"][0]["cpu"] == "abacus"
    assert results["seconds"] == 70 * 1 + 20 * 2  # asked by all, read once
    assert results["errors"] == [
        {"task": "needle", "method": "h2o", "samples": 10, "reason": "h2o: a|b too long"}
    ]
    assert results["figures"] == [
        "needle-grid.png", "needle-accuracy.png", "needle-kl.png", "text-kl.png"
    ]  # fmt: skip
    for name in results["figures"]:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    rows = {(r["task"], r["group"], r["method"]): r for r in results["results"]}
    assert rows["needle", "all", "razor"]["score"]["n"] == 20
    assert rows["needle", "2048", "h2o"]["errors"] == 10
    assert rows["text", "512", "razor"]["kl"]["mean"] == pytest.approx(0.1)


def test_report_tables(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    table: list[int] = []
    for line in text.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        if cells and table:
            assert cells == table[-1], line  # every row as wide as its head
        table = [*table, cells] if cells else []
    assert "h2o †" in text
    assert "reads the first question before it compresses" in text
    assert "10 samples: h2o: a\\|b too long" in text
    assert "0 (+ 10)" in text
    for heading in (
        "## needle",
        "### 2048",
        "### all groups",
        "## text",
        "## Compared",
        "## Errors",
    ):
        assert f"\n{heading}\n" in text
    assert "accuracy [95 %]" in text
    part = text[text.index("## text") : text.index("## Compared")]
    assert "accuracy" not in part
    assert "| dense | 50.0% | 60.0% |  |  | 7.389 |" in part
    assert "Not complete" not in text


def test_report_again_is_the_same_and_leaves_no_old_picture(tmp_path: Path) -> None:
    records = [needle(m, i, 1.0, 0.1) for m in ("dense", "razor") for i in range(4)]
    write(tmp_path, records, ["dense", "razor"])
    write_report(tmp_path)
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write_report(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first
    (tmp_path / "mine.png").write_bytes(b"x")
    plain = [Record("needle", "dense", "a", "a", "g", 9, 1.0, 1.0, 1.0, [1.0])]
    write(tmp_path, plain, ["dense"])
    write_report(tmp_path)
    assert {p.name for p in tmp_path.iterdir() if p.suffix == ".png"} == {"mine.png"}


def test_a_report_cannot_delete_elsewhere(tmp_path: Path) -> None:
    outside = tmp_path / "kept.png"
    outside.write_bytes(b"x")
    inside = tmp_path / "run"
    write(inside, [needle("dense", 0, 1.0, 0.0)], ["dense"])
    (inside / "results.json").write_text(json.dumps({"figures": ["../kept.png", 3]}))
    write_report(inside)
    assert outside.exists()


def test_unfinished_runs_say_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no results of trt-razor eval there"):
        write_report(tmp_path)
    write(tmp_path, [needle("dense", 0, 1.0, 0.0)], ["dense"])
    about = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**about, "planned": 9}))
    write_report(tmp_path)
    assert "**Not complete**: 1 of 9 results" in (tmp_path / "report.md").read_text()
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(RazorError, match="no records yet"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({**about, "config": {"tasks": 3}}))
    (tmp_path / "records.jsonl").write_text(needle("dense", 0, 1.0, 0.0).line())
    with pytest.raises(RazorError, match="damaged"):
        write_report(tmp_path)


# Pictures -----------------------------------------------------------------------------------------
def test_grid_shows_means_by_depth_and_length() -> None:
    records = [
        needle("razor", i, float(i >= 5), 0.1, g) for g in ("1024", "2048") for i in range(10)
    ]
    figure = needle_grid("needle", records, ["razor"])
    assert figure is not None
    grid = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_array_equal(grid, np.full((5, 2), 0.5))
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1K", "2K"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [
        "0%",
        "25%",
        "50%",
        "75%",
        "100%",
    ]
    without = [Record("t", "razor", "s", "c", "g", 9, 1.0, 1.0, 1.0, [1.0], meta={"depth": [0.1]})]
    assert needle_grid("t", without, ["razor"]) is None


def test_random_depths_are_binned() -> None:
    records = [
        Record(
            "t",
            "m",
            str(i),
            str(i),
            "8",
            8,
            1.0,
            1.0,
            float(i >= 50),
            meta={"depth": i / 99, "length": 8},
        )
        for i in range(100)
    ]
    figure = needle_grid("t", records, ["m"])
    assert figure is not None
    grid = np.asarray(figure.axes[0].images[0].get_array())[:, 0]
    np.testing.assert_array_equal(grid, [0] * 5 + [1] * 5)


@pytest.mark.parametrize("what", ["score", "kl"])
def test_every_method_has_a_mark_of_its_own(what: str) -> None:
    names = {
        "dense": "dense",
        **{f"razor-{i}": "razor" for i in range(6)},
        "h2o": "h2o",
        "duo": "duo",
    }
    records = [
        needle(m, i, float(i % 3 > 0), 0.0 if m == "dense" else 0.1 + i / 50, g)
        for m in names for g in ("1024", "2048", "4096") for i in range(6)
    ]  # fmt: skip
    figure = against_kept("needle", aggregate(records, ["needle"], list(names)), names, what)
    assert figure is not None
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["1K tokens", "2K tokens", "4K tokens"]
    handles = figure.legends[0].legend_handles
    marks = {(str(h.get_color()), str(h.get_marker())) for h in handles if h is not None}  # type: ignore[attr-defined]
    assert len(marks) == len(names) - (what == "kl")  # dense has no KL
    FigureCanvasAgg(figure).draw()
    # Labels of the legend lie neither on each other nor on a panel.
    boxes = [t.get_window_extent() for t in figure.legends[0].get_texts()]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not any(box.overlaps(ax.get_tightbbox()) for ax in panels)  # type: ignore[arg-type]
    # Equal budgets stand side by side.
    points = [
        x
        for line in panels[0].lines
        if line.get_marker() not in ("None", None, "")
        for x in line.get_xdata()
    ]
    assert len({round(float(x), 6) for x in points}) == len(points)
    assert all(x == pytest.approx(20, rel=0.2) for x in points if x < 90)


@pytest.mark.parametrize("what", ["score", "kl"])
def test_many_methods_get_a_row_each(what: str) -> None:
    names = {"dense": "dense", **{f"m{i}": "razor" for i in range(MANY)}}
    records = [
        needle(m, i, float(i % 3 > 0), 0.0 if m in ("dense", "m3") else 0.1 + i / 50, g)
        for m in names for g in ("1024", "4096") for i in range(6)
        if (m, g) != ("m5", "1024")
    ]  # fmt: skip
    rows = aggregate(records, ["needle"], list(names))
    figure = method_rows("needle", rows, names, what)
    assert figure is not None
    first, second = figure.axes
    assert [ax.get_title() for ax in figure.axes] == ["1024 tokens", "4096 tokens"]
    assert [t.get_text() for t in first.get_yticklabels()] == list(names)[1:]
    marked = [
        {round(float(line.get_ydata()[0])) for line in ax.lines if line.get_marker() == "o"}
        for ax in (first, second)
    ]
    every = set(range(MANY)) - ({3} if what == "kl" else set())  # no zero on a log axis
    assert marked == [every - {5}, every]
    FigureCanvasAgg(figure).draw()
    assert method_rows("t", [r for r in rows if r.method == "dense"], names, what) is None


def test_file_names_are_plain_and_different() -> None:
    assert unique("Ä b/../c-kl", []) == "b-..-c-kl.png"
    assert unique("a", ["a.png", "a-2.png"]) == "a-3.png"
    assert unique("///", []) == "figure.png"


def test_cpu_name(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Abacus 9\n")
    assert cpu_name(info) == "Abacus 9"
    assert cpu_name(tmp_path / "none")
