"""How heads and weights are shared out over GPUs: tensor-parallel ranks and pipeline stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from trt_razor.errors import UsageError
from trt_razor.models.spec import ModelSpec

HeadSplit = Sequence[tuple[int, int]]
"""(R, Lh) per layer: retrieval and local KV heads."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def check_share(share: float) -> None:
    if not 0 <= share <= 1:  # also refuses NaN
        raise UsageError(f"retrieval share: expected 0..1, found {share!r}")


def count_heads(share: float, heads: int) -> int:
    """Heads in a share, rounded up; a share such as 96/640 written in decimals stays 96."""
    check_share(share)
    return math.ceil(share * heads - 1e-9)


def spread(share: float, num_layers: int, num_kv_heads: int) -> list[tuple[int, int]]:
    total = count_heads(share, num_layers * num_kv_heads)
    upto = [i * total // num_layers for i in range(num_layers + 1)]
    counts = [b - a for a, b in pairwise(upto)]
    return [(r, num_kv_heads - r) for r in counts]


def rank_split(split: HeadSplit, tp_size: int) -> list[tuple[int, int]]:
    """Heads of the fullest rank: KV heads and, among them, retrieval heads, both rounded up."""
    out = []
    for retrieval, local in split:
        heads = ceil_div(retrieval + local, tp_size)
        full = min(heads, ceil_div(retrieval, tp_size))
        out.append((full, heads - full))
    return out


def stages(num_layers: int, pp_size: int) -> list[tuple[int, int]]:
    """(first, last) layer of every pipeline stage; earlier stages take the remainder."""
    size, extra = divmod(num_layers, pp_size)
    ends = [i * size + min(i, extra) for i in range(pp_size + 1)]
    return list(pairwise(ends))


# Weights and activations -----------------------------------------------------------------------
def rank_shape(spec: ModelSpec, name: str, shape: tuple[int, ...], tp_size: int) -> tuple[int, ...]:
    """Shape of a weight on one rank: Megatron-style column and row splits, norms on every rank."""
    leaf = name.split(".")[-2]
    if leaf in ("k_proj", "v_proj"):
        return (ceil_div(spec.num_kv_heads, tp_size) * spec.head_dim, *shape[1:])
    if leaf in ("q_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"):
        return (ceil_div(shape[0], tp_size), *shape[1:])
    if leaf in ("o_proj", "down_proj") and len(shape) == 2:
        return (shape[0], ceil_div(shape[1], tp_size))
    return shape


def weight_elements(spec: ModelSpec, tp_size: int, first: int, last: int) -> int:
    """Weights on one rank of the stage with layers ``first`` .. ``last - 1``."""
    head_stage = last == spec.num_layers
    total = 0
    for name, shape in spec.tensors().items():
        parts = name.split(".")
        if parts[1] == "layers":
            here = first <= int(parts[2]) < last
        elif parts[1] == "embed_tokens":
            # A tied embedding is also the output head, so the last stage needs it too.
            here = first == 0 or (spec.tie_embeddings and head_stage)
        else:
            here = head_stage
        if here:
            total += math.prod(rank_shape(spec, name, shape, tp_size))
    return total


def decode_weight_elements(spec: ModelSpec, tp_size: int) -> int:
    """Weights that one decode step reads: all but the input embedding, of which it reads rows."""
    total = weight_elements(spec, tp_size, 0, spec.num_layers)
    if spec.tie_embeddings:
        return total
    return total - ceil_div(spec.vocab_size, tp_size) * spec.hidden_size
