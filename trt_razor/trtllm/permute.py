"""A checkpoint whose KV heads are in another order: the same function of tokens.

Moves with a KV head: its rows of k and v, the rows of its query group, their biases, and the columns
of the output projection that read that group. QK-norm has one weight for all heads and stays. ALiBi
slopes belong to heads and move too, but are computed, not stored: ``permuted_slopes``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from trt_razor.errors import RazorError
from trt_razor.models.checkpoint import WeightSource
from trt_razor.models.positions import alibi_slopes
from trt_razor.models.spec import ModelSpec
from trt_razor.trtllm.ranks import RankLayout, query_heads

Array = npt.NDArray[Any]


class PermutedCheckpoint:
    """Weights of a checkpoint with the KV heads of each layer in a layout's order.

    Has ``spec`` and ``tensor(name)`` as a Checkpoint does.

    Raises:
        RazorError: the layout is of a model with other layers or heads.
    """

    def __init__(self, checkpoint: WeightSource, layout: RankLayout) -> None:
        spec = checkpoint.spec
        found = len(layout.order), len(layout.order[0])
        if found != (spec.num_layers, spec.num_kv_heads):
            raise RazorError(
                f"head layout: expected {spec.num_layers} layers x {spec.num_kv_heads} KV heads of "
                f"'{spec.name}', found {found[0]} x {found[1]}"
            )
        self.checkpoint, self.layout = checkpoint, layout

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    def tensor(self, name: str) -> Array:
        """A weight by its Hugging Face name, heads in the new order."""
        value = self.checkpoint.tensor(name)
        parts = name.split(".")
        if len(parts) < 6 or parts[3] != "self_attn" or not parts[4].endswith("_proj"):
            return value
        return permute(value, self.spec, self.layout.order[int(parts[2])], parts[4], parts[5])


def permute(
    value: Array, spec: ModelSpec, order: tuple[int, ...], projection: str, kind: str = "weight"
) -> Array:
    """A projection's weight or bias with its KV heads in the order given.

    Args:
        value: ``q_proj``, ``k_proj``, ``v_proj``: [heads · D, ...]; ``o_proj``: [hidden, Hq · D], or
            its bias [hidden], which belongs to no head.
        order: all KV heads, new to old.
        kind: ``weight`` or ``bias``.
    """
    if order == tuple(range(spec.num_kv_heads)) or (projection == "o_proj" and kind == "bias"):
        return value
    heads = list(order)
    if projection in ("q_proj", "o_proj"):
        heads = query_heads(order, spec.group)
    dim = spec.head_dim
    if projection == "o_proj":
        columns = value.reshape(value.shape[0], spec.num_heads, dim)
        return np.ascontiguousarray(columns[:, heads]).reshape(value.shape)
    rows = value.reshape(len(heads), dim, *value.shape[1:])
    return np.ascontiguousarray(rows[heads]).reshape(value.shape)


def permuted_slopes(spec: ModelSpec, order: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """ALiBi slopes [Hq] of query heads in the new order."""
    return alibi_slopes(spec.num_heads)[query_heads(order, spec.group)]
