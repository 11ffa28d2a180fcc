from .attention import (
    Attention,
    AttentionParams,
    KeyValueCacheParams,
    MropeParams,
    SpecDecodingParams,
)
from .embedding import Embedding
from .linear import ColumnLinear, Linear, RowLinear
from .mlp import GatedMLP
from .normalization import LayerNorm, RmsNorm

__all__ = [
    "Attention",
    "AttentionParams",
    "ColumnLinear",
    "Embedding",
    "GatedMLP",
    "KeyValueCacheParams",
    "LayerNorm",
    "Linear",
    "MropeParams",
    "RmsNorm",
    "RowLinear",
    "SpecDecodingParams",
]
