"""``LayerNorm`` and ``RmsNorm``. Read: parameters, attributes, ``normalized_shape`` of forward."""

from __future__ import annotations

from typing import Any

from .._common import keep
from ..functional import Tensor, layer_norm, rms_norm
from ..module import Module
from ..parameter import Parameter


class _Norm(Module):
    """``normalized_shape``, given as a number or as sizes, is kept as a tuple."""

    def _add(self, name: str, present: bool) -> None:
        """A weight of the normalised shape, or None under its name."""
        weight = Parameter(shape=self.normalized_shape, dtype=self.dtype) if present else None
        self.register_parameter(name, weight)

    def _operands(self, shape: Any, *names: str) -> tuple[Any, ...]:
        weights = (getattr(self, name) for name in names)
        return shape or self.normalized_shape, *(w and w.value for w in weights)


class LayerNorm(_Norm):
    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-05,
        elementwise_affine: bool = True,
        bias: bool = True,
        dtype: str | None = None,
        tp_size: int = 1,
        tp_dim: int = -1,
    ) -> None:
        super().__init__()
        self.normalized_shape = _sizes(normalized_shape)
        self.eps, self.dtype, self.tp_size, self.tp_dim = eps, dtype, tp_size, tp_dim
        self._add("weight", elementwise_affine)
        self._add("bias", elementwise_affine and bias)

    def forward(self, x: Tensor, normalized_shape: Any = None) -> Tensor:
        return layer_norm(x, *self._operands(normalized_shape, "weight", "bias"), self.eps)


class RmsNorm(_Norm):
    def __init__(
        self,
        normalized_shape: Any,
        num_groups: int = 1,
        eps: float = 1e-06,
        elementwise_affine: bool = True,
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        keep(self, locals())
        self.normalized_shape = _sizes(normalized_shape)
        self._add("weight", elementwise_affine)

    def forward(self, x: Tensor, normalized_shape: Any = None) -> Tensor:
        shape, weight = self._operands(normalized_shape, "weight")
        return rms_norm(x, shape, self.num_groups, weight, self.eps)


def _sizes(shape: Any) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)
