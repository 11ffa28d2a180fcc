"""KVzip's scores of heads (arXiv 2505.23416, github.com/snu-mllab/KVzip, ``utils/head_score/*.pt``).

A float tensor [layers, KV heads], bfloat16 or float16, saved on a GPU: the largest attention that any cached
position gets while the model repeats its context, over all query heads that share the KV head.
"""

from __future__ import annotations

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.heads.importers.base import Imported, Importer, per_kv_head
from trt_razor.heads.importers.source import Source
from trt_razor.models.spec import ModelSpec


def _fits(source: Source) -> bool:
    value = source.torch
    return isinstance(value, np.ndarray) and value.ndim in (1, 2) and value.dtype == np.float64


def _read(source: Source, spec: ModelSpec) -> Imported:
    value, where = source.torch, str(source.path)
    if not isinstance(value, np.ndarray) or value.dtype != np.float64:
        found = getattr(value, "dtype", type(value).__name__)
        raise UsageError(f"{where}: expected a tensor of float scores, found {found}")
    # KVzip squeezes: a model of one KV head has one axis.
    table = value[:, None] if value.ndim == 1 and spec.num_kv_heads == 1 else value
    table, by_query = per_kv_head(table, spec, where)
    bad = np.argwhere(~np.isfinite(table))
    if len(bad):
        raise UsageError(
            f"{where}: layer {bad[0][0]}, KV head {bad[0][1]}: expected a finite number, found "
            f"{table[tuple(bad[0])]} (and {len(bad) - 1} more such)"
        )
    return Imported({"kvzip": table}, ranked="kvzip", options={"per_query_head": by_query})


KVZIP = Importer("kvzip", "utils/head_score/*.pt of KVzip", "torch", _fits, _read)
