"""Windows of natural text: as long as asked, none twice, the continuation is what follows."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from trt_razor.errors import UsageError
from trt_razor.evaluation.tasks.perplexity import Perplexity
from trt_razor.evaluation.text import load_text
from trt_razor.models.tokenizer import Tokenizer

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def stream(smollm2_tokenizer: Tokenizer) -> list[int]:
    text = load_text("python", "test")
    return smollm2_tokenizer.encode("\n\n".join(" ".join(p) for p in text.paragraphs))


def test_windows_are_exact_disjoint_and_go_on(
    smollm2_tokenizer: Tokenizer, stream: list[int]
) -> None:
    task = Perplexity(lengths=(256, 1024), windows=6, continuation=32, text="python")
    samples = list(task.samples(smollm2_tokenizer, 3))
    assert len(samples) == task.count() == 12
    for length in (256, 1024):
        spans = []
        for s in samples:
            if s.group != str(length):
                continue
            at = s.meta["offset"]
            assert (len(s.context), len(s.continuation)) == (length, 32)
            assert [*s.context, *s.continuation] == stream[at : at + length + 32]
            spans.append((at, at + length + 32))
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert len({s.context_id for s in samples}) == 12


def test_seed_chooses_the_windows(smollm2_tokenizer: Tokenizer) -> None:
    task = Perplexity(lengths=(512,), windows=3, text="python")
    first = [s.meta["offset"] for s in task.samples(smollm2_tokenizer, 0)]
    assert first == [s.meta["offset"] for s in task.samples(smollm2_tokenizer, 0)]
    assert first != [s.meta["offset"] for s in task.samples(smollm2_tokenizer, 1)]


def test_short_text_says_how_many_windows_it_gives(
    smollm2_tokenizer: Tokenizer, stream: list[int]
) -> None:
    fits = len(stream) // (2048 + 64)
    task = Perplexity(lengths=(512, 2048), windows=fits + 1, text="python")
    with pytest.raises(UsageError, match=f"give {fits} windows of 2048"):
        next(task.samples(smollm2_tokenizer, 0))
    assert len(
        list(Perplexity(lengths=(2048,), windows=fits, text="python").samples(smollm2_tokenizer, 0))
    )


@pytest.mark.parametrize("wrong", [{"windows": 0}, {"continuation": 1.5}, {"lengths": []}])
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Perplexity(**wrong)
