"""Layers and schedules of calls: chosen to cross every boundary, and drawn at random."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from harness import Call, Rig
from razor_layers import Layer

from trt_razor.policy import RazorPolicy

# Layers -------------------------------------------------------------------------------------------
POLICIES = {
    "window": RazorPolicy(sink_tokens=2, min_window=6, compression=None),
    "no-sinks": RazorPolicy(sink_tokens=0, min_window=5, compression=None),
    "one-token-window": RazorPolicy(sink_tokens=3, min_window=1, compression=None),
    "compression": RazorPolicy(sink_tokens=4, min_window=3, compression=3),
    "half": RazorPolicy(sink_tokens=1, min_window=8, compression=2),
    "many-sinks": RazorPolicy(sink_tokens=18, min_window=4, compression=None),
    "nothing-dropped": RazorPolicy(sink_tokens=4, min_window=64, compression=None),
}

AXES: dict[str, list[Any]] = {
    "head_dim": [64, 96, 128, 256],
    "group": [1, 2, 3, 4, 7, 8, 16, 20],
    "dtype": [torch.float16, torch.bfloat16],
    # scales of keys and values
    "fp8": [None, None, (None, None), (0.0625, 0.25), (0.03, 0.017)],
    "position": [
        ("half", "split", 0),
        ("half", "pairs", 0),
        ("half", "split", 32),
        ("interleaved", "pairs", 0),
        ("interleaved", "split", 0),
        ("interleaved", "pairs", 48),
        ("alibi", "split", 0),
        ("none", "split", 0),
    ],
    "comp_tokens": [0, 1, 5, 32],
    # (KV heads, retrieval heads)
    "heads": [(2, ()), (2, (0, 1)), (2, (1,)), (2, (0,)), (4, (0, 2)), (3, (1,))],
    "policy": list(POLICIES.values()),
    "spare_rows": [0, 3],
    "heavy_hitters": [0, 3],
}


def layer_of(choice: dict[str, Any], **changes: Any) -> Layer:
    """The layer of one value of each axis."""
    position, table, rotary_dim = choice["position"]
    comp_tokens = min(choice["comp_tokens"], 1 if position == "alibi" else 256)
    heavy_hitters = 0 if position == "alibi" else choice["heavy_hitters"]
    num_kv_heads, retrieval = choice["heads"]
    k_scale, v_scale = choice["fp8"] or (None, None)
    layer = Layer(
        num_kv_heads=num_kv_heads,
        group=choice["group"],
        head_dim=choice["head_dim"],
        retrieval=retrieval,
        dtype=choice["dtype"],
        fp8=choice["fp8"] is not None,
        position=position,
        table=table,
        rotary_dim=rotary_dim,
        policy=choice["policy"].with_(comp_tokens=comp_tokens, heavy_hitters=heavy_hitters),
        k_scale=k_scale,
        v_scale=v_scale,
        spare_rows=choice["spare_rows"],
    )
    return replace(layer, **changes)


def pairwise(axes: dict[str, list[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Choices that hold every pair of values of every two axes at least once (greedy)."""
    rng = random.Random(seed)
    sizes = {name: range(len(values)) for name, values in axes.items()}
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(axes, 2)
        for i, j in itertools.product(sizes[a], sizes[b])
    }

    def covered(row: dict[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(row, 2)} & missing

    rows = []
    while missing:
        a, i, b, j = rng.choice(sorted(missing))
        candidates = []
        for _ in range(40):
            row: dict[str, int] = {}
            for name in axes:  # in the axes' order, so that pairs are found
                row[name] = {a: i, b: j}.get(name, rng.choice(sizes[name]))
            candidates.append(row)
        best = max(candidates, key=lambda row: len(covered(row)))
        missing -= covered(best)
        rows.append({name: axes[name][k] for name, k in best.items()})
    return rows


# What runs under sanitizers, too slow for everything: every head dimension, both dtypes, FP8, all positions.
SANITIZED = [
    layer_of(dict(zip(AXES, values, strict=True)))
    for values in (
        (64, 4, torch.float16, None, ("half", "split", 0), 5, (3, (1,)), POLICIES["window"], 0, 3),
        (
            96,
            1,
            torch.bfloat16,
            None,
            ("interleaved", "pairs", 48),
            1,
            (2, ()),
            POLICIES["half"],
            0,
            3,
        ),
        (
            128,
            8,
            torch.bfloat16,
            (None, None),
            ("alibi", "split", 0),
            1,
            (2, (1,)),
            POLICIES["window"],
            0,
            0,
        ),
        (
            256,
            3,
            torch.float16,
            (0.0625, 0.03),
            ("half", "pairs", 32),
            2,
            (2, (0,)),
            POLICIES["no-sinks"],
            0,
            5,
        ),
    )
]


# Schedules ----------------------------------------------------------------------------------------
def everything() -> list[Call]:
    """Three sequences through every kind of call: 0 starts short, 1 with a chunk longer than most
    windows, 2 idles at first; all wrap small rings."""
    return [
        Call(contexts=[(0, 5), (1, 13), (2, 0)]),
        Call(contexts=[(0, 7), (1, 1), (2, 21)], slack=2),
        Call(generations=[(0, 1), (1, 1), (2, 1)]),
        Call(contexts=[(2, 9), (0, 1)], generations=[(1, 1)], packed=True, use_total=True),
        Call(generations=[(1, 1), (0, 0), (2, 1)], packed=True, slack=3),
        Call(generations=[(2, 1), (1, 1), (0, 1)], one_each=True, use_total=True),
        Call(contexts=[(1, 17)], generations=[(0, 1), (2, 1)], packed=True, one_each=True),
        Call(generations=[(0, 1), (1, 1), (2, 1)]),
    ]


def lengths_around(layer: Layer, n: int) -> list[int]:
    """Chunks that take a sequence of n tokens to, before and behind a boundary."""
    policy, most = layer.policy, layer.n_max - n
    marks = {1, 2, policy.sink_tokens - n, layer.ring_rows, most}
    first_drop = next((t for t in range(layer.n_max + 1) if policy.dropped(t)), 0)
    marks |= {first_drop - n, layer.ring_offset + layer.ring_rows - n, policy.window(n)}
    near = {m + d for m in marks for d in (-1, 0, 1)}
    return sorted(c for c in near if 1 <= c <= most)


def random_calls(rig: Rig, rng: random.Random, count: int, sequences: int = 4) -> Iterator[Call]:
    """Calls of any kind; sequences that are full end and begin anew."""
    layer = rig.layer
    for _ in range(count):
        batch = rng.sample(range(sequences), rng.randint(1, sequences))
        for s in batch:
            if rig.n(s) == layer.n_max or (rig.n(s) and rng.random() < 0.05):
                rig.finish(s)
        kind = rng.choice(["contexts", "generations", "mixed", "mixed", "generations"])
        split = {"contexts": len(batch), "generations": 0}.get(kind, rng.randint(0, len(batch)))

        def chunk(sequence: int) -> int:
            if rng.random() < 0.15:
                return 0
            choices = lengths_around(layer, rig.n(sequence))
            near = [c for c in choices if c <= 24]
            return rng.choice(near if near and rng.random() < 0.8 else choices)

        contexts = [(s, chunk(s)) for s in batch[:split]]
        one_each = rng.random() < 0.3
        generations = [(s, int(one_each or rng.random() < 0.85)) for s in batch[split:]]
        packed = kind == "mixed" or rng.random() < 0.3
        if packed and contexts and not any(c for _, c in contexts):
            contexts[0] = contexts[0][0], 1
        yield Call(
            contexts,
            generations,
            packed=packed,
            use_total=rng.random() < 0.3,
            one_each=one_each,
            slack=rng.choice([0, 0, 1, 5]),
        )


def in_flight(
    rig: Rig, rng: random.Random, requests: int, max_batch: int, budget: int
) -> Iterator[Call]:
    """In-flight batching: requests arrive, bring their prompts in chunks of at most ``budget`` tokens a
    call, decode, and end; contexts first, the others one token each."""
    layer = rig.layer
    waiting = list(range(requests))
    prompt: dict[int, int] = {}
    until: dict[int, int] = {}
    while waiting or until:
        while waiting and len(until) < max_batch and rng.random() < 0.7:
            request = waiting.pop(0)
            prompt[request] = rng.randint(1, layer.n_max * 3 // 4)
            until[request] = min(layer.n_max, prompt[request] + rng.randint(0, 8))
        if not until:
            continue
        left, contexts, generations = budget, [], []
        for request in sorted(until):
            n = rig.n(request)
            if n < prompt[request]:
                if left:
                    contexts.append((request, min(left, prompt[request] - n)))
                    left -= contexts[-1][1]
            elif n < until[request]:
                generations.append((request, 1))
        if contexts or generations:
            yield Call(contexts, generations, packed=True, use_total=True, one_each=True)
        for request in [r for r in until if rig.n(r) >= until[r]]:
            rig.finish(request)
            del until[request]


def chunks_of(total: int, size: int) -> Sequence[int]:
    """``total`` in chunks of ``size``, the last one shorter."""
    return [min(size, total - start) for start in range(0, total, size)]
