"""A long continuation, span by span: from logits to records, tables and the picture."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from eval_doubles import Keep, ToyRunner, ToyTask, config, lanes

from trt_razor.cli_eval import RUNS
from trt_razor.evaluation.config import load_config
from trt_razor.evaluation.curves import Curve, curves
from trt_razor.evaluation.figures import behind
from trt_razor.evaluation.methods.kept import razor_bits
from trt_razor.evaluation.methods.razor import read_policy
from trt_razor.evaluation.nearness import SPAN, Meter, nearness
from trt_razor.evaluation.records import Record, RecordFolder, read_records
from trt_razor.evaluation.report import write_report
from trt_razor.evaluation.run import run

LONG = 2 * SPAN + 100


# Logits -------------------------------------------------------------------------------------------
def test_spans_are_means_of_their_tokens() -> None:
    rng = np.random.default_rng(0)
    before, rows = 3, 3 + LONG
    p, q = (rng.standard_normal((rows, 9)).astype(np.float32) * 2 for _ in range(2))
    targets = [int(t) for t in rng.integers(0, 9, rows)]
    near = nearness([q[:40], q[40:]], targets, [p[:40], p[40:]], LONG)
    assert len(near.kl_curve) == len(near.nll_curve) == 2  # the rest is no whole span
    for i in range(2):
        part = slice(before + i * SPAN, before + (i + 1) * SPAN)
        alone = nearness([q[part]], targets[part], [p[part]])
        assert near.kl_curve[i] == pytest.approx(alone.kl, rel=1e-9)
        assert near.nll_curve[i] == pytest.approx(alone.nll, rel=1e-9)
    short = nearness([q], targets, [p], 2 * SPAN - 1)
    assert (short.kl_curve, short.nll_curve, short.tokens) == ((), (), rows)


def test_a_meter_counts_pieces_as_if_they_were_one() -> None:
    rng = np.random.default_rng(1)
    p, q = (rng.standard_normal((2 * SPAN, 9)).astype(np.float32) for _ in range(2))
    targets = [int(t) for t in rng.integers(0, 9, 2 * SPAN)]
    cuts = [0, 1, 9, 500, 700, 2 * SPAN]
    pieces = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    meter = Meter([p[s] for s in pieces])
    for s in pieces:
        meter.add(q[s], targets[s])
    whole = nearness([q], targets, [p], 2 * SPAN)
    assert meter.result(2 * SPAN) == whole
    assert whole.kl == pytest.approx(sum(whole.kl_curve) / 2)


# Runs ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long")
    task = ToyTask(lengths=(20, 40), contexts=2, per=1, continuation=LONG)
    made = config(
        {"long": task, "short": ToyTask(per=1, contexts=1, continuation=5)},
        {"last8": Keep(8), "all": Keep()},
        chunk=8,
    )
    with RecordFolder(path, made.hash(), made.to_json(), False) as output:
        run(made, lanes(made, ToyRunner()), output, lambda *a: None, lambda t: None)
    return path


def test_only_long_continuations_have_curves(folder: Path) -> None:
    for r in read_records(folder):
        assert len(r.kl_curve) == len(r.nll_curve) == (2 if r.task == "long" else 0)
        if r.method != "last8":
            assert r.kl_curve in ([], [0.0, 0.0])
        elif r.task == "long":
            # Ever more tokens that both have: the toy forgets what it lost.
            assert r.kl_curve[0] > 2 * r.kl_curve[1] > 0


def test_the_report_shows_them(folder: Path) -> None:
    write_report(folder)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert "long-curve.png" in results["figures"]
    assert "short-curve.png" not in results["figures"]
    shown = {(c["task"], c["group"], c["method"]): c for c in results["curves"]}
    assert set(shown) == {("long", g, m) for g in ("20", "40", "all") for m in ("last8", "all")}
    mine = [r for r in read_records(folder) if (r.method, r.group) == ("last8", "20")]
    mine = [r for r in mine if r.task == "long"]
    found = shown["long", "20", "last8"]
    assert found["span"] == SPAN
    assert found["kl"][1]["mean"] == pytest.approx(np.mean([r.kl_curve[1] for r in mine]))
    text = (folder / "report.md").read_text(encoding="utf-8")
    part = text[text.index("## long") : text.index("## short")]
    assert part.count("| method | 1 – 512 | 513 – 1,024 | last : first |") == 3
    assert part.count("| method | 1 – 512 | 513 – 1,024 |\n") == 3
    assert "![long-curve](long-curve.png)" in part
    assert "513" not in text[text.index("## short") :]


def test_records_of_before_still_read() -> None:
    record = Record("t", "m", "s", "c", "g", 9, tokens=3, nll=1.0, kl=0.5, kl_curve=[0.5, 0.25])
    line = json.loads(record.line())
    assert Record.from_json(line) == record
    del line["kl_curve"], line["nll_curve"]
    assert Record.from_json(line).kl_curve == []


# Numbers ------------------------------------------------------------------------------------------
def made(method: str, sample: int, kl: list[float], nll: list[float], group: str = "9") -> Record:
    name = f"{group}-{sample}"
    return Record("t", method, name, name, group, 9, kl_curve=kl, nll_curve=nll)


def test_curves_are_paired_with_dense() -> None:
    records = [made("dense", i, [0.0] * 3, [2.0, 3.0, 4.0 + i]) for i in range(3)]
    records += [made("razor", i, [0.1, 0.2, 0.4 + i], [2.5, 3.5, 4.0 + i]) for i in range(2)]
    records += [made("late", 7, [0.1, 0.2], [1.0, 1.0])]  # dense has no such sample
    (curve,) = curves(records, ["t"], ["dense", "razor", "late"])
    assert curve.method == "razor"
    assert [e.mean for e in curve.kl] == pytest.approx([0.1, 0.2, 0.9])
    assert (curve.kl[2].low, curve.kl[2].high) == (pytest.approx(0.4), pytest.approx(1.4))
    assert [e.mean for e in curve.nll] == pytest.approx([0.5, 0.5, 0.0])
    assert curve.change is not None
    assert curve.change.mean == pytest.approx(9)


def test_equal_to_dense_has_no_change() -> None:
    records = [made(m, 0, [0.0, 0.0], [2.0, 3.0]) for m in ("dense", "razor")]
    (curve,) = curves(records, ["t"], ["razor"])
    assert curve.change is None
    assert curve.to_json()["change"] is None


# Picture ------------------------------------------------------------------------------------------
def followed(methods: int, samples: int) -> list[Curve]:
    records = []
    for group in ("512", "1024"):
        for i in range(samples):
            records.append(made("dense", i, [0.0] * 4, [1.0] * 4, group))
            for m in range(methods):
                kl = [0.1 * (m + 1) * (1 + s * m / 4) * (1 + i / 9) for s in range(4)]
                records.append(made(f"m{m}", i, kl, [1.0 + v for v in kl], group))
    return curves(records, ["t"], [f"m{m}" for m in range(methods)])


def test_a_line_and_a_band_for_each_method() -> None:
    figure = behind("t", followed(5, 3), [f"m{m}" for m in range(5)])
    assert figure is not None
    assert [ax.get_title() for ax in figure.axes] == ["512 tokens", "1K tokens"]  # not "all"
    for ax in figure.axes:
        assert ax.get_yscale() == "log"
        assert len(ax.lines) == len(ax.collections) == 5
        assert len({str(line.get_color()) for line in ax.lines}) == 5
        middles = [SPAN * (s + 0.5) for s in range(4)]
        np.testing.assert_allclose(np.asarray(ax.lines[1].get_xdata(), float), middles)
        kl = [0.2 * (1 + s / 4) * (1 + 1 / 9) for s in range(4)]
        np.testing.assert_allclose(np.asarray(ax.lines[1].get_ydata(), float), kl)
        assert ax.get_xlim() == (0, 4 * SPAN)


def test_one_context_has_no_band() -> None:
    figure = behind("t", followed(2, 1), ["m0", "m1"])
    assert figure is not None
    assert [len(ax.collections) for ax in figure.axes] == [0, 0]
    assert behind("t", [], ["m0"]) is None


# The bundled run ----------------------------------------------------------------------------------
def test_methods_of_the_long_run_take_equal_bytes() -> None:
    options = {m.label: m.options for m in load_config(RUNS / "long-decode.yaml").methods}
    policy = {k: read_policy(v["policy"]) for k, v in options.items() if k != "dense"}
    row, head_dim = 2 * 64 * 16, 64
    local = {k: razor_bits(0, 1, head_dim, p, 2048) / row for k, p in policy.items()}
    for name in ("mean", "window"):
        assert local["tight"] - 1 < local[name] <= local["tight"]
    assert policy["clusters"] == policy["tight"].with_(heavy_hitters=0)
    # SmolLM2-135M: 14 of 90 heads keep everything.
    at = range(1024, 1024 + 3072 + 1)
    tight = np.mean([razor_bits(14, 76, head_dim, policy["tight"], n) for n in at])
    streaming = np.mean([razor_bits(0, 90, head_dim, policy["streaming"], n) for n in at])
    assert 0.999 < streaming / tight <= 1.001
