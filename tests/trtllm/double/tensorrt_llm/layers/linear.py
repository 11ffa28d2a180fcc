"""``Linear`` (also called ColumnLinear) and ``RowLinear``.

Read (1.0 age): parameters and their order, attributes, weights [out, in] of a rank, ``forward``'s
keywords, bias cast to the input's dtype, RowLinear's added after the sum over ranks. Parameters of
RowLinear after ``tp_size`` are inferred.
"""

from __future__ import annotations

from typing import Any

from tensorrt.errors import require

from ..functional import Tensor, allgather, allreduce, cast, matmul
from ..module import Module
from ..parameter import Parameter


class _Projection(Module):
    """A rank's part of a weight, ``rows`` x ``columns``, and the bias if there is one."""

    def __init__(
        self, rows: int, columns: int, bias: bool, dtype: Any, group: Any, size: int
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = rows, columns
        self.dtype, self.tp_group, self.tp_size = dtype, group, size
        self.weight = Parameter(shape=(rows, columns), dtype=dtype)
        self.register_parameter("bias", Parameter(shape=(rows,), dtype=dtype) if bias else None)
        self.lora = self.dora = None

    @property
    def _shared(self) -> bool:
        """Whether other ranks have the other parts."""
        return self.tp_size > 1 and self.tp_group is not None

    def _product(self, x: Tensor, lora: Any) -> Tensor:
        require(lora is None, "LoRA is not in the double")
        return matmul(x, self.weight.value, transb=True)

    def _biased(self, x: Tensor) -> Tensor:
        return x if self.bias is None else x + cast(self.bias.value, x.dtype)


class Linear(_Projection):
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
        super().__init__(out_features // tp_size, in_features, bias, dtype, tp_group, tp_size)
        self.gather_output, self.is_qkv = gather_output, is_qkv

    def forward(
        self, x: Tensor, lora_runtime_params: Any = None, lora_hidden_state: Any = None
    ) -> Tensor:
        out = self._biased(self._product(x, lora_runtime_params))
        gather = self.gather_output and self._shared
        return allgather(out, self.tp_group, gather_dim=-1) if gather else out


ColumnLinear = Linear


class RowLinear(_Projection):
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
        super().__init__(out_features, in_features // tp_size, bias, dtype, tp_group, tp_size)

    def forward(
        self,
        x: Tensor,
        lora_runtime_params: Any = None,
        lora_hidden_state: Any = None,
        all_reduce_params: Any = None,
    ) -> Tensor:
        out = self._product(x, lora_runtime_params)
        if self._shared:
            out = allreduce(out, self.tp_group, all_reduce_params=all_reduce_params)
        return self._biased(out)
