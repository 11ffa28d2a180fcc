"""Tables of gates between 0 and 1, or of zeros and ones, a row a layer.

Two projects publish them. **DuoAttention** (arXiv 2410.10819, github.com/mit-han-lab/duo-attention)
learns a gate for every KV head: ``full_attention_heads.tsv`` with ``config.json`` beside it.
**FreeKV** (github.com/sjtu-zhao-lab/FreeKV) ships choices of Razor heads, ``razor_patterns/*.tsv``, mostly zeros
and ones, without a config; there one file has a column a query head.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.heads.importers.base import Cut, Imported, Importer, heads_of, per_kv_head
from trt_razor.heads.importers.source import Source
from trt_razor.models.spec import ModelSpec

DUO_SHARE = 0.5
"""DuoAttention's own example keeps this share (sparsity=0.5); its gates saturate, so that in five of its six
tables more than 15 % of the heads tie at exactly 1."""
FREEKV_THRESHOLD = 0.5
"""What FreeKV's own loader insists on for Razor patterns."""

_SLACK = 0.5
"""Gates are trained without bounds and clipped when they are read, as here; published: -0.0014."""
_CONFIG = ("sink_size", "recent_size", "reg_weight", "num_steps", "dataset_name", "model_name")


def _binary(table: np.ndarray) -> bool:
    return bool(np.isin(table, (0.0, 1.0)).all())


def _duo_config(source: Source) -> dict[str, Any] | None:
    config = source.config_beside()
    return config if config is not None and {"sink_size", "recent_size"} <= set(config) else None


def _duo_fits(source: Source) -> bool:
    return _duo_config(source) is not None or not _binary(source.table)


def _freekv_fits(source: Source) -> bool:
    return _duo_config(source) is None


def _read(source: Source, spec: ModelSpec, name: str, cut: Cut, extra: dict[str, Any]) -> Imported:
    where = str(source.path)
    table = source.table
    if table.min() < -_SLACK or table.max() > 1 + _SLACK:
        raise UsageError(
            f"{where}: expected gates between 0 and 1, found {table.min():g} .. {table.max():g}"
        )
    table, by_query = per_kv_head(np.clip(table, 0, 1), spec, where)
    options = {"per_query_head": by_query, **extra}
    listed = heads_of(table == 1) if _binary(table) else None
    return Imported({name: table}, listed, None if listed else name, cut, options=options)


def _read_duo(source: Source, spec: ModelSpec) -> Imported:
    config = _duo_config(source) or {}
    kept = {k: config[k] for k in _CONFIG if isinstance(config.get(k), (int, float, str))}
    extra = {"config": {k: v[:200] if isinstance(v, str) else v for k, v in kept.items()}}
    return _read(source, spec, "duoattention", Cut(share=DUO_SHARE), extra if kept else {})


def _read_freekv(source: Source, spec: ModelSpec) -> Imported:
    return _read(source, spec, "freekv", Cut(threshold=FREEKV_THRESHOLD), {})


DUOATTENTION = Importer(
    "duoattention",
    "full_attention_heads.tsv of DuoAttention, or the folder with it",
    "text",
    _duo_fits,
    _read_duo,
)
FREEKV = Importer("freekv", "razor_patterns/*.tsv of FreeKV", "text", _freekv_fits, _read_freekv)
