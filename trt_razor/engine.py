"""The engine directory, and the checks made when it is read.

Layout::

    manifest.json      what the engine is; every other file with its size and sha256
    heads.json         the head map (Razor engines)
    model.onnx …       the backend's files
    tokenizer/         tokenizer and chat template, if the checkpoint had one

The manifest is written last: a folder without a complete, matching one is never taken for an
engine.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trt_razor import __version__
from trt_razor.backends import get_backend
from trt_razor.backends.base import EngineOptions, Session
from trt_razor.cache_layout import CacheTensor
from trt_razor.errors import RazorError, UsageError
from trt_razor.files import sha256_file, write_text_atomic
from trt_razor.graph.options import GraphOptions
from trt_razor.headmap import HeadMap
from trt_razor.manifest import (
    MANIFEST,
    SCHEMA,
    SCHEMA_VERSION,
    FileRecord,
    HeadsRecord,
    Manifest,
    read_manifest,
)
from trt_razor.models.spec import ModelSpec
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.policy import RazorPolicy

__all__ = [
    "HEADS_FILE",
    "MANIFEST",
    "SCHEMA",
    "SCHEMA_VERSION",
    "TOKENIZER_DIR",
    "Engine",
    "FileRecord",
    "HeadsRecord",
    "Manifest",
    "foreign_files",
    "is_engine",
    "write_manifest",
]

HEADS_FILE = "heads.json"
TOKENIZER_DIR = "tokenizer"


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
        checkpoint: identity of the weights.
        facts: what the backend wants to be known about the engine.
        progress: called with the bytes hashed since the last call.

    Raises:
        RazorError: a file cannot be read, or the manifest cannot be written.
    """
    graph = options.graph
    head_map = graph.head_map
    heads = None
    if head_map is not None:
        heads = HeadsRecord(
            digest=head_map.digest(),
            method=head_map.method,
            source=head_map.source,
            retrieval_heads=head_map.num_retrieval,
            share=round(head_map.share, 6),
        )
    manifest = Manifest(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        trt_razor=__version__,
        spec=spec,
        checkpoint=checkpoint,
        backend=backend,
        facts={str(k): str(v) for k, v in facts.items()},
        razor=head_map is not None,
        policy=graph.policy if head_map is not None else None,
        heads=heads,
        dtype=graph.dtype,
        max_seq_len=graph.max_seq_len,
        max_batch_size=options.max_batch_size,
        prefill_chunk=options.prefill_chunk,
        kv_bytes_per_slot=_slot_bytes(graph, spec),
        dense_kv_bytes_per_slot=_slot_bytes(dataclasses.replace(graph, head_map=None), spec),
        files=tuple(
            FileRecord(
                name, (directory / name).stat().st_size, sha256_file(directory / name, progress)
            )
            for name in _files_of(directory)
        ),
    )
    data = manifest.to_json()
    # A build must not finish with a manifest that a load would refuse.
    Manifest.from_json(data, str(directory / MANIFEST))
    write_text_atomic(directory / MANIFEST, json.dumps(data, indent=1) + "\n")
    return manifest


def _slot_bytes(graph: GraphOptions, spec: ModelSpec) -> int:
    return sum(t.nbytes for t in graph.caches(spec))


def _files_of(directory: Path) -> list[str]:
    """POSIX paths of all files below a folder, relative to it, sorted."""
    found = []
    for folder, _, names in os.walk(directory, onerror=_raise):
        found += [(Path(folder) / n).relative_to(directory).as_posix() for n in names]
    return sorted(found)


def _raise(e: OSError) -> None:
    raise RazorError(f"{e.filename}: cannot read: {e.strerror or e}") from None


def is_engine(directory: Path) -> bool:
    """Whether a folder has our manifest (the rest of its content is not checked)."""
    try:
        data = read_manifest(directory / MANIFEST)
    except (OSError, RazorError):
        return False
    return isinstance(data, dict) and data.get("schema") == SCHEMA


def foreign_files(directory: Path) -> list[str]:
    """Files in an engine's folder that its manifest does not list: not ours to delete.

    Raises:
        RazorError: the folder cannot be read.
    """
    try:
        data = read_manifest(directory / MANIFEST)
    except (OSError, RazorError):
        data = None
    # Of any version, so not checked as strictly as for loading.
    listed = data.get("files") if isinstance(data, dict) else None
    records = [f for f in listed if isinstance(f, dict)] if isinstance(listed, list) else []
    known = [MANIFEST, *(f.get("path") for f in records)]
    return [name for name in _files_of(directory) if name not in known]


