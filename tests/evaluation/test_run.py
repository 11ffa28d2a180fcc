"""Samples × methods: what is fed, what is recorded, and that a stopped run goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from eval_doubles import (
    Keep,
    ToyRunner,
    ToySession,
    ToyTask,
    ToyTokenizer,
    config,
    lanes,
)

from trt_razor.errors import RazorError, UsageError
from trt_razor.evaluation.asking import ask
from trt_razor.evaluation.config import RunConfig
from trt_razor.evaluation.nearness import nearness
from trt_razor.evaluation.records import RECORDS_FILE, Record, RecordFolder, read_records
from trt_razor.evaluation.run import Summary, run
from trt_razor.evaluation.samples import Sample, Turn

METHODS = {"last8": Keep(8), "last12": Keep(12)}


def go(
    made: RunConfig,
    folder: Path,
    runner: ToyRunner | None = None,
    restart: bool = False,
    limit: int | None = None,
    retry: bool = False,
) -> Summary:
    with RecordFolder(folder, made.hash(), made.to_json(), restart) as output:
        if retry:
            output.drop_errors()
        runner = runner or ToyRunner()
        return run(made, lanes(made, runner), output, lambda *a: None, lambda t: None, limit)


def results(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Records without their times."""
    out = {}
    for r in read_records(folder):
        out[r.key] = {k: v for k, v in r.__dict__.items() if "seconds" not in k}
    return out


# What is fed --------------------------------------------------------------------------------------
class Recorder(ToySession):
    """Remembers each chunk it is fed, forks included."""

    chunks: list[list[int]]

    def feed(self, tokens: Any) -> Any:
        self.chunks.append(list(tokens))
        return super().feed(tokens)

    def fork(self) -> Recorder:
        other = Recorder(list(self.kept), self.length)
        other.chunks = self.chunks
        return other


def recorder() -> Recorder:
    made = Recorder([1, 2, 3], 3)
    made.chunks = []
    return made


def test_forced_turns_are_one_chunk_and_hold_the_last_token_back() -> None:
    turns = (Turn((10, 11), (), (20, 21)), Turn((12,), (), (22,)))
    session = recorder()
    asked = ask(session, [9], Sample("s", "c", "g", (1, 9), turns), "forced", ToyTokenizer())  # type: ignore[arg-type]
    assert session.chunks == [[9, 10, 11, 20], [21, 12]]
    assert asked.targets == [20, 21, 22]
    rows = np.concatenate(asked.logits)
    whole = ToySession([1, 2, 3], 3).feed([9, 10, 11, 20, 21, 12])
    np.testing.assert_array_equal(rows, whole[[2, 3, 5]])
    assert session.kept == [1, 2, 3]  # the second sample sees nothing of the first


def test_right_means_every_token_is_the_most_probable() -> None:
    best = [int(i) for i in ToySession([1], 1).feed([2, 3]).argmax(1)]
    second = int(ToySession([1], 1).feed([2, 3, best[1]]).argmax(1)[-1])

    def score(answer: tuple[int, ...]) -> float:
        sample = Sample("s", "c", "g", (1, 2), (Turn((3,), (), answer),))
        return ask(ToySession([1], 1), [2], sample, "forced", ToyTokenizer()).scores[0]  # type: ignore[arg-type]

    assert score((best[1], second)) == 1
    assert score((best[1], (second + 1) % 50)) == 0
    assert score(((best[1] + 1) % 50, second)) == 0


def test_generated_answers_are_greedy_and_stop() -> None:
    greedy: list[int] = []
    session = ToySession([1], 1)
    waiting = [2, 3]
    for _ in range(4):
        greedy.append(int(session.feed(waiting)[-1].argmax()))
        waiting = greedy[-1:]
    assert 0 not in greedy

    def answer(**turn: Any) -> tuple[str, float]:
        sample = Sample("s", "c", "g", (1, 2), (Turn((3,), **turn),))
        asked = ask(ToySession([1], 1), [2], sample, "generate", ToyTokenizer())  # type: ignore[arg-type]
        return asked.texts[0], asked.scores[0]

    whole = "".join(f"<{t}>" for t in greedy)
    assert answer(references=(whole,), max_new_tokens=4) == (whole, 1.0)
    assert answer(references=("<99>",), max_new_tokens=4) == (whole, 0.0)
    stopped, right = answer(references=(f"<{greedy[0]}",), max_new_tokens=4, stop=(">",))
    assert (stopped, right) == (f"<{greedy[0]}", 1.0)


