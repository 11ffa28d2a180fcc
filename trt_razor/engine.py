"""The engine directory: a manifest that is written last, and the checks made when it is read.

Layout::

    manifest.json      what the engine is; every other file with its size and sha256
    heads.json         the head map (Razor engines)
    model.onnx …       the backend's files
    tokenizer/         tokenizer and chat template, if the checkpoint had one

A folder without a complete, matching manifest is never taken for an engine.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trt_razor import __version__
from trt_razor.backends import get_backend
from trt_razor.backends.base import EngineOptions, Session
from trt_razor.cache_layout import CacheTensor
from trt_razor.errors import RazorError, UsageError
from trt_razor.files import sha256_file, write_text_atomic
from trt_razor.graph.options import GraphOptions
from trt_razor.headmap import HeadMap
from trt_razor.models.spec import ModelSpec, RopeSpec
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.policy import RazorPolicy

SCHEMA = "trt_razor.engine"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
HEADS_FILE = "heads.json"
TOKENIZER_DIR = "tokenizer"
MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True)
class FileRecord:
    """One file of an engine: POSIX path relative to its folder, bytes, sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an engine is.

    Attributes:
        spec: the model's shape. checkpoint: identity of its weights.
        razor: False = dense attention; then ``heads`` and ``policy`` are None.
        heads: digest, method, source and share of the head map.
        facts: what the backend recorded (versions, targets, …).
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
    heads: Mapping[str, Any] | None
    dtype: str
    max_seq_len: int
    max_batch_size: int
    prefill_chunk: int
    kv_bytes_per_slot: int
    dense_kv_bytes_per_slot: int
    files: tuple[FileRecord, ...]

    def to_json(self) -> dict[str, Any]:
        data = {"schema": SCHEMA, "version": SCHEMA_VERSION, **asdict(self)}
        data["model"] = {"fingerprint": self.spec.fingerprint(), **data.pop("spec")}
        return data

    @classmethod
    def from_json(cls, data: Any, where: str) -> Manifest:
        """Raises RazorError naming the wrong field."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise RazorError(f"{where}: schema: expected '{SCHEMA}'; not an engine's manifest")
        if data.get("version") != SCHEMA_VERSION:
            raise RazorError(
                f"{where}: version: expected {SCHEMA_VERSION}, found {data.get('version')!r}; "
                f"built by another version of trt_razor ({data.get('trt_razor')}): rebuild it"
            )
        try:
            model = dict(_field(data, "model", dict))
            fingerprint = model.pop("fingerprint", None)
            model["rope"] = _build(RopeSpec, model.get("rope"), "model.rope")
            model["eos_token_ids"] = tuple(model.get("eos_token_ids") or ())
            spec = _build(ModelSpec, model, "model")
            if spec.fingerprint() != fingerprint:
                raise RazorError("model.fingerprint: does not match the model's fields")
            razor = _field(data, "razor", bool)
            policy = RazorPolicy.from_json(_field(data, "policy", dict)) if razor else None
            heads = _field(data, "heads", dict) if razor else None
            files = tuple(
                _build(FileRecord, f, f"files[{i}]")
                for i, f in enumerate(_field(data, "files", list))
            )
            for i, f in enumerate(files):
                _check_relative(f.path, f"files[{i}].path")
            facts = _field(data, "facts", dict)
            return cls(
                **{n: _field(data, n, str) for n in ("created", "trt_razor", "checkpoint")},
                **{n: _field(data, n, str) for n in ("backend", "dtype")},
                **{
                    n: _field(data, n, int)
                    for n in (
                        "max_seq_len",
                        "max_batch_size",
                        "prefill_chunk",
                        "kv_bytes_per_slot",
                        "dense_kv_bytes_per_slot",
                    )
                },
                spec=spec,
                facts={str(k): str(v) for k, v in facts.items()},
                razor=razor,
                policy=policy,
                heads=heads,
                files=files,
            )
        except (RazorError, TypeError, ValueError) as e:
            raise RazorError(f"{where}: {e}") from None


def _field(data: Mapping[str, Any], name: str, kind: type) -> Any:
    value = data.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise RazorError(f"{name}: expected {kind.__name__}, found {value!r:.60}")
    return value


_PLAIN: dict[Any, tuple[type, ...]] = {
    int: (int,),
    str: (str,),
    bool: (bool,),
    float: (int, float),
}


def _build(cls: type, data: Any, where: str) -> Any:
    """A flat dataclass from JSON: no unknown or missing fields, plain types checked."""
    if not isinstance(data, Mapping):
        raise RazorError(f"{where}: expected an object, found {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    for name in [*(names - data.keys()), *(data.keys() - names)]:
        raise RazorError(f"{where}.{name}: {'missing' if name in names else 'unknown field'}")
    for name in names:
        kind, value = hints[name], data[name]
        plain = _PLAIN.get(kind)
        if plain and (not isinstance(value, plain) or (kind is not bool and value is True)):
            raise RazorError(f"{where}.{name}: expected {kind.__name__}, found {value!r:.60}")
    return cls(**data)


def _check_relative(path: str, where: str) -> None:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or ".." in parts or "\0" in path:
        raise RazorError(f"{where}: {path!r} leaves the engine folder; refusing it")


def write_manifest(
    directory: Path,
    spec: ModelSpec,
    checkpoint: str,
    backend: str,
    facts: Mapping[str, str],
    options: EngineOptions,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Hash all files of a finished folder and write its manifest: the last step of a build.

    Args:
        progress: called with the bytes hashed since the last call.
    """
    graph = options.graph
    files = []
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        files.append(FileRecord(name, path.stat().st_size, sha256_file(path, progress)))
    head_map = graph.head_map
    manifest = Manifest(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        trt_razor=__version__,
        spec=spec,
        checkpoint=checkpoint,
        backend=backend,
        facts=facts,
        razor=head_map is not None,
        policy=graph.policy if head_map else None,
        heads={
            "digest": head_map.digest(),
            "method": head_map.method,
            "source": head_map.source,
            "retrieval_heads": head_map.num_retrieval,
            "share": round(head_map.share, 6),
        }
        if head_map
        else None,
        dtype=graph.dtype,
        max_seq_len=graph.max_seq_len,
        max_batch_size=options.max_batch_size,
        prefill_chunk=options.prefill_chunk,
        kv_bytes_per_slot=sum(t.nbytes for t in graph.caches(spec)),
        dense_kv_bytes_per_slot=sum(
            t.nbytes for t in dataclasses.replace(graph, head_map=None).caches(spec)
        ),
        files=tuple(files),
    )
    write_text_atomic(directory / MANIFEST, json.dumps(manifest.to_json(), indent=1) + "\n")
    return manifest


