"""HeadMap: which KV heads of a model are retrieval heads, and how that was found."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trt_razor.errors import RazorError, UsageError
from trt_razor.files import write_text_atomic

SCHEMA_VERSION = 1
MAX_FILE_BYTES = 64 << 20

Scores = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class HeadMap:
    """The retrieval KV heads of one model.

    Attributes:
        model: name of the model, for people.
        fingerprint: ``ModelSpec.fingerprint()`` the map belongs to; engines refuse another one.
        num_layers, num_kv_heads: shape of the map.
        retrieval_heads: per layer, ascending indices of the retrieval KV heads.
        method: how heads were chosen (``echo+induction``, ``combined``, ``alibi-scope``, ``import``, …).
        source: where the scores come from (a probe's description, a file, a publication).
        checkpoint: identity of the weights that were scored, or None.
        scores: name → per layer, per KV head score (``echo``, ``induction``, ``scope`` …).
        options: the settings of the method (shares, seed, probe length …), JSON values only.
    """

    model: str
    fingerprint: str
    num_layers: int
    num_kv_heads: int
    retrieval_heads: tuple[tuple[int, ...], ...]
    method: str
    source: str
    checkpoint: str | None = None
    scores: Mapping[str, Scores] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self.num_layers >= 1, "num_layers", ">= 1", self.num_layers)
        _require(self.num_kv_heads >= 1, "num_kv_heads", ">= 1", self.num_kv_heads)
        _require(
            len(self.retrieval_heads) == self.num_layers,
            "retrieval_heads",
            f"{self.num_layers} layers",
            f"{len(self.retrieval_heads)} layers",
        )
        for i, heads in enumerate(self.retrieval_heads):
            where = f"retrieval_heads[{i}]"
            _require(
                all(0 <= h < self.num_kv_heads for h in heads),
                where,
                f"KV head indices 0..{self.num_kv_heads - 1}",
                list(heads),
            )
            _require(
                list(heads) == sorted(set(heads)),
                where,
                "ascending and unique indices",
                list(heads),
            )
        for name, table in self.scores.items():
            _require(
                len(table) == self.num_layers,
                f"scores.{name}",
                f"{self.num_layers} layers",
                f"{len(table)} layers",
            )
            for i, row in enumerate(table):
                where = f"scores.{name}[{i}]"
                _require(
                    len(row) == self.num_kv_heads,
                    where,
                    f"{self.num_kv_heads} numbers",
                    f"{len(row)} numbers",
                )
                _require(all(_finite(x) for x in row), where, "finite numbers", list(row))

    # Views ------------------------------------------------------------------------------------
    @property
    def num_retrieval(self) -> int:
        return sum(len(h) for h in self.retrieval_heads)

    @property
    def share(self) -> float:
        """Retrieval heads / all KV heads."""
        return self.num_retrieval / (self.num_layers * self.num_kv_heads)

    def local_heads(self, layer: int) -> tuple[int, ...]:
        keep = set(self.retrieval_heads[layer])
        return tuple(h for h in range(self.num_kv_heads) if h not in keep)

    @classmethod
    def uniform(
        cls,
        model: str,
        fingerprint: str,
        num_layers: int,
        num_kv_heads: int,
        heads: Iterable[int],
        method: str,
        source: str,
    ) -> HeadMap:
        """The same heads in every layer (all heads = dense attention; none = local everywhere)."""
        row = tuple(sorted(set(heads)))
        return cls(
            model, fingerprint, num_layers, num_kv_heads, (row,) * num_layers, method, source
        )

    def check_model(self, fingerprint: str, model: str, where: str) -> None:
        """Raises UsageError if this map was made for another model."""
        if self.fingerprint != fingerprint:
            raise UsageError(
                f"{where}: this head map is of model '{self.model}' (fingerprint "
                f"{self.fingerprint[:12]}), expected '{model}' ({fingerprint[:12]}); find its heads "
                f"with: trt-razor heads --model {model}"
            )

    # JSON -------------------------------------------------------------------------------------
    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "trt_razor.headmap",
            "version": SCHEMA_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "checkpoint": self.checkpoint,
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "method": self.method,
            "source": self.source,
            "options": dict(self.options),
            "retrieval_heads": [list(h) for h in self.retrieval_heads],
            "scores": {k: [list(r) for r in v] for k, v in self.scores.items()},
        }

    def digest(self) -> str:
        """sha256 over the choice itself (model fingerprint and retrieval heads), not its history."""
        text = json.dumps([self.fingerprint, self.num_kv_heads, self.retrieval_heads])
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write atomically, one layer a line so that a diff can be read; scores to six digits."""
        data = self.to_json()
        heads, scores = data.pop("retrieval_heads"), data.pop("scores")
        head = json.dumps(data, indent=1)[:-2]
        lines = [head + ',\n "retrieval_heads": [']
        lines += [
            f"  {json.dumps(h)}{',' if i + 1 < len(heads) else ''}" for i, h in enumerate(heads)
        ]
        lines.append(' ],\n "scores": {')
        for k, (name, table) in enumerate(scores.items()):
            lines.append(f"  {json.dumps(name)}: [")
            lines += [
                # + 0.0: no "-0", which JSON reads back as the integer 0
                f"   [{', '.join(f'{x + 0.0:.6g}' for x in row)}]{',' if i + 1 < len(table) else ''}"
                for i, row in enumerate(table)
            ]
            lines.append(f"  ]{',' if k + 1 < len(scores) else ''}")
        lines.append(" }\n}\n")
        write_text_atomic(path, "\n".join(lines))

    @classmethod
    def from_json(cls, data: Any, where: str = "head map") -> HeadMap:
        """Build from parsed JSON. Raises UsageError naming the wrong field."""
        if not isinstance(data, dict) or data.get("schema") != "trt_razor.headmap":
            raise UsageError(f"{where}: schema: expected 'trt_razor.headmap'; not a head map file")
        version = data.get("version")
        if version != SCHEMA_VERSION or isinstance(version, bool):
            found = repr(version)[:80]
            raise UsageError(f"{where}: version: expected {SCHEMA_VERSION}, found {found}")
        try:
            return cls(
                model=_get(data, "model", str),
                fingerprint=_get(data, "fingerprint", str),
                checkpoint=_get(data, "checkpoint", (str, type(None)), None),
                num_layers=_get(data, "num_layers", int),
                num_kv_heads=_get(data, "num_kv_heads", int),
                method=_get(data, "method", str),
                source=_get(data, "source", str),
                options=_get(data, "options", dict, {}),
                retrieval_heads=_table(_get(data, "retrieval_heads", list), "retrieval_heads", int),
                scores={
                    str(k): _table(v, f"scores.{k}", (int, float))
                    for k, v in _get(data, "scores", dict, {}).items()
                },
            )
        except UsageError as e:
            raise UsageError(f"{where}: {e}") from None

    @classmethod
    def load(cls, path: Path) -> HeadMap:
        """Read and validate a head map file."""
        try:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise UsageError(f"{path}: {size} bytes is too large for a head map file")
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"{path}: no such head map file") from None
        except OSError as e:
            raise RazorError(f"{path}: cannot read the head map: {e.strerror}") from None
        except (ValueError, RecursionError) as e:
            raise UsageError(f"{path}: not valid JSON ({e}); expected a head map file") from None
        return cls.from_json(data, str(path))