@dataclass(frozen=True)
class Engine:
    """A checked engine directory."""

    directory: Path
    manifest: Manifest
    head_map: HeadMap | None

    @property
    def options(self) -> EngineOptions:
        """What it was built with."""
        m = self.manifest
        graph = GraphOptions(m.policy or RazorPolicy(), self.head_map, m.max_seq_len, m.dtype)
        return EngineOptions(graph, m.max_batch_size, m.prefill_chunk)

    def caches(self) -> list[CacheTensor]:
        """The cache tensors of a slot."""
        return self.options.graph.caches(self.manifest.spec)

    @classmethod
    def load(
        cls,
        directory: Path,
        verify: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> Engine:
        """Read an engine directory and check it.

        The manifest and the sizes of all files are always checked; their sha256 unless ``verify``
        is False.

        Args:
            progress: called with (bytes checked, bytes in all).

        Raises:
            UsageError: not an engine directory. RazorError: the first mismatch found.
        """
        path = directory / MANIFEST
        try:
            data = read_manifest(path)
        except (FileNotFoundError, NotADirectoryError):
            hint = "no manifest.json: not an engine, or its build did not finish"
            if not os.path.lexists(directory):
                hint = "no such engine directory"
            elif not os.path.isdir(directory):
                hint = "expected an engine directory, found a file"
            raise UsageError(
                f"{directory}: {hint}; build one with: trt-razor build --model NAME --razor"
            ) from None
        manifest = Manifest.from_json(data, str(path))
        _check_files(directory, manifest, verify, progress)
        engine = cls(directory, manifest, _head_map(directory, manifest))
        try:
            engine.options.validate(manifest.spec)
        except UsageError as e:
            raise RazorError(f"{path}: {e}; rebuild the engine") from None
        if sum(t.nbytes for t in engine.caches()) != manifest.kv_bytes_per_slot:
            raise RazorError(
                f"{path}: kv_bytes_per_slot: expected {sum(t.nbytes for t in engine.caches())} for "
                f"this model and policy, found {manifest.kv_bytes_per_slot}; rebuild the engine"
            )
        return engine

    def tokenizer(self) -> Tokenizer | None:
        """The engine's tokenizer, or None if its checkpoint had none."""
        if not any(f.path.startswith(f"{TOKENIZER_DIR}/") for f in self.manifest.files):
            return None
        return Tokenizer.load(self.directory / TOKENIZER_DIR)

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
            raise UsageError(
                f"slots: expected 1..{m.max_batch_size}, the max_batch_size of this engine, found "
                f"{slots}"
            )
        backend = get_backend(m.backend)
        return backend.open(self.directory, self.caches(), slots, m.max_seq_len)


def _head_map(directory: Path, manifest: Manifest) -> HeadMap | None:
    """The head map of a Razor engine, which must be the one it was built with."""
    if manifest.heads is None:
        return None
    path = directory / HEADS_FILE
    if all(f.path != HEADS_FILE for f in manifest.files):
        raise RazorError(f"{path}: not listed in {MANIFEST}; the engine is damaged, rebuild it")
    try:
        head_map = HeadMap.load(path)
        head_map.check_model(manifest.spec.fingerprint(), manifest.spec.name, str(path))
    except UsageError as e:  # for an engine, that is damage
        raise RazorError(f"{e}; the engine is damaged, rebuild it") from None
    if head_map.digest() != manifest.heads.digest:
        raise RazorError(
            f"{path}: not the head map this engine was built with; the engine is damaged, rebuild it"
        )
    return head_map


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
        try:
            if not path.is_file():
                raise RazorError(f"{path}: missing; the engine is damaged, rebuild it")
            size = path.stat().st_size
        except OSError as e:
            raise RazorError(f"{path}: cannot read: {e.strerror or e}") from None
        if size != record.size:
            raise RazorError(
                f"{path}: size: expected {record.size} bytes, found {size}; the engine is damaged, "
                f"rebuild it"
            )
    for record in manifest.files if verify else ():
        found = sha256_file(directory / record.path, count)
        if found != record.sha256:
            raise RazorError(
                f"{directory / record.path}: sha256: expected {record.sha256[:12]}…, found "
                f"{found[:12]}…; the engine is damaged, rebuild it"
            )
