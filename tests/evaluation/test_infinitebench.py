"""InfiniteBench from files as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trt_razor.errors import UsageError
from trt_razor.evaluation.metrics import METRICS
from trt_razor.evaluation.samples import Sample
from trt_razor.evaluation.tasks.infinitebench import PARTS, InfiniteBench
from trt_razor.evaluation.tasks.interface import TASKS
from trt_razor.models.tokenizer import Tokenizer

CODE = "def func_1(x):\n    return func_2(x) + 1\n"
OPTIONS = ["load", "parse", "save", "main"]
ROWS: dict[str, tuple[dict[str, Any], str, float]] = {
    # task: fields, an answer of a model, its score
    "passkey": ({"input": "What is the pass key?", "answer": ["71432"]}, " 71432. The", 1),
    "number_string": ({"input": "Which digits?", "answer": ["2233"]}, "223", 0),
    "kv_retrieval": ({"input": 'Key "a-b"?', "answer": ["c-d"]}, '"c-d"', 1),
    "longbook_sum_eng": ({"input": "", "answer": ["He left.\nShe stayed."]}, "He left", 2 / 3),
    "longbook_qa_eng": ({"input": "Who?", "answer": ["Ida Holm", "Holm"]}, "Holm", 1),
    "longbook_choice_eng": (
        {"input": "Who?", "answer": ["parse"], "options": OPTIONS},
        "B. parse",
        1,
    ),
    "longbook_qa_chn": ({"input": "谁？", "answer": ["王明"]}, "王明。", 1),
    "longdialogue_qa_eng": ({"input": "", "answer": ["ANNA"]}, "Anna", 1),
    "math_find": ({"input": "The largest number of the list is:", "answer": [34]}, "34", 1),
    "math_calc": ({"input": "", "answer": [3, 7, 5, 9]}, "[3, 7, 6]", 0.5),
    "code_run": ({"input": "What is func_1(-3)? Value:", "answer": [-2]}, "-2", 1),
    "code_debug": (
        {"input": "Which one?", "answer": ["parse", "B"], "options": OPTIONS},
        "B. parse",
        1,
    ),
}


def row(task: str, **changes: Any) -> dict[str, Any]:
    fields, _, _ = ROWS[task]
    return {"id": 0, "context": CODE * 40, "options": [], **fields, **changes}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def made(tokenizer: Tokenizer, path: Path, max_length: int = 4000, **options: Any) -> list[Sample]:
    task = InfiniteBench(path, max_length, **options)
    samples = list(task.samples(tokenizer, 0))
    assert task.count() == len(samples)
    return samples


@pytest.mark.real
@pytest.mark.parametrize("task", PARTS)
def test_every_task(smollm2_tokenizer: Tokenizer, tmp_path: Path, task: str) -> None:
    fields, answer, score = ROWS[task]
    path = write(tmp_path / f"{task}.jsonl", row(task), row(task), row(task, context=CODE))
    first, second, third = made(smollm2_tokenizer, path)
    turn = first.turns[0]
    assert METRICS[turn.metric](answer, turn.references) == pytest.approx(score)
    assert turn.max_new_tokens == PARTS[task].max_new_tokens
    context = smollm2_tokenizer.decode(first.context)
    prompt = smollm2_tokenizer.decode(turn.prompt)
    assert context.endswith(CODE)
    if task != "code_run":  # where only the call of the question is used
        assert fields["input"] in prompt or task in ("code_debug", "longdialogue_qa_eng")
    assert "{" not in prompt
    assert first.context_id == second.context_id != third.context_id
    assert first.group == task


@pytest.mark.real
def test_what_is_asked_comes_after_the_text(smollm2_tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "code_run.jsonl", row("code_run", context="{input} {call}" + CODE * 9))
    write(tmp_path / "code_debug.jsonl", row("code_debug", options=["{A}", "parse", "{call}", "d"]))
    debug, run = sorted(made(smollm2_tokenizer, tmp_path, max_length=256), key=lambda s: s.id)
    text = smollm2_tokenizer.decode(run.context)
    assert "func_1(-3)" not in text
    assert "{input} {call}" in text
    prompt = smollm2_tokenizer.decode(run.turns[0].prompt)
    assert "Which number does func_1(-3) return?" in prompt
    assert prompt.endswith("func_1(-3) returns")
    assert "A. {A}\nB. parse\nC. {call}\nD. d" in smollm2_tokenizer.decode(debug.turns[0].prompt)
    assert len(debug.context) + len(debug.turns[0].prompt) == 256
    assert debug.meta["cut"] > 0


@pytest.mark.real
def test_letters_of_options(smollm2_tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [
        row("longbook_choice_eng", answer="save"),
        row("longbook_choice_eng", answer=["save"]),
        row("longbook_choice_eng", answer=["save", "C"]),
    ]
    samples = made(smollm2_tokenizer, write(tmp_path / "longbook_choice_eng.jsonl", *rows))
    assert {s.turns[0].references for s in samples} == {("save", "C")}


@pytest.mark.real
@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("passkey", {"context": None}, r":1: context: expected a text, found None"),
        ("passkey", {"answer": [None]}, r":1: answer: expected a text, a number or a list of them"),
        ("code_debug", {"options": ["a"]}, r":1: options: expected 4 texts, found \['a'\]"),
        ("code_debug", {"answer": ["x"]}, r":1: answer: expected one of the options"),
        ("code_run", {"input": "f(1)"}, r":1: input: expected a call like func_1\(2\)"),
        ("code_run", {"answer": ["x"]}, r":1: answer: expected a whole number"),
        ("math_find", {"answer": ["x"]}, r":1: answer: expected a number"),
        ("math_calc", {"answer": []}, r":1: answer: expected a list of whole numbers"),
    ],
)
def test_wrong_lines(
    smollm2_tokenizer: Tokenizer, tmp_path: Path, task: str, changes: Any, message: str
) -> None:
    path = write(tmp_path / f"{task}.jsonl", row(task, **changes))
    with pytest.raises(UsageError, match=rf"{task}\.jsonl{message}"):
        list(InfiniteBench(path, 4000).samples(smollm2_tokenizer, 0))


def test_wrong_options(tmp_path: Path) -> None:
    options = {"path": str(tmp_path), "max_length": 4000, "tasks": ["pass_key"]}
    with pytest.raises(UsageError, match="did you mean passkey"):
        TASKS.make("infinitebench", options, "tasks[0]")
    with pytest.raises(UsageError, match=r"expected files like passkey\.jsonl, found none"):
        InfiniteBench(tmp_path, 4000).count()


def test_all_metrics_exist() -> None:
    assert PARTS.keys() == ROWS.keys()
    assert {p.metric for p in PARTS.values()} <= METRICS.keys()
