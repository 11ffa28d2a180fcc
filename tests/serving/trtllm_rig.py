"""TensorRT-LLM engines as our build leaves them, and servers that load them with the stand-in backend.

The engines come from TensorRT-LLM's double (tests/trtllm): their folders, config.json, manifests and
tokenizers are as for the real one; only rank files have no network that a GPU could run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_server import Server, running

TESTS = Path(__file__).resolve().parents[1]
for _folder in (TESTS / "plugins" / "tensorrt", TESTS / "plugins", TESTS / "trtllm"):
    sys.path.append(str(_folder))
import doubles  # noqa: E402 (the loop above)
from tiny_models import write_model  # noqa: E402

from trt_razor import cli  # noqa: E402
from trt_razor.engine import Engine  # noqa: E402
from trt_razor.headmap import HeadMap  # noqa: E402
from trt_razor.serving.repository import RepositoryOptions, write_repository  # noqa: E402
from trt_razor.serving.server import ServerBinary  # noqa: E402
from trt_razor.trtllm import backend  # noqa: E402

STANDIN = Path(__file__).resolve().parent / "standin"
sys.path.append(str(STANDIN / "tensorrtllm"))

MODEL: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 96,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
RETRIEVAL = ((1,), (0, 3), ())
MAX_SEQ_LEN = 2048
RAZOR = ("--razor", "--sinks", "4", "--min-window", "9")
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cyclic": ("1.0.0", RAZOR),
    "slots-1.1": ("1.1.0", RAZOR),
    "slots": ("1.2.1", RAZOR),
    "dense": ("1.2.1", ()),
    "two-ranks": ("1.2.1", (*RAZOR, "--tp-size", "2")),
}
"""Release of TensorRT-LLM, and options of the build."""
EOS = 257


@dataclasses.dataclass(frozen=True)
class Engines:
    """Engines of one model, made when they are asked for."""

    root: Path

    def __call__(self, kind: str) -> Path:
        folder = self.root / kind
        if not folder.exists():
            self._build(kind, folder)
        return folder

    def preload(self, kind: str) -> Path:
        """A library that servers of a Razor engine can load, beside its plugin (which is empty)."""
        plugin = Path(doubles.environment(self._double(kind))["TRT_RAZOR_PLUGIN"])
        name = Engine.load(self(kind)).manifest.facts["preload"]
        folder = self.root / f"{kind}-library"
        if not folder.exists():
            folder.mkdir()
            shutil.copy2(plugin, folder / plugin.name)
            # Any library does, for nothing of it is called.
            maps = Path("/proc/self/maps").read_text().split()
            harmless = next(word for word in maps if Path(word).name.startswith("libm.so"))
            (folder / name).symlink_to(harmless)
        return folder / name

    def _double(self, kind: str) -> Path:
        return self.root / f"{kind}-double"

    def _build(self, kind: str, output: Path) -> None:
        model, heads = self.root / "model", self.root / "heads.json"
        if not model.exists():
            spec = write_model(model, **MODEL)
            HeadMap(spec.name, spec.fingerprint(), 3, 4, RETRIEVAL, "test", "by hand").save(heads)
        release, options = KINDS[kind]
        more = ("--heads", str(heads)) if options else ()
        arguments = ["--backend", "tensorrt-llm", "--checkpoint", str(model), *options, *more]
        arguments += ["--max-seq-len", str(MAX_SEQ_LEN), "--tokens-per-block", "8"]
        double = self._double(kind)
        with pytest.MonkeyPatch.context() as patch, doubles.installed(double, release):
            for name, value in doubles.environment(double).items():
                patch.setenv(name, value)
            patch.setattr(backend, "gpu_capability", lambda: "9.0")
            assert cli.build_main([*arguments, "--output", str(output)]) == 0


def repository_of(engine: Path, output: Path, **options: Any) -> Path:
    return write_repository(engine, output, RepositoryOptions(**options))


@contextlib.contextmanager
def serving(
    repository: Path, python: Path, record: Path, preload: Path | None, **options: Any
) -> Iterator[Server]:
    """A server whose ``tensorrtllm`` backend is the stand-in, ready.

    Args:
        record: folder for what the stand-in understood. preload: library that the server loads.
    """
    variables = {"TRT_RAZOR_STANDIN_RECORD": str(record)}
    if preload is not None:
        variables["LD_PRELOAD"] = str(preload)
    with running(repository, python, variables, backends=STANDIN, **options) as server:
        yield server


def backends_folder(folder: Path, binary: ServerBinary) -> tuple[Path, dict[str, str]]:
    """Backends as an image has them, in one folder, and the variables its server needs."""
    assert binary.backends is not None
    assert binary.stub is not None
    assert binary.python is not None
    shutil.copytree(binary.backends / "python", folder / "python")
    stub = folder / "python" / binary.stub.name
    stub.unlink(missing_ok=True)
    stub.symlink_to(binary.stub)
    (folder / "tensorrtllm").mkdir()
    for path in (STANDIN / "tensorrtllm").glob("*.py"):
        (folder / "tensorrtllm" / path.name).symlink_to(path)
    variables = dict(binary.environment)
    if binary.python.library is not None:
        libraries = folder.parent / f"{folder.name}-lib"
        libraries.mkdir()
        (libraries / binary.python.library.name).symlink_to(binary.python.library)
        found = variables.get("LD_LIBRARY_PATH", "")
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(libraries), found)))
    return folder, variables
