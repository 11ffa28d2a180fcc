"""The texts of one request's sequences, put together from the ids of the engine's responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trt_razor.errors import RazorError
from trt_razor.models.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True)
class Prompt:
    """One row of a request: its ids, its stop words, and whether its answer leaves the ids out."""

    ids: Sequence[int] = ()
    stop_words: Sequence[str] = ()
    excluded: bool = False


@dataclass
class _Answer:
    """One sequence so far: read as a whole, however it is cut into responses."""

    prompt: Prompt
    stream: TextStream
    tail: str = ""  # end of the text that may be the beginning of a stop word
    text: str = ""  # all of it
    stopped: bool = False

    def cut(self, more: str) -> str:
        """New text up to the end of the first stop word. The word itself stays, as it does among
        the ids of the public backend."""
        words = self.prompt.stop_words
        if not words or not more:
            return more
        seen = self.tail + more
        ends = [i + len(w) for w in words if (i := seen.find(w)) >= 0]
        if ends:
            self.stopped = True
            return more[: min(ends) - len(self.tail)]
        keep = max(map(len, words)) - 1
        self.tail = seen[max(0, len(seen) - keep) :]
        return more


class Answers:
    """The texts of a request, by row and by number of the sequence in its row.

    Args:
        prompts: one for each row.
        streaming: responses are pieces of the answers; otherwise each is a whole one.
        skip_special: leave special tokens out.
        accumulate: give all text of a sequence so far, not what is new.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        streaming: bool,
        skip_special: bool = True,
        accumulate: bool = False,
    ) -> None:
        self._tokenizer, self._prompts = tokenizer, prompts
        self._streaming, self._skip, self._accumulate = streaming, skip_special, accumulate
        self._known: dict[tuple[int, int], _Answer] = {}

    @property
    def stopped(self) -> bool:
        """Whether stop words ended the answers of all rows."""
        rows = {row for row, _ in self._known}
        return len(rows) == len(self._prompts) and all(a.stopped for a in self._known.values())

    def add(
        self, ids: np.ndarray, lengths: np.ndarray, row: int = 0, number: int = 0
    ) -> list[str] | None:
        """The texts of a response, one for each beam.

        Args:
            ids: [1, beams, tokens]. lengths: [1, beams], how many of them count.

        Returns:
            None if a stop word ended this answer before.

        Raises:
            RazorError: ids that do not fit the request.
        """
        beams = [r[:n].tolist() for r, n in zip(ids[0], lengths[0].tolist(), strict=True)]
        if not 0 <= row < len(self._prompts):
            raise RazorError(f"batch_index: expected 0..{len(self._prompts) - 1}, found {row}")
        if len(beams) > 1:
            # Beams may change what they said before: only whole answers have a text.
            return [self._tokenizer.decode(beam, self._skip) for beam in beams]
        answer = self._known.get((row, number))
        if answer is None:
            answer = _Answer(self._prompts[row], self._tokenizer.stream(self._skip))
            self._known[row, number] = answer
        if answer.stopped:
            return None
        text = self._piece(answer, beams[0]) if self._streaming else self._whole(answer, beams[0])
        answer.text += text if self._accumulate else ""
        return [answer.text if self._accumulate else text]

    def _piece(self, answer: _Answer, ids: Sequence[int]) -> str:
        return answer.cut("".join([answer.stream.step(i) for i in ids]))

    def _whole(self, answer: _Answer, ids: Sequence[int]) -> str:
        prompt = answer.prompt
        echoed = not prompt.excluded and list(ids[: len(prompt.ids)]) == list(prompt.ids)
        n = len(prompt.ids) if echoed else 0
        # A stop word in the prompt ends nothing.
        echo = "".join([answer.stream.step(i) for i in ids[:n]])
        text = "".join([answer.stream.step(i) for i in ids[n:]]) + answer.stream.finish()
        return echo + answer.cut(text)

    def finish(self) -> list[tuple[int, int, str]]:
        """(row, number, text) of the answers that still hold a character that never became whole,
        at the end of a stream."""
        left = []
        for (row, number), answer in self._known.items():
            if self._streaming and not answer.stopped and (more := answer.stream.finish()):
                left.append((row, number, answer.text + more if self._accumulate else more))
        return left
