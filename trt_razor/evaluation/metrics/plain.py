"""Whether an answer holds the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def contains(text: str, references: Sequence[str]) -> float:
    """1 if a reference occurs in the text, else 0. Case counts.

    A reference that begins or ends with a digit must not go on in the text with another one: 4821
    is no answer where 48213 was asked, nor the other way round.
    """
    return float(any(_occurs(text, r) for r in references))


def exact(text: str, references: Sequence[str]) -> float:
    """1 if the text is a reference, spaces around both apart."""
    return float(text.strip() in {r.strip() for r in references})


def string_match_all(text: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the text; case does not count (RULER, all but QA)."""
    said = _printable(text)
    return sum(r.lower() in said for r in references) / len(references)


def string_match_part(text: str, references: Sequence[str]) -> float:
    """1 if any reference occurs in the text; case does not count (RULER, QA)."""
    said = _printable(text)
    return float(any(r.lower() in said for r in references))


def _occurs(text: str, reference: str) -> bool:
    if not reference:
        return False
    before = r"(?<!\d)" if reference[0].isdigit() else ""
    after = r"(?!\d)" if reference[-1].isdigit() else ""
    return re.search(before + re.escape(reference) + after, text) is not None


def _printable(text: str) -> str:
    return _CONTROL.sub("\n", text.strip()).strip().lower()
