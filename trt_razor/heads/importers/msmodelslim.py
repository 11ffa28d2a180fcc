"""Huawei's own head search, msmodelslim (github.com/Ascend/msmodelslim, ``pytorch/ra_compression``).

RoPE models (``RARopeCompressor.get_compress_heads``): a dict with the chosen KV heads of each layer,
``{"prefix_matching": {layer: [head]}, "copying": {layer: [head]}}``: induction and echo heads. Layers without
heads are left out and heads come in any order. ALiBi models (``RACompressor.get_alibi_windows``): an int64
tensor [heads], how far each head sees in tokens, the same for all layers. Both are called ``win.pt``,
``head.pt`` or as their user likes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.heads.importers.base import Cut, Imported, Importer, heads_of, per_kv_head
from trt_razor.heads.importers.source import Source
from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy

LISTS = ("prefix_matching", "copying")


def _fits(source: Source) -> bool:
    value = source.torch
    if isinstance(value, dict):
        return any(name in value for name in LISTS)
    return isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype == np.int64


def _read(source: Source, spec: ModelSpec) -> Imported:
    value, where = source.torch, str(source.path)
    if isinstance(value, dict):
        return _read_lists(value, spec, where)
    return _read_windows(value, spec, where)


def _read_lists(value: dict[Any, Any], spec: ModelSpec, where: str) -> Imported:
    if not set(value) <= set(LISTS) or not value:
        names = ", ".join(repr(k)[:40] for k in list(value)[:4]) or "nothing"
        raise UsageError(f"{where}: expected a dict of {' and '.join(LISTS)}, found {names}")
    scores = {}
    for name in LISTS:
        table = np.zeros((spec.num_layers, spec.num_kv_heads))
        layers = value.get(name, {})
        if not isinstance(layers, dict):
            raise UsageError(
                f"{where}: {name}: expected a dict of layers, found {type(layers).__name__}"
            )
        for layer, heads in layers.items():
            _check_index(layer, spec.num_layers, f"{where}: {name}: layer", spec)
            if not isinstance(heads, list) or len(heads) > spec.num_kv_heads:
                raise UsageError(
                    f"{where}: {name}[{layer}]: expected a list of at most {spec.num_kv_heads} KV heads of "
                    f"'{spec.name}', found {_size(heads)}"
                )
            for head in heads:
                _check_index(head, spec.num_kv_heads, f"{where}: {name}[{layer}]: KV head", spec)
                table[layer, head] = 1
        scores[name] = table
    return Imported(scores, heads_of(scores[LISTS[0]] + scores[LISTS[1]] > 0))


def _read_windows(value: Any, spec: ModelSpec, where: str) -> Imported:
    if not isinstance(value, np.ndarray) or value.shape != (spec.num_heads,):
        found = list(value.shape) if isinstance(value, np.ndarray) else type(value).__name__
        raise UsageError(
            f"{where}: expected a dict of {' and '.join(LISTS)}, or an ALiBi window for each of the "
            f"{spec.num_heads} heads of '{spec.name}', found {found}"
        )
    if spec.position != "alibi":
        raise UsageError(
            f"{where}: windows of an ALiBi model; '{spec.name}' uses {spec.position}, whose heads "
            "get_compress_heads lists"
        )
    windows = value.astype(np.float64)
    if not np.isfinite(windows).all() or (windows < 0).any():
        raise UsageError(f"{where}: expected windows in tokens, found a negative or infinite one")
    table, _ = per_kv_head(np.tile(windows, (spec.num_layers, 1)), spec, where)
    cut = Cut(threshold=RazorPolicy().min_window)
    return Imported({"window": table}, ranked="window", cut=cut)


def _check_index(index: Any, count: int, what: str, spec: ModelSpec) -> None:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        raise UsageError(
            f"{what}: expected 0..{count - 1}, as '{spec.name}' has, found {str(index)[:40]}; "
            "these are the heads of another model"
        )


def _size(value: Any) -> str:
    return f"{len(value)} of them" if isinstance(value, list) else type(value).__name__


MSMODELSLIM = Importer(
    "msmodelslim",
    "win.pt or head.pt of Huawei's msmodelslim: lists of heads, or windows of an ALiBi model",
    "torch",
    _fits,
    _read,
)
