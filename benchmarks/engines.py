#!/usr/bin/env python3
"""Engines end to end on this machine: build, load, prefill, decode, KV bytes; dense beside Razor.

    python benchmarks/engines.py --contexts 1000 4000

Dense and Razor take turns within one run. Prints a Markdown table of medians with the spread (min –
max) and writes JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from trt_razor import __version__
from trt_razor.build import BuildRequest, build_engine
from trt_razor.engine import Engine
from trt_razor.files import write_text_atomic
from trt_razor.policy import RazorPolicy

ROOT = Path(__file__).resolve().parent.parent


def machine() -> str:
    """CPU model, cores and memory, for the table's caption."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"


class Runner:
    """One sequence in one slot of an open engine."""

    def __init__(self, engine: Engine) -> None:
        self.chunk = engine.manifest.prefill_chunk or engine.manifest.max_seq_len
        self.session = engine.open(1)
        self.n = 0

    def feed(self, tokens: np.ndarray) -> float:
        """Seconds for tokens that follow the cached ones, in prefill chunks."""
        start = time.perf_counter()
        for a in range(0, len(tokens), self.chunk):
            part = tokens[None, a : a + self.chunk]
            size = part.shape[1]
            self.session.forward(
                0, part, np.array([self.n]), np.array([size]), np.array([[size - 1]])
            )
            self.n += size
        return time.perf_counter() - start

    def restart(self) -> None:
        self.session.reset(0)
        self.n = 0


def spread(values: list[float], digits: int = 1) -> str:
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} – {max(values):.{digits}f})"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--min-window", type=int, default=256)
    p.add_argument("--max-seq-len", type=int, default=4608)
    p.add_argument("--contexts", type=int, nargs="+", default=[1000, 4000])
    p.add_argument("--decode-steps", type=int, default=32)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "engines.json")
    args = p.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="trt-razor-bench-"))
    rows: dict[str, dict[str, object]] = {"dense": {}, "razor": {}}
    runners = {}
    try:
        for name, row in rows.items():
            start = time.perf_counter()
            engine = build_engine(
                BuildRequest(
                    model=args.model,
                    razor=name == "razor",
                    backend="onnxruntime",
                    output=folder / name,
                    policy=RazorPolicy(min_window=args.min_window),
                    max_seq_len=args.max_seq_len,
                )
            )
            row["build_s"] = time.perf_counter() - start
            start = time.perf_counter()
            runners[name] = Runner(Engine.load(engine.directory))
            row["load_s"] = time.perf_counter() - start
            row["kv_bytes"] = runners[name].session.kv_bytes
        rng = np.random.default_rng(0)
        tokens = rng.integers(1000, 40000, args.max_seq_len).astype(np.int32)
        for n in args.contexts:
            for name in rows:
                rows[name][f"prefill_{n}"], rows[name][f"decode_{n}"] = [], []
            for _ in range(args.rounds):
                for name, runner in runners.items():
                    runner.restart()
                    rows[name][f"prefill_{n}"].append(n / runner.feed(tokens[:n]))  # type: ignore[attr-defined]
                # Decode in turns, a few steps each, so that a slow phase of the machine hits both.
                for _ in range(args.decode_steps // 8):
                    for name, runner in runners.items():
                        at = runner.n
                        seconds = sum(runner.feed(tokens[at + i : at + i + 1]) for i in range(8))
                        rows[name][f"decode_{n}"].append(8 / seconds)  # type: ignore[attr-defined]
                print(f"context {n}: round done", file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    result = {
        "machine": machine(),
        "model": args.model,
        "min_window": args.min_window,
        "max_seq_len": args.max_seq_len,
        "trt_razor": __version__,
        "rows": rows,
    }
    write_text_atomic(args.output, json.dumps(result, indent=1) + "\n")
    print(
        f"{args.model}, float32, onnxruntime, window max({args.min_window}, n/5), on {machine()}\n"
    )
    print("| | dense | Razor |\n|---|---|---|")
    d, r = rows["dense"], rows["razor"]
    print(f"| build, s | {d['build_s']:.1f} | {r['build_s']:.1f} |")
    print(f"| load and verify, s | {d['load_s']:.1f} | {r['load_s']:.1f} |")
    print(
        f"| KV bytes, 1 slot × {args.max_seq_len:,} tokens | {d['kv_bytes']:,} | {r['kv_bytes']:,} |"
    )
    for n in args.contexts:
        for phase in ("prefill", "decode"):
            cells = [spread(rows[x][f"{phase}_{n}"]) for x in rows]  # type: ignore[arg-type]
            what = f"{phase} tokens/s, " + (
                f"{n:,}-token prompt" if phase == "prefill" else f"after {n:,} tokens"
            )
            print(f"| {what} | {cells[0]} | {cells[1]} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
