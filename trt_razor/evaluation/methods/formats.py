"""Formats of stored keys and values: what rounding does to them, and the bits they take.

Rows are rounded and kept as floats; only the count of bits is that of the format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trt_razor.evaluation.methods.interface import ReadLayer
from trt_razor.evaluation.methods.kept import row_bits

SCALE_BITS = 32
FP8_MAX = 448.0
"""Largest finite e4m3 number."""


@dataclass(frozen=True)
class Fp8:
    """e4m3 with one float32 scale for all keys of a layer and one for all values.

    As the kernels have it: value = stored · scale. The scale is that of the context's largest
    number and does not move; what comes later is stored with it and clamped.
    """

    key_scale: float
    value_scale: float

    @classmethod
    def of(cls, layer: ReadLayer) -> Fp8:
        """With the scales of a context."""
        k, v = (max(float(t.abs().max()), 1e-12) / FP8_MAX for t in (layer.k, layer.v))
        return cls(k, v)

    def rows(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [H, P, D] as they come back."""
        return _fp8(k, self.key_scale), _fp8(v, self.value_scale)

    def later(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The same for tokens that come after the context."""
        return self.rows(k, v)

    def bits(self, heads: int, context: int, later: int, dim: int) -> int:
        """Of ``heads`` heads with so many rows of the context and of what came later."""
        return heads * (context + later) * 2 * dim * 8

    @property
    def layer_bits(self) -> int:
        """Of the two scales."""
        return 2 * SCALE_BITS


@dataclass(frozen=True)
class Integers:
    """Asymmetric integers: keys per channel over groups of tokens, values per token over groups of
    channels (KIVI, Liu et al. 2024, https://arxiv.org/abs/2402.02750).

    Each group has a scale and a smallest value, 16 bits each. Groups are of neighbouring kept rows;
    the last one may be short. Tokens that come after the context stay in 16 bits (KIVI's residual,
    which here holds nothing of the context itself).

    Attributes:
        width: bits of an element.
        group: rows (keys) or channels (values) of a group.
    """

    width: int
    group: int

    def rows(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [H, P, D] as they come back."""
        return self._grouped(k, 1), self._grouped(v, 2)

    def later(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing happens to tokens that come after the context."""
        return k, v

    def bits(self, heads: int, context: int, later: int, dim: int) -> int:
        """Of ``heads`` heads with so many rows of the context and of what came later."""
        key_groups, value_groups = -(-context // self.group), -(-dim // self.group)
        scales = key_groups * dim + value_groups * context
        return heads * (
            2 * context * dim * self.width + scales * SCALE_BITS + later * row_bits(dim)
        )

    @property
    def layer_bits(self) -> int:
        """Nothing beyond ``bits``."""
        return 0

    def _grouped(self, x: Tensor, axis: int) -> Tensor:
        """Rounded in groups along an axis: whole groups in one step, the short last one apart."""
        whole = x.shape[axis] // self.group * self.group
        parts = []
        if whole:
            head = x.narrow(axis, 0, whole).unflatten(axis, (-1, self.group))
            parts.append(self._rounded(head, axis + 1).flatten(axis, axis + 1))
        if whole < x.shape[axis]:
            parts.append(self._rounded(x.narrow(axis, whole, x.shape[axis] - whole), axis))
        return torch.cat(parts, axis) if parts else x

    def _rounded(self, x: Tensor, axis: int) -> Tensor:
        low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
        levels = 2**self.width - 1
        low = _half(low)
        # A group of equal numbers has no range; its scale must be no zero.
        step = _half((high - low) / levels).clamp_(min=2.0**-24)
        return x.sub(low).div_(step).round_().clamp_(0, levels).mul_(step).add_(low)


Format = Fp8 | Integers


def _fp8(x: Tensor, scale: float) -> Tensor:
    stored = (x / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return stored.to(x.dtype).mul_(scale)


def _half(x: Tensor) -> Tensor:
    """As float16 holds it; numbers beyond its range stay at its end."""
    return x.clamp(-65504.0, 65504.0).half().to(x.dtype)
