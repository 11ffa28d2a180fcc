"""The files of a model repository, and what may lie where one is to be written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from trt_razor import __version__
from trt_razor.engine import MANIFEST, TOKENIZER_DIR, Engine
from trt_razor.errors import RazorError, UsageError
from trt_razor.files import CHUNK, write_text_atomic
from trt_razor.models.stored import read_json
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.serving.config import ModelConfig

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); total 0 = unknown. ``console.Bars`` is one."""

MARKER = "trt_razor.json"
SCHEMA = "trt_razor.repository"
SCHEMA_VERSION = 1
TRTLLM = "tensorrt-llm"
ENGINE_DIR = "1/engine"
"""Where a copied engine lies in the folder of its model."""
MODULES = {
    "tensorrt_llm": "trt_razor.serving.models.engine",
    "preprocessing": "trt_razor.serving.models.preprocessing",
    "postprocessing": "trt_razor.serving.models.postprocessing",
    "tensorrt_llm_bls": "trt_razor.serving.models.bls",
}
"""Python models: the module that has their ``TritonPythonModel``."""


def write_model(folder: Path, config: ModelConfig, engine: Engine) -> None:
    """The folder of a model: its config, and what its version 1 needs.

    Raises:
        RazorError: the engine's tokenizer cannot be read back. OSError: a disk that is full.
    """
    write_text_atomic(folder / "config.pbtxt", config.text())
    version = folder / "1"
    version.mkdir()
    if config.backend == "python":
        write_text_atomic(version / "model.py", _shim(config.name, engine))
    else:
        # A version must be there, and some ways of copying leave empty folders out.
        write_text_atomic(version / ".keep", "")
    if config.parameter("tokenizer_dir") == f"1/{TOKENIZER_DIR}":
        for record in engine.manifest.files:
            if record.path.startswith(f"{TOKENIZER_DIR}/"):
                target = version / record.path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(engine.directory / record.path, target)
        Tokenizer.load(version / TOKENIZER_DIR)


def _shim(name: str, engine: Engine) -> str:
    """``model.py``: the model itself is in the installed package."""
    backend = engine.manifest.backend
    extra = backend if name == "tensorrt_llm" else "models"
    return f'''"""Triton model {name}, written by trt-razor; the model itself is in the package trt_razor."""

import sys

try:
    from {MODULES[name]} import TritonPythonModel
except ImportError as e:
    raise ImportError(
        f"model {name}: {{e}}; Python {{sys.version.split()[0]}} of {{sys.prefix}} runs it: install there "
        "with: pip install 'trt-razor[{extra}]'"
    ) from None

__all__ = ["TritonPythonModel"]
'''


def copy_engine(engine: Engine, target: Path, verify: bool, progress: Progress) -> None:
    """A copy of its own: neither hard links nor what lies in the folder beside the engine's files.

    Args:
        verify: check the sha256 of what is copied.

    Raises:
        RazorError: a file cannot be read, or is not what the manifest says any more.
    """
    files = engine.manifest.files
    total, done = sum(f.size for f in files), 0
    progress("copy", 0, total)
    for record in files:
        path = target / record.path
        path.parent.mkdir(parents=True, exist_ok=True)
        size, digest = 0, hashlib.sha256()
        with open(engine.directory / record.path, "rb") as source, open(path, "wb") as sink:
            while block := source.read(CHUNK):
                sink.write(block)
                size += len(block)
                if verify:
                    digest.update(block)
                done += len(block)
                progress("copy", done, total)
            sink.flush()
            os.fsync(sink.fileno())
        if size != record.size:
            raise RazorError(
                f"{engine.directory / record.path}: size: expected {record.size} bytes, found {size}; it "
                "was changed while it was copied, try again"
            )
        if verify and digest.hexdigest() != record.sha256:
            raise RazorError(
                f"{engine.directory / record.path}: sha256: expected {record.sha256[:12]}…, found "
                f"{digest.hexdigest()[:12]}…; the engine is damaged, rebuild it"
            )
    shutil.copyfile(engine.directory / MANIFEST, target / MANIFEST)
    if Engine.load(target, verify=False).manifest != engine.manifest:
        raise RazorError(f"{engine.directory}: was replaced while it was copied; try again")


# What is there already ----------------------------------------------------------------------------
def marker_text(folder: Path, engine: Engine, copied: bool) -> str:
    """``trt_razor.json`` of the finished ``folder``; ``copied``: the engine is in it."""
    m = engine.manifest
    data = {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "trt_razor": __version__,
        "flavour": "tensorrtllm" if m.backend == TRTLLM else "python",
        "model": m.spec.name,
        "models": sorted(p.name for p in folder.iterdir() if p.is_dir()),
        "engine": {
            "backend": m.backend,
            "digest": m.to_json()["digest"],
            "path": None if copied else str(engine.directory),
        },
        "files": _files_of(folder),
    }
    return json.dumps(data, indent=1) + "\n"


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What a repository of ours says about itself; None for any other folder."""
    try:
        data = read_json(folder / MARKER, "the repository's description")
    except RazorError:
        return None
    return data if isinstance(data, dict) and data.get("schema") == SCHEMA else None


def check_output(output: Path, engine: Path, force: bool) -> None:
    """Never touch what is not a repository of ours, nor one without being told to.

    Raises:
        UsageError: says why ``output`` cannot be it. RazorError: it cannot be read.
    """
    real, source = Path(os.path.realpath(output)), Path(os.path.realpath(engine))
    for inner, outer in ((real, source), (source, real)):
        if inner == outer or outer in inner.parents:
            raise UsageError(
                f"{output}: the engine {engine} and the repository lie in one another; choose another "
                "--output"
            )
    if real == Path(os.path.realpath(os.curdir)):
        raise UsageError(f"{output}: is the current folder; give a folder in it as --output")
    try:
        if not os.path.lexists(output):
            return
        if not output.is_dir():
            raise UsageError(f"{output}: is a file; choose another --output")
        if not any(output.iterdir()):
            return
    except OSError as e:
        raise RazorError(f"{output}: cannot use it as --output: {e.strerror or e}") from None
    marker = read_marker(output)
    if marker is None:
        raise UsageError(
            f"{output}: exists and is not a model repository of ours, so it will not be touched; choose "
            "another --output, or delete it yourself"
        )
    if not force:
        raise UsageError(f"{output}: a model repository is already there; --force replaces it")
    listed = marker.get("files")
    known = {MARKER, *(listed if isinstance(listed, list) else [])}
    foreign = [f for f in _files_of(output) if f not in known]
    if foreign:
        others = f" (nor are {len(foreign) - 1} others)" if len(foreign) > 1 else ""
        raise UsageError(
            f"{output / foreign[0]}: is not of the repository there{others}, so it will not be replaced; "
            "move it away, or choose another --output"
        )


def _files_of(folder: Path) -> list[str]:
    """POSIX paths of all files below a folder, sorted; what Python leaves beside models is nobody's."""
    found = []
    for at, _, names in os.walk(folder):
        relative = [(Path(at) / n).relative_to(folder) for n in names]
        found += [PurePosixPath(r).as_posix() for r in relative if "__pycache__" not in r.parts]
    return sorted(found)
