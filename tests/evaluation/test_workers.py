"""Several processes: the same records as one, and none of them left whatever happens."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from eval_doubles import Keep, ToyRunner, ToyTask, config
from tiny_models import TinyModel
from worker_doubles import (
    open_buggy,
    open_dead,
    open_deadly,
    open_nothing,
    open_shares,
    open_together,
    open_toy,
    open_wrong,
)

from trt_razor.cli import main
from trt_razor.engine import Engine
from trt_razor.errors import RazorError, UsageError
from trt_razor.evaluation.config import RunConfig, parse_config
from trt_razor.evaluation.records import Record, RecordFolder, read_records
from trt_razor.evaluation.report import RESULTS_FILE, write_report
from trt_razor.evaluation.run import Summary, Unit, lanes_of, run
from trt_razor.evaluation.workers import Workers, _own_share, cores_of, gpu_of

ROOT = Path(__file__).resolve().parents[2]
TASKS = {"t": ToyTask(), "p": ToyTask(per=1, continuation=5)}
METHODS = {"last8": Keep(8), "short": Keep(12, refuses=30), "aware": Keep(8, query_aware=True)}


def go(made: RunConfig, folder: Path, jobs: int, open_: Any = open_toy) -> Summary:
    def quiet(*anything: object) -> None: ...

    with RecordFolder(folder, made.hash(), made.to_json(), False) as output:
        if jobs == 1:
            return run(made, lanes_of(made, ToyRunner(), None), output, quiet, quiet)  # type: ignore[arg-type]
        meeting = folder / "meeting"
        with Workers(dataclasses.replace(made, model=str(meeting)), jobs, open_) as workers:
            try:
                lanes = lanes_of(made, *workers.runners)
                return run(made, lanes, output, quiet, quiet, compute=workers.records)
            finally:
                started = [w.process for w in workers._workers]
                workers.stop()
                assert not any(p.is_alive() for p in started)


def results(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {
        r.key: {k: v for k, v in r.__dict__.items() if "seconds" not in k}
        for r in read_records(folder)
    }


# The same records ---------------------------------------------------------------------------------
def test_the_same_records_and_the_same_report(tmp_path: Path) -> None:
    made = config(TASKS, METHODS, {"last8": 3})
    one, two = go(made, tmp_path / "one", 1), go(made, tmp_path / "two", 3, open_together)
    assert (two.computed, two.known) == (one.computed, one.known)
    assert two.computed == 3 * 18 + 6 + 6
    assert {r.error for r in two.errors} == {"keep: 39 tokens are too many"}
    assert len(two.errors) == len(one.errors) == 9
    assert results(tmp_path / "two") == results(tmp_path / "one")
    order = [r.key for r in read_records(tmp_path / "two")]
    assert order[0][1] != "20-0-0"  # its worker was the last of three
    for r in read_records(tmp_path / "one"):  # of each sample: dense first, the others behind it
        mine = [k[2] for k in order if k[:2] == (r.task, r.sample)]
        assert mine == [m for m in ("dense", *METHODS) if m in mine]
    # The report does not depend on the order, whatever the times are.
    reports = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        rewrite_times(folder)
        write_report(folder)
        reports.append((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    assert reports[0] == reports[1]


def rewrite_times(folder: Path) -> None:
    lines = [dataclasses.replace(r, seconds=0.1, read_seconds=0.2) for r in read_records(folder)]
    (folder / "records.jsonl").write_text("".join(r.line() for r in lines), encoding="utf-8")


def test_what_is_known_is_not_computed_again(tmp_path: Path) -> None:
    made = config(TASKS, METHODS)
    go(made, tmp_path, 1)
    whole, path = results(tmp_path), tmp_path / "records.jsonl"
    kept = [x for x in path.read_text().splitlines(keepends=True) if '"last8"' not in x]
    path.write_text("".join(kept))
    summary = go(made, tmp_path, 2)
    assert (summary.computed, summary.known) == (18, 54)
    assert results(tmp_path) == whole
    assert go(made, tmp_path, 2, open_deadly).computed == 0


def test_few_contexts_are_in_memory() -> None:
    made = config({"t": ToyTask(lengths=(20,), contexts=30, per=1)}, {})
    taken = 0

    def units() -> Iterator[Unit]:
        nonlocal taken
        for sample in made.tasks[0].task.samples(None, 0):  # type: ignore[arg-type]
            taken += 1
            yield Unit("t", [sample], {sample.id: ["dense"]})

    with Workers(made, 2, open_shares) as workers:
        for done, record in enumerate(workers.records(units())):
            assert isinstance(record, Record)
            assert taken <= done + 1 + 4
    assert (done, taken) == (29, 30)


def test_workers_start_as_there_is_work(tmp_path: Path) -> None:
    made = config({"t": ToyTask(lengths=(20,), contexts=2)}, {})
    with Workers(made, 8, open_toy) as workers:
        assert len(workers._workers) == 1
        units = [
            Unit("t", [s], {s.id: ["dense"]})
            for s in made.tasks[0].task.samples(None, 0)  # type: ignore[arg-type]
        ]
        assert len(list(workers.records(iter(units[:2])))) == 2
        assert len(workers._workers) <= 2


# What goes wrong ----------------------------------------------------------------------------------
@pytest.mark.parametrize("open_, error, words", [
    (open_nothing, UsageError, "model: none here"),
    (open_wrong, RazorError, "task t: the dense model: no such thing"),
    (open_buggy, RuntimeError, "ZeroDivisionError: no such thing"),
    (open_dead, RazorError, r"worker 1 of 2 \(process \d+\) ended with exit code 7; results are kept"),
    (open_deadly, RazorError, r"worker \d of 2 \(process \d+\) was ended by SIGKILL; .*--jobs$"),
])  # fmt: skip
def test_errors_come_back_as_one_line(
    tmp_path: Path, open_: Any, error: type[Exception], words: str
) -> None:
    made = config(TASKS, METHODS)
    with pytest.raises(error, match=words) as found:
        go(made, tmp_path, 2, open_)
    assert type(found.value) is error
    assert "\n" not in str(found.value)
    if open_ in (open_wrong, open_deadly):  # what there was is kept, and the same call goes on
        before = len(read_records(tmp_path))
        assert before >= 3
        assert go(made, tmp_path, 2).known == before
        go(made, tmp_path / "whole", 1)
        assert results(tmp_path) == results(tmp_path / "whole")


def test_a_bug_says_where(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as found:
        go(config({"t": ToyTask(lengths=(40,))}, {}), tmp_path, 2, open_buggy)
    assert re.search(r"in a worker:\nTraceback.*in read", str(found.value.__cause__), re.DOTALL)


# Shares -------------------------------------------------------------------------------------------
def test_threads_are_divided_unless_given() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert cores
    for threads, jobs, each in ((None, 1, cores), (None, 2, max(1, cores // 2)), (3, 64, 3)):
        assert _own_share(config(TASKS, {}, threads=threads), 1, jobs).threads == each
    with Workers(config(TASKS, {}), 64, open_shares) as workers:
        assert workers.runners[0] is not None
        assert workers.runners[0].label == f"{max(1, cores // 64)} cpu"


def test_cores_and_gpus_go_round() -> None:
    assert [cores_of([0, 2, 4, 6], i, 2) for i in range(3)] == [{0, 2}, {4, 6}, {0, 2}]
    assert cores_of([5], 3, 1) == {5}
    assert [gpu_of(i, 2) for i in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [gpu_of(3, n) for n in (0, 1)] == ["cuda", "cuda"]


def test_a_run_survives_the_way_to_another_process() -> None:
    made = parse_config(
        {
            "name": "x",
            "model": "smollm2-135m",
            "tasks": [
                "needle", "passkey", {"ruler": {}}, {"perplexity": {"text": "python"}},
            ],
            "methods": [
                {"razor": {"policy": {"min_window": 32}}}, {"h2o": {"budget": 0.3}},
                {"snapkv": {"budget": 0.3}}, {"streaming": {"budget": 0.3}},
                {"duo": {"budget": 0.4}},
                {"quantised": {"inner": {"h2o": {"budget": 0.3}}}}, {"inside": {"budget": 0.5}},
            ],
        }
    )  # fmt: skip
    assert pickle.loads(pickle.dumps(made)) == made


# The command --------------------------------------------------------------------------------------
def tiny_run(model: TinyModel, folder: Path, windows: int, engine: Engine | None = None) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(
        f"name: x\nmodel: {model.folder}\nthreads: 1\n"
        + (f"engine: {engine.directory}\n" if engine else "")
        + f"tasks: [perplexity: {{lengths: [40], windows: {windows}, continuation: 8, text: python}}]\n"
        "methods: [streaming: {budget: 0.5}]\n"
    )
    return path


def command(*argv: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trt_razor", "eval", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def members(group: int) -> list[int]:
    """Processes of a group that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(pgrp) == group and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def nobody_left(group: int) -> bool:
    end = time.monotonic() + 5
    while members(group) and time.monotonic() < end:
        time.sleep(0.02)
    return not members(group)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@needs_proc
