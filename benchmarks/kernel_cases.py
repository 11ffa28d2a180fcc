"""What benchmarks/kernels.py measures, counted and drawn: shapes, bytes, statistics, tables. No torch.

A layer has a whole number of retrieval heads. A share in between, such as 0.15 of one KV head, is a
mixture of layers with the whole numbers below and above; its time and bytes are the average layer's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_razor.policy import RazorPolicy

ELEMENT = 2
"""Bytes of an fp16 or bf16 number."""


@dataclass(frozen=True)
class Shape:
    """Heads of one layer on one GPU."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


SHAPES = (
    Shape("llama-3-8b", 32, 8, 128),
    Shape("qwen2.5-72b/tp8", 8, 1, 128),
    Shape("llama-2-7b", 32, 32, 128),
    Shape("qwen1.5-72b/tp8", 8, 8, 128),
)
BATCHES = (1, 8, 32)
LENGTHS = (8192, 32768, 131072, 524288)
SHARES = (0.15, 0.33, 1.0)
PREFILL_CHUNKS = (4096, 8192)


@dataclass(frozen=True)
class DecodeCase:
    """One token for each of ``batch`` sequences that hold ``past`` tokens."""

    shape: Shape
    batch: int
    past: int
    share: float

    @property
    def mixture(self) -> tuple[tuple[int, float], ...]:
        return mixture(self.share, self.shape.num_kv_heads)

    def __str__(self) -> str:
        return f"{self.shape.name} batch {self.batch} × {tokens(self.past)} share {self.share:g}"


@dataclass(frozen=True)
class PrefillCase:
    """A prompt of ``length`` tokens in chunks."""

    shape: Shape
    length: int
    chunk: int
    share: float

    @property
    def mixture(self) -> tuple[tuple[int, float], ...]:
        return mixture(self.share, self.shape.num_kv_heads)

    def __str__(self) -> str:
        return (
            f"{self.shape.name} prefill {tokens(self.length)} by {tokens(self.chunk)} "
            f"share {self.share:g}"
        )


def decode_cases(
    shapes: Sequence[Shape], batches: Sequence[int], lengths: Sequence[int], shares: Sequence[float]
) -> list[DecodeCase]:
    return [
        DecodeCase(shape, batch, past, share)
        for shape in shapes
        for batch in batches
        for past in lengths
        for share in shares
    ]


# Bytes --------------------------------------------------------------------------------------------
def mixture(share: float, num_kv_heads: int) -> tuple[tuple[int, float], ...]:
    """((R, weight), …): layers with R retrieval heads whose average is ``share`` of the KV heads."""
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected 0 .. 1, found {share}")
    exact = share * num_kv_heads
    low = math.floor(exact + 1e-9)
    part = exact - low
    if part < 1e-9:
        return ((low, 1.0),)
    return ((low, 1 - part), (low + 1, part))


def row_bytes(head_dim: int) -> int:
    """A key and a value."""
    return 2 * head_dim * ELEMENT


def dense_bytes(shape: Shape, batch: int, past: int) -> int:
    """Cache bytes that a dense decode step must read, the new token's row included."""
    return batch * shape.num_kv_heads * (past + 1) * row_bytes(shape.head_dim)


def razor_bytes(shape: Shape, batch: int, past: int, retrieval: int, policy: RazorPolicy) -> int:
    """Cache bytes that a decode step with ``retrieval`` retrieval heads must read.

    Rows that the definition names, each once: sinks, heavy hitters and window, the new token, and
    the fp32 compensation tokens with their log-weights.
    """
    full = (past + 1) * row_bytes(shape.head_dim)
    folded = policy.dropped(past) - policy.heavy(past)
    local = (past + 1 - folded) * row_bytes(shape.head_dim)
    if folded:
        local += policy.comp_tokens * (2 * shape.head_dim + 1) * 4
    return batch * (retrieval * full + (shape.num_kv_heads - retrieval) * local)


def cache_size(shape: Shape, batch: int, n_max: int, retrieval: int, policy: RazorPolicy) -> int:
    """Bytes of the keys and values that a layer's caches hold, compensation tokens apart."""
    local = policy.local_rows(n_max) if retrieval < shape.num_kv_heads else 0
    rows = retrieval * n_max + (shape.num_kv_heads - retrieval) * local
    return batch * rows * row_bytes(shape.head_dim)


