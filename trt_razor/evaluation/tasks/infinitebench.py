"""InfiniteBench: twelve tasks over texts of 100 thousand tokens and more (arXiv 2402.13718)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_razor.evaluation.documents import Around, around
from trt_razor.evaluation.downloaded import (
    check_names,
    check_numbers,
    count_samples,
    find_files,
    made_samples,
)
from trt_razor.evaluation.jsonl import Row
from trt_razor.evaluation.samples import Sample, Turn
from trt_razor.evaluation.tasks.interface import TASKS
from trt_razor.models.tokenizer import Tokenizer

LETTERS = "ABCD"
_OPTIONS = "".join(f"\n{letter}. {{{letter}}}" for letter in LETTERS)
_CALL = re.compile(r"func_[0-9]+\(-?[0-9]+\)")


@dataclass(frozen=True)
class Part:
    """How one task is asked.

    Attributes:
        before: instruction in front of the field ``context``.
        after: what follows it. ``{input}`` is the field of that name; ``{A}`` … ``{D}`` are the
            options; ``{call}`` is the call in ``input`` whose value is asked for.
        lead: how the answer is made to begin.
        metric, max_new_tokens: as published.
        answer: "texts", "choice" (text and letter of the right option), "numbers" (a list that is
            one answer).
    """

    before: str
    after: str
    lead: str
    metric: str
    max_new_tokens: int
    answer: str = "texts"


_HIDDEN = "Something important is hidden in a long text of no importance. Remember it.\n\n"

PARTS: dict[str, Part] = {
    "passkey": Part(_HIDDEN, "\n\n{input}", " The pass key is", "first_number", 6),
    "number_string": Part(_HIDDEN, "\n\n{input}", " The sequence of digits is", "first_number", 12),
    "kv_retrieval": Part(
        "Here is a JSON object of keys and values; the value of one key will be asked for.\n\n",
        "\n\n{input}",
        "",
        "kv_word",
        50,
    ),
    "longbook_sum_eng": Part(
        "Read this book.\n\n", "\n\nSummarise the book.", " Summary:", "rouge_lsum", 1200
    ),
    "longbook_qa_eng": Part(
        "Read this book; a question about it follows.\n\n",
        "\n\nAnswer the question as briefly as you can.\n\nQuestion: {input}",
        " Answer:",
        "qa_f1",
        40,
    ),
    "longbook_choice_eng": Part(
        "Read this book; a question about it follows.\n\n",
        f"\n\nQuestion: {{input}}\nOne of these answers is right:{_OPTIONS}",
        " The letter of the right answer is",
        "choice",
        40,
        "choice",
    ),
    "longbook_qa_chn": Part(
        "请阅读下面的书，之后会有一个问题。\n\n",
        "\n\n请尽量简短地回答。\n\n问题：{input}",
        "答案：",
        "qa_f1_characters",
        40,
    ),
    "longdialogue_qa_eng": Part(
        'In the following script one occurrence of a character\'s name was replaced by "$$MASK$$".\n\n',
        "\n\nWhich character is it, as the script writes the name?",
        " The name behind $$MASK$$ is",
        "dialogue",
        40,
    ),
    "math_find": Part(
        "Read this list of numbers; one of them will be asked for.\n\n",
        "\n\n{input}",
        "",
        "math_find",
        3,
    ),
    "math_calc": Part(
        "Compute the value after each operation of a long expression.\n\n"
        "Expression: 2 + 5 + 1\nValues: [2, 7, 8]\n\nExpression: 9 - 4 + 3 - 6\n"
        "Values: [9, 5, 8, 2]\n\nExpression: ",
        "",
        "\nValues:",
        "math_calc",
        30000,
        "numbers",
    ),
    "code_run": Part(
        "Here are Python functions that call each other.\n\n",
        "\n\nWhich number does {call} return? Give the number alone.",
        " {call} returns",
        "code_run",
        5,
    ),
    "code_debug": Part(
        "In the following Python code one function has an error, put there on purpose, that makes "
        "it fail.\n\n",
        f"\n\nWhich function is it?{_OPTIONS}",
        " The right option is:",
        "code_debug",
        5,
        "choice",
    ),
}


@TASKS.add("infinitebench")
@dataclass(frozen=True)
class InfiniteBench:
    """InfiniteBench from its published files, one task a ``NAME.jsonl``.

    Metrics, lengths of answers and the cut in the middle are as published. The wording is ours, and
    what is asked stands behind the text, also where the published prompts put it in front (the
    function of Code.Run, the number of Math.Find): a method compresses without knowing it. Scores
    compare methods with each other, and only roughly with published tables.

    Attributes:
        path: folder with the files, or one file.
        max_length: tokens of context and prompt; longer ones lose their middle.
        tasks: names; by default all that are in the folder, or the file's.
        limit: at most so many samples of each task, the first ones.
        chat: use the model's chat template, if it has one.
    """

    path: Path
    max_length: int
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    chat: bool = True

    def __post_init__(self) -> None:
        check_numbers(self.max_length, self.limit)
        check_names("tasks", self.tasks, tuple(PARTS))

    def count(self) -> int:
        return count_samples(self._files(), self.limit)

    def samples(self, tokenizer: Tokenizer, seed: int) -> Iterator[Sample]:
        """See ``tasks.interface.Task``; ``seed`` changes nothing.

        Raises:
            UsageError: missing files, a line with other fields than published, or a question that
                is longer than ``max_length``.
        """

        def make(name: str, row: Row) -> tuple[str, Around, Turn, dict[str, Any]]:
            part = PARTS[name]
            values = _values(row, part)
            after, lead = _filled(part.after, values), _filled(part.lead, values)
            frame = around(tokenizer, part.before, after, lead, self.chat)
            turn = Turn(
                frame.prompt,
                _references(row, part),
                max_new_tokens=part.max_new_tokens,
                metric=part.metric,
            )
            return name, frame, turn, {}

        return made_samples(self._files(), self.limit, tokenizer, self.max_length, make)

    def _files(self) -> dict[str, Path]:
        return find_files(self.path, "tasks", self.tasks, tuple(PARTS), tuple(PARTS))


def _values(row: Row, part: Part) -> dict[str, str]:
    """What the marks in a part's wording stand for."""
    values = {"input": row.text("input")}
    if part.answer == "choice":
        options = row.texts("options")
        if len(options) != len(LETTERS):
            raise row.wrong("options", "4 texts", options)
        values.update(zip(LETTERS, options, strict=True))
    if "{call}" in part.after:
        call = _CALL.search(values["input"])
        if call is None:
            raise row.wrong("input", "a call like func_1(2)", values["input"])
        values["call"] = call[0]
    return values


