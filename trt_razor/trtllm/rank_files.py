"""``rank{N}.safetensors``: the weights of one rank, written as they come.

All ranks of a checkpoint are written in one pass over its source, with one tensor in memory, so the
files are open side by side and every header is written before the first weight is read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from trt_razor.errors import RazorError

# Name in a file and bytes of an element.
_DTYPES = {
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int8": ("I8", 1),
    "float8_e4m3fn": ("F8_E4M3", 1),
}
_ALIGN = 8

TensorShapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensors of a file: name → (dtype name, shape)."""


def rank_path(directory: Path, rank: int) -> Path:
    """Where TensorRT-LLM looks for the weights of a rank (pp_rank · tp_size + tp_rank)."""
    return directory / f"rank{rank}.safetensors"


class RankFile:
    """A safetensors file whose tensors are written one by one, in any order, whole or in rows.

    As a context manager it checks on leaving that every tensor was written; after an exception it
    only closes the file.

    Args:
        path: the file to create.
        tensors: every tensor, name → (dtype, shape); dtype ``float32``, ``float16``,
            ``bfloat16``, ``int8`` or ``float8_e4m3fn``.
        metadata: strings for the header.

    Raises:
        RazorError: another dtype.
    """

    def __init__(
        self, path: Path, tensors: TensorShapes, metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self._tensors = dict(tensors)
        self._offsets: dict[str, int] = {}
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in tensors}
        header = self._header(metadata or {"format": "pt"})
        self._data = len(header)
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by close
        try:
            self._file.write(header)
            self._file.truncate(self._data + self.nbytes)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> RankFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        if e is None:
            self.close()
        else:
            self._file.close()

    def add(self, name: str, value: npt.NDArray[Any], row: int = 0) -> None:
        """Write a tensor, or the rows of it that begin at ``row``.

        Args:
            name: one of ``tensors``.
            value: of its dtype (its bytes as uint8 will do for ``float8_e4m3fn``) and its shape but
                for the number of rows; a tensor without axes is written whole.
            row: of the first axis.

        Raises:
            RazorError: no such tensor, another dtype or shape, or rows that are written already.
        """
        if name not in self._tensors:
            raise RazorError(f"{self.path}: no tensor {name} in its header")
        dtype, shape = self._tensors[name]
        found = value.dtype.name
        if found != dtype and (found, dtype) != ("uint8", "float8_e4m3fn"):
            raise RazorError(f"{self.path}: {name}: expected {dtype}, found {found}")
        rows, total = (value.shape[0], shape[0]) if shape and value.ndim else (1, 1)
        if (
            value.ndim != len(shape)
            or value.shape[1:] != shape[1:]
            or not 0 <= row <= row + rows <= total
        ):
            raise RazorError(
                f"{self.path}: {name}: expected {list(shape)}, found {list(value.shape)} at row {row}"
            )
        if any(row < end and first < row + rows for first, end in self._written[name]):
            raise RazorError(f"{self.path}: {name}: rows {row}..{row + rows - 1} written twice")
        self._written[name].append((row, row + rows))
        row_bytes = math.prod(shape[1:]) * value.itemsize
        self._file.seek(self._data + self._offsets[name] + row * row_bytes)
        self._file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Flush to the disk. Raises RazorError if a tensor was not written to its end."""
        with self._file:
            missing = [
                name
                for name, (_, shape) in self._tensors.items()
                if math.prod(shape)
                and sum(end - first for first, end in self._written[name]) != (shape or (1,))[0]
            ]
            if missing:
                raise RazorError(
                    f"{self.path}: {len(missing)} tensors incomplete: {', '.join(missing[:3])}"
                )
            self._file.flush()
            os.fsync(self._file.fileno())

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(self._nbytes(name) for name in self._tensors)

    def _nbytes(self, name: str) -> int:
        dtype, shape = self._tensors[name]
        return math.prod(shape) * _DTYPES[dtype][1]

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        """Length and JSON; sets the offsets, which leave no gap (the format allows none)."""
        for name, (dtype, _) in self._tensors.items():
            if dtype not in _DTYPES:
                raise RazorError(
                    f"{self.path}: {name}: dtype: expected {', '.join(_DTYPES)}, found {dtype}"
                )
        entries: dict[str, Any] = {"__metadata__": dict(metadata)}
        offset = 0
        # Wide elements first: so each tensor is aligned without gaps.
        for name in sorted(self._tensors, key=lambda name: -_DTYPES[self._tensors[name][0]][1]):
            dtype, shape = self._tensors[name]
            self._offsets[name] = offset
            end = offset + self._nbytes(name)
            entries[name] = {
                "dtype": _DTYPES[dtype][0],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGN)
        return len(text).to_bytes(8, "little") + text
