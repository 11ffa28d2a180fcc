"""HeadKV's scores (arXiv 2410.19258, github.com/FYYFU/HeadKV, ``Important_Head/head_score/*.json``).

``{"layer-head": [a score for each detection run]}`` for every **query** head, the form of the Retrieval Head
project (arXiv 2404.15574). As HeadKV does, a head's score is the mean over the runs; a KV head takes the largest
among the query heads that share it.
"""

from __future__ import annotations

import math
import re

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.heads.importers.base import Imported, Importer, per_kv_head
from trt_razor.heads.importers.source import Source
from trt_razor.models.spec import ModelSpec

_KEY = re.compile(r"(0|[1-9]\d{0,3})-(0|[1-9]\d{0,3})")


def _fits(source: Source) -> bool:
    return bool(source.json) and all(_KEY.fullmatch(key) for key in source.json)


def _read(source: Source, spec: ModelSpec) -> Imported:
    data, where = source.json, str(source.path)
    keys = {}
    for key in data:
        found = _KEY.fullmatch(key)
        if found is None:
            raise UsageError(
                f"{where}: expected names such as '0-31' (layer-head), found {key[:40]!r}"
            )
        keys[int(found[1]), int(found[2])] = key
    layers = 1 + max((layer for layer, _ in keys), default=-1)
    heads = 1 + max((head for _, head in keys), default=-1)
    if (layers, heads) != (spec.num_layers, spec.num_heads):
        text = f"{where}: scores of query heads: expected {spec.num_layers} layers of {spec.num_heads}, as "
        text += (
            f"'{spec.name}' has, found {layers} of {heads}; these are the heads of another model"
        )
        raise UsageError(text)
    if len(keys) != layers * heads:
        gap = next((a, b) for a in range(layers) for b in range(heads) if (a, b) not in keys)
        raise UsageError(
            f"{where}: '{gap[0]}-{gap[1]}' is missing ({len(keys)} of {layers * heads} heads are there)"
        )
    table = np.zeros((layers, heads))
    for (layer, head), key in keys.items():
        table[layer, head] = _mean(data[key], f"{where}: '{key}'")
    table, _ = per_kv_head(table, spec, where)
    runs = {len(data[key]) for key in keys.values()}
    options = {"per_query_head": True, "runs": max(runs)}
    return Imported({"headkv": table}, ranked="headkv", options=options)


def _mean(scores: object, where: str) -> float:
    if not isinstance(scores, list) or not scores:
        found = "an empty list" if scores == [] else type(scores).__name__
        raise UsageError(f"{where}: expected a list of scores, found {found}")
    for x in scores:
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            raise UsageError(f"{where}: expected numbers, found {repr(x)[:40]}")
    try:
        mean = math.fsum(scores) / len(scores)
    except (OverflowError, ValueError):
        mean = math.nan
    if not math.isfinite(mean):
        raise UsageError(f"{where}: expected finite numbers, found one beyond all bounds")
    return mean


HEADKV = Importer("headkv", "head_score/*.json of HeadKV or Retrieval Head", "json", _fits, _read)
