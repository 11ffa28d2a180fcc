"""What goes into a TensorRT-LLM executor, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Request:
    """A prompt.

    Attributes:
        tokens: ids of the prompt. max_new_tokens: most ids to generate.
        end_id: id that ends the answer; None = always ``max_new_tokens`` ids.
        after_tokens: send it once all requests together have got so many tokens: a schedule of
            arrivals that does not depend on the clock.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    end_id: int | None = None
    after_tokens: int = 0


@dataclass(frozen=True)
class Result:
    """What came of a request. Greedy: always the likeliest token.

    Attributes:
        tokens: generated ids.
        logits: [tokens, vocab] float32 that they were chosen from, if asked for.
        sent, arrivals: when the request was sent, and when each token came here, by
            ``time.perf_counter``. Tokens that came together have one time; without streaming that is all.
        finished: ``END_ID``, ``LENGTH``, … as TensorRT-LLM says.
        first_token_s: time to first token by the executor's own clock, if it measured.
    """

    tokens: tuple[int, ...]
    logits: npt.NDArray[np.float32] | None
    sent: float
    arrivals: tuple[float, ...]
    finished: str
    first_token_s: float | None = None

    @property
    def time_to_first_token(self) -> float:
        """Seconds, as the client sees it."""
        return self.arrivals[0] - self.sent


@dataclass(frozen=True)
class Iteration:
    """One step of the executor: what was scheduled, and blocks of all windows together."""

    number: int
    milliseconds: float
    contexts: int
    generations: int
    paused: int
    used_blocks: int
    max_blocks: int
