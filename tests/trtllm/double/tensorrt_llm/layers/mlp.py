"""``GatedMLP``: proj(silu(fc(x)) * gate(x)); weights fc, gate, proj."""

from __future__ import annotations

from typing import Any

from ..functional import ACT2FN, Tensor
from ..module import Module
from .linear import ColumnLinear, RowLinear


class GatedMLP(Module):
    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        hidden_act: str,
        bias: bool = True,
        dtype: str | None = None,
        tp_group: list[int] | None = None,
        tp_size: int = 1,
        quant_mode: Any = None,
    ) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"bias": bias, "dtype": dtype, "tp_group": tp_group}
        sizes["tp_size"] = tp_size
        self.hidden_act = hidden_act
        self.fc = ColumnLinear(hidden_size, ffn_hidden_size, gather_output=False, **sizes)
        self.gate = ColumnLinear(hidden_size, ffn_hidden_size, gather_output=False, **sizes)
        self.proj = RowLinear(ffn_hidden_size, hidden_size, **sizes)

    def forward(
        self, hidden_states: Tensor, lora_layer_params: Any = None, all_reduce_params: Any = None
    ) -> Tensor:
        inner = ACT2FN[self.hidden_act](self.fc(hidden_states)) * self.gate(hidden_states)
        return self.proj(inner, lora_runtime_params=None, all_reduce_params=all_reduce_params)
