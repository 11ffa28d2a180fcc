"""Text of a generation: whole characters, stop texts and sequences, what is held back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_session import NAN, FakeSession
from tiny_models import TEMPLATE, byte_tokenizer_json

from trt_razor.errors import UsageError
from trt_razor.generate import Completion, Event, Generator, SamplingParams
from trt_razor.models.tokenizer import Tokenizer

TOKENIZER = Tokenizer(
    byte_tokenizer_json(), {"bos_token": "<s>", "eos_token": "</s>"}, 256, (257,), TEMPLATE, "test"
)


def say_text(text: str, then: int | None = 257, **params: Any) -> tuple[Completion, list[str]]:
    """Generate with a model that says a text byte by byte; (result, texts of the events)."""
    script = TOKENIZER.encode(text) + ([] if then is None else [then])

    def logits(sequence: list[int]) -> np.ndarray:
        return np.eye(264, dtype=np.float32)[script[min(len(sequence) - 1, len(script) - 1)]]

    generator = Generator(FakeSession(1, 200, logits, 264), 0, [257], TOKENIZER)
    events: list[Event] = []
    given = SamplingParams(**{"max_new_tokens": len(script), **params})
    result = generator.run([[256]], given, lambda i, e: events.append(e))[0]
    assert "".join(e.text for e in events) == result.text
    assert [e.token for e in events if e.token is not None] == result.tokens
    assert [e.finished for e in events if e.finished] == [result.finished]
    return result, [e.text for e in events]


def test_text_streams_in_whole_characters_until_the_end_token() -> None:
    result, pieces = say_text("né 🎉!")
    assert result.text == "né 🎉!"
    assert (result.finished, len(result.tokens)) == ("stop", len("né 🎉!".encode()))
    assert [p for p in pieces if p] == ["n", "é", " ", "🎉", "!"]


def test_ignore_eos_and_stop_token_ids() -> None:
    stopped, _ = say_text("ab", stop_token_ids=(TOKENIZER.encode("b")[0],))
    assert (stopped.text, stopped.finished, len(stopped.tokens)) == ("a", "stop", 1)
    going_on, _ = say_text("ab", ignore_eos=True)
    assert (going_on.text, going_on.finished) == ("ab", "length")
    assert going_on.tokens[-1] == 257


@pytest.mark.parametrize("text, stop, expected", [
    ("hello STOP world", ("STOP",), "hello "),
    ("hello STOP world", ("world", "STOP"), "hello "),
    ("aab", ("ab",), "a"),
    ("ababac!", ("abac",), "ab"),
    ("x", ("x",), ""),
    ("né🎉 ok", ("🎉",), "né"),
    ("abcd", ("bcd", "abcde"), "a"),
])  # fmt: skip
def test_stop_text_over_several_tokens(text: str, stop: tuple[str, ...], expected: str) -> None:
    result, pieces = say_text(text, stop=stop)
    assert (result.text, result.finished) == (expected, "stop")
    # Never given out and taken back: what is out is always a beginning of the result.
    assert all(expected.startswith("".join(pieces[: i + 1])) for i in range(len(pieces)))


@pytest.mark.parametrize("then", [257, None])
def test_text_that_only_begins_like_a_stop_comes_out_at_the_end(then: int | None) -> None:
    result, pieces = say_text("so STO", then, stop=("STOP",))
    assert result.text == "so STO"
    assert result.finished == ("stop" if then else "length")
    assert pieces[-1] == "STO"


def test_stop_sequences_end_it_and_stay() -> None:
    ids = tuple(TOKENIZER.encode("cd"))
    result, _ = say_text("abcdef", stop_sequences=(tuple(TOKENIZER.encode("x")), ids))
    assert (result.text, result.finished) == ("abcd", "stop")
    assert tuple(result.tokens[-2:]) == ids
    # The text of a word is cut, its ids are not.
    result, _ = say_text("abcdef", stop_sequences=(ids,), stop=("cd",))
    assert (result.text, result.finished) == ("ab", "stop")
    assert result.tokens == TOKENIZER.encode("abcd")


@pytest.mark.parametrize("low, text, finished", [
    (0, "", "stop"), (1, "xy", "stop"), (3, "xyxy", "stop"), (5, "xyxyx", "length"),
])  # fmt: skip
def test_min_tokens_puts_off_every_end_but_the_last(low: int, text: str, finished: str) -> None:
    word = tuple(TOKENIZER.encode("xy"))
    given: dict[str, Any] = {"max_new_tokens": 5, "min_tokens": low}
    result, _ = say_text("xyxyxyxy", stop_sequences=(word,), **given)
    assert (result.text, result.finished) == (text or "xy", finished)
    # A text that began before the bound counts from there on, as what is out stays out.
    result, _ = say_text("xyxyxyxy", stop=("y",), **given)
    assert len(result.tokens) >= low
    assert result.finished == finished

    def end_first(sequence: list[int]) -> np.ndarray:
        out = np.zeros(264, np.float32)
        out[[257, TOKENIZER.encode("x")[0]]] = 2, 1
        return out

    generator = Generator(FakeSession(1, 20, end_first, 264), 0, [257], TOKENIZER)
    ended = generator.run([[256]], SamplingParams(**given))[0]
    assert (len(ended.tokens), ended.finished) == (low, "length" if low == 5 else "stop")


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    result, _ = say_text("a🎉", None, max_new_tokens=3)
    assert (result.text, result.finished) == ("a\ufffd", "length")


def test_held_text_comes_out_with_an_error() -> None:
    def logits(sequence: list[int]) -> np.ndarray:
        if len(sequence) == 3:
            return np.full(264, NAN, np.float32)
        return np.eye(264, dtype=np.float32)[TOKENIZER.encode("ST")[len(sequence) - 1]]

    generator = Generator(FakeSession(1, 20, logits, 264), 0, (), TOKENIZER)
    result = generator.run([[256]], SamplingParams(stop=("STOP",)))[0]
    assert (result.text, result.finished) == ("ST", "error")


def test_stop_text_needs_a_tokenizer() -> None:
    with pytest.raises(UsageError, match="stop: texts need a tokenizer"):
        Generator(FakeSession()).submit([1], SamplingParams(stop=("x",)))
