"""The manifest of an engine: what it is, written last, and read as if a stranger had written it."""

from __future__ import annotations

import collections.abc
import dataclasses
import hashlib
import json
import math
import re
import stat
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy

SCHEMA = "trt_razor.engine"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 << 20
_MAX_LAYERS = 1024
_MAX_SIZE = 1 << 26  # far above any real model; keeps every product of sizes harmless


@dataclass(frozen=True)
class FileRecord:
    """One file of an engine: POSIX path relative to its folder, bytes, sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class HeadsRecord:
    """The head map of an engine in short; the whole of it is in ``heads.json``."""

    digest: str
    method: str
    source: str
    retrieval_heads: int
    share: float


@dataclass(frozen=True)
class Manifest:
    """What an engine is.

    Attributes:
        created: UTC, ISO 8601. trt_razor: version that built it.
        spec: the model's shape. checkpoint: identity of its weights.
        facts: what the backend recorded (versions, targets, …).
        razor: False = dense attention; then ``heads`` and ``policy`` are None.
        dtype: of weights and KV rows.
        max_seq_len: capacity of a slot in tokens. max_batch_size: most slots.
        prefill_chunk: tokens a prompt is read in at once; 0 = whole prompts.
        kv_bytes_per_slot, dense_kv_bytes_per_slot: cache bytes of one slot at full capacity, and
            what dense attention would need.
    """

    created: str
    trt_razor: str
    spec: ModelSpec
    checkpoint: str
    backend: str
    facts: Mapping[str, str]
    razor: bool
    policy: RazorPolicy | None
    heads: HeadsRecord | None
    dtype: str
    max_seq_len: int
    max_batch_size: int
    prefill_chunk: int
    kv_bytes_per_slot: int
    dense_kv_bytes_per_slot: int
    files: tuple[FileRecord, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values, with a digest over all of them."""
        data: dict[str, Any] = {"schema": SCHEMA, "version": SCHEMA_VERSION, **asdict(self)}
        data["model"] = {"fingerprint": self.spec.fingerprint(), **data.pop("spec")}
        data = json.loads(json.dumps(data))  # tuples become lists, as they will be read
        return {**data, "digest": _digest(data)}

    @classmethod
    def from_json(cls, data: Any, where: str) -> Manifest:
        """Raises RazorError naming the wrong field."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise RazorError(f"{where}: schema: expected '{SCHEMA}'; not an engine's manifest")
        version = data.get("version")
        if version != SCHEMA_VERSION or type(version) is not int:
            raise RazorError(
                f"{where}: version: expected {SCHEMA_VERSION}, found {version!r:.20}; built by "
                f"another version of trt_razor ({data.get('trt_razor')!r:.20}): rebuild the engine"
            )
        fields = {k: v for k, v in data.items() if k not in ("schema", "version", "digest")}
        try:
            if data.get("digest") != _digest({k: v for k, v in data.items() if k != "digest"}):
                raise RazorError("digest: does not match the content: damaged, or edited by hand")
            model = fields.pop("model", None)
            if not isinstance(model, dict):
                raise RazorError(f"model: expected an object, found {type(model).__name__}")
            fingerprint = model.get("fingerprint")
            fields["spec"] = {k: v for k, v in model.items() if k != "fingerprint"}
            manifest: Manifest = _dataclass(cls, fields, "")
            _check_spec(manifest.spec)
            if manifest.spec.fingerprint() != fingerprint:
                raise RazorError("model.fingerprint: does not match the model's fields")
            for name in ("policy", "heads"):
                if (getattr(manifest, name) is not None) != manifest.razor:
                    expected = "an object" if manifest.razor else "null"
                    raise RazorError(
                        f"{name}: expected {expected}, because razor is {manifest.razor}"
                    )
            for i, f in enumerate(manifest.files):
                _check_file(f, f"files[{i}]")
        except (RazorError, RecursionError) as e:
            raise RazorError(f"{where}: {e}; rebuild the engine") from None
        return manifest


def read_manifest(path: Path) -> Any:
    """The parsed JSON of a manifest file.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        RazorError: too large, unreadable, or no JSON.
    """
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for ever
            raise RazorError(f"{path}: expected a file")
        if info.st_size > MAX_MANIFEST_BYTES:
            raise RazorError(f"{path}: {info.st_size} bytes is too large for a manifest")
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as e:
        raise RazorError(f"{path}: cannot read: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise RazorError(f"{path}: damaged manifest ({e}); rebuild the engine") from None


def _digest(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# Typed reading --------------------------------------------------------------------------------
_PLAIN: dict[Any, tuple[type, ...]] = {
    int: (int,),
    str: (str,),
    bool: (bool,),
    float: (int, float),
}


def _dataclass(cls: type, data: Any, where: str) -> Any:
    """A dataclass from JSON: no unknown or missing fields, every value of its declared type."""
    if not isinstance(data, dict):
        raise RazorError(f"{where}: expected an object, found {type(data).__name__}")
    prefix = f"{where}." if where else ""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for name in [*(n for n in names if n not in data), *(n for n in data if n not in names)]:
        shown = "model" if name == "spec" else f"{prefix}{name}"
        raise RazorError(f"{shown:.60}: {'missing' if name in names else 'unknown field'}")
    values = {
        n: _value(hints[n], data[n], "model" if n == "spec" else f"{prefix}{n}") for n in names
    }
    try:
        return cls(**values)
    except UsageError as e:
        raise RazorError(str(e)) from None


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        kind = next(a for a in args if a is not type(None))
        return _value(kind, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise RazorError(f"{where}: expected a list, found {type(value).__name__}")
        return tuple(_value(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is collections.abc.Mapping:
        if not isinstance(value, dict):
            raise RazorError(f"{where}: expected an object, found {type(value).__name__}")
        return {k: _value(args[1], v, f"{where}.{k:.40}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return _dataclass(typing.cast(type, kind), value, where)
    ok = isinstance(value, _PLAIN[kind]) and (kind is bool or not isinstance(value, bool))
    if ok and kind is float:
        ok = abs(value) <= 1e300 and math.isfinite(value)
    if not ok:
        raise RazorError(f"{where}: expected {kind.__name__}, found {value!r:.60}")
    return value


def _check_spec(spec: ModelSpec) -> None:
    """Sizes within reason, so that nothing computed from them can exhaust this machine."""
    for f in dataclasses.fields(spec):
        value = getattr(spec, f.name)
        if type(value) is int:
            low = 0 if f.name == "bos_token_id" else 1
            high = (
                _MAX_LAYERS if f.name in ("num_layers", "num_heads", "num_kv_heads") else _MAX_SIZE
            )
            if not low <= value <= high:
                raise RazorError(f"model.{f.name}: expected {low}..{high}, found {value!r:.20}")
    if spec.num_heads % spec.num_kv_heads:
        raise RazorError(
            f"model.num_kv_heads: {spec.num_kv_heads} does not divide {spec.num_heads}"
        )
    if spec.position not in ("rope", "alibi"):
        raise RazorError(f"model.position: expected rope or alibi, found {spec.position!r:.20}")


def _check_file(f: FileRecord, where: str) -> None:
    parts = PurePosixPath(f.path).parts
    odd = not f.path.isprintable() or set(f.path) & set("\\:")
    if not parts or f.path.startswith("/") or ".." in parts or odd:
        raise RazorError(f"{where}.path: {f.path!r:.80} leaves the engine folder; refusing it")
    if f.size < 0:
        raise RazorError(f"{where}.size: expected bytes >= 0, found {f.size}")
    if not re.fullmatch(r"[0-9a-f]{64}", f.sha256):
        raise RazorError(f"{where}.sha256: expected 64 hexadecimal digits, found {f.sha256!r:.20}")
