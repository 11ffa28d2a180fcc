"""The exported graph, run by ONNX Runtime in place, against the reference: outputs and caches.

Both as exported, with the operator as a local function, and flattened as engines have it.

Batches of unequal rows, random chunks (idle rows, single tokens, prompts), through the first drop,
the ring's wrap and many folds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trt_razor.backends.onnxruntime import OrtSession, flatten
from trt_razor.errors import UsageError
from trt_razor.graph.decoder import export_decoder
from trt_razor.graph.options import GraphOptions
from trt_razor.policy import RazorPolicy
from trt_razor.reference import ReferenceDecoder

ROWS, N_MAX = 3, 60
# Tiny models with std 0.3 weights: fp32 sums of different order differ by a few 1e-6.
TOLERANCE = 5e-5

POLICIES = {
    "one mean": RazorPolicy(2, 5, None, 1),
    "growing window": RazorPolicy(2, 5, 3, 1),
    "no sinks, 4 clusters": RazorPolicy(0, 5, None, 4),
    "no compensation": RazorPolicy(3, 4, 4, 0),
    "window of 1, 8 clusters": RazorPolicy(2, 1, None, 8),
    "late drop": RazorPolicy(1, 40, 2, 2),
    "never drops": RazorPolicy(4, 100, 2, 2),
    "heavy hitters, 4 clusters": RazorPolicy(2, 5, None, 4, 6),
    "heavy hitters alone, growing window": RazorPolicy(0, 3, 3, 0, 3),
}
LAYERS = {
    "mixed": ((1,), (0, 2)),
    "no retrieval heads, then no local heads": ((), (0, 1, 2)),
}


def run_both(checkpoint, options, directory: Path, seed: int, flat: bool = True, steps: int = 14):
    """Worst relative error of logits, and the two caches, after random chunks."""
    graph = export_decoder(checkpoint, options, directory)
    if flat:
        flatten(graph)
    session = OrtSession(graph, options.caches(checkpoint.spec), ROWS, N_MAX, 1)
    reference = ReferenceDecoder(checkpoint, torch.float32)
    caches = [
        reference.new_cache(options.policy, options.head_map, options.max_seq_len)
        for _ in range(ROWS)
    ]
    rng = np.random.default_rng(seed)
    past, worst = np.zeros(ROWS, int), 0.0
    for _ in range(steps):
        chunk = rng.integers(0, 20 if rng.random() < 0.4 else 2, ROWS)
        chunk = np.minimum(chunk, N_MAX - 1 - past)
        if chunk.max() == 0:
            continue
        tokens = rng.integers(0, checkpoint.spec.vocab_size, (ROWS, chunk.max()))
        index = np.tile(np.arange(chunk.max()), (ROWS, 1))
        got = session.forward(0, tokens, past, chunk, index)
        for b in np.flatnonzero(chunk):
            want = reference.forward(tokens[b, : chunk[b]], caches[b]).numpy()
            error = np.abs(got[b, : chunk[b]] - want).max() / np.abs(want).max()
            worst = max(worst, float(error))
        past = past + chunk
    return worst, session, caches, past


def cache_errors(options, spec, session, caches, past):
    """Largest difference over every valid row of every cache tensor, by kind."""
    policy, worst = options.policy, {}
    for t in options.caches(spec):
        for b in range(ROWS):
            layer, n = caches[b][t.layer], past[b]
            got = session.cache(t.name)[b]
            want = getattr(layer.full if t.kind.startswith("full") else layer.local, t.kind).numpy()
            if t.kind.startswith("full"):
                got, want = got[:, :n], want[:, :n]
            elif t.kind.startswith("local"):
                first = policy.sink_tokens + policy.dropped(n)
                kept = [p for p in range(n) if p < policy.sink_tokens or p >= first]
                rows = [
                    p
                    if p < policy.sink_tokens
                    else policy.kept_rows + (p - policy.sink_tokens) % policy.ring_rows(N_MAX)
                    for p in kept
                ]
                rows += range(policy.sink_tokens, policy.sink_tokens + policy.heavy(n))
                got, want = got[:, rows], want[:, rows]
            elif t.kind == "comp":
                used = layer.local.comp_count.numpy() > 0
                got, want = got[used], want[used]
            if got.size:
                same = got == want  # −inf of unused clusters
                error = np.abs(np.where(same, 0, got) - np.where(same, 0, want)).max()
                worst[t.kind] = max(worst.get(t.kind, 0.0), float(error))
    return worst


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "function"])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_rope(
    policy, layers, flat, make_spec, make_checkpoint, make_map, needs_overloads, tmp_path
):
    if not flat:
        needs_overloads()
    spec = make_spec(architecture="qwen3", qkv_bias=True, qk_norm=True)
    options = GraphOptions(policy, make_map(spec, *layers), N_MAX)
    worst, *state = run_both(make_checkpoint(spec), options, tmp_path, len(layers[0]), flat)
    assert worst < TOLERANCE
    errors = cache_errors(options, spec, *state)
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("name", ["one mean", "growing window", "no compensation"])
def test_alibi(name, make_spec, make_checkpoint, make_map, tmp_path):
    spec = make_spec(architecture="baichuan", position="alibi", num_heads=4, num_kv_heads=4)
    options = GraphOptions(POLICIES[name], make_map(spec, (1,), (0, 3)), N_MAX)
    worst, *state = run_both(make_checkpoint(spec), options, tmp_path, seed=3)
    assert worst < TOLERANCE
    assert max(cache_errors(options, spec, *state).values()) < TOLERANCE


def test_dense_graph(make_spec, make_checkpoint, tmp_path):
    spec = make_spec(tie_embeddings=True, o_bias=True, mlp_bias=True, qkv_bias=True)
    options = GraphOptions(RazorPolicy(), None, N_MAX)
    worst, *_ = run_both(make_checkpoint(spec), options, tmp_path, seed=1)
    assert worst < TOLERANCE


def test_float16(make_spec, make_checkpoint, make_map, tmp_path):
    """Half precision: the same computation with 11-bit mantissas (tolerance 2 %)."""
    spec = make_spec()
    options = GraphOptions(
        POLICIES["growing window"], make_map(spec, (1,), (0, 2)), N_MAX, "float16"
    )
    worst, *_ = run_both(make_checkpoint(spec), options, tmp_path, seed=2)
    assert 1e-5 < worst < 2e-2


def test_window_as_long_as_the_sequence_is_dense(make_spec, make_checkpoint, make_map, tmp_path):
    spec = make_spec()
    checkpoint, tokens = make_checkpoint(spec), np.random.default_rng(0).integers(0, 97, (1, 50))
    logits = []
    for name, head_map in (("razor", make_map(spec, (1,), ())), ("dense", None)):
        options = GraphOptions(RazorPolicy(2, 58, None, 1), head_map, N_MAX)
        (tmp_path / name).mkdir()
        graph = export_decoder(checkpoint, options, tmp_path / name)
        flatten(graph)
        session = OrtSession(graph, options.caches(spec), 1, N_MAX, 1)
        parts = [
            session.forward(
                0, tokens[:, a:b], np.array([a]), np.array([b - a]), np.arange(b - a)[None]
            )
            for a, b in ((0, 20), (20, 21), (21, 50))
        ]
        logits.append(np.concatenate(parts, axis=1))
    assert np.abs(logits[0] - logits[1]).max() / np.abs(logits[1]).max() < 1e-5


def test_slots_are_independent_of_their_neighbours(make_spec, make_checkpoint, make_map, tmp_path):
    """The same prompt in a slot range of one and beside others gives the same cache rows."""
    spec = make_spec()
    options = GraphOptions(POLICIES["no sinks, 4 clusters"], make_map(spec, (1,), (0,)), N_MAX)
    graph = export_decoder(make_checkpoint(spec), options, tmp_path)
    session = OrtSession(graph, options.caches(spec), ROWS, N_MAX, 1)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 97, (1, 30))
    alone = session.forward(2, tokens, np.array([0]), np.array([30]), np.array([[29]]))
    others = np.concatenate([rng.integers(0, 97, (2, 30)), tokens])
    session.reset(2)
    beside = session.forward(
        0, others, np.zeros(3, int), np.array([11, 0, 30]), np.full((3, 1), 29)
    )
    assert np.abs(alone[0] - beside[2]).max() < 1e-5


def test_reset_forgets_poison(make_spec, make_checkpoint, make_map, tmp_path):
    """A sequence that left NaN in every row of its slot does not reach the next one."""
    spec = make_spec()
    options = GraphOptions(POLICIES["one mean"], make_map(spec, (1,), (0,)), N_MAX)
    session = OrtSession(
        export_decoder(make_checkpoint(spec), options, tmp_path), options.caches(spec), 2, N_MAX, 1
    )
    tokens = np.arange(20)[None]
    feed = (tokens, np.array([0]), np.array([20]), np.array([[19]]))
    clean = session.forward(1, *feed)
    session.reset(1)
    whole = np.arange(N_MAX)[None] % spec.vocab_size
    session.forward(1, whole, np.array([0]), np.array([N_MAX]), np.array([[N_MAX - 1]]))
    for t in options.caches(spec):
        session.cache(t.name)[1] = np.nan
    session.reset(1)
    assert np.array_equal(session.forward(1, *feed), clean)


def test_callers_arithmetic_is_left_alone(make_spec, make_checkpoint, tmp_path):
    """Flushing denormal numbers is a mode of a thread: never of the caller's."""
    spec = make_spec()
    options = GraphOptions(RazorPolicy(), None, N_MAX)
    graph = export_decoder(make_checkpoint(spec), options, tmp_path)
    session = OrtSession(graph, options.caches(spec), 1, N_MAX, 1)
    session.forward(0, np.zeros((1, 4), int), np.array([0]), np.array([4]), np.array([[3]]))
    tiny = np.full(4, 2.0**-1060)
    assert (tiny * 0.5 == 2.0**-1061).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [[-1, 0, 0, 0]]}, "tokens: expected ids 0..96, found -1..0"),
        ({"tokens": [[97, 0, 0, 0]]}, "tokens: expected ids"),
        ({"tokens": [0, 1, 2, 3]}, r"tokens: expected shape \[b, S\]"),
        ({"first_slot": 2}, r"slots: expected 0..1, found 2..2"),
        ({"past": [[0]]}, r"past: expected shape \[1\]"),
        ({"past": [-1]}, "past . chunk: expected at most"),
        ({"past": [N_MAX - 3]}, "past . chunk: expected at most max_seq_len 60"),
        ({"past": [N_MAX], "chunk": [0]}, "past . chunk: expected at most"),
        ({"chunk": [5]}, "chunk: expected 0..4"),
        ({"logits_index": [[4]]}, "logits_index: expected places 0..3"),
        ({"logits_index": [[-1]]}, "logits_index: expected places"),
        ({"logits_index": [0]}, "logits_index: expected shape"),
    ],
)
def test_a_pass_out_of_bounds_is_refused(change, message, make_spec, make_checkpoint, tmp_path):
    spec = make_spec(num_layers=1)
    options = GraphOptions(RazorPolicy(), None, N_MAX)
    graph = export_decoder(make_checkpoint(spec), options, tmp_path)
    session = OrtSession(graph, options.caches(spec), 2, N_MAX, 1)
    good = {"tokens": [[0, 1, 2, 3]], "past": [N_MAX - 4], "chunk": [4], "logits_index": [[3]]}
    feed = {k: np.array(v) if isinstance(v, list) else v for k, v in {**good, **change}.items()}
    with pytest.raises(UsageError, match=message):
        session.forward(**{"first_slot": 1, **feed})
    session.forward(1, *(np.array(v) for v in good.values()))  # the last place there is