def copies_past_l2(bytes_read: int, l2_bytes: int, room: int) -> int:
    """Caches to take turns with, so that none is still in L2 when it comes round again."""
    wanted = 1 if bytes_read > 4 * l2_bytes else -(-4 * l2_bytes // max(1, bytes_read))
    return max(1, min(wanted, room, 64))


# Statistics ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, 10th and 90th percentile."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        if not samples:
            raise ValueError("Timing: no samples")
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered),
            ordered[round(last * 0.1)],
            ordered[round(last * 0.9)],
            len(ordered),
        )

    @classmethod
    def average(cls, parts: Sequence[tuple[Timing, float]]) -> Timing:
        """Of an average layer: parts are (timing, weight), weights sum to 1."""
        return cls(
            sum(t.median * w for t, w in parts),
            sum(t.low * w for t, w in parts),
            sum(t.high * w for t, w in parts),
            min(t.repeats for t, _ in parts),
        )


# Results ------------------------------------------------------------------------------------------
def decode_result(
    case: DecodeCase,
    policy: RazorPolicy,
    razor: Sequence[tuple[Timing, float]],
    peers: Mapping[str, Timing | str],
    copy_bandwidth: float,
    error: float,
) -> dict[str, Any]:
    """One row of the results. ``peers``: a timing, or why there is none; bandwidth in bytes/s."""
    timing = Timing.average(razor)
    read = sum(
        w * razor_bytes(case.shape, case.batch, case.past, r, policy) for r, w in case.mixture
    )
    dense = dense_bytes(case.shape, case.batch, case.past)
    rate = read / (timing.median * 1e-6)
    result: dict[str, Any] = {
        "kind": "decode",
        "shape": case.shape.name,
        "batch": case.batch,
        "past": case.past,
        "share": case.share,
        "retrieval_heads": [[r, round(w, 6)] for r, w in case.mixture],
        "us": timing.median,
        "us_p10": timing.low,
        "us_p90": timing.high,
        "repeats": timing.repeats,
        "bytes": round(read),
        "dense_bytes": dense,
        "byte_ratio": dense / read,
        "tb_per_s": rate / 1e12,
        "share_of_copy": rate / copy_bandwidth,
        "error": error,
    }
    result["peers"] = _peer_results(peers, timing)
    return result


def prefill_result(
    case: PrefillCase,
    razor: Sequence[tuple[Timing, float]],
    peers: Mapping[str, Timing | str],
    error: float,
) -> dict[str, Any]:
    timing = Timing.average(razor)
    return {
        "kind": "prefill",
        "shape": case.shape.name,
        "length": case.length,
        "chunk": case.chunk,
        "share": case.share,
        "retrieval_heads": [[r, round(w, 6)] for r, w in case.mixture],
        "us": timing.median,
        "us_p10": timing.low,
        "us_p90": timing.high,
        "repeats": timing.repeats,
        "error": error,
        "peers": _peer_results(peers, timing),
    }


def _peer_results(peers: Mapping[str, Timing | str], timing: Timing) -> dict[str, Any]:
    return {
        name: peer
        if isinstance(peer, str)
        else {
            "us": peer.median,
            "us_p10": peer.low,
            "us_p90": peer.high,
            "speedup": peer.median / timing.median,
        }
        for name, peer in peers.items()
    }


def best_speedup(row: Mapping[str, Any]) -> float | None:
    """Over the fastest peer."""
    found = [p["speedup"] for p in row["peers"].values() if isinstance(p, dict)]
    return min(found, default=None)


# Tables -------------------------------------------------------------------------------------------
def tokens(n: int) -> str:
    return f"{n // 1024}K" if n >= 1024 and n % 1024 == 0 else str(n)