def test_a_turn_without_answer_is_generated_and_then_nothing_is_compared() -> None:
    turns = (Turn((10,), ("x",), (), 2), Turn((12,), (), (22,)))
    asked = ask(
        ToySession([1], 1), [9], Sample("s", "c", "g", (1, 9), turns), "forced", ToyTokenizer()
    )  # type: ignore[arg-type]
    assert len(asked.texts) == 1
    assert len(asked.scores) == 2
    assert asked.targets == []


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_continuation_predicts_every_token_of_it(chunk: int | None) -> None:
    session = recorder()
    sample = Sample("s", "c", "g", (1, 9), (), (30, 31, 32, 33))
    asked = ask(session, [9], sample, "forced", ToyTokenizer(), chunk)  # type: ignore[arg-type]
    assert [t for c in session.chunks for t in c] == [9, 30, 31, 32]
    assert asked.targets == [30, 31, 32, 33]
    rows = np.concatenate(asked.logits)
    np.testing.assert_array_equal(rows, ToySession([1, 2, 3], 3).feed([9, 30, 31, 32]))


def test_nearness_against_float64() -> None:
    rng = np.random.default_rng(0)
    p, q = (rng.standard_normal((150, 40)).astype(np.float32) * 4 for _ in range(2))
    targets = [int(t) for t in rng.integers(0, 40, 150)]
    log_p, log_q = (
        x.astype(np.float64) - np.log(np.exp(x.astype(np.float64)).sum(1, keepdims=True))
        for x in (p, q)
    )
    near = nearness([q[:20], q[20:]], targets, [p[:20], p[20:]])
    assert near.tokens == 150
    assert near.nll == pytest.approx(-log_q[np.arange(150), targets].mean(), rel=1e-5)
    assert near.kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(1).mean(), rel=1e-5)
    assert near.agree == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    same = nearness([p], targets, [p])
    assert (same.kl, same.agree) == (0, 1)
    padded = np.pad(p, ((0, 0), (0, 2)), constant_values=-np.inf)
    assert nearness([padded], targets, [padded]).kl == 0
    with pytest.raises(UsageError, match=r"expected 40 .* found 39"):
        nearness([q[:, :39]], targets, [p])


def test_nan_is_an_error() -> None:
    class Broken(ToySession):
        def feed(self, tokens: Any) -> Any:
            return super().feed(tokens) * np.nan

        def fork(self) -> Broken:
            return Broken(list(self.kept), self.length)

    sample = Sample("s", "c", "g", (1, 9), (), (30,))
    with pytest.raises(UsageError, match="NaN"):
        ask(Broken([1], 1), [9], sample, "forced", ToyTokenizer())  # type: ignore[arg-type]


# Records ------------------------------------------------------------------------------------------
def test_every_sample_under_every_method(tmp_path: Path) -> None:
    runner = ToyRunner()
    made = config({"t": ToyTask(), "p": ToyTask(per=1, continuation=5)}, METHODS)
    summary = go(made, tmp_path, runner)
    found = results(tmp_path)
    assert (summary.computed, summary.known, summary.errors) == (54, 0, [])
    assert len(found) == 54
    assert [r for r in runner.reads if r[0] in (19, 39)] == runner.reads  # the last token waits
    assert len(runner.reads) == 12  # once a context
    dense, last = found["p", "40-0-0", "dense"], found["p", "40-0-0", "last8"]
    assert (dense["kl"], dense["agree"], dense["kv_ratio"]) == (0, 1, 1)
    assert last["kv_ratio"] == pytest.approx(8 / 39)
    assert last["kv_most"] == pytest.approx(13 / 44)
    assert last["kl"] > 0.01
    assert last["tokens"] == 5


def test_stopped_and_resumed_is_the_same_as_in_one_go(tmp_path: Path) -> None:
    made = config({"t": ToyTask(), "p": ToyTask(per=1, continuation=5)}, METHODS)
    go(made, tmp_path / "whole")
    for reads in (2, 0, 5):
        with pytest.raises(KeyboardInterrupt):
            go(made, tmp_path / "parts", ToyRunner(stop_after=reads))
    before = len(results(tmp_path / "parts"))
    assert before == 2 * 6 + 4 * 6 + 1 * 3
    runner = ToyRunner()
    summary = go(made, tmp_path / "parts", runner)
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    assert summary.known == before
    assert len(runner.reads) == 12 - 7  # finished contexts are not read again
    runner = ToyRunner()
    go(made, tmp_path / "parts", runner)
    assert runner.reads == []


