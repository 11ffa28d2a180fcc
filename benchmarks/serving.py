#!/usr/bin/env python3
"""Dense engine beside Razor engine behind Triton: first token, time between tokens, throughput, KV bytes.

    python benchmarks/serving.py --dense DIR --razor DIR --concurrency 1 2 4 8 --prompt 128 1024 --output 64
    python benchmarks/serving.py --backend onnxruntime --model smollm2-135m --min-window 256
    python benchmarks/serving.py --url dense=HOST:8001 razor=HOST:9001 --tokenizer DIR    # servers that run

Starts a server for each engine (or takes those at the URLs), runs perf_analyzer or genai-perf over the
grid, both engines taking turns, and two probes of its own. Prints Markdown; writes JSON and a PNG.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import latency
from latency_report import KINDS
from serving_grid import STREAMS, Benchmark
from serving_load import GenaiPerf, PerfAnalyzer, find_genai_perf, find_perf_analyzer
from serving_probe import PromptMaker
from serving_report import draw, markdown
from serving_servers import at_urls, fit_together, package_versions, server_version, start

from engines import machine
from trt_razor import __version__
from trt_razor.cli_arguments import Parser, model_arguments, policy_arguments
from trt_razor.console import Bars, guarded, say
from trt_razor.engine import Engine
from trt_razor.files import write_text_atomic
from trt_razor.models.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
METHOD = (
    "Median (lowest – highest) of {rounds} round{s}{turns}, with {requests} requests each. Every prompt is "
    "other random words of exactly that many tokens; answers are greedy, streamed by model {model} over "
    "gRPC, and of a fixed length. {meaning} {kv}"
)
KV = {
    "metrics": "KV bytes used are the highest that the server's metrics showed.",
    "engine": "KV bytes used are what the sequences at a time need at their full length.",
}
MEANING = {
    "perf_analyzer": "First token is the first response; between tokens are all gaps between responses.",
    "genai-perf": "Figures are genai-perf's own: tokens are the texts tokenised again, times between "
    "tokens averages of a request each.",
}


# Command line -----------------------------------------------------------------------------------
def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(description=__doc__.splitlines()[0])
    p.add_argument("--dense", type=Path, metavar="DIR", help="a dense engine")
    p.add_argument("--razor", type=Path, metavar="DIR", help="a Razor engine of the same model")
    p.add_argument(
        "--url",
        nargs="+",
        default=[],
        metavar="[KIND=]HOST:GRPC",
        help="servers that run: dense, razor",
    )
    p.add_argument(
        "--metrics-url",
        nargs="+",
        default=[],
        metavar="[KIND=]HOST:PORT",
        help="default: gRPC's port + 1",
    )
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="of the engines at the URLs")
    p.add_argument("--served-model", default="ensemble", metavar="NAME", help="default ensemble")
    p.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    p.add_argument("--prompt", type=int, nargs="+", default=[128, 1024], metavar="TOKENS")
    p.add_argument("--output", type=int, nargs="+", default=[64], metavar="TOKENS")
    p.add_argument(
        "--requests", type=int, metavar="N", help="of a round (default: 2 for each at a time, >= 8)"
    )
    p.add_argument("--rounds", type=int, default=3, metavar="N")
    p.add_argument("--tool", choices=["perf_analyzer", "genai-perf"], default="perf_analyzer")
    p.add_argument(
        "--perf-analyzer",
        type=Path,
        metavar="FILE",
        help="default: TRT_RAZOR_PERF_ANALYZER, then beside the server's Python, then PATH",
    )
    p.add_argument("--genai-perf", type=Path, metavar="FILE")
    p.add_argument(
        "--python",
        type=Path,
        metavar="FILE",
        help="the server's Python (default: TRT_RAZOR_TRITON_PYTHON)",
    )
    p.add_argument(
        "--slots", type=int, metavar="N", help="of our own engines (default: all they have)"
    )
    p.add_argument(
        "--memory",
        type=float,
        default=0.9,
        metavar="X",
        help="TensorRT-LLM: share of free GPU memory for the KV caches of both",
    )
    p.add_argument(
        "--one-at-a-time", action="store_true", help="one server after the other, without turns"
    )
    p.add_argument(
        "--limit",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="of a run, and of a server's start",
    )
    p.add_argument("--no-probe", action="store_true", help="the grid only")
    p.add_argument(
        "--probe-prompt", type=int, default=4096, metavar="TOKENS", help="long prompt of the probe"
    )
    p.add_argument(
        "--chunk",
        type=int,
        metavar="TOKENS",
        help="prefill chunk of the servers (default: the engines')",
    )
    p.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="JSON; default: benchmarks/results/serving-….json",
    )
    p.add_argument("--no-plot", action="store_true")
    b = p.add_argument_group("engines built here, as benchmarks/latency.py does")
    model_arguments(b)  # type: ignore[arg-type]
    b.add_argument("--backend", choices=["tensorrt-llm", "onnxruntime"], default="onnxruntime")
    b.add_argument("--random-weights", action="store_true", help="no checkpoint: numbers at random")
    b.add_argument("--heads", default="auto", metavar="FILE|auto")
    b.add_argument("--dtype", choices=["float16", "bfloat16", "float32"])
    b.add_argument("--tp-size", type=int, default=1, metavar="N")
    b.add_argument("--kv-dtype", choices=["auto", "fp8"], default="auto")
    b.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="default 256 for onnxruntime, else whole prompts",
    )
    b.add_argument("--engines", type=Path, metavar="DIR", help="build there and keep them")
    policy_arguments(p)
    args = p.parse_args(argv)
    _check(p, args)
    return args


def _check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What argparse cannot see; sets ``kinds``, ``urls``, ``metrics``, and what ``latency.build`` reads."""
    if (args.dense is None) != (args.razor is None):
        p.error("--dense and --razor go together")
    if not args.url and args.dense is None and args.model is None and args.checkpoint is None:
        p.error("expected --dense with --razor, --model, --checkpoint or --url")
    args.urls, args.metrics = (
        _by_kind(p, "--url", args.url),
        _by_kind(p, "--metrics-url", args.metrics_url),
    )
    args.kinds = [k for k in KINDS if not args.urls or k in args.urls]
    if args.urls and args.tokenizer is None and args.dense is None:
        p.error("--url needs --tokenizer (or --dense and --razor, whose tokenizer is taken)")
    counts = [
        *args.concurrency,
        *args.prompt,
        args.rounds,
        args.requests or 1,
        args.slots or 1,
        args.chunk or 1,
    ]
    if min(counts) < 1 or min(args.output) < 2 or args.probe_prompt < 1:
        p.error("expected numbers >= 1, and --output >= 2")
    if not 0 < args.memory < 1 or not args.limit > 0:
        p.error("expected --memory between 0 and 1, and --limit > 0")
    if args.prefill_chunk is None:
        args.prefill_chunk = 256 if args.backend == "onnxruntime" else 0
    args.batch, args.new_tokens = [args.slots or max(STREAMS, *args.concurrency)], max(args.output)
    args.lengths = [*args.prompt, *([] if args.no_probe else [args.probe_prompt])]


