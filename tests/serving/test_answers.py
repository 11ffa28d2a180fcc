"""Texts put together from an engine's responses: any cut of the ids gives the same text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from model_rig import save_tokenizer

from trt_razor.errors import RazorError
from trt_razor.serving.models.answers import Answers, Prompt

T = save_tokenizer(None)


def add(answers: Answers, ids: Sequence[int], row: int = 0, number: int = 0) -> str | None:
    values = np.array([[[*ids, 1, 1]]], np.int32)  # what is past the length does not count
    found = answers.add(values, np.array([[len(ids)]]), row, number)
    assert found is None or len(found) == 1
    return None if found is None else found[0]


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab\né🎉", max_size=12),
    st.lists(st.integers(0, 40), max_size=6),
    st.lists(st.text("ab\né🎉", min_size=1, max_size=3), max_size=3),
)
def test_a_stream_is_the_whole_answer(text: str, cuts: list[int], words: list[str]) -> None:
    ids = [*T.encode(text), T.encode("🎉")[0]]  # ends inside a character
    prompt = Prompt(T.encode("ab"), words, excluded=True)
    whole = add(Answers(T, [prompt], streaming=False), ids)
    decoded = T.decode(ids)
    ends = [decoded.find(w) + len(w) for w in words if w in decoded]
    assert whole == decoded[: min(ends, default=len(decoded))]
    for accumulate in (False, True):
        answers = Answers(T, [prompt], True, accumulate=accumulate)
        edges = [0, *sorted(min(c, len(ids)) for c in cuts), len(ids)]
        pieces = [add(answers, ids[a:b]) for a, b in pairwise(edges)]
        given_out = [p for p in pieces if p is not None]
        rest = [left for _, _, left in answers.finish()]
        found = [*given_out, *rest]
        assert (found[-1] if accumulate else "".join(found)) == whole
        assert answers.stopped == bool(ends)


def test_a_stop_word_in_the_prompt_ends_nothing() -> None:
    prompt = Prompt(T.encode("stop here "), ["stop"])
    echoed = [*prompt.ids, *T.encode("now stop it")]
    assert add(Answers(T, [prompt], False), echoed) == "stop here now stop"
    alone = T.encode("now stop it")
    assert add(Answers(T, [prompt], False), alone) == "now stop"
    again = Prompt(T.encode("stop"), ["stop"], excluded=True)
    assert add(Answers(T, [again], False), [*again.ids, *T.encode("!")]) == "stop"


def test_rows_and_sequences_do_not_mix() -> None:
    answers = Answers(T, [Prompt((), ["x"]), Prompt()], True)
    first, second = T.encode("é")
    assert add(answers, [first], 0) == ""
    assert add(answers, T.encode("ab"), 1) == "ab"
    assert add(answers, T.encode("c"), 0, 1) == "c"
    assert add(answers, [second], 0) == "é"
    assert add(answers, T.encode("xy"), 0) == "x"
    assert add(answers, T.encode("z"), 0) is None
    assert not answers.stopped
    assert add(answers, [first], 1) == ""
    assert answers.finish() == [(1, 0, "\ufffd")]


def test_beams_are_decoded_each_time() -> None:
    answers = Answers(T, [Prompt((), ["b"])], True)
    ids = np.array([[T.encode("ab"), T.encode("cd")]], np.int32)
    for _ in range(2):
        assert answers.add(ids, np.array([[2, 1]])) == ["ab", "c"]
    assert not answers.stopped


def test_special_tokens() -> None:
    ids = T.encode("a</s>b")
    assert add(Answers(T, [Prompt()], True), ids) == "ab"
    assert add(Answers(T, [Prompt()], True, skip_special=False), ids) == "a</s>b"


@pytest.mark.parametrize("row", [-1, 1])
def test_a_row_that_nobody_asked_for(row: int) -> None:
    with pytest.raises(RazorError, match=f"batch_index: expected 0..0, found {row}"):
        add(Answers(T, [Prompt()], True), [1], row)
