"""RULER: lengths, answers that are there, and nothing of them in what is known before."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from trt_razor.errors import UsageError
from trt_razor.evaluation.metrics import METRICS
from trt_razor.evaluation.ruler.words import ADJECTIVES, NOUNS, WORDS
from trt_razor.evaluation.samples import Sample
from trt_razor.evaluation.tasks.interface import TASKS
from trt_razor.evaluation.tasks.ruler import SYNTHETIC, Ruler
from trt_razor.models.tokenizer import Tokenizer

pytestmark = pytest.mark.real

SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": f"Town {a}",
            "paragraphs": [
                {
                    "context": f"Town {a} has a bridge number {p}, built in {1800 + 10 * a + p}. "
                    + "It stands to this day. " * 6,
                    "qas": [
                        {
                            "id": f"{a}.{p}",
                            "question": f"When was bridge {p} of town {a} built?",
                            "is_impossible": False,
                            "answers": [{"text": str(1800 + 10 * a + p), "answer_start": 0}] * 2,
                        },
                        {"question": "Why?", "is_impossible": True, "answers": []},
                    ],
                }
                for p in range(3)
            ],
        }
        for a in range(8)
    ],
}
HOTPOT = [
    {
        "_id": str(i),
        "question": f"Who lives in house {i}?",
        "answer": f"Person {i}",
        "context": [
            [f"House {i}-{j}", [f"Person {i + j} lives in house {i + j}. ", "It is red."]]
            for j in range(4)
        ],
    }
    for i in range(6)
]


def made(tokenizer: Tokenizer, task: str, length: int = 1024, **options: Any) -> list[Sample]:
    options = {"trials": 2, **options}
    return list(Ruler(lengths=(length,), tasks=(task,), **options).samples(tokenizer, 3))


def text_of(tokenizer: Tokenizer, sample: Sample) -> str:
    return tokenizer.decode(sample.context, skip_special=False)


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("task", SYNTHETIC)
def test_length_and_answer(smollm2_tokenizer: Tokenizer, task: str, length: int) -> None:
    samples = made(smollm2_tokenizer, task, length)
    assert len(samples) == Ruler(lengths=(length,), tasks=(task,), trials=2).count()
    assert len({s.context for s in samples}) == len({s.id for s in samples}) == 2
    for sample in samples:
        (turn,) = sample.turns
        used = len(sample.context) + len(turn.prompt) + turn.max_new_tokens
        # One more sentence (of text: up to 150 tokens) would be too much.
        assert length - 150 < used <= length
        document = text_of(smollm2_tokenizer, sample).split("<|im_start|>user")[1]
        prompt = smollm2_tokenizer.decode(turn.prompt, skip_special=False)
        assert "<|im_end|>\n<|im_start|>assistant\n" in prompt
        assert METRICS[turn.metric](document, turn.references) == 1
        assert not any(r in prompt for r in turn.references)


def test_same_seed_same_samples(smollm2_tokenizer: Tokenizer) -> None:
    task = Ruler(lengths=(1024,), trials=1)
    once, again = (list(task.samples(smollm2_tokenizer, 5)) for _ in range(2))
    assert once == again
    other = list(task.samples(smollm2_tokenizer, 6))
    assert all(a.context != b.context for a, b in zip(once, other, strict=True))


@pytest.mark.parametrize(
    ("task", "needles", "answers", "noun"),
    [
        ("niah_single_1", 1, 1, r"number for [a-z]+-[a-z]+ is \d{7}\."),
        ("niah_single_3", 1, 1, r"code for [a-z]+-[a-z]+ is [0-9a-f-]{36}\."),
        ("niah_multikey_1", 4, 1, r"number for [a-z]+-[a-z]+ is \d{7}\."),
        ("niah_multivalue", 4, 4, r"number for [a-z]+-[a-z]+ is \d{7}\."),
        ("niah_multiquery", 4, 4, r"number for [a-z]+-[a-z]+ is \d{7}\."),
        ("niah_multikey_3", None, 1, r"code for [0-9a-f-]{36} is [0-9a-f-]{36}\."),
    ],
)
def test_needles(
    smollm2_tokenizer: Tokenizer, task: str, needles: int | None, answers: int, noun: str
) -> None:
    for sample in made(smollm2_tokenizer, task):
        found = re.findall(f"The secret {noun}", text_of(smollm2_tokenizer, sample))
        assert len(found) == (sample.meta["size"] + 1 if needles is None else needles)
        assert len(set(found)) == len(found)
        assert len(sample.turns[0].references) == answers
        asked = smollm2_tokenizer.decode(sample.turns[0].prompt)
        keys = {f.split(" for ")[1].split(" is ")[0] for f in found}
        wanted = {"niah_multiquery": 4}.get(task, 1)
        assert sum(k in asked for k in keys) == wanted


def test_depth_is_where_the_needle_is(smollm2_tokenizer: Tokenizer) -> None:
    for sample in made(smollm2_tokenizer, "niah_single_1", 2048, trials=4):
        text = text_of(smollm2_tokenizer, sample)
        start = text.index("The lake")
        where = (text.index("The secret") - start) / (len(text) - start)
        assert where == pytest.approx(sample.meta["depth"], abs=0.03)


def test_tracking_is_a_chain(smollm2_tokenizer: Tokenizer) -> None:
    for sample in made(smollm2_tokenizer, "vt"):
        text = text_of(smollm2_tokenizer, sample).rsplit("Variables are assigned", 1)[1]
        steps = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text)
        names = sample.turns[0].references
        value = re.search(
            r"have the value (\d{5})", smollm2_tokenizer.decode(sample.turns[0].prompt)
        )
        assert value is not None
        assert [s[0] for s in steps] == list(names)
        assert [s[1] for s in steps] == [value[1], *names[:-1]]


@pytest.mark.parametrize(("length", "often", "seldom"), [(1024, 6, 1), (4096, 30, 3)])
def test_common_words_are_common(
    smollm2_tokenizer: Tokenizer, length: int, often: int, seldom: int
) -> None:
    for sample in made(smollm2_tokenizer, "cwe", length):
        entries = text_of(smollm2_tokenizer, sample).rsplit("remember them.\n", 1)[1]
        words = Counter(re.findall(r"\d+\. ([\w-]+)", entries))
        assert {w for w, n in words.items() if n == often} == set(sample.turns[0].references)
        assert set(words.values()) == {often, seldom}
        assert words.total() == 10 * often + sample.meta["size"] * seldom


def test_frequent_words_are_ranks_two_to_four(smollm2_tokenizer: Tokenizer) -> None:
    for length in (512, 4096):
        for sample in made(smollm2_tokenizer, "fwe", length):
            coded = text_of(smollm2_tokenizer, sample).rsplit("ones.\n\n", 1)[1].split()
            ranks = Counter(coded).most_common()
            assert ranks[0][0] == "..."
            assert tuple(w for w, _ in ranks[1:4]) == sample.turns[0].references
            assert ranks[3][1] > ranks[4][1]
            # The shares are those of the zeta distribution.
            assert ranks[1][1] / ranks[0][1] == pytest.approx(1 / 4, rel=0.1)


def test_questions_of_files(smollm2_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    (tmp_path / "hotpot.json").write_text(json.dumps(HOTPOT))
    task = Ruler(
        lengths=(600,),
        trials=5,
        tasks=("qa_1", "qa_2"),
        squad=tmp_path / "squad.json",
        hotpotqa=tmp_path / "hotpot.json",
    )
    samples = list(task.samples(smollm2_tokenizer, 0))
    assert len(samples) == task.count() == 10
    for sample in samples:
        (turn,) = sample.turns
        text = text_of(smollm2_tokenizer, sample)
        assert len(sample.context) + len(turn.prompt) + turn.max_new_tokens <= 600
        assert METRICS["string_match_part"](text, turn.references) == 1
        assert len(turn.references) == 1
        count = sample.meta["documents"]
        assert re.findall(r"Document (\d+):", text) == [str(i) for i in range(1, count + 1)]
    # Other questions, and the paragraph with the answer is not always at one place.
    assert len({s.turns[0].prompt for s in samples[:5]}) > 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1", r"squad\.json: expected a SQuAD file, a JSON file"),
        ("[]", r"squad\.json: expected an object, found \[\]"),
        ('{"data": [{"paragraphs": [{}]}]}', r"data\[0\]\.paragraphs\[0\]\.context: missing"),
        ('{"data": [{"paragraphs": 3}]}', r"data\[0\]\.paragraphs: expected a list, found 3"),
        ('{"data": []}', "expected questions with answers, found none"),
    ],
)
def test_damaged_files(
    smollm2_tokenizer: Tokenizer, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "squad.json").write_text(content)
    task = Ruler(tasks=("qa_1",), squad=tmp_path / "squad.json")
    with pytest.raises(UsageError, match=message):
        next(task.samples(smollm2_tokenizer, 0))


def test_too_short(smollm2_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="ruler: cwe at length 300: expected room for at least"):
        made(smollm2_tokenizer, "cwe", 300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["niah_single_4"]}, "did you mean niah_single_"),
        ({"tasks": ["qa_1"]}, "'qa_1' needs a file; give squad: PATH"),
        ({"lengths": [0]}, "lengths: expected numbers of tokens, found 0"),
        ({"trials": 0}, "trials: expected a number >= 1"),
        ({"tasks": []}, "tasks: expected different values in a list"),
        ({"part": "tset"}, "part 'tset'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TASKS.make("ruler", options, "tasks[0]")


def test_word_lists() -> None:
    assert len(WORDS) > 500
    assert len(ADJECTIVES) * len(NOUNS) > 50_000
    assert all(re.fullmatch("[a-z]+", w) for w in WORDS)
