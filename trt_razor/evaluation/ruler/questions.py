"""Questions of SQuAD and HotpotQA, their paragraphs among others (section 3.4)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_razor.errors import UsageError
from trt_razor.evaluation.jsonl import read_json_file
from trt_razor.evaluation.ruler.problem import Problem

MAX_BYTES = 256 << 20
"""Of a question file; HotpotQA's development set has 46 MB."""

_BEFORE = "Read the following documents; a question about them comes at the end.\n\n"


@dataclass(frozen=True)
class Question:
    """Attributes:
    documents: indices of the paragraphs with the answer (HotpotQA: and its own distractors).
    near: indices of paragraphs of the same article.
    """

    question: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    near: tuple[int, ...]


@dataclass(frozen=True)
class Questions:
    """A question file: its questions, and all its paragraphs."""

    questions: tuple[Question, ...]
    paragraphs: tuple[str, ...]


def load_squad(path: Path) -> Questions:
    """A file of SQuAD, version 1.1 or 2.0; questions that have no answer are left out.

    Raises:
        UsageError: another format, naming the place. RazorError: unreadable.
    """
    number: dict[str, int] = {}
    found = []
    data = read_json_file(path, MAX_BYTES, "a SQuAD file")
    for a, article in enumerate(_list(data, path, "", "data")):
        at = f"data[{a}]"
        paragraphs = _list(article, path, at, "paragraphs")
        texts = [
            _text(p, path, f"{at}.paragraphs[{i}]", "context") for i, p in enumerate(paragraphs)
        ]
        mine = [number.setdefault(t, len(number)) for t in texts]
        for i, (paragraph, here) in enumerate(zip(paragraphs, mine, strict=True)):
            where = f"{at}.paragraphs[{i}]"
            for j, q in enumerate(_list(paragraph, path, where, "qas")):
                there = f"{where}.qas[{j}]"
                question = _text(q, path, there, "question")
                answers = [
                    _text(x, path, f"{there}.answers[{k}]", "text")
                    for k, x in enumerate(_list(q, path, there, "answers"))
                ]
                if q.get("is_impossible") or not answers:
                    continue
                near = tuple(dict.fromkeys(m for m in mine if m != here))
                found.append(Question(question, tuple(dict.fromkeys(answers)), (here,), near))
    return _questions(path, found, number)


def load_hotpotqa(path: Path) -> Questions:
    """A file of HotpotQA (distractor setting): each question with its ten paragraphs.

    Raises:
        UsageError: another format, naming the place. RazorError: unreadable.
    """
    number: dict[str, int] = {}
    found = []
    data = read_json_file(path, MAX_BYTES, "a HotpotQA file")
    if not isinstance(data, list):
        raise _wrong(path, "", "a list of questions", data)
    for i, q in enumerate(data):
        question, answer = (_text(q, path, f"[{i}]", n) for n in ("question", "answer"))
        mine = []
        for j, entry in enumerate(_list(q, path, f"[{i}]", "context")):
            where = f"[{i}].context[{j}]"
            ok = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
            if (
                not ok
                or not isinstance(entry[1], list)
                or not all(isinstance(s, str) for s in entry[1])
            ):
                raise _wrong(path, where, "[title, [sentence, …]]", entry)
            text = f"{entry[0]}\n{''.join(entry[1])}"
            mine.append(number.setdefault(text, len(number)))
        found.append(Question(question, (answer,), tuple(dict.fromkeys(mine)), ()))
    return _questions(path, found, number)


def question_problem(rng: random.Random, source: Questions, question: Question) -> Problem:
    """Size is the number of paragraphs: the question's own, then of its article, then any."""
    own = set(question.documents) | set(question.near)
    near = rng.sample(question.near, len(question.near))
    others = [i for i in range(len(source.paragraphs)) if i not in own]
    order = [*question.documents, *near, *rng.sample(others, len(others))]
    seed = rng.getrandbits(64)

    def document(size: int) -> str:
        chosen = order[:size]
        random.Random(seed).shuffle(chosen)
        return "\n\n".join(
            f"Document {i}:\n{source.paragraphs[d]}" for i, d in enumerate(chosen, 1)
        )

    def meta(size: int) -> Mapping[str, Any]:
        return {"documents": size}

    return Problem(
        _BEFORE,
        document,
        "\n\nAnswer the question from the documents above. Give the answer only, no other words.\n\n"
        f"Question: {question.question}",
        " Answer:",
        question.answers,
        max_new_tokens=32,
        metric="string_match_part",
        smallest=len(question.documents),
        largest=len(order),
        meta=meta,
    )


# Reading ----------------------------------------------------------------------------------------
def _questions(path: Path, found: list[Question], number: dict[str, int]) -> Questions:
    if not found:
        raise UsageError(f"{path}: expected questions with answers, found none")
    return Questions(tuple(found), tuple(number))


def _get(data: Any, path: Path, where: str, name: str) -> Any:
    if not isinstance(data, dict):
        raise _wrong(path, where, "an object", data)
    if name not in data:
        raise UsageError(f"{path}: {where}.{name}: missing".replace(": .", ": "))
    return data[name]


def _list(data: Any, path: Path, where: str, name: str) -> list[Any]:
    value = _get(data, path, where, name)
    if not isinstance(value, list):
        raise _wrong(path, f"{where}.{name}", "a list", value)
    return value


def _text(data: Any, path: Path, where: str, name: str) -> str:
    value = _get(data, path, where, name)
    if not isinstance(value, str):
        raise _wrong(path, f"{where}.{name}", "a text", value)
    return value


def _wrong(path: Path, where: str, expected: str, found: object) -> UsageError:
    place = f"{path}: {where}".rstrip(": ").replace(": .", ": ")
    return UsageError(f"{place}: expected {expected}, found {repr(found)[:60]}")
