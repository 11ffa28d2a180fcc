"""``trt-razor eval``: wrong use, and a real run on the real model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from eval_doubles import Keep, ToyRunner, ToyTask, config
from tiny_models import TinyModel

import trt_razor.evaluation.config
import trt_razor.evaluation.run
from trt_razor.cli import main
from trt_razor.engine import Engine
from trt_razor.evaluation.records import read_records

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]

TINY = """
name: tiny
model: smollm2-135m
threads: 1
tasks:
  - needle: {lengths: [192], trials: 2, needles: 2}
  - perplexity: {lengths: [128], windows: 1, continuation: 16, text: python}
methods:
  - razor: {policy: {min_window: 32}}
  - streaming: {budget: 0.3}
compare: [[razor, streaming]]
"""


def run(*argv: object) -> int:
    try:
        return main(["eval", *map(str, argv)])
    except SystemExit as e:
        return int(e.code or 0)


def refused(capsys: Capture, code: int, words: str, *argv: object) -> None:
    capsys.readouterr()
    assert run(*argv) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert re.search(words, lines[-1]), lines[-1]


@pytest.mark.parametrize("argv, words", [
    ([], "expected one of RUN.yaml, --report DIR, --agreement ENGINE, --list"),
    (["quick", "--list"], "expected one of"),
    (["qiuck"], "qiuck: no such file, and no bundled run; did you mean quick"),
    (["no/quick.yaml"], "no/quick.yaml: no such file"),
    (["quick", "--limit", "0"], "--limit: expected at least 1"),
    (["quick", "--limit", "x"], "--limit: invalid int value"),
    (["quick", "--jobs", "0"], "--jobs: expected 1 to 64, found 0"),
    (["quick", "--jobs", "-1"], "--jobs: expected 1 to 64, found -1"),
    (["quick", "--jobs", "1000"], "--jobs: expected 1 to 64, found 1000"),
    (["quick", "--jobs", "two"], "--jobs: invalid int value"),
    (["--list", "--jobs", "2"], "--jobs: --list computes nothing"),
    (["--report", "x", "--jobs", "2"], "--jobs: --report takes a results folder alone"),
    (["--agreement", "x", "--jobs", "2"], "--jobs: --agreement takes an engine and --model"),
    (["quick", "--restart", "--retry"], "give one of them"),
    (["--report", "no-such-folder"], "no results of trt-razor eval there"),
    (["--report", "x", "--restart"], "--restart: --report takes a results folder alone"),
    (["--agreement", "no-such-engine"], "no-such-engine: no such engine directory"),
    (["--agreement", "x", "--limit", "3"], "--limit: --agreement takes an engine and --model"),
    (["quick", "--agreement", "x"], "expected one of"),
    (["quick", "--model", "smolm2-135m"], "did you mean .*smollm2-135m"),
    (["quick", "--device", "nodevice"], "device: nodevice: not usable here"),
    (["quick", "--device", "nodevice", "--jobs", "2"], "device: nodevice: not usable here"),
])  # fmt: skip
def test_wrong_use(
    argv: list[str], words: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, 2, words, *argv)


def test_a_wrong_field_names_file_and_place(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(TINY.replace("trials", "trails"))
    refused(capsys, 2, r"run\.yaml: tasks\[0\]\.needle\.trails: did you mean trials", path)
    assert not (tmp_path / "evaluations").exists()


def test_list_names_everything(capsys: Capture) -> None:
    assert run("--list") == 0
    shown = capsys.readouterr().out
    for line in (
        "tasks",
        "      lengths = [1024, 2048, 4096]",
        "      questions = null",
        "methods",
        "  dense: Full attention over every token.",
        "      budget (required)",
        "runs",
    ):
        assert f"\n{line}\n" in f"\n{shown}"
    assert "\n  smoke: A minute" in shown


# With a toy model ---------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A run may set them; other tests shall not be slower for it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ToyRunner:
    """``toy.yaml`` is a run of toy tasks on a toy model; stops where its runner says."""
    runner = ToyRunner()
    made = config({"t": ToyTask()}, {"last8": Keep(8), "short": Keep(8, refuses=30)})
    monkeypatch.setattr(trt_razor.evaluation.config, "load_config", lambda path, override: made)
    monkeypatch.setattr(trt_razor.evaluation.run, "open_runners", lambda c: (runner, None))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text("")
    return runner


def test_interrupted_then_finished(toy: ToyRunner, capsys: Capture) -> None:
    toy.stop_after = 2
    assert run("toy.yaml") == 130
    assert (
        "12 results are kept in evaluations/toy; the same command goes on"
        in capsys.readouterr().err
    )
    assert not Path("evaluations/toy/report.md").exists()
    toy.stop_after = None
    assert run("toy.yaml") == 1  # a method failed, and says so
    shown = capsys.readouterr()
    assert "12 of 36 results are there already" in shown.err
    assert "failed: short on t, 6 samples: keep: 39 tokens are too many" in shown.err
    assert "36 results: evaluations/toy/report.md" in shown.out
    assert "short on t: 6 samples" in Path("evaluations/toy/report.md").read_text(encoding="utf-8")
    reads = len(toy.reads)
    assert run("--report", "evaluations/toy") == 0
    assert len(toy.reads) == reads
    assert run("toy.yaml", "--retry") == 1
    assert "6 failed results are tried again" in capsys.readouterr().err


def test_limit_and_restart(toy: ToyRunner, capsys: Capture, tmp_path: Path) -> None:
    assert run("toy.yaml", "--limit", 1, "--output", "here") == 1
    assert len(read_records(Path("here"))) == 2 * 3
    assert run("toy.yaml", "--output", "here", "--restart") == 1
    assert len(read_records(Path("here"))) == 36
    assert "are there already" not in capsys.readouterr().err


# With engines -------------------------------------------------------------------------------------
def test_an_engine_beside_the_model_and_alone(
    tiny_model: TinyModel, razor_engine: Engine, dense_engine: Engine, tmp_path: Path
) -> None:
    """The dense engine says what transformers says, the Razor engine nearly; both go through the tasks."""
    task = "perplexity: {lengths: [40], windows: 3, continuation: 8, text: python}"
    rows = {}
    for name, engine in (("dense", dense_engine), ("razor", razor_engine)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"name: x\nmodel: {tiny_model.folder}\nengine: {engine.directory}\ntasks: [{task}]"
        )
        assert run(path, "--output", tmp_path / name) == 0
        results = json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))
        rows[name] = {r["method"]: r for r in results["results"]}
        assert len(results["environments"][0]["runners"]) == 2
    same, razor = rows["dense"]["engine"], rows["razor"]["engine"]
    assert (same["kv_ratio"], same["agree"]["mean"]) == (1, 1)
    assert same["kl"]["mean"] < 1e-6 < razor["kl"]["mean"]
    assert razor["kv_ratio"] < 1

    path.write_text(f"name: x\nengine: {razor_engine.directory}\ntasks: [{task}]")
    assert run(path, "--output", tmp_path / "alone") == 0
    (alone,) = read_records(tmp_path / "alone")[:1]
    assert (alone.method, alone.kl) == ("engine", None)
    with_model = {r.key: r for r in read_records(tmp_path / "razor")}
    assert alone.nll == with_model[alone.key].nll


# With the real one --------------------------------------------------------------------------------
def numbers(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {
        r.key: {k: v for k, v in r.__dict__.items() if "seconds" not in k}
        for r in read_records(folder)
    }


@pytest.mark.real
def test_killed_and_resumed_on_the_real_model(tmp_path: Path, capsys: Capture) -> None:
    """kill -9 in the middle; the next call completes it, and the numbers are those of one go."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    argv = [sys.executable, "-m", "trt_razor", "eval", tmp_path / "tiny.yaml", "--output", killed]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL, env=env)
    records = killed / "records.jsonl"
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if records.exists() and records.stat().st_size > 1000:
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = len(read_records(killed))
    assert 0 < before < 9
    for folder in (killed, whole):
        assert run(tmp_path / "tiny.yaml", "--output", folder) == 0
        said = capsys.readouterr().err
        assert (f"{before} of 9 results are there already" in said) == (folder == killed)
    assert numbers(killed) == numbers(whole)
    assert len(numbers(whole)) == 9

    results = json.loads((whole / "results.json").read_text(encoding="utf-8"))
    rows = {(r["task"], r["method"]): r for r in results["results"]}
    assert rows["needle", "dense"]["score"]["mean"] == 1  # 192 tokens are easy for the dense model
    assert rows["perplexity", "dense"]["kv_ratio"] == 1
    assert 0.2 < rows["perplexity", "streaming"]["kv_ratio"] <= 0.3
    assert rows["perplexity", "dense"]["kl"]["mean"] == 0
    for task in ("needle", "perplexity"):
        assert 0 < rows[task, "razor"]["kl"]["mean"] < rows[task, "streaming"]["kl"]["mean"]
    assert results["environments"][0]["versions"]["torch"]
