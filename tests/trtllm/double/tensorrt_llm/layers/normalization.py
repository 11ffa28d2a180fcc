"""``LayerNorm`` and ``RmsNorm``. Read: parameters, attributes, ``normalized_shape`` of forward."""

from __future__ import annotations

from typing import Any

from ..functional import Tensor, layer_norm, rms_norm
from ..module import Module
from ..parameter import Parameter


class LayerNorm(Module):
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
        if isinstance(normalized_shape, int):
            normalized_shape = (normalized_shape,)
        self.normalized_shape = tuple(normalized_shape)
        self.eps, self.dtype, self.tp_size, self.tp_dim = eps, dtype, tp_size, tp_dim
        shape = self.normalized_shape
        self.weight = Parameter(shape=shape, dtype=dtype)
        self.register_parameter("bias", Parameter(shape=shape, dtype=dtype) if bias else None)

    def forward(self, x: Tensor, normalized_shape: Any = None) -> Tensor:
        bias = None if self.bias is None else self.bias.value
        shape = self.normalized_shape if normalized_shape is None else normalized_shape
        return layer_norm(x, shape, self.weight.value, bias, self.eps)


class RmsNorm(Module):
    def __init__(
        self,
        normalized_shape: Any,
        num_groups: int = 1,
        eps: float = 1e-06,
        elementwise_affine: bool = True,
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(normalized_shape, int):
            normalized_shape = (normalized_shape,)
        self.normalized_shape = tuple(normalized_shape)
        self.elementwise_affine, self.num_groups = elementwise_affine, num_groups
        self.eps, self.dtype = eps, dtype
        weight = Parameter(shape=self.normalized_shape, dtype=dtype) if elementwise_affine else None
        self.register_parameter("weight", weight)

    def forward(self, x: Tensor, normalized_shape: Any = None) -> Tensor:
        weight = None if self.weight is None else self.weight.value
        shape = self.normalized_shape if normalized_shape is None else normalized_shape
        return rms_norm(x, shape, self.num_groups, weight, self.eps)
