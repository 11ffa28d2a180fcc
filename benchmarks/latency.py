#!/usr/bin/env python3
"""Dense engine beside Razor engine: time to first token, time per token, throughput, KV memory.

    python benchmarks/latency.py --backend tensorrt-llm --model qwen-7b --random-weights \\
        --lengths 8192 32768 131072 --batch 1 8 [--tp-size 2]       # in the NGC container
    python benchmarks/latency.py --backend tensorrt-llm --dense DIR --razor DIR
    python benchmarks/latency.py --backend onnxruntime --model smollm2-135m --lengths 512 2048

Both engines are open at the same time, each in a process of its own, and take turns. Prints Markdown tables
and writes JSON and a PNG beside each other.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib import metadata
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from latency_report import KINDS, draw, markdown, summarise
from latency_worker import KEY_VARIABLE

from engines import machine
from trt_razor import __version__
from trt_razor.cli_arguments import (
    Parser,
    model_arguments,
    policy,
    policy_arguments,
    policy_options,
)
from trt_razor.console import say
from trt_razor.engine import Engine
from trt_razor.errors import RazorError, UsageError
from trt_razor.files import write_text_atomic
from trt_razor.trtllm.cache_settings import read_settings

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
METHOD = (
    "Median (p10 – p90) over {rounds} rounds in which both engines took turns. A batch of random prompts is sent at "
    "once: first token from there on; per token while all sequences decode; tokens/s of the whole round, prompts "
    "included."
)


class Worker:
    """An engine in a process of its own (under mpirun with several ranks)."""

    def __init__(
        self, kind: str, engine: Path, args: argparse.Namespace, memory: float, folder: Path
    ) -> None:
        self.kind, self.log = kind, folder / f"{kind}.log"
        ranks = read_settings(engine).world_size if args.backend == "tensorrt-llm" else 1
        address, key = str(folder / f"{kind}.socket"), secrets.token_bytes(16)
        command = [sys.executable, str(HERE / "latency_worker.py"), "--backend", args.backend]
        command += ["--engine", str(engine), "--address", address, "--memory", f"{memory:.4f}"]
        if ranks > 1:
            command = [*args.mpirun.split(), "-n", str(ranks), *command]
        self._listener = Listener(address, "AF_UNIX", authkey=key)
        # Accept must give up when the worker died: look now and then.
        self._listener._listener._socket.settimeout(1.0)  # type: ignore[attr-defined]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, KEY_VARIABLE: key.hex()},
            )
        self._connection: Connection | None = None

    def wait(self, seconds: float) -> None:
        """Until the engine is open. Raises RazorError with the end of the log if it does not."""
        end = time.monotonic() + seconds
        while self._connection is None:
            with suppress(TimeoutError):
                self._connection = self._listener.accept()
                return
            if self.process.poll() is not None or time.monotonic() > end:
                raise self._failure("did not open its engine")

    def ask(self, **job: Any) -> dict[str, Any]:
        assert self._connection is not None
        try:
            self._connection.send_bytes(json.dumps(job).encode())
            answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise self._failure("died") from None
        if "error" in answer:
            raise RazorError(f"{self.kind}: {answer['error']}")
        return answer

    def _failure(self, what: str) -> RazorError:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines
        return RazorError(f"{self.kind} worker {what}: {errors[-1] if errors else 'no output'}")

    def close(self) -> None:
        """Stop it, gently at first."""
        if self._connection is not None:
            with suppress(OSError):
                self._connection.send_bytes(b'{"stop": true}')
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
            self._connection.close()
        self._listener.close()
        with suppress(ProcessLookupError):  # its process group: ranks, too
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def new_tokens(args: argparse.Namespace, length: int, batch: int, capacity: int) -> list[int]:
    """Tokens for each request of a batch: earlier ones get more, as prompts are read one after another
    and all sequences shall decode together for ``--new-tokens`` steps."""
    steps = -(-length // args.prefill_chunk) if args.prefill_chunk else 1
    wanted = [args.new_tokens + (batch - 1 - i) * steps for i in range(batch)]
    return [max(2, min(n, capacity - length)) for n in wanted]


def capacity(args: argparse.Namespace) -> int:
    """Tokens that the longest trial needs."""
    length = max(args.lengths)
    return length + max(new_tokens(args, length, max(args.batch), 1 << 40))


def build(args: argparse.Namespace, kind: str, output: Path) -> Path:
    """One of the two engines, by ``trt-razor build``. Raises RazorError with its last line."""
    command = [sys.executable, "-m", "trt_razor", "build", "--backend", args.backend]
    command += ["--output", str(output), "--force", "--max-seq-len", str(capacity(args))]
    command += ["--max-batch-size", str(max(args.batch))]
    command += ["--prefill-chunk", str(args.prefill_chunk)]
    for name in ("model", "checkpoint", "dtype"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    if args.random_weights:
        command.append("--random-weights")
    if args.backend == "tensorrt-llm":
        command += ["--tp-size", str(args.tp_size), "--kv-dtype", args.kv_dtype]
    if kind == "razor":
        command += ["--razor", "--heads", args.heads]
        for option in policy_options(args):
            value = getattr(args, option[2:].replace("-", "_"))
            if option == "--compression" and policy(args).compression is None:
                value = "none"
            command += [option, str(value)]
    say(f"building {kind}: {' '.join(command[2:])}")
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if found.returncode != 0:
        lines = found.stdout.strip().splitlines()
        raise RazorError(
            f"{kind}: {lines[-1].removeprefix('error: ') if lines else 'build failed'}"
        )
    return output


def gpus() -> tuple[str, str]:
    """(GPUs, driver) as nvidia-smi names them; empty without one."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "", ""
    lines = [line.split(", ") for line in found.stdout.strip().splitlines()]
    if found.returncode != 0 or not lines or any(len(line) != 2 for line in lines):
        return "", ""
    name = lines[0][0] if len(lines) == 1 else f"{len(lines)} × {lines[0][0]}"
    return name, lines[0][1]