def _by_kind(p: argparse.ArgumentParser, option: str, values: Sequence[str]) -> dict[str, str]:
    """KIND → HOST:PORT; without a kind: dense, then razor."""
    found: dict[str, str] = {}
    for i, value in enumerate(values):
        kind, _, url = value.rpartition("=")
        kind = kind or (KINDS[i] if len(values) == len(KINDS) else "")
        if kind not in KINDS or kind in found or not re.fullmatch(r"[^/\s]+:\d{1,5}", url):
            p.error(f"{option} {value}: expected dense=HOST:PORT or razor=HOST:PORT, each once")
        found[kind] = url
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build and start what is missing, measure, and return the document."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="trt-razor-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        python = args.python or (
            Path(p) if (p := os.environ.get("TRT_RAZOR_TRITON_PYTHON")) else None
        )
        inner = find_perf_analyzer(args.perf_analyzer, python, folder / "libraries")
        engines: dict[str, Path] = {}
        if args.dense is not None or not args.urls:
            place = args.engines or folder
            engines = {k: getattr(args, k) or latency.build(args, k, place / k) for k in KINDS}
        manifests = {k: Engine.load(path, verify=False).manifest for k, path in engines.items()}
        if manifests:
            latency._check_pair(manifests, manifests["dense"].backend)
        tokenizer = args.tokenizer or engines["razor"] / "tokenizer"
        tool: PerfAnalyzer | GenaiPerf = inner
        if args.tool == "genai-perf":
            tool = find_genai_perf(args.genai_perf, python, inner, tokenizer)
        say(f"{inner.name} {inner.version}: {inner.executable}")
        bench = Benchmark(
            args, tool, PromptMaker(Tokenizer.load(tokenizer)), manifests, engines, folder
        )
        together = bool(args.urls) or fit_together(args, manifests)
        version = ""
        with Bars() as bars:
            for kinds in [args.kinds] if together else [[k] for k in args.kinds]:
                with ExitStack() as servers:
                    targets = at_urls(args) if args.urls else []
                    share = args.memory / len(kinds)
                    for kind in kinds if not args.urls else []:
                        targets.append(start(args, kind, engines[kind], share, folder, servers))
                        share = share / (1 - share)  # of what the first one leaves
                    version = server_version(targets[0].grpc)
                    bench.measure(targets, bars)
                    if not args.no_probe:
                        bench.probe(targets, bars)
        return document(args, bench, together and len(args.kinds) > 1, version)


