"""Find a Triton server to start here, and the Python that runs its Python models.

A server comes from NVIDIA's container images (``/opt/tritonserver``), from the package
``nvidia-pytriton`` of some Python (extra ``serve``), or from wherever ``TRITONSERVER`` points. The
Python models run in a process of their own, the *stub*: Python embedded, of one minor version, which
takes its packages from the first ``python3`` on PATH and ignores PYTHONPATH.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trt_razor.errors import RazorError, UsageError

SERVER_ENV = "TRITONSERVER"
"""Environment variable: the server's executable."""
PYTHON_ENV = "TRT_RAZOR_TRITON_PYTHON"
"""Environment variable: the Python whose nvidia-pytriton is started and that runs the models."""
IMAGE = Path("/opt/tritonserver")
"""Where container images have the server."""
HOW_TO_GET = (
    "make a fresh virtual environment (old servers need numpy < 2) and there pip install "
    "'trt-razor[serve]', or use an NGC image nvcr.io/nvidia/tritonserver:YY.MM-py3"
)

_PROBE = """
import importlib.metadata, importlib.util, json, os, sys, sysconfig
def version(name):
    try:
        return importlib.metadata.version(name)
    except Exception:
        return None
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except Exception:
        return False
def works(name):
    import ctypes
    try:
        ctypes.CDLL(name)
        return True
    except OSError:
        return False
spec = importlib.util.find_spec("pytriton")
folder = sysconfig.get_config_var("LIBDIR") or ""
library = "libpython%d.%d.so.1.0" % sys.version_info[:2]
path = os.path.join(folder, library)
modules = ["trt_razor", "numpy", "rich", "tokenizers", "jinja2", "onnxruntime", "tensorrt",
           "tensorrt_rtx", "cuda", "ml_dtypes"]
print(json.dumps({
    "version": list(sys.version_info[:2]),
    "pytriton": list(spec.submodule_search_locations)[0] if spec else None,
    "library": path if os.path.exists(path) else None,
    "library_of_system": works(library),
    "modules": [m for m in modules if there(m)],
    "numpy": version("numpy"),
}))
"""


@dataclass(frozen=True)
class PythonFacts:
    """A Python, as it answered.

    Attributes:
        executable: as called; not resolved, for a virtual environment is known by its path.
        version: such as (3, 11).
        pytriton: folder of the package, if it is installed.
        library: its shared libpython, if it has one; library_of_system: the linker finds one.
        modules: which of the packages that models need can be imported.
        numpy: version, "" if absent.
    """

    executable: Path
    version: tuple[int, int]
    pytriton: Path | None
    library: Path | None
    library_of_system: bool
    modules: frozenset[str]
    numpy: str


@dataclass(frozen=True)
class ServerBinary:
    """A server that can be started.

    Attributes:
        executable: ``tritonserver``.
        backends: folder of its backends; None = the server's own default.
        environment: of the process, whole.
        source: where it was found, for messages.
        python: the Python that runs the models; None = there is no ``python3``.
        stub: the stub for that Python, where the server has several.
    """

    executable: Path
    backends: Path | None
    environment: Mapping[str, str] = field(repr=False)
    source: str = ""
    python: PythonFacts | None = None
    stub: Path | None = None


def find_server(python: Path | None = None) -> ServerBinary:
    """The first server of: ``TRITONSERVER``; nvidia-pytriton of ``python`` (argument, else
    ``TRT_RAZOR_TRITON_PYTHON``); ``/opt/tritonserver``; PATH; nvidia-pytriton of this Python.

    Raises:
        UsageError: there is none (what was looked for, and how to get one), or what was named is
            not one.
    """
    named = os.environ.get(SERVER_ENV)
    given = python or (Path(os.environ[PYTHON_ENV]) if os.environ.get(PYTHON_ENV) else None)
    if named:
        return _installed(Path(named), f"{SERVER_ENV}={named}", given)
    if given is not None:
        facts = python_facts(given)
        if facts.pytriton is not None:
            return _packaged(facts)
    looked = [f"{SERVER_ENV} (not set)"]
    looked.append(f"nvidia-pytriton in {given}" if given else f"{PYTHON_ENV} (not set)")
    image = IMAGE / "bin" / "tritonserver"
    if image.is_file():
        return _installed(image, str(image), given)
    looked.append(str(image))
    on_path = shutil.which("tritonserver")
    if on_path:
        return _installed(Path(on_path), f"{on_path} (PATH)", given)
    looked.append("tritonserver on PATH")
    if given is None:
        facts = python_facts(Path(sys.executable))
        if facts.pytriton is not None:
            return _packaged(facts)
        looked.append(f"nvidia-pytriton in {sys.executable}")
    raise UsageError(
        f"no Triton server on this machine: looked for {', '.join(looked)}; {HOW_TO_GET}"
    )


@functools.lru_cache(maxsize=8)
def python_facts(executable: Path) -> PythonFacts:
    """Ask a Python about itself.

    Raises:
        UsageError: it cannot be run or is no Python 3.
    """
    command = [str(executable), "-I", "-c", _PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        data = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired) as e:
        raise UsageError(
            f"{executable}: expected a Python 3, and it cannot be run: {getattr(e, 'strerror', None) or e}"
        ) from None
    if data is None:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UsageError(f"{executable}: expected a Python 3, and it answers: {last}")
    return PythonFacts(
        executable=executable,
        version=(data["version"][0], data["version"][1]),
        pytriton=Path(data["pytriton"]) if data["pytriton"] else None,
        library=Path(data["library"]) if data["library"] else None,
        library_of_system=data["library_of_system"],
        modules=frozenset(data["modules"]),
        numpy=data["numpy"] or "",
    )