def versions(backend: str) -> str:
    packages = {"tensorrt-llm": ("tensorrt_llm", "tensorrt"), "onnxruntime": ("onnxruntime",)}
    found = [f"trt_razor {__version__}"]
    for package in packages[backend]:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return ", ".join(found)


def measure(args: argparse.Namespace, workers: dict[str, Worker], document: dict[str, Any]) -> None:
    """Fill in rows, memory and what is left out; engines take turns, and take turns in going first."""
    about = {kind: w.ask(describe=args.lengths) for kind, w in workers.items()}
    document["pools"] = {kind: about[kind]["pool_bytes"] for kind in KINDS}
    columns = ("sequence_bytes", "sequence_blocks", "fit", "fit_in_pools")
    for i, length in enumerate(args.lengths):
        row: dict[str, Any] = {"length": length}
        for kind in KINDS:
            row[kind] = {c: about[kind][c][i] for c in columns if c in about[kind]}
        document["memory"].append(row)
    room = min(about[kind]["max_seq_len"] for kind in KINDS)
    for length in args.lengths:
        for batch in args.batch:
            where = f"{length} tokens × batch {batch}"
            tokens = new_tokens(args, length, batch, room)
            if length + 2 > room:
                document["left_out"].append(f"{where}: engines take {room} tokens")
                continue
            fit = {k: w.ask(describe=[length + max(tokens)])["fit"][0] for k, w in workers.items()}
            short = [f"{kind} {fit[kind]}" for kind in KINDS if fit[kind] < batch]
            if short:
                document["left_out"].append(f"{where}: sequences that fit: {', '.join(short)}")
                continue
            trials: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
            for turn in range(args.rounds + 1):  # the first one warms up
                for kind in KINDS if turn % 2 else KINDS[::-1]:
                    job = {"length": length, "new_tokens": tokens, "seed": turn}
                    trials[kind].append(workers[kind].ask(**job))
            trials = {kind: found[1:] for kind, found in trials.items()}
            if not all(trial["tpot"] for found in trials.values() for trial in found):
                document["left_out"].append(
                    f"{where}: sequences never decoded all together; raise --new-tokens"
                )
                continue
            found = {kind: summarise(trials[kind]) for kind in KINDS}
            document["rows"].append({"length": length, "batch": batch, **found})
            say(f"{where}: done")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(description=__doc__.splitlines()[0])
    p.add_argument("--backend", choices=["tensorrt-llm", "onnxruntime"], default="tensorrt-llm")
    p.add_argument(
        "--dense", type=Path, metavar="DIR", help="a dense engine, instead of building one"
    )
    p.add_argument("--razor", type=Path, metavar="DIR", help="a Razor engine of the same model")
    model_arguments(p)
    p.add_argument("--random-weights", action="store_true", help="no checkpoint: numbers at random")
    p.add_argument("--heads", default="auto", metavar="FILE|auto")
    p.add_argument("--dtype", choices=["float16", "bfloat16", "float32"])
    p.add_argument("--tp-size", type=int, default=1, metavar="N")
    p.add_argument("--kv-dtype", choices=["auto", "fp8"], default="auto")
    p.add_argument(
        "--prefill-chunk", type=int, metavar="N",
        help="0 = whole prompts (default for tensorrt-llm; 2048 for onnxruntime)",
    )  # fmt: skip
    policy_arguments(p)
    p.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768], metavar="N")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="B")
    p.add_argument("--new-tokens", type=int, default=64, metavar="N")
    p.add_argument("--rounds", type=int, default=5, metavar="N")
    p.add_argument(
        "--memory", type=float, default=0.9, metavar="X",
        help="share of free GPU memory for both KV caches, half each (default 0.9)",
    )  # fmt: skip
    p.add_argument("--mpirun", default="mpirun --allow-run-as-root", help="for several ranks")
    p.add_argument("--engines", type=Path, metavar="DIR", help="build there and keep them")
    p.add_argument(
        "--output", type=Path, help="JSON file; default: benchmarks/results/latency-….json"
    )
    p.add_argument("--no-plot", action="store_true")
    args = p.parse_args(argv)
    if (args.dense is None) != (args.razor is None):
        p.error("--dense and --razor go together")
    if args.dense is None and args.model is None and args.checkpoint is None:
        p.error("expected --model, --checkpoint, or --dense with --razor")
    if min(*args.lengths, *args.batch, args.rounds, 1) < 1 or args.new_tokens < 2:
        p.error("--lengths, --batch and --rounds: expected >= 1; --new-tokens: >= 2")
    if not 0 < args.memory < 1:
        p.error(f"--memory: expected a share between 0 and 1, found {args.memory:g}")
    if args.prefill_chunk is None:
        args.prefill_chunk = 2048 if args.backend == "onnxruntime" else 0
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build what is missing, measure, and return the document."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="trt-razor-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        place = args.engines or folder
        engines = {kind: getattr(args, kind) or build(args, kind, place / kind) for kind in KINDS}
        manifests = {
            kind: Engine.load(path, verify=False).manifest for kind, path in engines.items()
        }
        _check_pair(manifests, args.backend)
        args.prefill_chunk = manifests["razor"].prefill_chunk
        gpu, driver = gpus()
        document: dict[str, Any] = {
            "schema": 1,
            "backend": args.backend,
            "model": manifests["razor"].spec.name,
            "machine": {
                "gpu": gpu,
                "driver": driver,
                "cpu": machine(),
                "versions": versions(args.backend),
            },
            "method": METHOD.format(rounds=args.rounds),
            "new_tokens": args.new_tokens,
            "engines": {
                kind: {
                    "dtype": m.dtype,
                    "max_seq_len": m.max_seq_len,
                    "max_batch_size": m.max_batch_size,
                    "prefill_chunk": m.prefill_chunk,
                    "policy": m.policy.to_json() if m.policy else None,
                    "retrieval_share": m.heads.share if m.heads else None,
                    "facts": dict(m.facts),
                }
                for kind, m in manifests.items()
            },
            "rows": [],
            "memory": [],
            "left_out": [],
        }
        # One after another, so that the second finds what the first has left of the memory.
        share, workers = args.memory / 2, {}
        for kind, memory in zip(KINDS, (share, share / (1 - share)), strict=True):
            workers[kind] = Worker(kind, engines[kind], args, memory, folder)
            stack.callback(workers[kind].close)
            workers[kind].wait(1800)
        measure(args, workers, document)
        return document


def _check_pair(manifests: dict[str, Any], backend: str) -> None:
    dense, razor = (manifests[kind] for kind in KINDS)
    if dense.razor or not razor.razor:
        raise UsageError("engines: expected a dense one as --dense and a Razor one as --razor")
    if dense.spec != razor.spec:
        raise UsageError(f"engines: of different models, {dense.spec.name} and {razor.spec.name}")
    for m in (dense, razor):
        if m.backend != backend:
            raise UsageError(f"engines: expected backend {backend}, found {m.backend}")


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    try:
        document = run(args)
    except RazorError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    path = args.output
    if path is None:
        name = re.sub(r"[^a-z0-9.]+", "-", f"{document['model']}-{args.backend}".lower())
        path = ROOT / "benchmarks" / "results" / f"latency-{name}.json"
    write_text_atomic(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    if not args.no_plot:
        try:
            draw(document, path.with_suffix(".png"))
        except ImportError:
            say("no picture: it needs matplotlib, pip install -e '.[heads]'")
    sys.stdout.write(markdown(document))
    say(f"wrote {path}")
    return 0 if document["rows"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
