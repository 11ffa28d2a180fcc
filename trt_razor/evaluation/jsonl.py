"""Benchmarks from files that somebody downloaded: a JSON object a line, checked as it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

from trt_razor.errors import RazorError, UsageError

MAX_FILE_BYTES = 4 << 30
MAX_LINE_BYTES = 64 << 20
"""The longest published line, a Chinese novel, has about 15 MB."""


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        where: file and line, for messages.
        line: number of the line, from 1.
    """

    fields: Mapping[str, Any]
    where: str
    line: int

    def text(self, name: str) -> str:
        """A field that is a text. Raises UsageError naming line and field."""
        return self._get(name, str, "a text")

    def texts(self, name: str) -> list[str]:
        """A field that is a list of texts, or one text."""
        value = self._get(name, (str, list), "a text or a list of texts")
        values = [value] if isinstance(value, str) else value
        if not values or not all(isinstance(v, str) for v in values):
            raise self.wrong(name, "a list of texts that is not empty", value)
        return list(values)

    def wrong(self, name: str, expected: str, found: object) -> UsageError:
        return UsageError(f"{self.where}: {name}: expected {expected}, found {repr(found)[:60]}")

    def _get(self, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
        if name not in self.fields:
            have = ", ".join(sorted(map(str, self.fields)))[:120]
            raise UsageError(f"{self.where}: {name}: missing; the line has {have or 'no fields'}")
        value = self.fields[name]
        if not isinstance(value, kind):
            raise self.wrong(name, expected, value)
        return value


def read_rows(path: Path, limit: int | None = None) -> Iterator[Row]:
    """The lines of a file that are not empty, the first ``limit`` of them, one at a time.

    Raises:
        UsageError: no such file, not a file, too large, or a line that is no JSON object in UTF-8.
        RazorError: it cannot be read.
    """
    found = 0
    with _open(path) as f:
        for number, raw in _lines(f, path):
            if limit is not None and found >= limit:
                return
            found += 1
            where = f"{path}:{number}"
            try:
                fields = json.loads(raw.decode("utf-8-sig"))
            except (ValueError, RecursionError) as e:
                raise UsageError(f"{where}: expected a JSON object in UTF-8: {e}"[:300]) from None
            if not isinstance(fields, dict):
                raise UsageError(
                    f"{where}: expected a JSON object, found {type(fields).__name__}; expected one "
                    f"object a line (JSONL), as published"
                )
            yield Row(fields, where, number)


def count_rows(path: Path, limit: int | None = None) -> int:
    """How many rows ``read_rows`` gives, without parsing them. Raises as it does."""
    with _open(path) as f:
        found = 0
        for _ in _lines(f, path):
            if limit is not None and found >= limit:
                break
            found += 1
    return found


def read_json_file(path: Path, max_bytes: int, what: str) -> Any:
    """A whole JSON file. Raises UsageError for a file that is none, RazorError if unreadable."""
    with _open(path, max_bytes) as f:
        try:
            return json.loads(f.read(max_bytes + 1))
        except OSError as e:
            raise RazorError(f"{path}: cannot read: {e.strerror or e}") from None
        except (ValueError, RecursionError) as e:
            raise UsageError(f"{path}: expected {what}, a JSON file: {e}"[:300]) from None


def _open(path: Path, max_bytes: int = MAX_FILE_BYTES) -> BinaryIO:
    try:
        info = path.stat()
        if not S_ISREG(info.st_mode):  # opening a pipe would wait for ever
            raise UsageError(f"{path}: expected a file, found a folder or a device")
        if info.st_size > max_bytes:
            raise UsageError(f"{path}: {info.st_size} bytes, expected at most {max_bytes}")
        return open(path, "rb")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except OSError as e:
        raise RazorError(f"{os.fspath(path)}: cannot read: {e.strerror or e}") from None


def _lines(f: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    while True:
        try:
            raw = f.readline(MAX_LINE_BYTES + 1)
        except OSError as e:
            raise RazorError(f"{path}: cannot read: {e.strerror or e}") from None
        if not raw:
            return
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            raise UsageError(f"{path}:{number}: longer than {MAX_LINE_BYTES} bytes")
        if raw.strip():
            yield number, raw