def _filled(wording: str, values: dict[str, str]) -> str:
    """Marks replaced in one go: a text of the file is never searched for marks."""
    return re.sub(r"\{(\w+)\}", lambda m: values[m[1]], wording)


def _references(row: Row, part: Part) -> tuple[str, ...]:
    answer: Any = row.fields.get("answer")
    if part.answer == "choice":
        texts, options = row.texts("answer"), row.texts("options")
        if len(texts) == 2 and texts[1] in LETTERS:
            return (texts[0], texts[1])
        if len(texts) != 1 or texts[0] not in options:
            raise row.wrong("answer", "one of the options", answer)
        return (texts[0], LETTERS[options.index(texts[0])])
    values = answer if isinstance(answer, list) else [answer]
    if part.answer == "numbers":
        values = values[0] if len(values) == 1 and isinstance(values[0], list) else values
        if not values or not all(map(_is_whole, values)):
            raise row.wrong("answer", "a list of whole numbers", answer)
        return (" ".join(str(int(v)) for v in values),)
    ok = values and all(
        isinstance(v, (str, int, float)) and not isinstance(v, bool) for v in values
    )
    if not ok:
        raise row.wrong("answer", "a text, a number or a list of them", answer)
    if part.metric == "code_run" and not all(map(_is_whole, values)):
        raise row.wrong("answer", "a whole number", answer)
    if part.metric == "math_find" and not all(map(_is_number, values)):
        raise row.wrong("answer", "a number", answer)
    return tuple(str(v) for v in values)


def _is_whole(value: object) -> bool:
    return not isinstance(value, bool) and re.fullmatch(r"-?[0-9]{1,300}", str(value)) is not None


def _is_number(value: object) -> bool:
    return re.fullmatch(r"-?[0-9]{1,300}(\.[0-9]{1,300})?", str(value)) is not None