def document(
    args: argparse.Namespace, bench: Benchmark, turns: bool, version: str
) -> dict[str, Any]:
    """All that was found, for the reports."""
    gpu, driver = latency.gpus()
    manifest = bench.manifests.get("razor")
    backend = manifest.backend if manifest else "servers at URLs"
    tool = f"{bench.tool.name} {bench.tool.version}"
    made = [f"trt_razor {__version__}", f"server {version}", tool]
    if manifest and not args.urls:
        made[1:1] = package_versions(args.python, backend)
    counts = sorted({c.requests(args.requests) for c in bench.grid}) or [0]
    rows = bench.rows()
    sources = {row[k]["kv"]["source"] for row in rows for k in args.kinds if k in row}
    method = METHOD.format(
        rounds=args.rounds,
        s="s" if args.rounds > 1 else "",
        turns=" in which both engines took turns" if turns else "",
        requests=str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}",
        model=args.served_model,
        meaning=MEANING[bench.tool.name],
        kv=" ".join(KV[source] for source in sorted(sources)),
    )
    return {
        "schema": 1,
        "model": manifest.spec.name if manifest else args.served_model,
        "backend": backend,
        "machine": {"gpu": gpu, "driver": driver, "cpu": machine(), "versions": ", ".join(made)},
        "method": method,
        "kinds": args.kinds,
        "turns": turns,
        "engines": {
            kind: {
                "dtype": m.dtype, "max_seq_len": m.max_seq_len, "max_batch_size": m.max_batch_size,
                "slots": args.slots or m.max_batch_size, "prefill_chunk": m.prefill_chunk,
                "policy": m.policy.to_json() if m.policy else None,
                "retrieval_share": m.heads.share if m.heads else None,
            }
            for kind, m in bench.manifests.items()
        },
        "rows": rows,
        "probe": bench.probes,
        "left_out": bench.left_out,
        "failed": bench.failed,
    }  # fmt: skip


def report(args: argparse.Namespace) -> int:
    found = run(args)
    path = args.results
    if path is None:
        name = re.sub(r"[^a-z0-9.]+", "-", f"{found['model']}-{found['backend']}".lower())
        path = ROOT / "benchmarks" / "results" / f"serving-{name}.json"
    write_text_atomic(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if found["rows"] and not args.no_plot:
        try:
            draw(found, path.with_suffix(".png"))
        except ImportError:
            say("no picture: it needs matplotlib, pip install -e '.[heads]'")
    sys.stdout.write(markdown(found))
    say(f"wrote {path}")
    return 0 if found["rows"] and not found["failed"] else 1


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    return guarded(lambda: report(args))


if __name__ == "__main__":
    raise SystemExit(main())
