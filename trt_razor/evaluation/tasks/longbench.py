"""LongBench: 21 data sets of questions, summaries, examples and code (arXiv 2308.14508)."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Dataset:
    """How one data set is asked.

    Attributes:
        before: instruction in front of the field ``context``.
        after: what follows it; ``{input}`` is the field of that name.
        metric, max_new_tokens: as published.
        chat: False where the published harness gives plain text also to chat models.
    """

    before: str
    after: str
    metric: str
    max_new_tokens: int
    chat: bool = True


_PASSAGES = Dataset(
    "Here are passages of text. A question about them follows; its answer is in them.\n\n",
    "\n\nUse the passages to answer the question. Give the answer alone, without other words.\n\n"
    "Question: {input}\nAnswer:",
    "qa_f1",
    32,
)
_CODE = "Continue the following code.\n"

DATASETS: dict[str, Dataset] = {
    "narrativeqa": Dataset(
        "Read this story, a novel or the script of a film. A question follows.\n\nStory: ",
        "\n\nAnswer the question about the story as briefly as possible, with a single phrase if you "
        "can, and without an explanation.\n\nQuestion: {input}\n\nAnswer:",
        "qa_f1",
        128,
    ),
    "qasper": Dataset(
        "Read this scientific article. A question follows.\n\nArticle: ",
        "\n\nAnswer the question about the article as briefly as possible, with a phrase or one "
        'sentence. Write "unanswerable" if the article does not say it; answer "yes", "no" or '
        '"unanswerable" if yes or no is asked. Do not explain.\n\nQuestion: {input}\n\nAnswer:',
        "qa_f1",
        128,
    ),
    "multifieldqa_en": Dataset(
        "Read this text. A question follows.\n\n",
        "\n\nAnswer the question about the text. Give the answer alone, without other words."
        "\n\nQuestion: {input}\nAnswer:",
        "qa_f1",
        64,
    ),
    "multifieldqa_zh": Dataset(
        "请阅读下面的文字，之后会有一个问题。\n\n",
        "\n\n根据上文回答问题。只写答案，不要写别的内容。\n\n问题：{input}\n回答：",
        "qa_f1_zh",
        64,
    ),
    "hotpotqa": _PASSAGES,
    "2wikimqa": _PASSAGES,
    "musique": _PASSAGES,
    "dureader": Dataset(
        "请阅读下面的文章，之后会有一个问题。\n\n文章：",
        "\n\n根据以上文章回答问题。\n\n问题：{input}\n回答：",
        "rouge_l_zh",
        128,
    ),
    "gov_report": Dataset(
        "Read this report of a government agency.\n\nReport:\n",
        "\n\nSummarise the report on one page.\n\nSummary:",
        "rouge_l",
        512,
    ),
    "qmsum": Dataset(
        "Read this transcript of a meeting. A request about it follows.\n\nTranscript:\n",
        "\n\nAnswer the request about the meeting in one or more sentences.\n\nQuery: {input}\nAnswer:",
        "rouge_l",
        512,
    ),
    "multi_news": Dataset(
        "Read these news reports.\n\nNews:\n",
        "\n\nSummarise all of the news on one page.\n\nSummary:",
        "rouge_l",
        512,
    ),
    "vcsum": Dataset(
        "请阅读下面的会议记录。\n会议记录：\n",
        "\n\n请用一段话总结会议的内容。\n会议总结：",
        "rouge_l_zh",
        512,
    ),
    "trec": Dataset(
        "Name the type of a question. Examples:\n\n", "\n{input}", "classification", 64, chat=False
    ),
    "triviaqa": Dataset(
        "Answer a question about a passage with the answer alone. Examples:\n\n",
        "\n\n{input}",
        "qa_f1_line",
        32,
        chat=False,
    ),
    "samsum": Dataset(
        "Summarise a dialogue in a few short sentences. Examples:\n\n",
        "\n\n{input}",
        "rouge_l_line",
        128,
        chat=False,
    ),
    "lsht": Dataset("判断新闻的类别。例子：\n\n", "\n{input}", "classification", 64, chat=False),
    "passage_count": Dataset(
        "Here are paragraphs of Wikipedia; some may be there more than once. Find out how many "
        "different ones there are.\n\n",
        "\n\nHow many different paragraphs are there, each counted once? Give the number alone."
        "\n\nThe number is: ",
        "count",
        32,
    ),
    "passage_retrieval_en": Dataset(
        "Here are 30 paragraphs of Wikipedia. An abstract of one of them follows.\n\n",
        "\n\nThe abstract:\n\n{input}\n\nWhich paragraph does it summarise? Answer in the form "
        '"Paragraph 1", "Paragraph 2" and so on.\n\nThe answer is: ',
        "retrieval",
        32,
    ),
    "passage_retrieval_zh": Dataset(
        "下面是若干段落，之后会给出其中一段的摘要。\n\n",
        "\n\n摘要：\n\n{input}\n\n这个摘要出自哪一段？请按“段落1”、“段落2”的格式回答。\n\n答案是：",
        "retrieval_zh",
        32,
    ),
    "lcc": Dataset(_CODE, "The next line:\n", "code_similarity", 64, chat=False),
    "repobench-p": Dataset(_CODE, "{input}The next line:\n", "code_similarity", 64, chat=False),
}
NAMES = (*DATASETS, *(f"{name}_e" for name in DATASETS))
"""With those of LongBench-E."""


@TASKS.add("longbench")
@dataclass(frozen=True)
class LongBench:
    """LongBench from the files of its ``data.zip``, one data set a ``NAME.jsonl``.

    Metrics, lengths of answers, the data sets that go without a chat template and the cut in the
    middle are as published. The wording around the documents is ours, and all that is asked stands
    behind the document, which a method compresses without knowing it: scores compare methods with
    each other, and only roughly with published tables. Files ``NAME_e.jsonl`` (LongBench-E) are
    asked for by name and reported by the published classes of length.

    Attributes:
        path: folder with the files, or one file.
        max_length: tokens of context and prompt; longer ones lose their middle.
        datasets: names; by default all of LongBench that are in the folder, or the file's.
        limit: at most so many samples of each data set, the first ones.
    """

    path: Path
    max_length: int
    datasets: tuple[str, ...] = ()
    limit: int | None = None

    def __post_init__(self) -> None:
        check_numbers(self.max_length, self.limit)
        check_names("datasets", self.datasets, NAMES)

    def count(self) -> int:
        return count_samples(self._files(), self.limit)

    def samples(self, tokenizer: Tokenizer, seed: int) -> Iterator[Sample]:
        """See ``tasks.interface.Task``; ``seed`` changes nothing.

        Raises:
            UsageError: missing files, a line with other fields than published, or a question that
                is longer than ``max_length``.
        """

        def make(name: str, row: Row) -> tuple[str, Around, Turn, dict[str, Any]]:
            data = DATASETS[name.removesuffix("_e")]
            question = data.after.replace("{input}", row.text("input"))
            frame = around(tokenizer, data.before, question, chat=data.chat)
            turn = Turn(
                frame.prompt,
                _references(row, data),
                max_new_tokens=data.max_new_tokens,
                metric=data.metric,
            )
            words = row.fields.get("length")
            return _group(name, row), frame, turn, {"words": words if _whole(words) else None}

        return made_samples(self._files(), self.limit, tokenizer, self.max_length, make)

    def _files(self) -> dict[str, Path]:
        return find_files(self.path, "datasets", self.datasets, NAMES, tuple(DATASETS))


def _group(name: str, row: Row) -> str:
    """LongBench-E is reported by the length in words."""
    if not name.endswith("_e"):
        return name
    words = row.fields.get("length")
    if not isinstance(words, int):
        raise row.wrong("length", "a number of words", words)
    return f"{name} {'0-4k' if words < 4000 else '4-8k' if words < 8000 else '8k+'}"


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _references(row: Row, data: Dataset) -> tuple[str, ...]:
    answers = row.texts("answers")
    if data.metric != "classification":
        return tuple(answers)
    classes = row.texts("all_classes")
    if len(answers) != 1 or answers[0] not in classes:
        raise row.wrong("answers", "one of all_classes", answers)
    return (answers[0], *classes)
