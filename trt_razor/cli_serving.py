"""``trt-razor triton`` and ``trt-razor serve``: a model repository, and a server that runs it here."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_razor.cli_arguments import Parser
from trt_razor.cli_serving_arguments import (
    PORTS,
    SERVE_TEXT,
    TRITON_TEXT,
    serve_arguments,
    triton_arguments,
)
from trt_razor.console import Bars, err, guarded, out, say
from trt_razor.errors import RazorError, UsageError

if TYPE_CHECKING:
    from trt_razor.manifest import Manifest
    from trt_razor.serving.binary import ServerBinary
    from trt_razor.serving.repository import RepositoryOptions
    from trt_razor.serving.server import TritonServer

LOOK_SECONDS = 1.0
"""How often a running server is looked at."""
_NOT_FIELDS = {"copy_engine": "copy", "max_queue_size": "queue", "verify": "no_verify"}
"""Options of a repository whose name here is another one."""


def triton_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``build_scripts/make_triton_repository.py``: ``trt-razor triton``."""
    parser = Parser(prog="make_triton_repository.py", description=TRITON_TEXT)
    triton_arguments(parser)
    args = parser.parse_args(argv)
    return guarded(lambda: run_triton(args))


def add_commands(commands: Any) -> None:
    """Put both commands beside the others."""
    p = commands.add_parser(
        "triton", help="write a Triton model repository for an engine", description=TRITON_TEXT
    )
    triton_arguments(p)
    p.set_defaults(run=run_triton)
    p = commands.add_parser(
        "serve", help="serve an engine with Triton on this machine", description=SERVE_TEXT
    )
    serve_arguments(p)
    p.set_defaults(run=run_serve)


def _options(args: argparse.Namespace) -> RepositoryOptions:
    """The repository's options, as far as the command has them."""
    from trt_razor.serving.repository import RepositoryOptions

    values: dict[str, Any] = {}
    for f in fields(RepositoryOptions):
        name = _NOT_FIELDS.get(f.name, f.name)
        if hasattr(args, name) and getattr(args, name) is not None:
            values[f.name] = getattr(args, name)
    values["verify"] = not args.no_verify
    return RepositoryOptions(**values)


# triton -------------------------------------------------------------------------------------------
def run_triton(args: argparse.Namespace) -> int:
    """Write a repository, or check one."""
    if args.check is not None:
        if args.engine is not None or args.output is not None:
            raise UsageError("--check: takes the repository alone; leave ENGINE and --output out")
        return _check(args.check, args.mounted_at)
    if args.engine is None or args.output is None:
        raise UsageError("expected ENGINE and --output DIR (or --check DIR)")
    from trt_razor.serving.repository import write_repository

    with Bars() as bars:
        folder = write_repository(args.engine, args.output, _options(args), bars)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    out.print(
        f"{folder}: model repository ({size / 1e6:,.1f} MB); start it with:\n"
        f"  trt-razor serve {shlex.quote(str(folder))}\n"
        f"  {shlex.quote(str(folder / 'start.sh'))}   where a Triton server is installed (NGC images)",
        markup=False,
    )
    return 0


def _check(folder: Path, elsewhere: str | None) -> int:
    from trt_razor.serving.check import check_repository

    findings = check_repository(folder, elsewhere)
    for line in findings:
        out.print(line, markup=False)
    if findings:
        count = len(findings)
        raise RazorError(f"{folder}: {count} thing{'s' * (count > 1)} wrong with this repository")
    out.print(f"{folder}: nothing wrong with this repository", markup=False)
    return 0


# serve --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Target:
    """What is to be served.

    Attributes:
        engine: directory; None = a repository was given. repository: the other way round.
        backend: of the engine. tokenizer, template: whether it has them.
    """

    engine: Path | None
    repository: Path | None
    backend: str
    tokenizer: bool
    template: bool


