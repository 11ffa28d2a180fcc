"""The rank files of a TensorRT-LLM checkpoint, read as one model: tensors put together again."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.safetensors_reader import read_header
from trt_razor.models.spec import ModelSpec
from trt_razor.models.stored import (
    StoredTensor,
    check_tensors,
    elements,
    numpy_dtype,
    samples_digest,
)
from trt_razor.sharding import stages
from trt_razor.trtllm.rank_files import rank_path
from trt_razor.trtllm.rank_tensors import (
    EMBEDDING,
    HEAD,
    LAYER,
    Rule,
    Share,
    held,
    layer_name,
    padded_part,
)

Array = npt.NDArray[Any]

# safetensors dtype → what NumPy takes its elements for, and how they are written. Unsigned bytes
# become signed ones, the only ones that TensorRT-LLM recognises as packed.
_READ = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "uint8",
    "I8": "int8",
    "U8": "int8",
}
_COMPARED_BYTES = 16 << 20
"""Tensors that every rank has whole are compared up to this size."""
_TIED_ROWS = 64


def written_dtype(stored: str) -> str:
    """dtype name for ``RankFile`` of a safetensors dtype."""
    return "float8_e4m3fn" if stored == "F8_E4M3" else _READ[stored]


@dataclass(frozen=True)
class RankTensors:
    """Tensors of all rank files by name, layers numbered over the whole model.

    Attributes:
        parts: name → the tensor of each tensor-parallel rank.
    """

    folder: Path
    spec: ModelSpec
    tp_size: int
    pp_size: int
    parts: Mapping[str, tuple[StoredTensor, ...]]

    @classmethod
    def open(cls, folder: Path, spec: ModelSpec, tp_size: int, pp_size: int) -> RankTensors:
        """Read the headers.

        Raises:
            UsageError: a missing file, or ranks that do not have the same tensors.
            RazorError: a damaged file.
        """
        extra = rank_path(folder, tp_size * pp_size)
        if extra.exists():
            raise UsageError(
                f"{folder}: config.json says {tp_size * pp_size} ranks, but there is {extra.name}, too; "
                "the folder holds two checkpoints mixed up: convert again into an empty one"
            )
        parts: dict[str, tuple[StoredTensor, ...]] = {}
        for stage, (first, end) in enumerate(stages(spec.num_layers, pp_size)):
            files = []
            for tp_rank in range(tp_size):
                path = rank_path(folder, stage * tp_size + tp_rank)
                named = read_header(path)
                files.append({_global_name(n, first, end, path): t for n, t in named.items()})
            for name in sorted(set().union(*files)):
                if name in parts:
                    raise UsageError(f"{folder}: {_shown(name)} is in two pipeline stages")
                held_by = [file[name] for file in files if name in file]
                if len(held_by) < tp_size:
                    raise UsageError(
                        f"{folder}: {_shown(name)}: expected on {tp_size} ranks, found on "
                        f"{len(held_by)}; the checkpoint is incomplete or mixed up, convert it again"
                    )
                parts[name] = tuple(_vector(t) for t in held_by)
        return cls(folder, spec, tp_size, pp_size, parts)

    def __contains__(self, name: str) -> bool:
        return name in self.parts

    def dtype(self, name: str) -> str:
        """safetensors dtype."""
        return self.parts[name][0].dtype

    def check(self, rules: Mapping[str, Rule], harmless: Collection[str]) -> None:
        """Compare names, shapes and dtypes with what they must be; nothing is read.

        Args:
            harmless: names without a rule that may be there.

        Raises:
            UsageError: the first few that differ.
        """
        found = {name: parts[0].shape for name, parts in self.parts.items()}
        expected = {
            name: self._rank_shape(name, rule)
            for name, rule in rules.items()
            if name in self.parts or not rule.optional
        }
        check_tensors(expected, found, harmless, str(self.folder))
        for name, shape in expected.items():
            for part in self.parts[name]:
                self._check_part(part, rules[name].dtypes, self.dtype(name), shape)

    def _check_part(
        self, part: StoredTensor, dtypes: Collection[str], first: str, shape: tuple[int, ...]
    ) -> None:
        where = f"{part.path}: {part.name}"
        if part.dtype not in dtypes or part.dtype != first:
            allowed = {first} if first in dtypes else dtypes
            raise UsageError(
                f"{where}: dtype: expected {' or '.join(sorted(allowed))}, found {part.dtype}"
            )
        if part.shape != shape:
            raise UsageError(f"{where}: expected {list(shape)}, found {list(part.shape)}")
        if part.nbytes != elements(part.shape) * _numpy(part.dtype).itemsize:
            raise RazorError(f"{where}: damaged: {part.nbytes} bytes for {list(shape)}")

    def whole(self, name: str, rule: Rule) -> Array:
        """The whole model's tensor; bytes of FP8 as uint8. A view of the file where that will do.

        Raises:
            UsageError: ranks contradict each other. RazorError: a file cannot be read any more.
        """
        parts = self.parts[name]
        if rule.share is Share.WHOLE or len(parts) == 1:
            self._check_equal(name)
            value = read(parts[0])
            return value[: rule.shape[0]] if rule.share is Share.VOCAB else value
        out = np.empty(rule.shape, read(parts[0]).dtype)
        before = (slice(None),) * rule.axis
        indices = [
            held(name, rule, self.spec, self.tp_size, rank, self._heads)
            for rank in range(len(parts))
        ]
        for part, index in zip(parts, indices, strict=True):
            value = read(part)
            at: Any = (*before, index)
            out[at] = value[: len(index)] if rule.share is Share.VOCAB else value
        if rule.share is Share.QKV and self.tp_size > self.spec.num_kv_heads:
            for part, index in zip(parts, indices, strict=True):
                if not np.array_equal(_bits(out[index]), _bits(read(part))):
                    raise UsageError(
                        f"{part.path}: {part.name}: ranks that share a KV head hold different weights "
                        "of it; convert or quantise the model again"
                    )
        return out

    def tied(self) -> bool:
        """Whether the output head is the input embedding, by a sample of rows."""
        if HEAD not in self.parts or EMBEDDING not in self.parts:
            return False
        embedding, head = self.parts[EMBEDDING][0], self.parts[HEAD][0]
        if embedding.dtype != head.dtype or embedding.dtype not in _READ:
            return False
        if not len(embedding.shape) == len(head.shape) == 2 or embedding.shape[1] != head.shape[1]:
            return False
        rows = np.linspace(0, min(embedding.shape[0], head.shape[0]) - 1, _TIED_ROWS).astype(int)
        return np.array_equal(_bits(read(embedding)[rows]), _bits(read(head)[rows]))

    def digest(self) -> str:
        """Identity of all files; see ``stored.samples_digest``."""
        return samples_digest(
            replace(part, name=f"{rank} {name}")
            for name, parts in self.parts.items()
            for rank, part in enumerate(parts)
        )

    def nbytes(self) -> int:
        return sum(part.nbytes for parts in self.parts.values() for part in parts)

    @property
    def _heads(self) -> tuple[int, ...]:
        """The KV heads as they are in the files."""
        return tuple(range(self.spec.num_kv_heads))

    def _rank_shape(self, name: str, rule: Rule) -> tuple[int, ...]:
        return rank_shape(name, rule, self.spec, self.tp_size, 0, self._heads)

    def _check_equal(self, name: str) -> None:
        first, *others = self.parts[name]
        if first.nbytes > _COMPARED_BYTES:
            return
        for part in others:
            if not np.array_equal(first.raw(), part.raw()):
                way = "convert the model again"
                if name.endswith("_factor"):
                    way = "quantise with one scale for all ranks: for one rank, we split the result"
                raise UsageError(
                    f"{part.path}: {part.name}: expected the same values as in {first.path.name}; {way}"
                )


def rank_shape(
    name: str, rule: Rule, spec: ModelSpec, tp_size: int, rank: int, order: tuple[int, ...]
) -> tuple[int, ...]:
    """Shape of a rank's tensor, the same on every rank. Raises UsageError as ``held`` does."""
    size = len(held(name, rule, spec, tp_size, rank, order))
    if rule.share is Share.VOCAB:
        size = padded_part(rule, tp_size)
    return (*rule.shape[: rule.axis], size, *rule.shape[rule.axis + 1 :])


