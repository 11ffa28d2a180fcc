"""What matters in the log of a Triton server."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_HARMLESS = ("CudaDriverHelper", "pinned memory pool", "unable to create stream")
"""What every server without a GPU says."""
# The server writes the exception's text with its line ends as \\n, and where it was raised.
_NOT_LOADED = re.compile(
    r"failed to load '([^']*)' version \d+: (?:[A-Z][a-z ]+: )?(?:TritonModelException: )?"
    r"(.*?)(?:(?:\\n)*At:\\n.*)?\"?$"
)
_HEAD = re.compile(r"^[IWEF]\d{4} [\d:.]+ \d+ \S+\] ")


def telling(lines: Iterable[str]) -> list[str]:
    """Without information, banners and tables."""
    kept = []
    for line in lines:
        text = line.rstrip()
        is_log = len(text) > 5 and text[0] in "IWEF" and text[1:5].isdigit()
        table = text.startswith(("+--", "|"))
        if text and not table and not (is_log and text[0] in "I") and not _harmless(text):
            kept.append(text)
    return kept


def _harmless(text: str) -> bool:
    return any(x in text for x in _HARMLESS)


def reason(lines: Sequence[str]) -> str:
    """One line: a model's own error, else the most telling line."""
    said = telling(lines)
    for line in said:
        if found := _NOT_LOADED.search(line):
            return _one_line(f"model {found[1]}: {found[2]}")
    for mark in ("failed to start", "already in use"):
        for line in said:
            if mark in line:
                return _one_line(line)
    return _one_line(said[-1]) if said else "it said nothing"


def _one_line(text: str) -> str:
    return " ".join(_HEAD.sub("", text).split())[:600]
