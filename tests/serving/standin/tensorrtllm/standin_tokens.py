"""What the stand-in answers: the prompt over and over, so that a test can say what must come out.

Pure Python, for the stand-in in the server and for the tests alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def reply(
    prompt: Sequence[int],
    max_tokens: int,
    end_id: int | None = None,
    stop: Sequence[Sequence[int]] = (),
    bad: Sequence[Sequence[int]] = (),
    min_tokens: int = 0,
) -> Iterator[int]:
    """Tokens of the answer: those of the prompt in turn.

    ``end_id`` ends it and is not given out; before ``min_tokens`` it is left out. A stop sequence is
    given out and ends it. A token that would complete a bad sequence is left out.
    """
    out: list[int] = []
    place = 0
    while len(out) < max_tokens:
        for _ in prompt:
            token = prompt[place % len(prompt)]
            place += 1
            early_end = token == end_id and len(out) < min_tokens
            if not early_end and not any(_ends_with([*out, token], b) for b in bad):
                break
        else:
            return
        if token == end_id:
            return
        out.append(token)
        yield token
        if any(_ends_with(out, s) for s in stop):
            return


def log_prob(token: int) -> float:
    """Of any token: exact in float32, and so are sums of many."""
    return -(token % 7 + 1) / 8


def _ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    return len(end) > 0 and list(tokens[-len(end) :]) == list(end)
