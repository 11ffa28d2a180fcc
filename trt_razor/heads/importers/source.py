"""A file of somebody else's head scores: read once, within bounds, and parsed as what it is."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trt_razor.errors import RazorError, UsageError
from trt_razor.heads.importers.table import read_table
from trt_razor.heads.importers.torch_file import load_torch_file

MAX_FILE_BYTES = 32 << 20
"""The largest published file has 1.5 MB; a Python object of a byte of JSON takes about ten."""
MAX_CONFIG_BYTES = 1 << 20

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"


@dataclass(frozen=True)
class Source:
    """One file, untrusted, as bytes. Everything later is parsed from these bytes, never read again.

    Attributes:
        path: where it was read from; for messages, and to look for a file beside it.
        data: all of it.
    """

    path: Path
    data: bytes

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def kind(self) -> str:
        """``torch`` (zip), ``json`` or ``text``, by content.

        Raises:
            UsageError: empty, a bare pickle, or none of the three.
        """
        if not self.data.strip():
            raise UsageError(f"{self.path}: the file is empty; expected head scores")
        if self.data.startswith(ZIP_MAGIC):
            return "torch"
        if self.data.startswith(PICKLE_MAGIC):
            raise UsageError(
                f"{self.path}: a bare pickle (torch.save's form before 1.6), which can run any program "
                "and is not opened here; save the tensors again with torch >= 1.6 where you trust the file"
            )
        if self.data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")):
            return "json"
        try:
            self.data.decode("utf-8")
        except UnicodeDecodeError:
            raise UsageError(
                f"{self.path}: expected a table (TSV), JSON or a file of torch.save, found other bytes"
            ) from None
        return "text"

    @cached_property
    def json(self) -> dict[str, Any]:
        """A JSON object without double names and without NaN."""
        return _parse_json(self.data, self.path)

    @cached_property
    def torch(self) -> Any:
        """What torch.save wrote: a tensor, or a dict of plain values. See :mod:`.torch_file`."""
        return load_torch_file(self.data, str(self.path))

    @cached_property
    def table(self) -> np.ndarray:
        """Tab-separated numbers, float64 [rows, columns]. See :mod:`.table`."""
        return read_table(self.data, str(self.path))

    def config_beside(self) -> dict[str, Any] | None:
        """``config.json`` in the same folder, or None. It is untrusted too."""
        path = self.path.parent / "config.json"
        if not path.is_file():
            return None
        return _parse_json(_read(path, MAX_CONFIG_BYTES), path)


def open_source(path: Path) -> Source:
    """Read a file, or ``full_attention_heads.tsv`` of a folder.

    Raises:
        UsageError: no such file, not a plain file, too large.
        RazorError: it cannot be read.
    """
    if path.is_dir():
        inside = path / "full_attention_heads.tsv"
        if not inside.is_file():
            raise UsageError(
                f"{path}: a folder without full_attention_heads.tsv; expected a file with head scores"
            )
        path = inside
    return Source(path, _read(path, MAX_FILE_BYTES))


def _read(path: Path, limit: int) -> bytes:
    try:
        # Not blocking: a named pipe would wait for its writer for ever.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise UsageError(f"{path}: not a plain file; expected a file with head scores")
            if info.st_size > limit:
                raise UsageError(f"{path}: {info.st_size} bytes, expected at most {limit}")
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; expected a file with head scores") from None
    except OSError as e:
        raise RazorError(f"{path}: cannot read the file: {e.strerror or e}") from None
    if len(data) > limit:
        raise UsageError(f"{path}: grew while it was read; expected at most {limit} bytes")
    return data


def _parse_json(data: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a name occurs twice")
        return out

    def number(text: str) -> Any:
        raise ValueError(f"{text} is not a number")

    try:
        value = json.loads(data, object_pairs_hook=once, parse_constant=number)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path}: not valid JSON ({str(e)[:120]})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
