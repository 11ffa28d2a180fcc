"""What Razor attention computes, in plain PyTorch: the oracle of every kernel and engine.

* ``attention``: softmax over rows with log-weights, RoPE rotation, chunks of queries.
* ``clusters``: folding dropped tokens into M compensation tokens.
* ``cache``: the caches of a layer in the engines' layout, and attention over them.
* ``definition``: the same results from scratch for one KV head, slow and obvious.
* ``decoder``: whole models over those caches.

The text behind it is docs/semantics.md. Float32 or float64, on any torch device.
"""

from trt_razor.reference.attention import (
    CachedRows,
    chunk_attention,
    group_queries,
    rotate,
    weighted_attention,
)
from trt_razor.reference.cache import (
    FullHeadsCache,
    LayerCache,
    LocalHeadsCache,
    new_layer_caches,
)
from trt_razor.reference.decoder import ReferenceDecoder, WeightSource
from trt_razor.reference.definition import DefinitionResult, razor_attention_by_definition

__all__ = [
    "CachedRows",
    "DefinitionResult",
    "FullHeadsCache",
    "LayerCache",
    "LocalHeadsCache",
    "ReferenceDecoder",
    "WeightSource",
    "chunk_attention",
    "group_queries",
    "new_layer_caches",
    "razor_attention_by_definition",
    "rotate",
    "weighted_attention",
]
