"""The files of an engine of TensorRT or of TensorRT for RTX, and the shapes it is built for.

``model.engine`` is the plan. ``io.json`` records what an engine cannot be asked without a GPU: the
version that built it, limits, every input and output.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_razor.backends.base import EngineOptions
from trt_razor.errors import MissingExtra, RazorError
from trt_razor.files import write_text_atomic

ENGINE_FILE = "model.engine"
IO_FILE = "io.json"
PROFILES = ("context", "generation")
MAX_LOGITS = 128
"""Most tokens of a chunk whose logits can be asked for: workspace grows by them times the
vocabulary. Generation wants one; evaluation reads its text in chunks of this length."""
MAX_IO_BYTES = 16 << 20


@dataclass(frozen=True)
class Flavour:
    """One of the two TensorRTs.

    Attributes:
        product: what messages call it.
        module: its Python module, and the name of its version in ``io.json``.
        package: what ``pip install`` calls it.
        extra: of this project.
        schema, version: of ``io.json``.
        instead: what to do on a machine that cannot run an engine.
    """

    product: str
    module: str
    package: str
    extra: str
    schema: str
    version: int
    instead: str


def read_facts(directory: Path, flavour: Flavour) -> dict[str, Any]:
    """``io.json``: what the builder wrote down about the engine.

    Raises:
        RazorError: the file is missing, damaged, or of another version.
    """
    path = directory / IO_FILE
    try:
        if path.stat().st_size > MAX_IO_BYTES:
            raise RazorError(f"{path}: too large for an engine's I/O list; rebuild the engine")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise RazorError(f"{path}: cannot read: {e.strerror}; rebuild the engine") from None
    except (ValueError, RecursionError) as e:
        raise RazorError(f"{path}: not valid JSON ({e}); rebuild the engine") from None
    if not isinstance(data, dict) or data.get("schema") != flavour.schema:
        raise RazorError(f"{path}: schema: expected '{flavour.schema}'; rebuild the engine")
    if data.get("version") != flavour.version:
        found = repr(data.get("version"))[:60]
        raise RazorError(
            f"{path}: version: expected {flavour.version}, found {found}; rebuild the engine"
        )
    kinds: dict[str, type] = {
        flavour.module: str,
        "targets": list,
        "max_batch_size": int,
        "max_seq_len": int,
        "max_chunk": int,
        "max_logits": int,
        "inputs": list,
        "outputs": list,
    }
    for name, kind in kinds.items():
        value: Any = data.get(name)
        if not isinstance(value, kind) or (isinstance(value, int) and (value is True or value < 1)):
            raise RazorError(
                f"{path}: {name}: expected {kind.__name__}, found {repr(value)[:60]}; rebuild the "
                "engine"
            )
    for side in ("inputs", "outputs"):
        for i, tensor in enumerate(data[side]):
            if not isinstance(tensor, dict) or not (
                isinstance(tensor.get("name"), str) and isinstance(tensor.get("shape"), list)
            ):
                raise RazorError(
                    f"{path}: {side}[{i}]: expected a name and a shape; rebuild the engine"
                )
    return data


def import_module(flavour: Flavour, why: str) -> Any:
    """The Python module of a flavour, or a clear error that names the extra."""
    try:
        return importlib.import_module(flavour.module)
    except (ImportError, OSError) as e:  # OSError: the module loads libraries of its own
        if isinstance(e, ModuleNotFoundError) and e.name == flavour.module:
            raise MissingExtra(flavour.package, flavour.extra, why) from None
        text = " ".join(str(e).split())[:300]
        raise RazorError(
            f"{why} needs the Python package '{flavour.package}', which cannot be imported: {text}"
        ) from None


def write_facts(
    directory: Path,
    flavour: Flavour,
    version: str,
    options: EngineOptions,
    facts: Mapping[str, Any],
) -> None:
    """Write ``io.json``: what ``read_facts`` demands, and ``facts``: targets, inputs, outputs …"""
    data = {
        "schema": flavour.schema,
        "version": flavour.version,
        flavour.module: version,
        "profiles": list(PROFILES),
        "max_batch_size": options.max_batch_size,
        "max_seq_len": options.graph.max_seq_len,
        "max_chunk": options.max_chunk,
        "max_logits": max_logits(options),
        **facts,
    }
    write_text_atomic(directory / IO_FILE, json.dumps(data, indent=1) + "\n")


def max_logits(options: EngineOptions) -> int:
    """Most tokens of one chunk whose logits an engine gives."""
    return min(options.max_chunk, MAX_LOGITS)


def profile_shapes(options: EngineOptions) -> list[list[dict[str, tuple[int, ...]]]]:
    """Per profile the smallest, the best and the largest shape of every small input.

    The caches have the batch of ``past`` and are fixed otherwise. ``context`` takes chunks of any
    length, ``generation`` one token a row.
    """

    def shapes(batch: int, seq: int, span: int, wanted: int) -> dict[str, tuple[int, ...]]:
        return {
            "input_ids": (batch, seq),
            "past": (batch,),
            "chunk": (batch,),
            "past_span": (span,),
            "logits_index": (batch, wanted),
        }

    batch, chunk, length = options.max_batch_size, options.max_chunk, options.graph.max_seq_len
    half = max(1, length // 2)
    return [
        [
            shapes(1, 1, 1, 1),
            shapes(1, chunk, half, 1),
            shapes(batch, chunk, length, max_logits(options)),
        ],
        [shapes(1, 1, 1, 1), shapes(batch, 1, half, 1), shapes(batch, 1, length, 1)],
    ]
