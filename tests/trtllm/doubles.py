"""Installs a recording double of TensorRT and TensorRT-LLM, which are not available where tests run.

What it is
    ``double/`` holds two packages, ``tensorrt`` and ``tensorrt_llm``, written from what is known of
    TensorRT-LLM's public sources: names, order, defaults, keyword-only parameters, attributes, shapes
    and dtypes. Networks are recorded, with symbolic tensors that carry shapes and dtypes, and checked on
    the way: a wrong name is a TypeError, a wrong shape, dtype or order a ContractError (tensorrt.errors).
    Nothing is computed. It is never bent to fit our code: only a fact about TensorRT-LLM changes it.

Which release
    1.0.0, 1.1.0 or 1.2.1, chosen by ``make``: where releases differ, the double asks
    ``tensorrt_llm._release.RELEASE``, ``(1, 0)``, ``(1, 1)`` or ``(1, 2)``. Each module says in its
    docstring which of its facts were read and which inferred. No file of exactly these versions could
    be read, but neighbours of theirs from forks and commits in between.

In this process: the fixture ``trtllm`` (conftest.py, once per release; ``trtllm.load(module)`` imports)
    def test_x(trtllm):
        model = trtllm.load("tensorrt_llm.models").LLaMAForCausalLM(config)
        engine = trtllm.load("tensorrt_llm.builder").build(model, BuildConfig(...))
        network = doubles.network(engine)       # or doubles.network(folder / "rank0.engine")
        network["inputs"]["slot_mapping"]       # {"dtype", "shape", "dims", "profiles"}
        network["plugins"]                      # [{"name", "type", "fields", "inputs", "outputs"}, ...]

In a child: ``subprocess.run(..., env={**os.environ, **doubles.environment(doubles.make(folder, release))})``

The plugin library is an empty file that only the double's ``load_library`` accepts; the creator that
appears then checks fields and inputs against the tables of the plugin's README, parsed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "plugins/tensorrt/razor_gpt_attention/README.md"
RELEASES = {"1.0.0": "10.11.0", "1.1.0": "10.13.0", "1.2.1": "10.14.0"}
"""Releases of TensorRT-LLM and the TensorRT in their images."""
PLUGIN = "libtrt_razor_plugins_trt10.so"
OURS = ("attention", "models", "build_rank")
"""Modules of trt_razor.trtllm that import TensorRT-LLM at their top: imported anew for each double."""


def make(folder: Path, release: str) -> Path:
    """Writes the packages of one release into ``folder``, which goes on ``sys.path``; returns it.

    Raises:
        KeyError: a release that the double does not mirror.
    """
    tensorrt = RELEASES[release]
    for package, version in (("tensorrt", tensorrt), ("tensorrt_llm", release)):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(HERE / "double" / package, folder / package, ignore=ignore)
        (folder / package / "version.py").write_text(f'__version__ = "{version}"\n')
        info = folder / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
    shutil.copy(README, folder / "tensorrt/razor_gpt_attention.md")
    (folder / PLUGIN).touch()
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Environment variables for a child process that shall use the double in ``folder``."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "TRT_RAZOR_PLUGIN": str(folder / PLUGIN)}


@dataclass(frozen=True)
class Double:
    """An installed double."""

    release: str
    path: Path

    @property
    def modules(self) -> dict[str, ModuleType]:
        """Its modules imported so far, by name."""
        return {n: m for n, m in sys.modules.items() if n.split(".")[0] in RELEASE_PACKAGES}

    def load(self, name: str) -> Any:
        """Imports a module of the double, or one of ours that needs it."""
        return importlib.import_module(name)


RELEASE_PACKAGES = ("tensorrt", "tensorrt_llm")


@contextlib.contextmanager
def installed(folder: Path, release: str) -> Iterator[Double]:
    """The double of ``release`` in ``folder`` (made if need be), importable until the end."""
    if not (folder / "tensorrt_llm").exists():
        make(folder, release)
    variables = {"TRT_RAZOR_PLUGIN": str(folder / PLUGIN)}
    before = {name: os.environ.get(name) for name in variables}
    _forget()
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    os.environ.update(variables)
    try:
        yield Double(release, folder)
    finally:
        sys.path.remove(str(folder))
        _forget()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _forget() -> None:
    ours = {f"trt_razor.trtllm.{name}" for name in OURS}
    for name in list(sys.modules):
        # "models" is the name that trtllm-build gives to the file of --model_cls_file.
        if name.split(".")[0] in (*RELEASE_PACKAGES, "models") or name in ours:
            del sys.modules[name]
    package = sys.modules.get("trt_razor.trtllm")
    for name in OURS:
        if hasattr(package, name):
            delattr(package, name)


def network(engine: Any) -> dict[str, Any]:
    """The network recorded in an ``Engine``, in its bytes or in a ``rank{N}.engine`` file."""
    data = engine.read_bytes() if isinstance(engine, Path) else getattr(engine, "engine", engine)
    recorded: dict[str, Any] = json.loads(bytes(data))
    return recorded