@pytest.mark.parametrize("lines", range(0, 18, 4))
def test_killed_at_any_record(tmp_path: Path, lines: int) -> None:
    """A process that is killed leaves some whole lines and perhaps a part of one."""
    made = config({"t": ToyTask(lengths=(20,))}, METHODS)
    go(made, tmp_path)
    whole, path = results(tmp_path), tmp_path / RECORDS_FILE
    written = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(written[:lines]) + written[lines][:-9])
    assert len(read_records(tmp_path)) == lines
    go(made, tmp_path)
    assert results(tmp_path) == whole
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_dense_is_repeated_for_the_kl_of_a_missing_method(tmp_path: Path) -> None:
    made = config({"p": ToyTask(per=1, continuation=5)}, METHODS)
    go(made, tmp_path)
    whole, path = results(tmp_path), tmp_path / RECORDS_FILE
    kept = [x for x in path.read_text().splitlines(keepends=True) if '"last12"' not in x]
    path.write_text("".join(kept))
    assert go(made, tmp_path).computed == 6
    assert results(tmp_path) == whole


def test_other_settings_are_refused_unless_restarted(tmp_path: Path) -> None:
    go(config({"t": ToyTask()}, METHODS), tmp_path)
    other = config({"t": ToyTask()}, METHODS, seed=5)
    with pytest.raises(UsageError, match=r"other settings \(seed: 0 there, 5 now\).*--restart"):
        go(other, tmp_path)
    go(other, tmp_path, restart=True)
    assert len(results(tmp_path)) == 36
    threads = config({"t": ToyTask()}, METHODS, seed=5, threads=3)
    assert go(threads, tmp_path).computed == 0


def test_one_process_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    made = config({"t": ToyTask()}, METHODS)
    with (
        RecordFolder(tmp_path, made.hash(), made.to_json(), False),
        pytest.raises(UsageError, match="another run writes there"),
    ):
        go(made, tmp_path)


def test_damaged_records_are_named(tmp_path: Path) -> None:
    made = config({"t": ToyTask()}, METHODS)
    go(made, tmp_path)
    path = tmp_path / RECORDS_FILE
    lines = path.read_text().splitlines(keepends=True)
    for bad in (
        "{}",
        "[1]",
        '{"task": 3}',
        "nonsense",
        lines[1].replace('"tokens": 2', '"tokens": "2"'),
    ):
        path.write_text(lines[0] + bad.strip() + "\n" + lines[2])
        with pytest.raises(RazorError, match=r"line 2: damaged record"):
            read_records(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UsageError, match=r"records without run\.json"):
        go(made, tmp_path)


def test_record_survives_its_line() -> None:
    record = Record(
        "t", "m", "s", "c", "g", 9, 0.5, 0.6, 1.0, [1.0], ["ä\n"], 3, 1, 0.0, meta={"d": [1]}
    )
    assert Record.from_json(json.loads(record.line())) == record


# Methods ------------------------------------------------------------------------------------------
def test_trials_and_limit_take_the_first_of_each_group(tmp_path: Path) -> None:
    made = config({"t": ToyTask()}, METHODS, trials={"last12": 3})
    go(made, tmp_path, limit=4)
    found = results(tmp_path)
    count = {m: sum(k[2] == m for k in found) for m in ("dense", "last8", "last12")}
    assert count == {"dense": 8, "last8": 8, "last12": 6}
    assert ("t", "20-1-0", "last12") in found
    assert ("t", "20-1-1", "last12") not in found
    go(made, tmp_path)  # without the limit: the rest
    assert len(results(tmp_path)) == 12 + 12 + 6


