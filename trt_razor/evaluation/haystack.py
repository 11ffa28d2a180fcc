"""Contexts of an exact number of tokens with sentences hidden in them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trt_razor.errors import UsageError
from trt_razor.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Hidden:
    """A context with hidden sentences.

    Attributes:
        ids: of the whole context, opening included.
        positions: index of the first token of each hidden sentence, in the order they were given.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]


class SentenceEncoder:
    """Ids of sentences that follow one another, each encoded once.

    The ids joined are those of the joined text for every tokenizer that never merges over a space
    between sentences (byte-level BPE, SentencePiece).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        whole = tokenizer.encode("One is here. Two.")
        first, second = tokenizer.encode("One is here."), tokenizer.encode("Two.")
        # SentencePiece puts the space there by itself.
        self._space = "" if first + second == whole else " "
        self._ids = functools.lru_cache(maxsize=1 << 16)(self._encode)

    def _encode(self, sentence: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(self._space + sentence, parse_special=False))

    def __call__(self, sentence: str) -> tuple[int, ...]:
        return self._ids(sentence)


def hide(
    encode: SentenceEncoder,
    opening: Sequence[int],
    length: int,
    filler: Iterator[str],
    needles: Sequence[str],
    depths: Sequence[float],
) -> Hidden:
    """``opening``, then sentences of ``filler`` with the needles between them: ``length`` tokens.

    The last sentence is whole, since the question follows it; the first one loses its beginning so
    that the number of tokens is exact. A needle stands between two sentences, the nearest gap to
    its depth: 0 is after the first sentence, 1 the end. Needles in one gap keep their order.

    Args:
        encode: of the model's tokenizer.
        opening: ids before the text.
        length: tokens of the whole context.
        filler: enough sentences; those that are used follow one another.
        needles, depths: the sentences to hide, each with its place, 0 .. 1.

    Raises:
        UsageError: the length has no room for the needles and some filler, or the filler ends.
    """
    hidden = [encode(n) for n in needles]
    room = length - len(opening) - sum(map(len, hidden))
    if room < 2 * sum(map(len, hidden)):
        raise UsageError(
            f"length {length}: expected room for {len(needles)} hidden sentence(s) and at least "
            f"twice as much text, found {max(0, room)} tokens for text; use longer contexts"
        )
    hay: list[tuple[int, ...]] = []
    size = 0
    for sentence in filler:
        ids = encode(sentence)
        if ids:
            hay.append(ids)
            size += len(ids)
        if size >= room:
            break
    else:
        raise UsageError(
            f"length {length}: the text has {size} tokens, expected {room}; use a longer text"
        )
    while size - len(hay[0]) >= room:  # the last one was longer than the first
        size -= len(hay.pop(0))
    hay[0] = hay[0][size - room :]
    # gaps[i]: tokens of text before gap i; gap 0 (before the cut sentence) is no place for a needle.
    gaps = [0]
    for ids in hay:
        gaps.append(gaps[-1] + len(ids))
    where: dict[int, list[int]] = {}
    for i, depth in enumerate(depths):
        gap = min(range(1, len(gaps)), key=lambda g: abs(gaps[g] - depth * room))
        where.setdefault(gap, []).append(i)
    out = list(opening)
    positions = [0] * len(needles)
    for gap, ids in enumerate(hay, 1):
        out += ids
        for i in where.get(gap, []):
            positions[i] = len(out)
            out += hidden[i]
    return Hidden(tuple(out), tuple(positions))


def as_tuples(options: object, *names: str) -> None:
    """Fields of a frozen dataclass that YAML gives as a list, or as one number, become tuples."""
    for name in names:
        value = getattr(options, name)
        if isinstance(value, (int, float)):
            value = (value,)
        elif not isinstance(value, (list, tuple)):
            raise UsageError(f"{name}: expected a list of numbers, found {value!r}")
        object.__setattr__(options, name, tuple(value))


def check_lengths(lengths: Sequence[int]) -> None:
    """Raises UsageError unless these are lengths of contexts, each once."""
    if not lengths or any(not _whole(n) or n < 1 for n in lengths):
        raise UsageError(f"lengths: expected numbers of tokens, found {list(lengths)}")
    if len(set(lengths)) < len(lengths):
        raise UsageError(f"lengths: expected each once, found {list(lengths)}")


def check_places(
    lengths: Sequence[int], trials: int, depths: Sequence[float], depth_range: Sequence[float]
) -> None:
    """Raises UsageError for an option of a haystack task that cannot be."""
    check_lengths(lengths)
    if not _whole(trials) or trials < 1:
        raise UsageError(f"trials: expected at least 1, found {trials!r}")
    if not all(isinstance(d, (int, float)) and 0 <= d <= 1 for d in depths):
        raise UsageError(f"depths: expected places from 0 to 1, found {list(depths)}")
    if len(depth_range) != 2 or not 0 <= depth_range[0] <= depth_range[1] <= 1:
        raise UsageError(f"depth_range: expected two places from 0 to 1, found {list(depth_range)}")


def _whole(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool)