def markdown(document: Mapping[str, Any]) -> str:
    """The whole run: machine, decode, prefill, what was left out and why."""
    machine = document["machine"]
    lines = [
        f"{machine['gpu']}, driver {machine['driver']}, {machine['versions']}; {machine['clocks']}. "
        f"Copy bandwidth in this run: {document['copy_tb_per_s']:.2f} TB/s. {document['method']}",
    ]
    for kind, head in (
        (
            "decode",
            ["model", "batch", "tokens", "share", "µs (p10 – p90)", "MB read", "TB/s", "of copy"],
        ),
        ("prefill", ["model", "tokens", "chunk", "share", "ms (p10 – p90)"]),
    ):
        rows = [r for r in document["rows"] if r["kind"] == kind]
        if not rows:
            continue
        peers = list(dict.fromkeys(name for r in rows for name in r["peers"]))
        lines += ["", "| " + " | ".join([*head, *(f"× {p}" for p in peers)]) + " |"]
        lines += ["|" + "---|" * (len(head) + len(peers))]
        cells = _decode_cells if kind == "decode" else _prefill_cells
        for r in rows:
            found = [r["peers"].get(p, "–") for p in peers]
            speed = [f"{p['speedup']:.2f}" if isinstance(p, dict) else "–" for p in found]
            lines.append("| " + " | ".join([*cells(r), *speed]) + " |")
    if document["left_out"]:
        lines += ["", "Left out:", ""]
        lines += [f"* {text}" for text in document["left_out"]]
    return "\n".join(lines) + "\n"


def _decode_cells(r: Mapping[str, Any]) -> list[str]:
    return [
        r["shape"],
        str(r["batch"]),
        tokens(r["past"]),
        f"{r['share']:g}",
        f"{r['us']:.1f} ({r['us_p10']:.1f} – {r['us_p90']:.1f})",
        f"{r['bytes'] / 1e6:.1f}",
        f"{r['tb_per_s']:.2f}",
        f"{r['share_of_copy']:.0%}",
    ]


def _prefill_cells(r: Mapping[str, Any]) -> list[str]:
    low, mid, high = (r[k] / 1000 for k in ("us_p10", "us", "us_p90"))
    return [
        r["shape"],
        tokens(r["length"]),
        tokens(r["chunk"]),
        f"{r['share']:g}",
        f"{mid:.2f} ({low:.2f} – {high:.2f})",
    ]


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Decode: share of copy bandwidth, and speed-up at the smallest share, by length and batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in document["rows"] if r["kind"] == "decode"]
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    if not shapes:
        return
    share = min(r["share"] for r in rows)
    rows = [r for r in rows if r["share"] == share]
    figure, axes = pyplot.subplots(
        2, len(shapes), figsize=(3.2 * len(shapes), 6), sharex=True, sharey="row", squeeze=False
    )
    for column, shape in enumerate(shapes):
        top, bottom = axes[0][column], axes[1][column]
        for batch, line in _by_batch(rows, shape):
            x = [r["past"] for r in line]
            top.plot(x, [r["share_of_copy"] for r in line], marker="o", label=f"batch {batch}")
            speed = [(r["past"], s) for r in line if (s := best_speedup(r)) is not None]
            bottom.plot([a for a, _ in speed], [b for _, b in speed], marker="o")
        ideal = sorted({r["past"]: r["byte_ratio"] for r in rows if r["shape"] == shape}.items())
        bottom.plot(*zip(*ideal, strict=True), "k--", linewidth=1, label="bytes saved")
        top.set_title(shape)
        top.axhline(1, color="gray", linewidth=0.5)
        bottom.axhline(1, color="gray", linewidth=0.5)
        bottom.set_xscale("log", base=2)
        bottom.set_xticks([n for n, _ in ideal], [tokens(n) for n, _ in ideal], minor=False)
        bottom.set_xlabel("tokens")
    axes[0][0].set_ylabel("share of copy bandwidth")
    axes[1][0].set_ylabel("speed-up over best dense peer")
    axes[0][0].set_ylim(bottom=0)
    axes[1][0].set_ylim(bottom=0)
    axes[0][0].legend()
    axes[1][0].legend()
    figure.suptitle(f"{document['machine']['gpu']}, decode, {share:g} of KV heads retrieve")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _by_batch(
    rows: Sequence[Mapping[str, Any]], shape: str
) -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
    mine = [r for r in rows if r["shape"] == shape]
    for batch in sorted({r["batch"] for r in mine}):
        yield batch, sorted((r for r in mine if r["batch"] == batch), key=lambda r: r["past"])
