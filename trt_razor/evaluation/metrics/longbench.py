"""Metrics of LongBench (arXiv 2308.14508, and the scorer published with it)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from trt_razor.errors import UsageError
from trt_razor.evaluation.metrics.rouge import rouge_l
from trt_razor.evaluation.metrics.words import chinese_clean, chinese_words, english_words, f1

_NUMBER = re.compile(r"\d+")
_COMMENT = ("`", "#", "//")


def first_line(text: str) -> str:
    """What few-shot answers are cut to: the model goes on with examples of its own otherwise."""
    return text.lstrip("\n").split("\n")[0]


def qa_f1(text: str, references: Sequence[str]) -> float:
    """F1 over English words, punctuation and articles apart; the best over the references."""
    return max(f1(english_words(text), english_words(r)) for r in references)


def qa_f1_line(text: str, references: Sequence[str]) -> float:
    """``qa_f1`` of the first line."""
    return qa_f1(first_line(text), references)


def qa_f1_zh(text: str, references: Sequence[str]) -> float:
    """F1 over Chinese words without punctuation; the best over the references.

    Raises:
        MissingExtra: jieba is not installed.
    """
    return max(f1(_words_zh(text), _words_zh(r)) for r in references)


def rouge_l_line(text: str, references: Sequence[str]) -> float:
    """``rouge_l`` of the first line."""
    return rouge_l(first_line(text), references)


def rouge_l_zh(text: str, references: Sequence[str]) -> float:
    """``rouge_l`` over Chinese words. Raises MissingExtra without jieba."""
    return rouge_l(" ".join(chinese_words(text)), [" ".join(chinese_words(r)) for r in references])


def classification(text: str, references: Sequence[str]) -> float:
    """1 / number of class names in the first line if the right one is among them, else 0.

    A name that is part of the right one does not count against it.

    Args:
        references: the right class, then all classes (the right one again among them).
    """
    right, *classes = references
    line = first_line(text)
    named = [c for c in classes if c in line]
    # The published scorer takes names out of the list it walks over and so jumps over the next one.
    i = 0
    while i < len(named):
        if named[i] in right and named[i] != right:
            named.remove(named[i])
        i += 1
    return 1 / len(named) if right in named else 0.0


def retrieval(text: str, references: Sequence[str]) -> float:
    """Share of the numbers in the text that are N of the reference ``Paragraph N``."""
    return max(_share_of_numbers(text, _paragraph(r, r"Paragraph (\d+)")) for r in references)


def retrieval_zh(text: str, references: Sequence[str]) -> float:
    """``retrieval`` for references ``段落N``."""
    return max(_share_of_numbers(text, _paragraph(r, r"段落(\d+)")) for r in references)


def count(text: str, references: Sequence[str]) -> float:
    """Share of the numbers in the text that are the reference."""
    return max(_share_of_numbers(text, r) for r in references)


def code_similarity(text: str, references: Sequence[str]) -> float:
    """Similarity of the first line that is code to the reference, in hundredths.

    2·M / T with M characters in matching blocks (Ratcliff and Obershelp) of T in both.
    """
    lines = text.lstrip("\n").split("\n")
    code = next((x for x in lines if not any(mark in x for mark in _COMMENT)), "")
    return max(_ratio(code, r) for r in references)


def _words_zh(text: str) -> list[str]:
    return [w for w in map(chinese_clean, chinese_words(text)) if w]


def _share_of_numbers(text: str, right: str) -> float:
    numbers = _NUMBER.findall(text)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def _paragraph(reference: str, pattern: str) -> str:
    found = re.search(pattern, reference)
    if found is None:
        raise UsageError(f"reference: expected '{pattern}', found {reference[:60]!r}")
    return found[1]


def _ratio(a: str, b: str) -> float:
    if a == b:
        return 1.0
    if not a or not b:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, a, b).ratio()) / 100