def test_with_a_model_and_an_engine(
    tiny_model: TinyModel, razor_engine: Engine, tmp_path: Path
) -> None:
    path = tiny_run(tiny_model, tmp_path, 4, razor_engine)
    process = command(path, "--jobs", 2, "--output", tmp_path / "2")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "12 results" in out
    assert nobody_left(process.pid)
    assert main(["eval", str(path), "--output", str(tmp_path / "1")]) == 0
    one, two = results(tmp_path / "1"), results(tmp_path / "2")
    assert two.keys() == one.keys()
    for key, r in one.items():
        for name, value in r.items():
            if isinstance(value, float):
                value = pytest.approx(value, rel=1e-5, abs=1e-7)
            assert two[key][name] == value, (key, name)


@needs_proc
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopped_by_a_signal(
    stop: signal.Signals,
    tiny_model: TinyModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C reaches the whole group, a kill only the parent; either way nobody is left."""
    path, folder = tiny_run(tiny_model, tmp_path, 400), tmp_path / "out"
    process = command(path, "--jobs", 2, "--output", folder)
    records = folder / "records.jsonl"
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if records.exists() and records.stat().st_size > 1000 and len(members(process.pid)) >= 4:
            break  # itself, two workers, Python's own resource tracker
        time.sleep(0.01)
    if stop == signal.SIGINT:
        os.killpg(process.pid, stop)
    else:
        process.send_signal(stop)
    _, err = process.communicate(timeout=20)
    assert nobody_left(process.pid)
    kept = len(read_records(folder))
    assert 0 < kept < 800
    if stop == signal.SIGKILL:
        assert process.returncode == -stop
        return
    assert process.returncode == 130, err
    assert f"{kept} results are kept in {folder}; the same command goes on" in err
    assert "Traceback" not in err
    assert main(["eval", str(path), "--output", str(folder), "--limit", "1"]) == 0
    assert "2 of 2 results are there already" in capsys.readouterr().err


@needs_proc
def test_a_killed_worker_ends_the_command(tiny_model: TinyModel, tmp_path: Path) -> None:
    path, folder = tiny_run(tiny_model, tmp_path, 400), tmp_path / "out"
    process = command(path, "--jobs", 2, "--output", folder)
    records = folder / "records.jsonl"
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if records.exists() and records.stat().st_size > 1000:
            break
        time.sleep(0.01)
    workers = [p for p in members(process.pid) if b"spawn_main" in command_line(p)]
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    last = err.splitlines()[-1]
    assert re.fullmatch(r"error: worker \d of 2 \(process \d+\) was ended by SIGKILL; .*", last)
    assert nobody_left(process.pid)
    assert 0 < len(read_records(folder)) < 800


def command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""
