"""Metrics of InfiniteBench (arXiv 2402.13718, and the scorer published with it)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trt_razor.evaluation.metrics.words import chinese_clean, f1

_SEPARATORS = "\n:\"'.,?!{}"
_LETTERS = "ABCD"


def first_number(text: str, references: Sequence[str]) -> float:
    """1 if the first run of digits in the text is a reference (passkey, number string)."""
    found = re.search(r"[0-9]+", text)
    return float(found is not None and found[0] in references)


def kv_word(text: str, references: Sequence[str]) -> float:
    """1 if a word of the text is a reference; words end at spaces and ``: " ' . , ? ! { }``."""
    words = _blank(text, _SEPARATORS).split()
    return float(any(r in words for r in references))


def dialogue(text: str, references: Sequence[str]) -> float:
    """1 if a word of the text, in capitals, is the first reference (names are in capitals)."""
    words = [w.upper() for w in _blank(text, _SEPARATORS).split()]
    return float(references[0] in words)


def qa_f1_characters(text: str, references: Sequence[str]) -> float:
    """F1 over the characters of Chinese text, punctuation apart; the best over the references."""
    said = chinese_clean(text)
    return max(f1(said, chinese_clean(r)) for r in references)


def choice(text: str, references: Sequence[str]) -> float:
    """1 if the right one of four options was chosen, by its letter or its text.

    Looked for in this order: a letter A – D as first character, the whole text, what follows
    "answer is" and the like, the first word made of A – D.

    Args:
        references: text of the right option and its letter.
    """
    said = text.strip()
    if not said:
        return 0.0
    if said[0] in _LETTERS:
        return float(said[0] in references)
    if said in references:
        return 1.0
    said = _single_spaces(_blank(said, "\n\"'.,?!{}"))
    for prefix in ("answer is:", "answer:", "answer is", "option is"):
        after = _after(said, prefix)
        if after is not None:
            return float(any(after.startswith(r) for r in references))
    word = next((w for w in said.split() if w in _LETTERS), None)
    return float(word is not None and word in references)


def code_debug(text: str, references: Sequence[str]) -> float:
    """1 if the function with the error was named, by its letter or its name.

    Args:
        references: name of the function and the letter of its option.
    """
    name, letter = references
    said = text.strip()
    if said[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    said = _blank(said, "\n`'\"-*").replace("Option", " ").replace("option", " ")
    said = _single_spaces(said)
    for prefix in ("answer is:", "is:", "answer:", "correct option is:"):
        after = _after(said, prefix)
        if after is not None:
            return float(after.startswith((letter, name)))
    return 0.0


def code_run(text: str, references: Sequence[str]) -> float:
    """1 if the last word of the text is the whole number that is the reference."""
    words = _blank(text.strip(), "\n.`'\":").split()
    return float(bool(words) and _integer(words[-1]) in [int(r) for r in references])


def math_find(text: str, references: Sequence[str]) -> float:
    """1 if the first number in the text is the reference; signs are not looked at.

    A reference without a point is a whole number, and 3.0 is not 3 (the published scorer fails).
    """
    found = re.search(r"\d+\.\d+|\d+", text)
    if found is None:
        return 0.0
    right = references[0]
    if "." in right:
        return float(float(found[0]) == float(right))
    return float(_integer(found[0]) == int(right))


def math_calc(text: str, references: Sequence[str]) -> float:
    """Share of the intermediate values that are right before the first wrong one.

    Args:
        references: one text with all values, spaces between them.
    """
    right = [int(x) for x in references[0].split()]
    said = [_integer(x) for x in re.findall(r"[0-9]+", text)]
    done = 0
    for a, b in zip(right, said, strict=False):
        if a != b:
            break
        done += 1
    return done / len(right)


def _blank(text: str, characters: str) -> str:
    return text.translate({ord(c): " " for c in characters})


def _single_spaces(text: str) -> str:
    return re.sub(" {2,}", " ", text)


def _after(text: str, prefix: str) -> str | None:
    """Text behind a prefix and the character that follows it; None if the prefix is not there."""
    at = text.find(prefix)
    return None if at < 0 else text[at + len(prefix) + 1 :]


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
