"""Errors a user can act on. Every message is one line: what, where, expected, found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RazorError(Exception):
    """Something failed while doing what was asked (exit code 1)."""

    exit_code = 1


class UsageError(RazorError):
    """What was asked cannot be done as asked: a wrong name, value or combination (exit code 2)."""

    exit_code = 2


class MissingExtra(UsageError):
    """An optional package is needed and absent."""

    def __init__(self, package: str, extra: str, why: str) -> None:
        super().__init__(
            f"{why} needs the Python package '{package}', which is not installed; "
            f"install it with: pip install 'trt-razor[{extra}]'"
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean …?)' for the nearest known name, or the list of all names if none is near."""
    options = sorted(known)
    near = difflib.get_close_matches(name.lower(), options, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(options)}"
