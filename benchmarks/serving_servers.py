"""Servers that benchmarks/serving.py measures: started here, or at URLs."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from trt_razor.console import say
from trt_razor.engine import Engine
from trt_razor.errors import MissingExtra, RazorError
from trt_razor.manifest import Manifest
from trt_razor.serving.repository import RepositoryOptions, write_repository
from trt_razor.serving.server import ScriptServer, TritonServer, check_models_run, find_server
from trt_razor.trtllm.cache_settings import read_settings


@dataclass
class Target:
    """A server that answers."""

    kind: str
    grpc: str
    metrics: str | None
    server: TritonServer | None = None

    def check(self) -> None:
        """Raises RazorError if a server of ours has ended."""
        if self.server is not None and not self.server.alive:
            raise RazorError(f"{self.kind}: the server ended: {self.server.reason()}")


def start(
    args: argparse.Namespace, kind: str, engine: Path, share: float, place: Path, stack: ExitStack
) -> Target:
    """Write the repository of an engine and start its server, stopped with ``stack``. Raises RazorError."""
    manifest = Engine.load(engine, verify=False).manifest
    stock = manifest.backend == "tensorrt-llm"
    options = RepositoryOptions(
        verify=False, force=True,
        # Each answers one request at a time.
        bls_instances=max(args.concurrency) if args.served_model == "tensorrt_llm_bls" else 1,
        slots=None if stock else args.slots,
        kv_cache_free_gpu_mem_fraction=share if stock else None,
    )  # fmt: skip
    repository = write_repository(engine, place / f"repository-{kind}", options)
    binary = find_server(args.python)
    check_models_run(binary, manifest.backend)
    mpirun = shutil.which(os.environ.get("MPIRUN", "mpirun"))
    if stock and mpirun is None and read_settings(engine).world_size == 1:
        binary = replace(binary, environment={**binary.environment, "NO_MPI": "1"})
    server = (ScriptServer if stock else TritonServer)(
        repository, binary, log=place / f"{kind}.log"
    )
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
