"""Lists of stop and bad words: int32 [2, N], ids in one row, where each word ends in the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.models.tokenizer import Tokenizer

MAX_IDS = 4096
"""Most ids in a list: every word is looked for in every step."""
MAX_CHARACTERS = 32768
"""Most characters of the stop words of a row: one id may be a hundred of them."""


@dataclass(frozen=True)
class StopRules:
    """Fields of SamplingParams: ``stop``, ``stop_token_ids``, ``stop_sequences``."""

    texts: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    sequences: tuple[tuple[int, ...], ...] = ()


def words_of(
    tensors: Mapping[str, np.ndarray], name: str, row: int, rows: int, vocab: int
) -> tuple[tuple[int, ...], ...]:
    """The words of one row of a list tensor [B, 2, N] (or [2, N] for one row).

    Row 0 holds the ids of all words one after another, row 1 where each word ends, then -1.

    Raises:
        UsageError: names the tensor and what is wrong with it.
    """
    x = tensors.get(name)
    if x is None or x.size == 0:
        return ()
    if x.ndim == 2 and rows == 1:
        x = x[None]
    if x.ndim != 3 or x.shape[:2] != (rows, 2) or x.dtype.kind not in "iu":
        raise UsageError(f"{name}: expected int32 [{rows}, 2, N], found {x.dtype} {list(x.shape)}")
    if x.shape[2] > MAX_IDS:
        raise UsageError(f"{name}: expected at most {MAX_IDS} ids, found {x.shape[2]}")
    ids, ends = x[row].tolist()
    if -1 in ends:
        first = ends.index(-1)
        if any(e != -1 for e in ends[first:]):
            raise UsageError(f"{name}: offsets: expected -1 only at the end, found {_some(ends)}")
        ends = ends[:first]
    start, words = 0, []
    for end in ends:
        if end <= start:
            raise UsageError(f"{name}: offsets: expected them to grow from 1, found {_some(ends)}")
        if end > len(ids):
            raise UsageError(f"{name}: offsets: expected at most {len(ids)}, found {_some(ends)}")
        word = tuple(ids[start:end])
        if min(word) < 0 or max(word) >= vocab:
            raise UsageError(f"{name}: expected ids 0..{vocab - 1}, found {_some(word)}")
        words.append(word)
        start = end
    return tuple(words)


def stop_rules(words: Sequence[tuple[int, ...]], tokenizer: Tokenizer | None) -> StopRules:
    """What ends generation for these words of ids.

    A word stops as its ids and, with a tokenizer, as its text however that is tokenised. A single
    control token ends it as the end token does; words with control tokens have no text.

    Raises:
        UsageError: too much text to look for in every step.
    """
    texts, ids = [], []
    for word in words if tokenizer else ():
        assert tokenizer is not None
        special = [_is_special(tokenizer, i) for i in word]
        if special == [True]:
            ids.append(word[0])
            continue
        text = tokenizer.decode(word)
        if text and not any(special) and "\ufffd" not in text:
            texts.append(text)
    length = sum(map(len, texts))
    if length > MAX_CHARACTERS:
        raise UsageError(
            f"stop_words_list: expected at most {MAX_CHARACTERS} characters in all words, found {length}"
        )
    alone = {(i,) for i in ids}
    sequences = tuple(w for w in words if w not in alone)
    return StopRules(tuple(dict.fromkeys(texts)), tuple(ids), sequences)


def _is_special(tokenizer: Tokenizer, token: int) -> bool:
    return not tokenizer.token_bytes(token) and bool(tokenizer.token_bytes(token, False))


def _some(numbers: Sequence[int]) -> str:
    return f"{list(numbers[:8])}{' …' if len(numbers) > 8 else ''}"
