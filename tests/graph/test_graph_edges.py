"""Edges of the operator that random runs seldom meet: full slots, ties, emptied clusters.

The operator alone, one node, on keys chosen by hand (RoPE that turns nothing), against the
reference's layer cache; and the index arithmetic on its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

sys.path.insert(0, str(Path(__file__).parent))
from operators import Operator, operator_model  # noqa: E402

from trt_razor.backends.onnxruntime import (  # noqa: E402
    DISABLED_OPTIMIZERS,
    SPAN_STEP,
    OrtSession,
    flatten,
)
from trt_razor.graph.decoder import export_decoder  # noqa: E402
from trt_razor.graph.operator import RazorAttention  # noqa: E402
from trt_razor.graph.options import GraphOptions  # noqa: E402
from trt_razor.policy import RazorPolicy  # noqa: E402
from trt_razor.reference.cache import LayerCache  # noqa: E402

D = 2


def attention(policy: RazorPolicy, n_max: int, heads: tuple[int, ...] = (), kv: int = 1):
    return RazorAttention(kv, kv, D, heads, policy, n_max)


def keys_on_a_line(values: list[float]) -> np.ndarray:
    """qkv [1, S, 3 D] of one head: zero queries, keys (x, 0), values (x, 1)."""
    qkv = np.zeros((1, len(values), 3 * D), np.float32)
    qkv[0, :, D] = qkv[0, :, 2 * D] = values
    qkv[0, :, 2 * D + 1] = 1
    return qkv


def reference_comp(policy: RazorPolicy, n_max: int, chunks: list[list[float]]):
    """Cluster means and counts of the reference after the same chunks."""
    cache = LayerCache(policy, (), 1, 1, D, n_max)
    for values in chunks:
        q, k, v = torch.from_numpy(keys_on_a_line(values)).reshape(-1, 3, D).unbind(1)
        cache.attend(q[None], k[None], v[None])
    assert cache.local is not None
    return cache.local.comp.numpy(), cache.local.comp_count.numpy()


# N0 = 0 and S0 = 1: all but the last key of each chunk is folded at once. Distances are exact here.
CLUSTER_CASES = {
    # seeds (keys 0 and 1) are 0 and 4; key 2 is as near to one as to the other: the lower index
    "tie in the first fold": ([[0, 4, 99]], [1, 1]),
    "tie in Lloyd's rounds": ([[0, 0, 4, 4, 2, 99]], None),
    "tie in a later fold": ([[0, 8, 4], [99]], [2, 1]),
    # both seeds are 102: cluster 1 gets nothing in round 1, keeps its place and wins keys in round 2
    "empty cluster keeps its place": ([[110, 102, 106, 102, 99]], [2, 2]),
    "equal keys leave clusters unused": ([[5, 5, 5, 9]], [3, 0]),
    "an unused cluster opens later": ([[5, 5, 5, 9], [7]], [3, 1]),
}


@pytest.mark.parametrize("chunks, count", CLUSTER_CASES.values(), ids=CLUSTER_CASES)
def test_clusters_of_exact_keys(chunks: list[list[float]], count: list[int] | None) -> None:
    policy = RazorPolicy(0, 1, None, 2)
    op = Operator(attention(policy, 16))
    for values in chunks:
        op.run(keys_on_a_line(values), [len(values)])
    comp, want_count = reference_comp(policy, 16, chunks)
    if count is not None:
        assert want_count[0].tolist() == count  # the case is what it says
    assert op.state["comp_count"][0].tolist() == want_count.tolist()
    np.testing.assert_allclose(op.state["comp"][0], comp, rtol=1e-6)


@pytest.mark.parametrize("comp_tokens", [0, 1, 3])
@pytest.mark.parametrize(
    "n_max, policy",
    [
        (9, RazorPolicy(2, 3, None)),  # ring of 4 rows
        (9, RazorPolicy(2, 2, 2)),  # window grows to 5
        (9, RazorPolicy(4, 5, None)),  # ring of n_max − N0 rows: the last token that fits
        (3, RazorPolicy(4, 4, 5)),  # shorter than the sinks
        (2, RazorPolicy(0, 1, None)),
    ],
)
def test_slots_filled_to_the_last_token(n_max: int, policy: RazorPolicy, comp_tokens: int) -> None:
    """Row 0 by single tokens, the last one padded to the length of rows 1 and 2, filled at once."""
    policy = policy.with_(comp_tokens=comp_tokens)
    op = Operator(attention(policy, n_max, heads=(1,), kv=2), slots=3)
    caches = [LayerCache(policy, (1,), 2, 2, D, n_max) for _ in range(3)]
    rng = np.random.default_rng(n_max)
    for chunk in [[1, 0, 0]] * (n_max - 1) + [[1, n_max, n_max]]:
        size = max(chunk)
        qkv = rng.standard_normal((3, size, 6 * D)).astype(np.float32)
        out = op.run(qkv, chunk)
        for b in np.flatnonzero(chunk):
            q, k, v = torch.from_numpy(qkv[b, : chunk[b]].reshape(-1, 3, 2, D)).permute(1, 2, 0, 3)
            want = caches[b].attend(q, k, v).transpose(0, 1).flatten(1).numpy()
            np.testing.assert_allclose(out[b, : chunk[b]], want, atol=1e-5)
    assert op.past.tolist() == [n_max] * 3
    for b in range(3):
        full, local = caches[b].full, caches[b].local
        assert full is not None
        assert local is not None
        np.testing.assert_array_equal(op.state["full_k"][b], full.full_k)
        np.testing.assert_array_equal(op.state["full_v"][b], full.full_v)
        rows = local.row_of(local.kept_positions()).numpy()
        np.testing.assert_array_equal(op.state["local_k"][b][:, rows], local.local_k[:, rows])
        np.testing.assert_array_equal(op.state["local_v"][b][:, rows], local.local_v[:, rows])


def test_no_two_tokens_are_written_to_one_row() -> None:
    """ScatterND leaves it open which of two updates of a row wins: equal rows, equal tokens.

    A chunk several times as long as the ring, rows of all lengths, padding and an idle row.
    """
    op = attention(RazorPolicy(2, 3, None, 1), 40, heads=(1,), kv=2)
    model = operator_model(op)
    producer = {out: node for node in model.graph.node for out in node.output}
    pairs = []
    for node in model.graph.node:
        if node.op_type == "ScatterND":
            update = producer[node.input[2]]
            while update.op_type == "Reshape":
                update = producer[update.input[0]]
            assert update.op_type == "GatherND"
            pairs.append((node.input[1], update.input[1]))
    assert len(pairs) == 4
    names = tuple(dict.fromkeys(name for pair in pairs for name in pair))
    session = ort.InferenceSession(
        operator_model(op, names).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    past, chunk = np.array([0, 0, 5, 17, 39], np.int32), np.array([20, 3, 13, 0, 1], np.int32)
    feeds = {
        "qkv": np.zeros((5, 20, 6 * D), np.float32),
        "past": past,
        "chunk": chunk,
        "past_span": np.zeros(39, np.int8),
        "cos_sin": np.zeros((40, D), np.float32),
    }
    for i in session.get_inputs()[5:]:
        feeds[i.name] = np.zeros((5, *i.shape[1:]), np.float32)
    found = dict(zip(names, session.run(list(names), feeds), strict=True))
    for put, take in pairs:
        token_of: dict[tuple[int, ...], tuple[int, ...]] = {}
        for row, token in zip(
            found[put].reshape(-1, 3).tolist(), found[take].reshape(-1, 3).tolist(), strict=True
        ):
            assert token_of.setdefault(tuple(row), tuple(token)) == tuple(token), (row, token)
            assert token[2] < max(1, chunk[row[0]])  # no padding is read


def _is_ordered(graph: onnx.GraphProto, cache: str) -> bool:
    """Whether the write of ``{cache}_out`` depends on every other node that reads ``cache``."""
    producer = {out: node for node in graph.node for out in node.output}

    def inputs(node: onnx.NodeProto) -> list[str]:
        names = list(node.input)
        for a in node.attribute:
            if a.HasField("g"):
                names += [name for inner in a.g.node for name in inputs(inner)]
        return names

    writer = producer[f"{cache}_out"]
    before, todo = set(), [writer]
    while todo:
        for name in inputs(todo.pop()):
            node = producer.get(name)
            if node is not None and node.name not in before:
                before.add(node.name)
                todo.append(node)
    readers = [n for n in graph.node if cache in inputs(n)]
    assert readers
    return all(n.name in before or n.name == writer.name for n in readers)


@pytest.mark.parametrize("comp_tokens, heavy", [(1, 0), (3, 0), (0, 4), (3, 4)])
@pytest.mark.parametrize("optimised", [False, True], ids=["flat", "optimised"])
def test_caches_are_read_before_they_are_written_in_place(
    optimised: bool,
    comp_tokens: int,
    heavy: int,
    make_spec,
    make_checkpoint,
    make_map,
    tmp_path: Path,
) -> None:
    """By data dependence, in the engine's graph and in what ONNX Runtime makes of it."""
    spec = make_spec()
    policy = RazorPolicy(2, 3, None, comp_tokens, heavy)
    options = GraphOptions(policy, make_map(spec, (1,), ()), 40)
    path = export_decoder(make_checkpoint(spec), options, tmp_path)
    flatten(path)
    if optimised:
        settings = ort.SessionOptions()
        settings.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        ort.InferenceSession(
            str(path),
            settings,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=DISABLED_OPTIMIZERS,
        )
        path = tmp_path / "optimised.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    for t in options.caches(spec):
        assert _is_ordered(graph, t.name), t.name


