"""Weights of a Hugging Face folder: ``model.safetensors``, whole or in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_razor.errors import MissingExtra, RazorError, UsageError
from trt_razor.models.spec import ModelSpec
from trt_razor.models.stored import (
    StoredTensor,
    check_tensors,
    elements,
    numpy_dtype,
    read_json,
    samples_digest,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NORM_ROWS = 4096  # rows of lm_head normalised at a time: bounds the float32 copy


class SafetensorsWeights:
    """Reads tensors on demand; opening validates names, shapes and dtypes and reads no data.

    Raises:
        UsageError: no safetensors files, or tensors that do not fit ``spec``.
        RazorError: a damaged file or index.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self._spec = spec
        stored = _index(folder)
        expected, self._parts = _layout(spec)
        if spec.tie_embeddings and "model.embed_tokens.weight" not in stored:
            # Of two tensors that share memory some tools keep only the other name.
            head = stored.get("lm_head.weight")
            if head is not None:
                stored["model.embed_tokens.weight"] = head
        harmless = {n for n in stored if n.endswith("rotary_emb.inv_freq")}
        if spec.tie_embeddings:
            harmless.add("lm_head.weight")
        check_tensors(expected, {n: t.shape for n, t in stored.items()}, harmless, str(folder))
        self._stored = {n: stored[n] for n in expected}
        for name, t in self._stored.items():
            if t.dtype not in _DTYPES:
                raise UsageError(
                    f"{t.path}: tensor {name}: dtype: expected F32, F16 or BF16, found {t.dtype}; "
                    "use an unquantised checkpoint"
                )

    def dtype(self, name: str) -> np.dtype[Any]:
        return numpy_dtype(_DTYPES[self._stored[self._parts[name][0]].dtype])

    def read(self, name: str) -> npt.NDArray[Any]:
        stored_name, first, rows = self._parts[name]
        t = self._stored[stored_name]
        dtype = self.dtype(name)
        raw = t.raw()
        if t.offset % dtype.itemsize:
            raw = raw.copy()  # odd header length: frameworks expect aligned elements
        whole = raw.view(dtype).reshape(t.shape)
        part = whole if rows is None else whole[first : first + rows]
        if name == "lm_head.weight" and self._spec.norm_head:
            return _unit_rows(part)
        return part

    def digest(self) -> str:
        return samples_digest(self._stored.values())


def _layout(
    spec: ModelSpec,
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str, int, int | None]]]:
    """Stored names → shapes, and canonical names → (stored name, first row, rows or None)."""
    canonical = spec.tensors()
    parts: dict[str, tuple[str, int, int | None]] = {n: (n, 0, None) for n in canonical}
    expected = dict(canonical)
    if spec.architecture == "baichuan":
        # q, k and v are stored as one matrix, in this order.
        for i in range(spec.num_layers):
            p = f"model.layers.{i}.self_attn."
            first = 0
            for proj in ("q", "k", "v"):
                rows = expected.pop(f"{p}{proj}_proj.weight")[0]
                parts[f"{p}{proj}_proj.weight"] = (p + "W_pack.weight", first, rows)
                first += rows
            expected[p + "W_pack.weight"] = (first, spec.hidden_size)
    return expected, parts


def _unit_rows(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows scaled to Euclidean length 1 in float32, rounded to the stored dtype (NormHead)."""
    out = np.empty_like(weight)
    for i in range(0, weight.shape[0], _NORM_ROWS):
        rows = weight[i : i + _NORM_ROWS].astype(np.float32)
        length = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        out[i : i + _NORM_ROWS] = rows / np.maximum(length, 1e-12)[:, None]
    return out


def _index(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder by its stored name."""
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise _nothing_to_read(folder)
    index = folder / INDEX
    weight_map = read_json(index, "the safetensors index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RazorError(f"{index}: damaged: weight_map: expected an object of tensor → file")
    headers: dict[str, dict[str, StoredTensor]] = {}
    stored = {}
    for name, file in weight_map.items():
        # A plain file name only: an index from elsewhere must not point out of its folder.
        if not isinstance(file, str) or not _is_plain_name(file):
            raise RazorError(
                f"{index}: weight_map[{name!r}]: expected the name of a file in the same folder, "
                f"found {repr(file)[:80]}"
            )
        if file not in headers:
            headers[file] = read_header(folder / file)
        if name not in headers[file]:
            raise RazorError(
                f"{folder / file}: tensor {name} is missing, but {INDEX} places it there"
            )
        stored[name] = headers[file][name]
    return stored


def _is_plain_name(file: str) -> bool:
    return file.endswith(".safetensors") and not set(file) & set("/\\\0:")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one file. The safetensors library checks the header, offsets and file size.

    Raises:
        UsageError: no such file. RazorError: a damaged one.
    """
    try:
        from safetensors import safe_open
    except ImportError:
        raise MissingExtra("safetensors", "models", f"reading {path.name}") from None
    if not path.is_file():
        raise UsageError(f"{path}: no such file; the checkpoint is incomplete, fetch it again")
    try:
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
        start = 8 + length
        out = {}
        for name, info in header.items():
            if name == "__metadata__":
                continue
            begin, end = info["data_offsets"]
            shape = tuple(info["shape"])
            out[name] = StoredTensor(name, info["dtype"], shape, path, start + begin, end - begin)
    except Exception as e:  # the library's own error type, OSError, broken JSON
        reason = " ".join(str(e).split())[:200]
        raise RazorError(
            f"{path}: damaged or not a safetensors file ({reason}); fetch it again"
        ) from None
    for t in out.values():
        if t.dtype in _DTYPES and t.nbytes != elements(t.shape) * (4 if t.dtype == "F32" else 2):
            raise RazorError(f"{path}: damaged: tensor {t.name}: {t.nbytes} bytes for {t.shape}")
    return out


def _nothing_to_read(folder: Path) -> UsageError:
    pickles = sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("*.pth")])
    if pickles:
        return UsageError(
            f"{folder}: has only {pickles[0].name}, a pickle that could run code when opened; "
            "expected safetensors: use a safetensors revision of the model, or convert it once "
            "where you trust it (transformers: save_pretrained(DIR, safe_serialization=True))"
        )
    return UsageError(f"{folder}: no {SINGLE} and no {INDEX}; expected a Hugging Face model folder")
