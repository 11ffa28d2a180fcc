#!/usr/bin/env python3
"""Razor attention against dense attention on a GPU: decode and prefill of one layer.

    python benchmarks/kernels.py [--quick]      # needs `make plugin` and a torch for the GPU

For every model shape, batch, length and share of retrieval heads: time, bytes read, bytes/s, its share of
the copy bandwidth measured in the same run, and the speed-up over the dense peers that can be
imported (FlashInfer, torch, flash-attn). Everything that is compared takes turns on the same GPU; every
result is checked against float64 before it is timed. Prints a Markdown table; writes JSON and a PNG.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import torch
    from kernel_cases import (
        BATCHES,
        LENGTHS,
        PREFILL_CHUNKS,
        SHAPES,
        SHARES,
        DecodeCase,
        PrefillCase,
        Shape,
        Timing,
        copies_past_l2,
        decode_result,
        dense_bytes,
        draw,
        markdown,
        mixture,
        prefill_result,
        razor_bytes,
        tokens,
    )
    from kernel_peers import PAGE, DecodePeers, prefill_peers, versions
    from kernel_razor import (
        DecodeRun,
        Pool,
        PrefillRun,
        WrongResult,
        accept,
        plain_attention,
        relative_error,
        rope_table,
    )
    from kernel_timing import Calls, Clock, clocks, driver, one_line
except ImportError as e:
    sys.exit(
        f"error: {e}; the benchmark needs: pip install -e '.[torch]' with a torch for your GPU"
    )

import trt_razor
from trt_razor.console import Bars, say
from trt_razor.errors import RazorError
from trt_razor.files import write_text_atomic
from trt_razor.kernels import RazorKernels
from trt_razor.policy import RazorPolicy

ROOT = Path(__file__).resolve().parent.parent
METHOD = (
    "Times are medians of CUDA graphs replayed in turns, caches rotated past the L2. Ours rotates, stores, attends and "
    "folds; peers only attend. Bytes are the cache rows that the definition reads, each once."
)


class Benchmark:
    """One run on one device: pool of memory, clock, results so far."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.dtype = getattr(torch, args.dtype)
        self.policy = RazorPolicy(**args.policy)
        self.kernels = RazorKernels(args.library)
        self.clock = Clock(device, args.seconds)
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.l2 = 1 << 16
        if device.type == "cuda":
            self.l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.clocks_before = clocks(device)
        self.copy_bandwidth, self.copy_samples = self.clock.copy_bandwidth(args.copy_bytes)
        longest = max([*args.lengths, args.prefill_length]) + 1
        self.tables = {
            dim: rope_table(longest, dim, device) for dim in {s.head_dim for s in args.shapes}
        }
        self.pool = Pool(self._pool_bytes(), self.dtype, device)

    def _pool_bytes(self) -> int:
        """What the largest case wants, or most of what is free."""
        _forget(self.device)
        args = self.args
        wanted = max(
            dense_bytes(s, b, n + PAGE) + 8 * 256
            for s in args.shapes
            for b in args.batches
            for n in args.lengths
        )
        wanted = max(wanted, 4 * self.l2 + (1 << 20), 1 << 20)
        for s in args.shapes[:1]:
            wanted = max(
                wanted, PrefillRun.nbytes(s, args.prefill_length, s.num_kv_heads, self.policy)
            )
        if self.device.type != "cuda":
            return min(wanted, 1 << 30)
        free, _ = torch.cuda.mem_get_info(self.device)
        return min(wanted, int(free * 0.8))

    # Decode ---------------------------------------------------------------------------------------
    def decode(self, shape: Shape, batch: int, past: int) -> None:
        """All shares of one shape, batch and length, and the dense peers, side by side."""
        cases = [DecodeCase(shape, batch, past, share) for share in self.args.shares]
        contenders: dict[str, Calls] = {}
        errors: dict[int, float] = {}
        missing: set[int] = set()
        for retrieval in sorted({r for case in cases for r, _ in case.mixture}):
            self.pool.restart()
            size = DecodeRun.nbytes(shape, batch, past, retrieval, self.policy)
            room = self.pool.left // size
            if room == 0:
                missing.add(retrieval)
                continue
            read = razor_bytes(shape, batch, past, retrieval, self.policy)
            run = DecodeRun(
                self.kernels,
                self.pool,
                self.tables[shape.head_dim],
                shape,
                batch,
                past,
                retrieval,
                self.policy,
                copies_past_l2(read, self.l2, room),
            )
            where = f"{shape.name} batch {batch} × {tokens(past)}, {retrieval} retrieval heads"
            errors[retrieval] = accept(run.check(), self.dtype, where)
            contenders[f"razor {retrieval}"] = run.calls()
        peers: dict[str, Calls] = {}
        if not self._add_peers(peers, shape, batch, past):
            self.left_out.append(
                f"{shape.name} batch {batch} × {tokens(past)}, dense peers: memory does not suffice"
            )
        if not errors:
            self.left_out.append(
                f"{shape.name} batch {batch} × {tokens(past)}: memory does not suffice"
            )
            return
        timings = self.clock.measure({**contenders, **peers})
        for case in cases:
            if any(r in missing for r, _ in case.mixture):
                self.left_out.append(f"{case}: memory does not suffice")
                continue
            razor = [(_timed(timings, f"razor {r}"), w) for r, w in case.mixture]
            error = max(errors[r] for r, _ in case.mixture)
            found = _merge(timings, peers)
            self.rows.append(
                decode_result(case, self.policy, razor, found, self.copy_bandwidth, error)
            )

    def _add_peers(self, contenders: dict[str, Calls], shape: Shape, batch: int, past: int) -> bool:
        """Their calls on dense caches; False if there is no room for these."""
        self.pool.restart()
        length = past + 1
        rows = -(-length // PAGE) * PAGE
        size = 2 * batch * shape.num_kv_heads * rows * shape.head_dim * 2 + 2 * 256
        room = self.pool.left // size
        if room == 0:
            return False
        copies = copies_past_l2(dense_bytes(shape, batch, past), self.l2, room)
        queries = torch.randn(batch, shape.num_heads, shape.head_dim, device=self.device)
        peers = DecodePeers(shape, length, queries.to(self.dtype))
        for _ in range(copies):
            k, v = (
                self.pool.take(batch, shape.num_kv_heads, rows, shape.head_dim) for _ in range(2)
            )
            for name, call in peers.calls(k, v).items():
                contenders.setdefault(name, [])
                contenders[name] = [*contenders[name], call]
        return True

    # Prefill --------------------------------------------------------------------------------------
    def prefill(self, shape: Shape, length: int, chunk: int) -> None:
        cases = [PrefillCase(shape, length, chunk, share) for share in self.args.shares]
        contenders: dict[str, Calls] = {}
        errors: dict[int, float] = {}
        for retrieval in sorted({r for case in cases for r, _ in case.mixture}):
            self.pool.restart()
            if PrefillRun.nbytes(shape, length, retrieval, self.policy) > self.pool.left:
                self.left_out.append(
                    f"{shape.name} prefill {tokens(length)}: memory does not suffice"
                )
                return
            run = PrefillRun(
                self.kernels,
                self.pool,
                self.tables[shape.head_dim],
                shape,
                length,
                chunk,
                retrieval,
                self.policy,
            )
            where = f"{shape.name} prefill by {tokens(chunk)}, {retrieval} retrieval heads"
            errors[retrieval] = accept(run.check(), self.dtype, where)
            contenders[f"razor {retrieval}"] = run.calls()
        self.pool.restart()
        q, k, v = (
            self.pool.take(length, heads, shape.head_dim)
            for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        )
        peers: dict[str, Calls] = {}
        refused: dict[str, Timing | str] = {}
        for name, calls in prefill_peers(q, k, v, chunk).items():
            if problem := self._check_prefill_peer(calls, q, k, v, chunk):
                refused[name] = problem
            else:
                peers[name] = calls
        # A measured call is a chunk; a result is a prompt.
        prompts = {
            name: _whole(timing, -(-length // chunk))
            for name, timing in self.clock.measure({**contenders, **peers}).items()
        }
        for case in cases:
            razor = [(_timed(prompts, f"razor {r}"), w) for r, w in case.mixture]
            error = max(errors[r] for r, _ in case.mixture)
            found = {**refused, **_merge(prompts, peers)}
            self.rows.append(prefill_result(case, razor, found, error))

    def _check_prefill_peer(
        self, calls: Calls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: int
    ) -> str | None:
        """A peer that masks otherwise computes another thing, in another time."""
        start = (len(calls) - 1) * chunk
        try:
            out = calls[-1]()
        except Exception as e:  # a peer may fail in any way; it is named in the results
            return one_line(e)
        out = out.squeeze(0)
        if out.shape[0] != q.shape[0] - start:  # [heads, rows, D]
            out = out.transpose(0, 1)
        group = q.shape[1] // k.shape[1]
        for i in (0, out.shape[0] - 1):
            seen = start + i + 1
            reference = plain_attention(
                q[start + i, :group],
                k[:seen, 0],
                v[:seen, 0],
                torch.zeros(seen, dtype=torch.float64, device=q.device),
                q.shape[2] ** -0.5,
            )
            error = relative_error(out[i, :group], reference)
            if not error <= 2e-2:
                return f"left out: differs from float64 by {error:.2g} in row {i} of the last chunk"
        return None

    # The whole ------------------------------------------------------------------------------------
    def run(self, bars: Bars) -> None:
        args = self.args
        groups = [(s, b, n) for s in args.shapes for b in args.batches for n in args.lengths]
        prompts = [(args.shapes[0], args.prefill_length, c) for c in args.prefill_chunks]
        # Time goes with bytes; the bar is to tell how much is left.
        weights = [1e9 + min(dense_bytes(*g), self.pool.nbytes) for g in groups]
        total, done = sum(weights), 0.0
        for group, weight in zip(groups, weights, strict=True):
            self.decode(*group)
            done += weight
            self._save()
            _forget(self.device)
            bars("decode", round(done / total * 1000), 1000)
        for i, prompt in enumerate(prompts):
            self.prefill(*prompt)
            self._save()
            _forget(self.device)
            bars("prefill", i + 1, len(prompts))

    def document(self) -> dict[str, Any]:
        gpu = "CPU, dry run: no measurement"
        capability = None
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            gpu, capability = properties.name, [properties.major, properties.minor]
        return {
            "schema": 1,
            "machine": {
                "gpu": gpu,
                "capability": capability,
                "driver": driver() if self.device.type == "cuda" else "none",
                "clocks": clocks(self.device),
                "clocks_before": self.clocks_before,
                "cpu": platform.processor() or platform.machine(),
                "versions": f"{versions()}, librazor {self.kernels.build_info}",
            },
            "trt_razor": trt_razor.__version__,
            "method": METHOD,
            "dtype": self.args.dtype,
            "policy": self.policy.to_json(),
            "copy_tb_per_s": self.copy_bandwidth / 1e12,
            "copy_samples_tb_per_s": [x / 1e12 for x in self.copy_samples],
            "rows": self.rows,
            "left_out": self.left_out,
        }

    def output(self) -> Path:
        if self.args.output:
            return Path(self.args.output)
        name = self.document()["machine"]["gpu"].removeprefix("NVIDIA ")
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return ROOT / "benchmarks" / "results" / f"kernels-{slug}.json"

    def _save(self) -> None:
        """What there is so far, beside the place of the result: a run on a lent GPU may be cut off."""
        path = self.output()
        _write(path.with_name(f"{path.stem}.partial.json"), self.document())

    def finish(self) -> Path:
        path = self.output()
        _write(path, self.document())
        path.with_name(f"{path.stem}.partial.json").unlink(missing_ok=True)
        return path


def _write(path: Path, document: Mapping[str, Any]) -> None:
    write_text_atomic(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _forget(device: torch.device) -> None:
    """Graphs and caches of a case before the next one."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _timed(timings: Mapping[str, Timing | str], name: str) -> Timing:
    timing = timings[name]
    if isinstance(timing, str):
        raise RazorError(f"{name}: cannot be timed: {timing}")
    return timing


def _merge(timings: Mapping[str, Timing | str], names: Iterable[str]) -> dict[str, Timing | str]:
    """Variants of one peer, "flashinfer (…)", as one: the fastest."""
    best: dict[str, Timing | str] = {}
    for name in names:
        timing, peer = timings[name], name.split(" (")[0]
        old = best.get(peer)
        if old is None or isinstance(old, str):
            best[peer] = timing if not isinstance(timing, str) or old is None else old
        elif isinstance(timing, Timing) and timing.median < old.median:
            best[peer] = timing
    return best


def _whole(timing: Timing | str, calls: int) -> Timing | str:
    if isinstance(timing, str):
        return timing
    return Timing(timing.median * calls, timing.low * calls, timing.high * calls, timing.repeats)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--quick", action="store_true", help="two shapes, batches 1 and 8, 32K and 128K")
    p.add_argument("--shapes", nargs="+", choices=[s.name for s in SHAPES])
    p.add_argument("--batches", nargs="+", type=int)
    p.add_argument("--lengths", nargs="+", type=int, help="tokens cached before the step")
    p.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    p.add_argument("--prefill-length", type=int, default=131072)
    p.add_argument("--prefill-chunks", nargs="*", type=int, default=list(PREFILL_CHUNKS))
    p.add_argument("--dtype", choices=["float16", "bfloat16"], default="bfloat16")
    p.add_argument("--seconds", type=float, default=0.3, help="of measuring, for each contender")
    p.add_argument("--library", help="librazor.so; default: the one of make plugin")
    p.add_argument("--output", help="JSON file; default: benchmarks/results/kernels-<gpu>.json")
    p.add_argument("--no-plot", action="store_true")
    p.add_argument(
        "--policy",
        type=json.loads,
        default={},
        metavar="JSON",
        help='fields of RazorPolicy, such as {"min_window": 128, "heavy_hitters": 64}; default: the paper\'s',
    )
    # For the tests: the whole run in small, without a GPU.
    p.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    p.add_argument("--copy-bytes", type=int, default=2 << 30, help=argparse.SUPPRESS)
    p.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    quick = args.quick
    known: tuple[Shape, ...] = SHAPES
    if args.tiny:
        known = (Shape("tiny", 4, 2, 64), Shape("tiny-one", 2, 1, 64))
        args.shapes = None
    names = args.shapes or [s.name for s in (known[:2] if quick else known)]
    args.shapes = [s for s in known if s.name in names]
    args.batches = args.batches or ([1, 8] if quick else list(BATCHES))
    args.lengths = args.lengths or ([32768, 131072] if quick else list(LENGTHS))
    args.prefill_chunks = args.prefill_chunks[:1] if quick else args.prefill_chunks
    for share in args.shares:
        if not 0 <= share <= 1:
            p.error(f"--shares: expected 0 .. 1, found {share:g}")
        mixture(share, 1)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        reason = (
            "this torch is built without CUDA" if torch.version.cuda is None else "no GPU found"
        )
        print(
            f"error: benchmarks/kernels.py: expected an NVIDIA GPU: {reason}; nothing was measured",
            file=sys.stderr,
        )
        return 1
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if args.device == "cuda"
        else torch.device(args.device)
    )
    try:
        benchmark = Benchmark(args, device)
        say(
            f"librazor {benchmark.kernels.build_info}; copies at {benchmark.copy_bandwidth / 1e12:.2f} TB/s"
        )
        with Bars() as bars, torch.inference_mode():
            benchmark.run(bars)
        path = benchmark.finish()
        document = benchmark.document()
        if not args.no_plot:
            try:
                draw(document, path.with_suffix(".png"))
            except ImportError:
                say("no picture: it needs matplotlib, pip install -e '.[heads]'")
    except (RazorError, WrongResult) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was measured is in the .partial.json file", file=sys.stderr)
        return 130
    sys.stdout.write(markdown(document))
    say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