def test_the_longest_row_of_a_step_decides_how_much_is_read(
    make_spec, make_checkpoint, make_map, tmp_path: Path
) -> None:
    """A short row in front of one that is longer than a step of ``past_span``."""
    spec, n_max = make_spec(num_layers=1), 3 * SPAN_STEP - 7
    options = GraphOptions(RazorPolicy(2, 2 * SPAN_STEP, None, 1), make_map(spec, (1,)), n_max)
    path = export_decoder(make_checkpoint(spec), options, tmp_path)
    flatten(path)
    session = OrtSession(path, options.caches(spec), 2, n_max, 1)
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (1, n_max))
    steps = {0: [3, 1], 1: [n_max - 1, 1]}

    def step(slot: int, start: int, size: int) -> np.ndarray:
        part, at = tokens[:, start : start + size], np.array([[size - 1]])
        return session.forward(slot, part, np.array([start]), np.array([size]), at)

    alone = []
    for slot, (prompt, new) in steps.items():
        step(slot, 0, prompt)
        alone.append(step(slot, prompt, new)[0])
        session.reset(slot)
        step(slot, 0, prompt)
    past = np.array([3, n_max - 1])
    both = session.forward(
        0, tokens[0, past][:, None], past, np.ones(2, int), np.zeros((2, 1), int)
    )
    np.testing.assert_allclose(both, np.stack(alone), atol=1e-5)