def run_serve(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM (0), or until the server ends by itself (1)."""
    from trt_razor.serving.ports import check_ports

    started = time.monotonic()
    if args.force and args.repository is None:
        raise UsageError("--force: is about --repository DIR; give both")
    target = _target(args.engine)
    if target.engine is None:
        _no_repository_options(args)
    # What takes seconds comes after what can be told at once.
    ports = {f"--{n}-port": getattr(args, f"{n}_port") for n in PORTS}
    check_ports(args.address, {n: p for n, p in ports.items() if p != 0})
    binary = _server_for(target.backend)
    say(f"server: {binary.source}")
    stopped = False
    with ExitStack() as stack:
        repository = target.repository or _write(args, target, stack)
        server = _make_server(args, target, repository, binary)
        stack.callback(server.stop)
        server.start()
        with Bars() as bars:
            server.wait_ready(args.timeout, lambda seconds: bars("loading", 0, 0))
        say(f"ready after {time.monotonic() - started:.1f} s")
        stubs = server.stubs()
        try:
            _say_where(server, target, repository)
            _watch(server, stubs)
        except KeyboardInterrupt:
            stopped = True
            say("stopping … (once more: at once)")
            code = server.stop()
            if code not in (0, None):
                cut = "Exit timeout expired" in server.log_text()
                why = "requests were still running and were cut off" if cut else server.reason()
                say(f"note: the server ended with exit code {code}: {why}")
    if stopped:
        say("stopped")
    return 0


def _target(path: Path) -> _Target:
    from trt_razor.engine import MANIFEST, is_engine
    from trt_razor.manifest import Manifest, read_manifest
    from trt_razor.serving.repository import read_marker

    if is_engine(path):
        m = Manifest.from_json(read_manifest(path / MANIFEST), str(path / MANIFEST))
        tokenizer = _has_tokenizer(m)
        return _Target(path, None, m.backend, tokenizer, tokenizer and _has_template(path))
    marker = read_marker(path)
    if marker is not None:
        about = marker.get("engine")
        backend = about.get("backend") if isinstance(about, dict) else None
        if not isinstance(backend, str):
            raise RazorError(f"{path}: its description names no backend; write it again")
        texts = (path / "ensemble" / "config.pbtxt").is_file()
        return _Target(None, path, backend, texts, False)
    if not path.is_dir():
        raise UsageError(f"{path}: expected an engine directory or a model repository, found none")
    if (path / MANIFEST).exists():  # says what is wrong with it
        Manifest.from_json(read_manifest(path / MANIFEST), str(path / MANIFEST))
    raise UsageError(
        f"{path}: expected an engine directory (trt-razor build) or a model repository (trt-razor "
        "triton), found neither's description there"
    )


def _has_tokenizer(m: Manifest) -> bool:
    return any(f.path.startswith("tokenizer/") for f in m.files)


def _has_template(engine: Path) -> bool:
    from trt_razor.engine import TOKENIZER_DIR
    from trt_razor.models.tokenizer import Tokenizer

    return Tokenizer.load(engine / TOKENIZER_DIR).chat_template is not None


def _no_repository_options(args: argparse.Namespace) -> None:
    """A repository that is there has its settings already."""
    parser = Parser()
    serve_arguments(parser)
    defaults = parser.parse_args(["x"])
    names = ("repository", *(_NOT_FIELDS.get(f, f) for f in _option_fields()))
    given = [n for n in names if hasattr(args, n) and getattr(args, n) != getattr(defaults, n)]
    if given:
        raise UsageError(
            f"{args.engine}: is a repository, which has its settings; leave --"
            f"{given[0].replace('_', '-')} out, or serve the engine"
        )


def _option_fields() -> list[str]:
    from trt_razor.serving.repository import RepositoryOptions

    return [f.name for f in fields(RepositoryOptions)]


def _write(args: argparse.Namespace, target: _Target, stack: ExitStack) -> Path:
    """The repository of an engine; a temporary one unless the user wants to keep it."""
    from dataclasses import replace

    from trt_razor.serving.repository import write_repository
    from trt_razor.serving.temporary import Folder

    assert target.engine is not None
    options = _options(args)
    if args.prompt_format is None:
        options = replace(options, prompt_format="chat" if target.template else "raw")
    engine, folder = target.engine, args.repository
    if folder is None:
        temporary = Folder("serve")
        stack.callback(temporary.remove)
        folder = temporary.path / "model_repository"
        if not str(engine.absolute()).isascii():  # Triton's Python does not find such a path
            (temporary.path / "engine").symlink_to(engine.absolute())
            engine = temporary.path / "engine"
    with Bars() as bars:
        return write_repository(engine, folder, options, bars)


def _server_for(backend: str) -> ServerBinary:
    """A server that can run engines of this backend.

    Raises:
        UsageError: none here, and what to do.
    """
    from trt_razor.serving.binary import check_models_run, find_server

    binary = find_server()
    if backend == "tensorrt-llm":
        _check_trtllm(binary)
    check_models_run(binary, backend)
    return binary


def _check_trtllm(binary: ServerBinary) -> None:
    image = (
        "write a repository with trt-razor triton and run its start.sh in an image "
        "nvcr.io/nvidia/tritonserver:YY.MM-trtllm-python-py3"
    )
    if binary.backends is None or not (binary.backends / "tensorrtllm").is_dir():
        raise UsageError(
            f"{binary.source}: expected a server with the backend tensorrtllm for this TensorRT-LLM "
            f"engine, found one without; {image}"
        )
    try:
        gpus = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, timeout=30, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        gpus = b""
    if b"GPU" not in gpus:
        raise UsageError(
            f"expected an NVIDIA GPU for this TensorRT-LLM engine, nvidia-smi found none; {image}"
        )


def _make_server(
    args: argparse.Namespace, target: _Target, repository: Path, binary: ServerBinary
) -> TritonServer:
    from trt_razor.serving.server import ScriptServer, TritonServer

    kind = ScriptServer if target.backend == "tensorrt-llm" else TritonServer
    return kind(
        repository,
        binary,
        args.http_port,
        args.grpc_port,
        args.metrics_port,
        args.address,
        log=args.log,
        die_with_us=True,
    )


def _say_where(server: TritonServer, target: _Target, repository: Path) -> None:
    """Addresses, and a command that answers."""
    if target.tokenizer:
        model = "ensemble"
        body: dict[str, Any] = {"text_input": "What is the capital of France?", "max_tokens": 64}
    else:
        model = "tensorrt_llm"
        body = {"input_ids": [1, 2, 3], "input_lengths": 3, "request_output_len": 16}
    url = f"http://{server.http}/v2/models/{model}"
    lines = [
        f"HTTP {server.http}, gRPC {server.grpc}, metrics http://{server.metrics}/metrics",
        f"repository: {repository}",
        "ask it (Ctrl-C here stops the server):",
        f"  curl -s {url}/generate -d {shlex.quote(json.dumps(body))}",
    ]
    if target.tokenizer:
        streamed = {**body, "stream": True}
        lines.append(f"  curl -sN {url}/generate_stream -d {shlex.quote(json.dumps(streamed))}")
    out.print("\n".join(lines), markup=False)
    out.file.flush()


def _watch(server: TritonServer, stubs: dict[int, str]) -> None:
    """Until the server or the process of a model ends.

    A server whose model has died still calls itself ready, and its clients wait for ever.

    Raises:
        RazorError: that has happened, and why as far as the log tells.
    """
    while server.alive:
        time.sleep(LOOK_SECONDS)
        # One that was killed stays in the list of processes, without a command line.
        alive = server.stubs() if stubs else {}
        gone = [name for pid, name in stubs.items() if pid not in alive]
        if gone and server.alive:
            with _log_shown(server):
                raise RazorError(
                    f"the process of model {gone[0]} ended (killed, or out of memory?); the server was "
                    "stopped"
                )
    code = server.process.wait() if server.process is not None else None
    with _log_shown(server):
        raise RazorError(f"the Triton server ended with exit code {code}: {server.reason()}")


@contextmanager
def _log_shown(server: TritonServer) -> Iterator[None]:
    tail = server.log_tail(12)
    if tail:
        err.print("the last lines of the server:\n" + tail, markup=False)
    yield