def test_a_method_of_some_groups(tmp_path: Path) -> None:
    made = config({"t": ToyTask()}, METHODS)
    dense, first, *others = made.methods
    only = dataclasses.replace(
        made, methods=(dense, dataclasses.replace(first, groups=("40",), trials=3), *others)
    )
    go(only, tmp_path)
    found = results(tmp_path)
    count = Counter((k[2], r["group"]) for k, r in found.items())
    every = {(m, g): 6 for m in ("dense", "last12") for g in ("20", "40")}
    assert count == {**every, ("last8", "40"): 3}
    wrong = dataclasses.replace(first, groups=("44",))
    with pytest.raises(UsageError, match="method last8: groups: did you mean 40"):
        go(dataclasses.replace(made, methods=(dense, wrong)), tmp_path / "wrong")


def test_a_method_that_refuses_is_recorded_and_named(tmp_path: Path) -> None:
    made = config({"t": ToyTask()}, {"short": Keep(8, refuses=30), "last8": Keep(8)})
    summary = go(made, tmp_path)
    assert {r.method for r in summary.errors} == {"short"}
    assert len(summary.errors) == 6
    assert summary.errors[0].error == "keep: 39 tokens are too many"
    assert sum(r["error"] is None for r in results(tmp_path).values()) == 30
    runner = ToyRunner()
    assert len(go(made, tmp_path, runner).errors) == 6  # still named
    assert runner.reads == []
    able = config({"t": ToyTask()}, {"short": Keep(8), "last8": Keep(8)})
    assert go(able, tmp_path, retry=True).errors == []
    assert all(r["error"] is None for r in results(tmp_path).values())


def test_without_dense_there_is_nothing_to_compare(tmp_path: Path) -> None:
    made = config({"t": ToyTask()}, {})
    broken = [type(x)(x.label, x.runner, Keep(refuses=3)) for x in lanes(made, ToyRunner())]
    with (
        RecordFolder(tmp_path, made.hash(), made.to_json(), False) as output,
        pytest.raises(RazorError, match="task t: the dense model: keep: 19 tokens"),
    ):
        run(made, broken, output, lambda *a: None, lambda t: None)


def test_all_queries_only_where_a_pending_method_needs_them(tmp_path: Path) -> None:
    made = config(
        {"t": ToyTask(contexts=2)}, {"h2o": Keep(8, queries="all"), "last8": Keep(8)}, {"h2o": 2}
    )
    runner = ToyRunner()
    go(made, tmp_path, runner)
    assert runner.reads == [(19, True), (19, False), (39, True), (39, False)]


def test_query_aware_methods_read_the_first_question(tmp_path: Path) -> None:
    task = ToyTask(lengths=(20,), contexts=1, turns=2)
    go(config({"t": task}, {"aware": Keep(8, query_aware=True), "last8": Keep(8)}), tmp_path)
    aware, blind = (results(tmp_path)["t", "20-0-0", m] for m in ("aware", "last8"))
    assert aware["kv_ratio"] == pytest.approx(8 / 22)  # 19 read, then 3 of the question's
    assert blind["kv_ratio"] == pytest.approx(8 / 19)
    assert aware["tokens"] == blind["tokens"] == 4
    # What it keeps: the last 8 of context and question.
    sample = next(iter(task.samples(None, 0)))
    tokens = [*sample.context, *sample.turns[0].prompt]
    expected = ask(
        ToySession(tokens[:-1][-8:], 22),
        tokens[-1:],
        Sample("s", "c", "g", (1, 2), (Turn((), (), sample.turns[0].answer), sample.turns[1])),
        "forced",
        ToyTokenizer(),  # type: ignore[arg-type]
    )
    assert aware["nll"] == pytest.approx(nearness(expected.logits, expected.targets, None).nll)


def test_tasks_must_keep_their_promises(tmp_path: Path) -> None:
    class Twice(ToyTask):
        def samples(self, tokenizer: Any, seed: int) -> Any:
            first, *_ = super().samples(tokenizer, seed)
            yield from (first, first)

    class Apart(ToyTask):
        def samples(self, tokenizer: Any, seed: int) -> Any:
            made = list(super().samples(tokenizer, seed))
            yield from (made[0], made[2], made[1])

    class Empty(ToyTask):
        def samples(self, tokenizer: Any, seed: int) -> Any:
            yield from ()

    for task, words in (
        (Twice(), "20-0-0 is there twice"),
        (Apart(), "not together"),
        (Empty(), "no samples"),
    ):
        with pytest.raises(UsageError, match=words):
            go(config({"t": task}, METHODS), tmp_path)
