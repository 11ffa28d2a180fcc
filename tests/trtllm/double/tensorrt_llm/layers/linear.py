"""``Linear`` (also called ColumnLinear) and ``RowLinear``.

Read (1.0 age): parameters and their order, attributes, weights [out, in] of a rank, ``forward``'s
keywords, bias cast to the input's dtype. Parameters of RowLinear after ``tp_size`` are inferred.
"""

from __future__ import annotations

from typing import Any

from .._common import default_net
from ..functional import Tensor, allgather, allreduce, cast, matmul
from ..module import Module
from ..parameter import Parameter


class LinearBase(Module):
    def __init__(
        self,
        local_in_features: int,
        local_out_features: int,
        bias: bool = True,
        dtype: str | None = None,
        tp_group: list[int] | None = None,
        tp_size: int = 1,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = local_in_features, local_out_features
        self.dtype, self.tp_group, self.tp_size = dtype, tp_group, tp_size
        self.weight = Parameter(shape=(self.out_features, self.in_features), dtype=dtype)
        if bias:
            self.bias = Parameter(shape=(self.out_features,), dtype=dtype)
        else:
            self.register_parameter("bias", None)
        self.lora = None
        self.dora = None

    def collect_and_bias(self, x: Tensor, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        lora_runtime_params: Any = None,
        lora_hidden_state: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        if default_net().plugin_config.lora_plugin and lora_runtime_params is not None:
            raise NotImplementedError("LoRA is not in the double")
        return self.collect_and_bias(matmul(x, self.weight.value, transb=True), **kwargs)


class Linear(LinearBase):
    """Columns of the output are divided over the ranks."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: str | None = None,
        tp_group: list[int] | None = None,
        tp_size: int = 1,
        gather_output: bool = True,
        share_weight: Any = None,
        strict_dtype: bool = False,
        pad_lda: int = 0,
        pad_ldc: int = 0,
        prefer_managed_weight: bool = True,
        is_qkv: bool = False,
    ) -> None:
        super().__init__(in_features, out_features // tp_size, bias, dtype, tp_group, tp_size)
        self.gather_output, self.is_qkv = gather_output, is_qkv
        self.tp_dim = 0

    def collect_and_bias(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.bias is not None:
            x = x + cast(self.bias.value, x.dtype)
        if self.gather_output and self.tp_size > 1 and self.tp_group is not None:
            x = allgather(x, self.tp_group, gather_dim=-1)
        return x


ColumnLinear = Linear


class RowLinear(LinearBase):
    """Columns of the input are divided over the ranks, whose results are summed."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: str | None = None,
        tp_group: list[int] | None = None,
        tp_size: int = 1,
        strict_dtype: bool = False,
        pad_lda: int = 0,
        prefer_managed_weight: bool = True,
        is_expert: bool = False,
    ) -> None:
        super().__init__(in_features // tp_size, out_features, bias, dtype, tp_group, tp_size)
        self.tp_dim = 1
        self.is_expert = is_expert

    def collect_and_bias(self, x: Tensor, all_reduce_params: Any = None) -> Tensor:  # type: ignore[override]
        if self.tp_size > 1 and self.tp_group is not None:
            x = allreduce(x, self.tp_group, all_reduce_params=all_reduce_params)
        if self.bias is not None:
            x = x + cast(self.bias.value, x.dtype)
        return x
