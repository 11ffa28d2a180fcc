"""Any method with its keys and values in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from trt_razor.errors import UsageError, did_you_mean
from trt_razor.evaluation.methods.formats import Format, Fp8, Integers
from trt_razor.evaluation.methods.interface import METHODS, Kept, Method, Read, ReadLayer
from trt_razor.evaluation.methods.kept import RazorKept, RowsKept, SplitKept

FORMATS = ("fp8", "int8", "int4")
MEANS = {"float32": torch.float32, "float16": torch.float16}


@METHODS.add("quantised")
@dataclass(frozen=True)
class Quantised:
    """What another method keeps, in fewer bits.

    The method chooses (and folds the context) in full precision; what it keeps of the context is
    rounded then. Razor's later folds read rounded rows.

    Attributes:
        inner: ``{name: options}`` of the method. Its budget counts 16-bit rows: what is kept in the
            end is reported, and less.
        format: fp8 (e4m3), int8 or int4; see ``formats``.
        group: rows or channels of a group of int8 and int4.
        means: of Razor's compensation rows, keys and values: float32, as the engines have them, or
            float16. Their counts and log-weights stay float32.
    """

    inner: Mapping[str, Mapping[str, Any]]
    format: str = "int8"
    group: int = 64
    means: str = "float32"

    name: ClassVar[str]

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"format '{self.format}': {did_you_mean(self.format, FORMATS)}")
        if self.means not in MEANS:
            raise UsageError(f"means '{self.means}': {did_you_mean(self.means, MEANS)}")
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1:
            raise UsageError(f"group: expected an integer >= 1, found {self.group!r}")
        self._method()

    @property
    def queries(self) -> str:
        """See ``Method.queries``."""
        return self._method().queries

    @property
    def query_aware(self) -> bool:
        """See ``Method.query_aware``."""
        return self._method().query_aware

    def compress(self, read: Read) -> list[Kept]:
        """See ``Method.compress``."""
        inner = self._method().compress(read)
        return [
            QuantisedKept(_rounded(kept, how, MEANS[self.means]), how, MEANS[self.means])
            for kept, how in zip(inner, map(self._format, read.layers), strict=True)
        ]

    def _format(self, layer: ReadLayer) -> Format:
        if self.format == "fp8":
            return Fp8.of(layer)
        return Integers(int(self.format.removeprefix("int")), self.group)

    def _method(self) -> Method:
        if not isinstance(self.inner, Mapping) or len(self.inner) != 1:
            raise UsageError(f"inner: expected one {{name: options}}, found {self.inner!r}")
        ((name, options),) = self.inner.items()
        if name == self.name:
            raise UsageError("inner: expected another method, found 'quantised' itself")
        return METHODS.make(name, options or {}, f"inner.{name}")


class QuantisedKept:
    """A method's rows in a format.

    Args:
        kept: with the context's rows rounded already.
        format: of the layer.
        means: dtype of compensation rows.
        context: tokens of the context.
    """

    def __init__(
        self, kept: Kept, format: Format, means: torch.dtype, context: int | None = None
    ) -> None:
        self.kept, self.format, self.means = kept, format, means
        self.context = kept.n if context is None else context

    @property
    def n(self) -> int:
        return self.kept.n

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``Kept.attend``; the new tokens are stored, and seen, as the format has them."""
        out = self.kept.attend(q, *self.format.later(k, v))
        _round_means(self.kept, self.means)
        return out

    def bits(self) -> int:
        """See ``Kept.bits``."""
        return self.format.layer_bits + _bits(self.kept, self.format, self.means, self.context)

    def fork(self) -> QuantisedKept:
        """See ``Kept.fork``."""
        return QuantisedKept(self.kept.fork(), self.format, self.means, self.context)


def _rounded(kept: Kept, how: Format, means: torch.dtype) -> Kept:
    """Fresh from ``compress``: its rows of the context as the format has them."""
    if isinstance(kept, SplitKept):
        return SplitKept([(heads, _rounded(part, how, means)) for heads, part in kept.parts])
    if isinstance(kept, RowsKept):
        groups = []
        for g in kept.groups:
            k, v = how.rows(g.k, g.v)
            groups.append(replace(g, k=k, v=v))
        return RowsKept(groups, kept.n, kept.scale)
    if isinstance(kept, RazorKept):
        full, local = kept.cache.full, kept.cache.local
        if full is not None:
            k, v = how.rows(full.full_k[:, : full.n], full.full_v[:, : full.n])
            full.full_k[:, : full.n], full.full_v[:, : full.n] = k, v
        if local is not None:
            rows = torch.cat([local.row_of(local.kept_positions()), local.heavy_rows()])
            k, v = how.rows(local.local_k[:, rows], local.local_v[:, rows])
            local.local_k[:, rows], local.local_v[:, rows] = k, v
        _round_means(kept, means)
        return kept
    raise UsageError(f"quantised: cannot round what {type(kept).__name__} keeps")


def _round_means(kept: Kept, means: torch.dtype) -> None:
    if isinstance(kept, SplitKept):
        for _, part in kept.parts:
            _round_means(part, means)
    elif isinstance(kept, RazorKept) and kept.cache.local is not None:
        comp = kept.cache.local.comp
        if means != comp.dtype and comp.numel():
            comp.copy_(comp.to(means))


def _bits(kept: Kept, how: Format, means: torch.dtype, context: int) -> int:
    """Without what the format needs once a layer."""
    if isinstance(kept, SplitKept):
        return sum(_bits(part, how, means, context) for _, part in kept.parts)
    if isinstance(kept, RowsKept):
        later = kept.n - context
        shapes = [g.k.shape for g in kept.groups]
        return sum(how.bits(heads, rows, later, dim) for heads, rows, dim in shapes)
    assert isinstance(kept, RazorKept)
    cache, later = kept.cache, kept.n - context
    total = how.bits(len(cache.retrieval_heads), context, later, cache.head_dim)
    if cache.local is not None:
        positions, heavy = cache.local.kept_positions(), len(cache.local.heavy_rows())
        new = int((positions >= context).sum())
        # Heavy hitters do not say where they come from: those that can be of later tokens count as such.
        policy = cache.local.policy
        new += min(heavy, max(0, policy.sink_tokens + policy.dropped(kept.n) - context))
        old = len(positions) + heavy - new
        heads, dim = len(cache.local_heads), cache.head_dim
        total += how.bits(heads, old, new, dim)
        used = int((cache.local.comp_count > 0).sum())
        total += used * (2 * dim * torch.finfo(means).bits + 2 * 32)
    return total
