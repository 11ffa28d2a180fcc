"""RULER: thirteen synthetic tasks at chosen lengths (arXiv 2404.06654)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trt_razor.errors import UsageError, did_you_mean
from trt_razor.evaluation.documents import around
from trt_razor.evaluation.ruler.counting import common_problem, frequent_problem
from trt_razor.evaluation.ruler.needles import KINDS, needle_problem
from trt_razor.evaluation.ruler.problem import Problem, largest_document
from trt_razor.evaluation.ruler.questions import (
    Questions,
    load_hotpotqa,
    load_squad,
    question_problem,
)
from trt_razor.evaluation.ruler.tracking import tracking_problem
from trt_razor.evaluation.samples import Sample, Turn
from trt_razor.evaluation.tasks.interface import TASKS
from trt_razor.evaluation.text import check_text, load_text
from trt_razor.models.tokenizer import Tokenizer

SYNTHETIC = (*KINDS, "vt", "cwe", "fwe")
"""Tasks that need no file."""
ALL = (*SYNTHETIC, "qa_1", "qa_2")
_FILES = {"qa_1": ("squad", load_squad), "qa_2": ("hotpotqa", load_hotpotqa)}


@TASKS.add("ruler")
@dataclass(frozen=True)
class Ruler:
    """RULER's tasks: eight of needles, variable tracking, common and frequent words, questions.

    A sample has at most ``length`` tokens, its answer's room included, as in the paper; what is
    asked comes after the context was compressed. Words and wordings are ours: compare methods with
    it, not with published tables.

    Attributes:
        lengths: tokens of context, prompt and answer together.
        trials: samples of each task and length.
        tasks: names of tasks; by default all that need no file.
        squad: file of SQuAD (dev-v2.0.json), for ``qa_1``.
        hotpotqa: file of HotpotQA (dev distractor), for ``qa_2``.
        text, part: haystack of the needle tasks, see ``evaluation.text``.
        chat: put it into the model's chat template, if it has one.
    """

    lengths: tuple[int, ...] = (4096,)
    trials: int = 50
    tasks: tuple[str, ...] = SYNTHETIC
    squad: Path | None = None
    hotpotqa: Path | None = None
    text: str = "python"
    part: str = "test"
    chat: bool = True

    def __post_init__(self) -> None:
        for name, values in (("lengths", self.lengths), ("tasks", self.tasks)):
            if isinstance(values, str) or not values or len(set(values)) != len(values):
                raise UsageError(f"{name}: expected different values in a list, found {values!r}")
        for length in self.lengths:
            if isinstance(length, bool) or not isinstance(length, int) or length < 1:
                raise UsageError(f"lengths: expected numbers of tokens, found {length!r}")
        if isinstance(self.trials, bool) or not isinstance(self.trials, int) or self.trials < 1:
            raise UsageError(f"trials: expected a number >= 1, found {self.trials!r}")
        for task in self.tasks:
            if task not in ALL:
                raise UsageError(f"tasks: '{task}': {did_you_mean(str(task), ALL)}")
            if task in _FILES and getattr(self, _FILES[task][0]) is None:
                field = _FILES[task][0]
                raise UsageError(f"tasks: '{task}' needs a file; give {field}: PATH")
        check_text(self.text, self.part)

    def count(self) -> int:
        return len(self.lengths) * len(self.tasks) * self.trials

    def samples(self, tokenizer: Tokenizer, seed: int) -> Iterator[Sample]:
        """See ``tasks.interface.Task``.

        Raises:
            UsageError: a length that is too short for a task, naming both; a question file of
                another format.
        """
        sources: dict[str, Questions] = {}
        for task in self.tasks:
            if task in _FILES:
                field, load = _FILES[task]
                sources[task] = load(Path(getattr(self, field)).expanduser())
        for length in self.lengths:
            for task in self.tasks:
                for trial in range(self.trials):
                    name = f"{task}/{length}/{trial}"
                    rng = random.Random(f"{seed}/{name}")
                    try:
                        yield self._sample(tokenizer, task, length, name, rng, sources.get(task))
                    except UsageError as e:
                        raise UsageError(f"ruler: {task} at length {length}: {e}") from None

    def _sample(
        self,
        tokenizer: Tokenizer,
        task: str,
        length: int,
        name: str,
        rng: random.Random,
        source: Questions | None,
    ) -> Sample:
        if source is not None:
            return self._question(tokenizer, length, name, task, rng, source)
        if task in KINDS:
            sentences = load_text(self.text, self.part).sentences
            problem = needle_problem(KINDS[task], rng, sentences)
        elif task == "vt":
            problem = tracking_problem(rng)
        else:
            problem = (common_problem if task == "cwe" else frequent_problem)(rng, length)
        return self._made(tokenizer, length, name, task, problem)

    def _question(
        self,
        tokenizer: Tokenizer,
        length: int,
        name: str,
        task: str,
        rng: random.Random,
        source: Questions,
    ) -> Sample:
        """A question whose own paragraphs fit; some of HotpotQA's are long."""
        refused = ""
        for question in rng.sample(source.questions, min(20, len(source.questions))):
            problem = question_problem(rng, source, question)
            try:
                return self._made(tokenizer, length, name, task, problem)
            except UsageError as e:
                refused = str(e)
        raise UsageError(refused)

    def _made(
        self, tokenizer: Tokenizer, length: int, name: str, task: str, problem: Problem
    ) -> Sample:
        frame = around(tokenizer, problem.before, problem.question, problem.lead, self.chat)
        room = length - len(frame.opening) - len(frame.prompt) - problem.max_new_tokens
        size, document = largest_document(tokenizer, problem, room)
        turn = Turn(
            frame.prompt,
            problem.references,
            max_new_tokens=problem.max_new_tokens,
            metric=problem.metric,
        )
        meta = {"task": task, "length": length, "size": size, **problem.meta(size)}
        return Sample(
            name, name, f"{task} {length}", (*frame.opening, *document), (turn,), meta=meta
        )
