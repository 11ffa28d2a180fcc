"""Servers that benchmarks/serving.py measures: started here, or at URLs."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from serving_load import reason

from trt_razor.console import say
from trt_razor.engine import Engine
from trt_razor.errors import MissingExtra, RazorError
from trt_razor.manifest import Manifest
from trt_razor.serving.repository import RepositoryOptions, write_repository
from trt_razor.serving.server import TritonServer, check_models_run, find_server, free_ports
from trt_razor.trtllm.cache_settings import read_settings


class Server(Protocol):
    """What is needed of a server that was started here."""

    @property
    def grpc(self) -> str: ...
    @property
    def metrics(self) -> str: ...
    @property
    def alive(self) -> bool: ...
    def start(self) -> None: ...
    def wait_ready(self, timeout: float) -> None: ...
    def reason(self) -> str: ...
    def stop(self) -> object: ...


@dataclass
class Target:
    """A server that answers."""

    kind: str
    grpc: str
    metrics: str | None
    server: Server | None = None

    def check(self) -> None:
        """Raises RazorError if a server of ours has ended."""
        if self.server is not None and not self.server.alive:
            raise RazorError(f"{self.kind}: the server ended: {self.server.reason()}")


class ScriptServer:
    """A server started by the ``start.sh`` of its repository: TensorRT-LLM engines, all ranks."""

    def __init__(self, repository: Path, log: Path, one_rank: bool, python: Path | None) -> None:
        self.repository, self.log = repository, log
        self._ports = free_ports("127.0.0.1", 3)
        names = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")
        self._environment = {n: str(p) for n, p in zip(names, self._ports, strict=True)}
        self._environment["ADDRESS"] = "127.0.0.1"
        if python is not None:
            self._environment["TRT_RAZOR_TRITON_PYTHON"] = str(python)
        if one_rank and shutil.which(os.environ.get("MPIRUN", "mpirun")) is None:
            self._environment["NO_MPI"] = "1"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self._ports[1]}"

    @property
    def metrics(self) -> str:
        return f"127.0.0.1:{self._ports[2]}"

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it; it is not ready yet."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["bash", str(self.repository / "start.sh")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **self._environment},
            )

    def wait_ready(self, timeout: float) -> None:
        """Raises RazorError with the reason if it ends or is not ready in time."""
        end = time.monotonic() + timeout
        while True:
            with suppress(OSError):
                url = f"http://127.0.0.1:{self._ports[0]}/v2/health/ready"
                if urllib.request.urlopen(url, timeout=5).status == 200:
                    return
            if not self.alive or time.monotonic() > end:
                what = "is not ready in time" if self.alive else "ended"
                raise RazorError(f"{self.repository.name}: the server {what}: {self.reason()}")
            time.sleep(0.5)

    def reason(self) -> str:
        """The line of its log that says why it ended."""
        return reason(self.log)

    def stop(self) -> None:
        """Stop it and all its ranks, gently at first."""
        if self.process is None:
            return
        for number, patience in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)


def start(
    args: argparse.Namespace, kind: str, engine: Path, share: float, place: Path, stack: ExitStack
) -> Target:
    """Write the repository of an engine and start its server, stopped with ``stack``. Raises RazorError."""
    manifest = Engine.load(engine, verify=False).manifest
    stock = manifest.backend == "tensorrt-llm"
    options = RepositoryOptions(
        verify=False, force=True,
        slots=None if stock else args.slots,
        kv_cache_free_gpu_mem_fraction=share if stock else None,
    )  # fmt: skip
    repository = write_repository(engine, place / f"repository-{kind}", options)
    log = place / f"{kind}.log"
    server: Server
    if stock:
        ranks = read_settings(engine).world_size
        server = ScriptServer(repository, log, ranks == 1, args.python)
    else:
        binary = find_server(args.python)
        check_models_run(binary, manifest.backend)
        server = TritonServer(repository, binary, log=log)
    stack.callback(server.stop)
    say(f"{kind}: starting a server on {server.grpc} (gRPC)")
    server.start()
    server.wait_ready(args.limit)
    return Target(kind, server.grpc, server.metrics, server)


def fit_together(args: argparse.Namespace, manifests: dict[str, Manifest]) -> bool:
    """Whether both engines can be loaded at the same time: weights and caches in what is free."""
    if args.one_at_a_time:
        return False
    if any(m.backend != "onnxruntime" for m in manifests.values()):
        return True  # on a GPU the share of each is set beforehand
    need = 0.0
    for m in manifests.values():
        slots = args.slots or m.max_batch_size
        need += 1.5 * sum(f.size for f in m.files) + 1.2 * slots * m.kv_bytes_per_slot
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(x for x in lines if x.startswith("MemAvailable"))
        return need < 1024 * int(free.split()[1])
    return False


def at_urls(args: argparse.Namespace) -> list[Target]:
    """The servers given; metrics where they say, or on the port after gRPC's, as Triton does it."""
    found = []
    for kind, url in args.urls.items():
        host, _, port = url.rpartition(":")
        metrics = args.metrics.get(kind, f"{host}:{int(port) + 1}")
        found.append(Target(kind, url, metrics))
    return found


def server_version(url: str) -> str:
    """What a server says it is; empty if it does not."""
    try:
        import tritonclient.grpc as grpc
    except ImportError:
        raise MissingExtra("tritonclient", "triton", "the benchmark") from None
    client = grpc.InferenceServerClient(url)
    try:
        about = client.get_server_metadata(client_timeout=20)
        return f"{about.name} {about.version}"
    except grpc.InferenceServerException as e:
        raise RazorError(f"{url}: no Triton server answers over gRPC: {e.message()}") from None
    finally:
        client.close()


def package_versions(python: Path | None, backend: str) -> list[str]:
    """What runs the engines, in the Python that runs the models: ``onnxruntime 1.27.0`` …"""
    packages = {
        "onnxruntime": ("onnxruntime",),
        "tensorrt-llm": ("tensorrt_llm", "tensorrt"),
        "tensorrt": ("tensorrt",),
        "tensorrt-rtx": ("tensorrt-rtx",),
    }
    code = (
        "import sys\nfrom importlib import metadata\nfor name in sys.argv[1:]:\n"
        "    try:\n        print(name, metadata.version(name))\n"
        "    except metadata.PackageNotFoundError:\n        pass"
    )
    with suppress(OSError, subprocess.SubprocessError, RazorError):
        facts = find_server(python).python
        if facts is not None:
            command = [str(facts.executable), "-c", code, *packages.get(backend, ())]
            said = subprocess.run(command, capture_output=True, text=True, timeout=60)
            return said.stdout.splitlines()
    return []
