"""Quantised linear layers, and the attention layer that FP8 rowwise puts in the place of every other.

Read: names, shapes and dtypes of their weights. What they compute is recorded as one layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tensorrt.errors import require

from ..functional import Tensor, allgather, allreduce, cast, record
from ..layers.attention import Attention
from ..layers.linear import Linear, RowLinear
from ..module import Module
from ..parameter import Parameter


class _Quantised(Module):
    """Takes the sizes, bias and ranks of the layer that it replaces."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.dtype, self.tp_size, self.tp_group = like.dtype, like.tp_size, like.tp_group
        self.register_parameter("bias", like.bias)
        self.lora = self.dora = None

    def _product(self, x: Tensor, what: str, gather: bool) -> Tensor:
        require(x.shape[-1] == self.in_features, f"{what}: {x.shape} into {self.in_features}")
        out = record(what, [x, self.weight.value], (*x.shape[:-1], self.out_features))
        if self.bias is not None:
            out = out + cast(self.bias.value, out.dtype)
        return allgather(out, self.tp_group, -1) if gather and self.tp_size > 1 else out


class _Column(_Quantised):
    def __init__(self, like: Linear) -> None:
        super().__init__(like)
        self.gather_output, self.is_qkv = like.gather_output, like.is_qkv

    def forward(
        self, x: Tensor, lora_runtime_params: Any = None, lora_hidden_state: Any = None
    ) -> Tensor:
        return self._product(x, type(self).__name__, self.gather_output)


class _Row(_Quantised):
    def forward(
        self,
        x: Tensor,
        lora_runtime_params: Any = None,
        lora_hidden_state: Any = None,
        all_reduce_params: Any = None,
    ) -> Tensor:
        out = self._product(x, type(self).__name__, False)
        return allreduce(out, self.tp_group, all_reduce_params) if self.tp_size > 1 else out


def _fp8_weights(layer: Any) -> None:
    layer.weight = Parameter(shape=(layer.out_features, layer.in_features), dtype="fp8")
    layer.activation_scaling_factor = Parameter(shape=(1,), dtype="float32")
    layer.weights_scaling_factor = Parameter(shape=(1,), dtype="float32")


class WeightOnlyQuantLinear(_Column):
    """Weights in 8 or 4 bits, a scale for each row: quantised from floats when they are loaded."""

    def __init__(self, like: Linear) -> None:
        super().__init__(like)
        _weight_only(self)


class WeightOnlyQuantRowLinear(_Row):
    def __init__(self, like: RowLinear) -> None:
        super().__init__(like)
        _weight_only(self)


def _weight_only(layer: Any) -> None:
    layer.weight = Parameter(shape=(layer.in_features, layer.out_features), dtype="int8")
    layer.per_channel_scale = Parameter(shape=(layer.out_features,), dtype=layer.dtype)


class FP8Linear(_Column):
    def __init__(self, like: Linear) -> None:
        super().__init__(like)
        _fp8_weights(self)


class FP8RowLinear(_Row):
    def __init__(self, like: RowLinear) -> None:
        super().__init__(like)
        _fp8_weights(self)


def _groupwise_weights(layer: Any, group_size: int) -> None:
    """INT4 weights four to an element of 16 bits, [in, out / 4], as loading leaves them."""
    require(layer.in_features % group_size == 0, f"{layer.in_features} inputs, group {group_size}")
    layer.weight = Parameter(shape=(layer.in_features, layer.out_features // 4), dtype="float16")
    groups = (layer.in_features // group_size, layer.out_features)
    layer.weights_scaling_factor = Parameter(shape=groups, dtype=layer.dtype)
    layer.prequant_scaling_factor = Parameter(shape=(1, layer.in_features), dtype=layer.dtype)


class WeightOnlyGroupwiseQuantColumnLinear(_Column):
    def __init__(self, like: Linear, group_size: int) -> None:
        super().__init__(like)
        _groupwise_weights(self, group_size)


class WeightOnlyGroupwiseQuantRowLinear(_Row):
    def __init__(self, like: RowLinear, group_size: int) -> None:
        super().__init__(like)
        _groupwise_weights(self, group_size)


class Fp8RowwiseAttention(Module):
    """Replaces every Attention, subclasses too; its network is not doubled."""

    def __init__(self, replaced: Attention) -> None:
        super().__init__()
        self.replaced = type(replaced).__name__
        self.scale = np.float32(1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{self.replaced} was replaced by FP8 rowwise quantisation")