def check_models_run(binary: ServerBinary, backend: str) -> None:
    """What the Python models of a repository of ours need, before a server is started.

    Args:
        backend: of the engine: ``onnxruntime``, ``tensorrt``, ``tensorrt-rtx``, ``tensorrt-llm``.

    Raises:
        UsageError: the Python that runs them lacks a package, or has a numpy that kills them.
    """
    p = binary.python
    if p is None:
        raise UsageError(
            "no python3 on PATH: Triton runs the models of the repository with the first one; install "
            f"Python, or name one with {PYTHON_ENV}"
        )
    needed = ["trt_razor", "numpy", "tokenizers", "jinja2"]
    runtime = {
        "onnxruntime": ("onnxruntime",),
        "tensorrt": ("tensorrt", "cuda"),
        "tensorrt-rtx": ("tensorrt_rtx", "cuda"),
    }
    needed += runtime.get(backend, ())
    absent = [m for m in needed if m not in p.modules]
    if absent:
        extra = "models" if backend == "tensorrt-llm" else f"models,{backend}"
        extra = "serve" if binary.stub is not None and backend == "onnxruntime" else extra
        raise UsageError(
            f"{p.executable}: this Python runs the models and lacks {', '.join(absent)}; install with: "
            f"{p.executable} -m pip install 'trt-razor[{extra}]'"
        )
    major = re.match(r"\d+", p.numpy)
    if binary.stub is not None and major and int(major[0]) >= 2:
        raise UsageError(
            f"{p.executable}: this Python runs the models and has numpy {p.numpy}, with which this "
            f"server's text outputs crash; install with: {p.executable} -m pip install 'numpy<2'"
        )


def _installed(executable: Path, source: str, python: Path | None) -> ServerBinary:
    """A server that brings its backends along; its stub is made for the system's python3."""
    if not (executable.is_file() and os.access(executable, os.X_OK)):
        raise UsageError(
            f"{source}: expected the executable tritonserver, found none there; {HOW_TO_GET}"
        )
    environment = dict(os.environ)
    if python is not None:
        environment["PATH"] = _first(python.absolute().parent, environment.get("PATH"))
    first = shutil.which("python3", path=environment.get("PATH"))
    backends = executable.resolve().parent.parent / "backends"
    return ServerBinary(
        executable=executable.absolute(),
        backends=backends if backends.is_dir() else None,
        environment=environment,
        source=source,
        python=python_facts(Path(first)) if first else None,
    )


def _packaged(facts: PythonFacts) -> ServerBinary:
    """The server in nvidia-pytriton, with the stub for that Python."""
    assert facts.pytriton is not None
    root = facts.pytriton / "tritonserver"
    executable = root / "bin" / "tritonserver"
    name = ".".join(map(str, facts.version))
    stub = root / "python_backend_stubs" / name / "triton_python_backend_stub"
    if not executable.is_file():
        raise UsageError(
            f"{executable}: expected nvidia-pytriton's server, found none; install it again with: "
            f"{facts.executable} -m pip install --force-reinstall nvidia-pytriton"
        )
    if not stub.is_file():
        known = sorted(p.name for p in stub.parent.parent.glob("*.*"))
        raise UsageError(
            f"{facts.executable}: is Python {name}; this server has stubs for "
            f"{', '.join(known) or 'none'}; make the virtual environment with one of these"
        )
    folder = facts.executable.absolute().parent
    first = python_facts(folder / "python3") if (folder / "python3").is_file() else None
    if first is None or first.version != facts.version:
        raise UsageError(
            f"{folder}: expected a python3 of version {name} beside {facts.executable.name}, for the "
            "server takes the first python3 on PATH; use a virtual environment"
        )
    libraries = facts.pytriton.parent / "nvidia_pytriton.libs"
    # Up to 3.12 the stub wants the Python's own shared library; the one for 3.13 comes along.
    if facts.version < (3, 13) and facts.library is None and not facts.library_of_system:
        raise UsageError(
            f"{facts.executable}: libpython{name}.so.1.0 is needed and this Python has none; install "
            f"libpython{name} (Debian and Ubuntu), or a Python built with --enable-shared"
        )
    environment = dict(os.environ)
    environment["PATH"] = _first(folder, environment.get("PATH"))
    environment["LD_LIBRARY_PATH"] = _first(libraries, environment.get("LD_LIBRARY_PATH"))
    return ServerBinary(
        executable=executable,
        backends=root / "backends",
        environment=environment,
        source=f"nvidia-pytriton in {facts.executable}",
        python=facts,
        stub=stub,
    )


def _first(folder: Path, rest: str | None) -> str:
    return os.pathsep.join([str(folder), *([rest] if rest else [])])


__all__ = [
    "HOW_TO_GET",
    "PYTHON_ENV",
    "SERVER_ENV",
    "PythonFacts",
    "RazorError",
    "ServerBinary",
    "check_models_run",
    "find_server",
    "python_facts",
]
