"""Tensors that lie in files: memory mapping, a fast identity, checks before anything is read."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_razor.errors import MissingExtra, RazorError, UsageError

SAMPLES = 8
SAMPLE_BYTES = 256
MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class StoredTensor:
    """One tensor inside a file: element type by name, shape, and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    def raw(self) -> npt.NDArray[np.uint8]:
        """The tensor's bytes [nbytes], memory-mapped.

        The mapping is private to the caller (copy-on-write), so that frameworks that want
        writable memory take it without a copy and the file can never change. It lives as long as
        the array: pages of a dropped tensor no longer count as this process's memory.

        Raises:
            RazorError: the file vanished, cannot be read, or became shorter than it was.
        """
        try:
            if self.path.stat().st_size < self.offset + self.nbytes:
                raise RazorError(f"{self.path}: the file became shorter while it was in use")
            mapped = np.memmap(self.path, np.uint8, "c", self.offset, (self.nbytes,))
        except (OSError, ValueError) as e:
            raise RazorError(f"{self.path}: cannot read tensor {self.name}: {e}") from None
        return mapped.view(np.ndarray)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy dtype of ``float32``, ``float16`` or ``bfloat16`` (the last from ml_dtypes)."""
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise MissingExtra("ml_dtypes", "models", "reading bfloat16 weights") from None
        return np.dtype(ml_dtypes.bfloat16)
    if name in ("float32", "float16"):
        return np.dtype(name)
    raise UsageError(f"dtype: expected float32, float16 or bfloat16, found {name!r}")


def convert(
    value: npt.NDArray[Any], dtype: str, name: str, wider: str = "bfloat16 or float32"
) -> npt.NDArray[Any]:
    """A weight in ``dtype``, C-contiguous.

    Args:
        name, wider: for the message: the weight, and dtypes that would do.

    Raises:
        RazorError: a weight does not fit (float16 ends at 65504), or on the way to float16 is no number.
    """
    target = numpy_dtype(dtype)
    if value.dtype == target:
        return np.ascontiguousarray(value)
    wide = value.astype(np.float32)
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(wide.astype(target))
    if dtype == "float16" and not np.isfinite(out).all():
        if not np.isfinite(wide).all():
            raise RazorError(
                f"{name}: expected finite weights, found infinity or NaN; the checkpoint is damaged, "
                "fetch it again"
            )
        raise RazorError(
            f"{name}: weights do not fit into float16 (largest magnitude "
            f"{float(np.abs(wide).max()):.4g}); use --dtype {wider}"
        )
    return out


def samples_digest(tensors: Iterable[StoredTensor]) -> str:
    """sha256 hex that tells checkpoints apart without reading them whole.

    Covers each tensor's name, type, shape and up to 8 evenly spaced samples of 256 bytes (small
    tensors whole), and the sizes of the files. It is an identity, not an integrity check: a
    damaged byte between two samples goes unseen. The time depends on the number of tensors, not
    on their size.

    Raises:
        RazorError: a file cannot be read.
    """
    by_file: dict[Path, list[StoredTensor]] = {}
    for t in tensors:
        by_file.setdefault(t.path, []).append(t)
    parts: dict[str, bytes] = {}
    sizes = []
    for path, group in by_file.items():
        try:
            with open(path, "rb", buffering=0) as f:
                sizes.append(os.fstat(f.fileno()).st_size)
                for t in sorted(group, key=lambda t: t.offset):
                    h = hashlib.sha256(f"{t.name} {t.dtype} {t.shape}".encode())
                    for start, length in _sample_ranges(t.nbytes):
                        f.seek(t.offset + start)
                        h.update(f.read(length))
                    parts[t.name] = h.digest()
        except OSError as e:
            raise RazorError(f"{path}: cannot read: {e.strerror or e}") from None
    total = hashlib.sha256(json.dumps(sorted(sizes)).encode())
    for name in sorted(parts):
        total.update(parts[name])
    return total.hexdigest()


def _sample_ranges(nbytes: int) -> list[tuple[int, int]]:
    if nbytes <= SAMPLES * SAMPLE_BYTES:
        return [(0, nbytes)]
    last = nbytes - SAMPLE_BYTES
    return [(last * i // (SAMPLES - 1), SAMPLE_BYTES) for i in range(SAMPLES)]


def check_tensors(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    harmless: Collection[str],
    where: str,
) -> None:
    """Compare names and shapes; nothing is read.

    Raises:
        UsageError: one line with the number of missing, extra and mis-shaped tensors and the
            first few of each.
    """
    missing = [n for n in expected if n not in found]
    # Names from the file go through repr: one line, whatever is in them.
    extra = [repr(n)[1:-1][:100] for n in found if n not in expected and n not in harmless]
    wrong = [
        f"{n} (expected {list(s)}, found {list(found[n])})"
        for n, s in expected.items()
        if n in found and found[n] != s
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("mis-shaped", wrong), ("unexpected", extra))
        if names
    ]
    if problems:
        raise UsageError(
            f"{where}: the tensors do not fit the model's configuration: {'; '.join(problems)}"
        )


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from an untrusted file.

    Raises:
        UsageError: no such file.
        RazorError: it is too large, cannot be read, or is no JSON object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise RazorError(f"{path}: {size} bytes is too large for {what}")
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; expected {what}") from None
    except OSError as e:
        raise RazorError(f"{path}: cannot read {what}: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise RazorError(f"{path}: damaged: {what} is not valid JSON ({e})") from None
    if not isinstance(data, dict):
        raise RazorError(f"{path}: damaged: {what} is not a JSON object")
    return data


def elements(shape: Iterable[int]) -> int:
    return math.prod(shape)
