"""An engine as lines for the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from trt_razor.engine import Engine


def render(engine: Engine) -> Text:
    """What a verified engine is, one fact a line, for ``rich.console.Console.print``."""
    from rich.text import Text

    from trt_razor.plan_table import count

    m = engine.manifest
    s, facts = m.spec, ", ".join(f"{k} {v}" for k, v in m.facts.items())
    rows = [
        ("engine", str(engine.directory)),
        ("built", f"{m.created} by trt_razor {m.trt_razor}"),
        ("backend", f"{m.backend} ({facts})"),
        (
            "model",
            f"{s.name}: {s.num_layers} layers, {s.num_heads} heads, {s.num_kv_heads} KV heads",
        ),
        ("fingerprint", s.fingerprint()[:16]),
        ("checkpoint", m.checkpoint[:16]),
        ("limits", f"{count(m.max_batch_size, 'slot')} × {m.max_seq_len:,} tokens, {m.dtype}"),
        (
            "prefill",
            f"chunks of {m.prefill_chunk:,} tokens" if m.prefill_chunk else "whole prompts",
        ),
        ("KV per slot", f"{m.kv_bytes_per_slot:,} bytes (dense: {m.dense_kv_bytes_per_slot:,})"),
    ]
    if m.policy is not None and m.heads is not None:
        p, h = m.policy, m.heads
        c = f"{p.min_window:,}"
        if p.compression:
            c = f"n / {p.compression}, at least {c}"
        kept = (
            count(p.sink_tokens, "sink")
            + ", "
            + (f"{count(p.heavy_hitters, 'heavy hitter')}, " if p.heavy_hitters else "")
            + f"window {c}, "
            + count(p.comp_tokens, "compensation token")
        )
        rows += [
            ("heads", f"{h.retrieval_heads} retrieve ({h.share:.1%}), {h.method}"),
            ("local heads", kept),
        ]
    else:
        rows.append(("attention", "dense"))
    rows += [("file", f"{f.path}  {f.size:,} bytes  sha256 {f.sha256[:12]}… ok") for f in m.files]
    return Text("\n").join(
        Text.assemble((f"{name:<13}", "bold"), " ".join(value.split())) for name, value in rows
    )
