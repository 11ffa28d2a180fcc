"""A plan as a table for the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from trt_razor.planner import Plan


def human_bytes(n: float) -> str:
    """1536 -> '1.50 KiB': three significant digits or more, binary units."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    i = 0
    while abs(n) >= 1024 and i + 1 < len(units):
        n, i = n / 1024, i + 1
    return f"{n:.0f} {units[i]}" if i == 0 else f"{n:,.2f} {units[i]}"


def human_count(n: int) -> str:
    """134515008 -> '134.52 M': millions, from a billion on billions."""
    return f"{n / 1e9:,.2f} B" if n >= 1e9 else f"{n / 1e6:,.2f} M"


def count(n: int, thing: str) -> str:
    """'1 slot', '2 slots'."""
    return f"{n:,} {thing}" + "s" * (n != 1)


def render(result: Plan) -> RenderableType:
    """The plan as a compact table for ``rich.console.Console.print``."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    p = result
    gpus = p.tp_size * p.pp_size
    on = f" · {gpus} × {p.gpu.name}" if p.gpu else (f" · {gpus} GPUs" if gpus > 1 else "")
    table = Table(
        title=Text(f"{p.model} · {p.max_seq_len:,} tokens{on}", style="bold"),
        title_justify="left",
    )
    table.add_column("")
    for column in ("full KV", "Razor", "ratio"):
        table.add_column(column, justify="right")

    def row(label: str, full: str, razor: str, ratio: float | None = None) -> None:
        gain = Text(f"{ratio:.2f}×", style="bold green" if ratio > 1.005 else "") if ratio else ""
        table.add_row(Text(label), full, razor, gain)

    def speed(x: float | None) -> str:
        return "-" if x is None else f"{x:,.0f}"

    row(
        f"weights, {p.weight_dtype}" + (", per GPU" if gpus > 1 else ""),
        human_bytes(p.weight_bytes_per_gpu),
        human_bytes(p.weight_bytes_per_gpu),
    )
    row(
        f"KV per sequence, {p.kv_dtype}",
        human_bytes(p.kv_full_bytes),
        human_bytes(p.kv_razor_bytes),
        p.kv_full_bytes / p.kv_razor_bytes,
    )
    if gpus > 1:
        row(
            "KV per sequence and GPU",
            human_bytes(p.kv_full_bytes_per_gpu),
            human_bytes(p.kv_razor_bytes_per_gpu),
            p.kv_ratio,
        )
    if p.max_batch_full is not None and p.max_batch_razor is not None:
        batches = p.max_batch_razor / p.max_batch_full if p.max_batch_full else None
        row("largest batch", f"{p.max_batch_full:,}", f"{p.max_batch_razor:,}", batches)
        if p.pp_size == 1:
            full, razor = p.tokens_s_full, p.tokens_s_razor
            at = f"batch {p.batch}" if p.batch else "that batch"
            gain = razor / full if full and razor else None
            row(f"tokens/s at {at}, upper bound", speed(full), speed(razor), gain)
    if p.batch is not None:
        row(
            f"KV per GPU, batch {p.batch}",
            human_bytes(p.batch * p.kv_full_bytes_per_gpu),
            human_bytes(p.batch * p.kv_razor_bytes_per_gpu),
        )
    row("decode attention, expected", "", "", p.attention_speedup)

    window = min(p.policy.window(p.max_seq_len), p.max_seq_len)
    heavy = p.policy.heavy_hitters
    kept = [count(p.policy.sink_tokens, "sink")] + [count(heavy, "heavy hitter")] * (heavy > 0)
    means = count(p.policy.comp_tokens, "compensation token")
    starts = "never" if p.compression_starts is None else f"at {p.compression_starts:,} tokens"
    lines = [
        f"parameters {human_count(p.parameters)} · retrieval heads {p.retrieval_share:.1%}"
        + (f" ({p.rank_share:.1%} on a rank)" if p.tp_size > 1 else ""),
        f"local heads: {', '.join(kept)}, window {window:,} of {p.max_seq_len:,} tokens, "
        f"{means}; compression starts {starts}",
    ]
    notes = [Text(line) for line in lines]
    notes += [Text(f"assumed: {line}", style="dim") for line in p.assumptions]
    notes += [Text(f"warning: {line}", style="yellow") for line in p.warnings]
    return Group(table, *notes)