def test_half_precision_scores_do_not_overflow() -> None:
    """q·k beyond float16's 65504, q·k/√D within it. By ONNX's own evaluator: ONNX Runtime
    multiplies float16 in float32 on the CPU and would hide it; a GPU rounds the product."""
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    op = RazorAttention(2, 2, D, (1,), RazorPolicy(1, 4, None, 1), 8, dtype="float16")
    model = operator_model(op)
    qkv = np.full((1, 4, 6 * D), 200, np.float16)  # q·k = 80000, scaled 56569
    qkv[..., 4 * D :] = np.arange(4)[:, None]
    feeds = {
        "qkv": qkv,
        "past": np.zeros(1, np.int32),
        "chunk": np.full(1, 4, np.int32),
        "past_span": np.zeros(1, np.int8),
        "cos_sin": np.tile(np.array([1, 0], np.float32), (8, 1)),
    }
    for i in model.graph.input[5:]:
        shape = [1, *(x.dim_value for x in i.type.tensor_type.shape.dim[1:])]
        dtype = np.float32 if i.name.startswith("comp") else np.float16
        feeds[i.name] = np.full(shape, -np.inf if i.name == "comp_log_weight" else 0, dtype)
    with np.errstate(divide="ignore"):  # ln 0 of unused clusters
        out = evaluator(model).run(["out"], feeds)[0][0]
    want = np.repeat([[0.0], [0.5], [1.0], [1.5]], 2 * D, axis=1)  # all keys equal: plain means
    np.testing.assert_allclose(out.astype(np.float32), want, atol=2e-3)