def read(tensor: StoredTensor) -> Array:
    """A stored tensor, memory-mapped; bytes of FP8 as uint8, other bytes as int8."""
    dtype = _numpy(tensor.dtype)
    raw = tensor.raw()
    if tensor.offset % dtype.itemsize:
        raw = raw.copy()  # odd header length
    return raw.view(dtype).reshape(tensor.shape)


def _numpy(stored: str) -> np.dtype[Any]:
    name = _READ[stored]
    return np.dtype(name) if name.endswith("int8") else numpy_dtype(name)


def _bits(value: Array) -> Array:
    """For comparisons in which NaN equals itself."""
    return np.ascontiguousarray(value).view(np.uint8)


def _vector(tensor: StoredTensor) -> StoredTensor:
    """Scales may be stored without axes; TensorRT-LLM reads them as [1]."""
    return tensor if tensor.shape else replace(tensor, shape=(1,))


def _global_name(name: str, first: int, end: int, path: Path) -> str:
    """Layers are numbered from the first of a pipeline stage in a file."""
    match = re.fullmatch(re.escape(LAYER) + r"(0|[1-9][0-9]{0,4})\.(.+)", name)
    if match is None:
        return name
    layer = first + int(match[1])
    if layer >= end:
        raise UsageError(
            f"{path}: {_shown(name)}: expected layers 0..{end - first - 1} in this rank's file"
        )
    return layer_name(layer, match[2])


def _shown(name: str) -> str:
    """A name from a file, in one line."""
    return repr(name)[1:-1][:100]