def is_engine(directory: Path) -> bool:
    """Whether a folder has our manifest (its content is not checked)."""
    try:
        data = json.loads((directory / MANIFEST).read_bytes()[:MAX_MANIFEST_BYTES])
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("schema") == SCHEMA


@dataclass(frozen=True)
class Engine:
    """A checked engine directory."""

    directory: Path
    manifest: Manifest
    head_map: HeadMap | None

    @property
    def options(self) -> EngineOptions:
        m = self.manifest
        graph = GraphOptions(m.policy or RazorPolicy(), self.head_map, m.max_seq_len, m.dtype)
        return EngineOptions(graph, m.max_batch_size, m.prefill_chunk)

    def caches(self) -> list[CacheTensor]:
        return self.options.graph.caches(self.manifest.spec)

    @classmethod
    def load(
        cls,
        directory: Path,
        verify: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> Engine:
        """Read an engine directory and check it.

        Sizes of all files are always checked; their sha256 unless ``verify`` is False.

        Args:
            progress: called with (bytes checked, bytes in all).

        Raises:
            UsageError: not an engine directory. RazorError: the first mismatch found.
        """
        path = directory / MANIFEST
        try:
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise RazorError(f"{path}: too large for a manifest")
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            hint = "no manifest.json: not an engine, or its build did not finish"
            if not directory.exists():
                hint = "no such engine directory"
            raise UsageError(
                f"{directory}: {hint}; build one with: trt-razor build --model NAME --razor"
            ) from None
        except OSError as e:
            raise RazorError(f"{path}: cannot read: {e.strerror}") from None
        except (ValueError, RecursionError) as e:
            raise RazorError(f"{path}: damaged manifest ({e}); rebuild the engine") from None
        manifest = Manifest.from_json(data, str(path))
        _check_files(directory, manifest, verify, progress)
        head_map = None
        if manifest.razor:
            assert manifest.heads is not None
            head_map = HeadMap.load(directory / HEADS_FILE)
            spec = manifest.spec
            head_map.check_model(spec.fingerprint(), spec.name, str(directory / HEADS_FILE))
            if head_map.digest() != manifest.heads.get("digest"):
                raise RazorError(
                    f"{directory / HEADS_FILE}: digest: not the head map this engine was built "
                    f"with; rebuild the engine"
                )
        return cls(directory, manifest, head_map)

    def tokenizer(self) -> Tokenizer | None:
        """The engine's tokenizer, or None if its checkpoint had none."""
        folder = self.directory / TOKENIZER_DIR
        return Tokenizer.load(folder) if folder.is_dir() else None

    def open(self, num_slots: int | None = None) -> Session:
        """Load the engine for running.

        Args:
            num_slots: sequences cached at once, 1 .. max_batch_size (the default).

        Raises:
            UsageError: too many slots, or a backend that is not here. RazorError: it fails to load.
        """
        m = self.manifest
        slots = m.max_batch_size if num_slots is None else num_slots
        if not 1 <= slots <= m.max_batch_size:
            raise UsageError(f"slots: expected 1..{m.max_batch_size}, found {slots}")
        backend = get_backend(m.backend)
        return backend.open(self.directory, self.caches(), slots, m.max_seq_len)


def _check_files(
    directory: Path,
    manifest: Manifest,
    verify: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    total, done = sum(f.size for f in manifest.files), 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        if progress:
            progress(done, total)

    for record in manifest.files:
        path = directory / record.path
        if not path.is_file():
            raise RazorError(f"{path}: missing; the engine is damaged, rebuild it")
        size = path.stat().st_size
        if size != record.size:
            raise RazorError(
                f"{path}: size: expected {record.size} bytes, found {size}; the engine is damaged, "
                f"rebuild it"
            )
    for record in manifest.files if verify else ():
        path = directory / record.path
        try:
            found = sha256_file(path, count)
        except OSError as e:
            raise RazorError(f"{path}: cannot read: {e.strerror}") from None
        if found != record.sha256:
            raise RazorError(
                f"{path}: sha256: expected {record.sha256[:12]}…, found {found[:12]}…; the engine "
                f"is damaged, rebuild it"
            )
