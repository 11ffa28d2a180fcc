"""``quantize(model, quant_config)``, run after a model's whole constructor.

Read: linear layers are replaced in place under their names; FP8 KV caches give every Attention (also
of subclasses) two scales; FP8 rowwise replaces the attention layers themselves; patterns of
``exclude_modules``. Doubled: none, FP8, W4A16_AWQ, W8A16, W4A16,
FP8_PER_CHANNEL_PER_TOKEN.
"""

from __future__ import annotations

import itertools
from fnmatch import fnmatchcase
from typing import Any

from ..layers.attention import Attention
from ..layers.linear import Linear, RowLinear
from ..parameter import Parameter
from . import layers

DEFAULT_EXCLUDED = [
    "*lm_head",
    "*router",
    "*vocab_embedding",
    "*position_embedding",
    "*block_embedding",
    "*shared_expert_gate",
]


_KV_SCALES = ("kv_cache_scaling_factor", "kv_cache_rcp_scaling_factor")


def quantize(model: Any, quant_config: Any) -> Any:
    algo = quant_config.quant_algo
    if algo == "FP8":
        _replace(model, quant_config, layers.FP8Linear, layers.FP8RowLinear)
    elif algo == "W4A16_AWQ":
        group = (quant_config.group_size,)
        column = layers.WeightOnlyGroupwiseQuantColumnLinear
        _replace(model, quant_config, column, layers.WeightOnlyGroupwiseQuantRowLinear, group)
    elif algo in ("W8A16", "W4A16"):
        _replace(model, quant_config, layers.WeightOnlyQuantLinear, layers.WeightOnlyQuantRowLinear)
    elif algo == "FP8_PER_CHANNEL_PER_TOKEN":
        for _, name, child, parent in list(model.named_modules_with_parent()):
            if isinstance(child, Attention):
                setattr(parent, name, layers.Fp8RowwiseAttention(child))
    elif algo not in (None, "NO_QUANT"):
        raise NotImplementedError(f"quant_algo {algo}: not in the double")
    if quant_config.quant_mode.has_kv_cache_quant():
        layers_of = [m for m in model.modules() if isinstance(m, Attention)]
        for attention, name in itertools.product(layers_of, _KV_SCALES):
            setattr(attention, name, Parameter(shape=(1,), dtype="float32"))
    model.quant_mode = quant_config.quant_mode
    return model


def _replace(model: Any, config: Any, column: Any, row: Any, extra: tuple[Any, ...] = ()) -> None:
    excluded = config.exclude_modules
    excluded = DEFAULT_EXCLUDED if excluded is None else excluded
    for full, name, child, parent in list(model.named_modules_with_parent()):
        if any(fnmatchcase(full, pattern) for pattern in excluded):
            continue
        if type(child) is Linear:
            setattr(parent, name, column(child, *extra))
        elif type(child) is RowLinear:
            setattr(parent, name, row(child, *extra))
