"""Our own head maps, for a sibling of the model they were made for.

A map belongs to one fingerprint, and a build refuses another's. Models that differ in RoPE scaling
or vocabulary but not in layers and KV heads, an extended context or a fine-tune with new tokens, may share their
retrieval heads. An imported map keeps choice and scores, and says what it was made for.
"""

from __future__ import annotations

import numpy as np

from trt_razor.headmap import HeadMap
from trt_razor.heads.importers.base import Imported, Importer, wrong_model
from trt_razor.heads.importers.source import Source
from trt_razor.models.spec import ModelSpec


def _fits(source: Source) -> bool:
    return source.json.get("schema") == "trt_razor.headmap"


def _read(source: Source, spec: ModelSpec) -> Imported:
    where = str(source.path)
    head_map = HeadMap.from_json(source.json, where)
    shape = head_map.num_layers, head_map.num_kv_heads
    if shape != (spec.num_layers, spec.num_kv_heads):
        raise wrong_model(spec, where, f"{shape[0]} x {shape[1]} ('{head_map.model}')")
    notes: tuple[str, ...] = ()
    if head_map.fingerprint != spec.fingerprint():
        notes = (
            f"the map was made for '{head_map.model}', another architecture than '{spec.name}' with the "
            "same layers and KV heads; evaluate before relying on it",
        )
    scores = {name: np.array(rows, dtype=np.float64) for name, rows in head_map.scores.items()}
    options = {
        "model": head_map.model,
        "method": head_map.method,
        "source": head_map.source,
        "options": dict(head_map.options),
    }
    return Imported(
        scores,
        head_map.retrieval_heads,
        checkpoint=head_map.checkpoint,
        options={"from": options},
        notes=notes,
    )


RAZOR = Importer("razor", "a head map of trt-razor, made for a sibling model", "json", _fits, _read)