def _finite(x: float) -> bool:
    try:
        return math.isfinite(x)
    except OverflowError:  # an integer beyond the range of a float
        return False


def _require(ok: bool, where: str, expected: str, found: object) -> None:
    if not ok:
        text = repr(found)
        raise UsageError(f"{where}: expected {expected}, found {text[:80]}")


_MISSING = object()


def _get(data: Mapping[str, Any], name: str, kind: Any, default: Any = _MISSING) -> Any:
    value = data.get(name, default)
    if value is _MISSING:
        raise UsageError(f"{name}: missing")
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise UsageError(f"{name}: expected {expected}, found {type(value).__name__}")
    return value


def _table(rows: Sequence[Any], where: str, kind: Any) -> tuple[tuple[Any, ...], ...]:
    if not isinstance(rows, list):
        raise UsageError(f"{where}: expected a list of lists, found {type(rows).__name__}")
    out = []
    for i, row in enumerate(rows):
        if not isinstance(row, list):
            raise UsageError(f"{where}[{i}]: expected a list, found {type(row).__name__}")
        for x in row:
            if not isinstance(x, kind) or isinstance(x, bool):
                raise UsageError(f"{where}[{i}]: expected numbers, found {repr(x)[:80]}")
        out.append(tuple(row))
    return tuple(out)
