"""What a Razor cache keeps: the same for all caches of a model it was switched on for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trt_razor.policy import RazorPolicy

if TYPE_CHECKING:
    from trt_razor.reference.hf.gpu import KernelChoice


@dataclass(frozen=True, eq=False)
class Plan:
    """Heads, policy and kernels of one model.

    Attributes:
        model: its name, for messages.
        num_kv_heads: Hkv of every layer.
        retrieval_heads: per layer, ascending.
        policy: what local heads keep.
        kernels: whether the CUDA kernels do the work.
    """

    model: str
    num_kv_heads: int
    retrieval_heads: tuple[tuple[int, ...], ...]
    policy: RazorPolicy
    kernels: KernelChoice

    @property
    def num_layers(self) -> int:
        return len(self.retrieval_heads)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # a copied cache is still a cache of the same model
