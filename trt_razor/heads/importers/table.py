"""Tables of numbers as NumPy's ``savetxt`` writes them: a row a layer, tab-separated."""

from __future__ import annotations

import re

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.models.spec import MAX_HEADS, MAX_LAYERS

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_MAX_FIELD = 64


def read_table(data: bytes, where: str) -> np.ndarray:
    """Parse a table; empty lines and what follows ``#`` do not count, as in NumPy's ``loadtxt``.

    Returns:
        float64 [rows, columns], all finite.

    Raises:
        UsageError: naming the line and the field.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UsageError(f"{where}: byte {e.start}: not text; expected a table (TSV)") from None
    rows: list[list[float]] = []
    for number, line in enumerate(text.split("\n"), 1):
        content = line.partition("#")[0].strip(" \r\t")
        if not content:
            continue
        if len(rows) == MAX_LAYERS:
            raise UsageError(f"{where}: line {number}: expected at most {MAX_LAYERS} layers")
        fields = content.split("\t", MAX_HEADS)
        if len(fields) > MAX_HEADS:
            raise UsageError(f"{where}: line {number}: expected at most {MAX_HEADS} fields")
        if rows and len(fields) != len(rows[0]):
            raise UsageError(
                f"{where}: line {number}: expected {len(rows[0])} fields as in the lines before, "
                f"found {len(fields)}; is the file cut off?"
            )
        rows.append(
            [_number(f, f"{where}: line {number}, field {i}") for i, f in enumerate(fields, 1)]
        )
    if not rows:
        raise UsageError(f"{where}: no numbers; expected a row of scores for each layer")
    return np.array(rows, dtype=np.float64)


def _number(text: str, where: str) -> float:
    text = text.strip()
    if len(text) > _MAX_FIELD or not _NUMBER.fullmatch(text):
        if _NOT_FINITE.fullmatch(text):
            raise UsageError(f"{where}: expected a finite number, found {text}")
        raise UsageError(f"{where}: expected a number, found {text[:20]!r}")
    value = float(text)
    if not np.isfinite(value):
        raise UsageError(f"{where}: expected a finite number, found {text}")
    return value
