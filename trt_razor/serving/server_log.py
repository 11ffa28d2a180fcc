"""What matters in the log of a Triton server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_HARMLESS = ("CudaDriverHelper", "pinned memory pool", "unable to create stream")
"""What every server without a GPU says."""


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
    """The most telling line: a model's own error before the server's summary of it."""
    said = telling(lines)
    for mark in ("failed to load", "failed to start", "already in use", "UNAVAILABLE"):
        for line in said:
            if mark in line:
                return " ".join(line.split())[:600]
    return " ".join(said[-1].split())[:600] if said else "it said nothing"
