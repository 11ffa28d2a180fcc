"""Heavy hitters in the operator: rows, clusters and outputs against the reference's layer cache.

Keys and values are normal numbers: no two scores or distances agree to rounding, so every choice
must come out the same and cached rows must be equal to the bit.
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

from trt_razor.backends.onnxruntime import OrtSession  # noqa: E402
from trt_razor.errors import UsageError  # noqa: E402
from trt_razor.graph.decoder import export_decoder  # noqa: E402
from trt_razor.graph.operator import RazorAttention  # noqa: E402
from trt_razor.graph.options import GraphOptions  # noqa: E402
from trt_razor.policy import RazorPolicy  # noqa: E402
from trt_razor.reference.cache import LayerCache  # noqa: E402

D, HQ, HKV, WINDOW, N_MAX = 8, 6, 3, 16, 400
TOLERANCE = 2e-5  # sums of different order, values of size 1


class Pair:
    """The operator and three reference caches, fed the same."""

    def __init__(self, policy: RazorPolicy, heads: tuple[int, ...], dtype: str = "float32") -> None:
        self.policy, self.slots = policy, 3
        self.op = Operator(RazorAttention(HQ, HKV, D, heads, policy, N_MAX, dtype=dtype), 3)
        kind = getattr(torch, dtype)
        self.caches = [LayerCache(policy, heads, HQ, HKV, D, N_MAX, kind) for _ in range(3)]
        self.rng = np.random.default_rng(7)

    def step(self, *chunk: int) -> None:
        """A chunk of so many tokens for each slot; then everything is compared."""
        size = max(chunk)
        qkv = self.rng.standard_normal((3, size, (HQ + 2 * HKV) * D)).astype(self.op.op.dtype)
        qkv[..., : HQ * D] *= 2  # sharp attention
        # What stands behind a chunk must not be seen.
        for b in range(3):
            qkv[b, chunk[b] :] = 7.0
        out = self.op.run(qkv, list(chunk))
        for b in np.flatnonzero(chunk):
            x = torch.from_numpy(qkv[b, : chunk[b]]).reshape(-1, HQ + 2 * HKV, D).transpose(0, 1)
            want = self.caches[b].attend(x[:HQ], x[HQ : HQ + HKV], x[HQ + HKV :])
            want = want.transpose(0, 1).flatten(1).numpy()
            tolerance = TOLERANCE if self.op.op.dtype == "float32" else 1e-2
            np.testing.assert_allclose(out[b, : chunk[b]], want, atol=tolerance)
        for b in range(3):
            self.compare(b)

    def compare(self, b: int) -> None:
        local, state = self.caches[b].local, self.op.state
        if local is None:
            return
        rows = torch.cat([local.row_of(local.kept_positions()), local.heavy_rows()]).numpy()
        assert len(rows) == len(set(rows.tolist()))
        np.testing.assert_array_equal(state["local_k"][b][:, rows], local.local_k[:, rows])
        np.testing.assert_array_equal(state["local_v"][b][:, rows], local.local_v[:, rows])
        if self.policy.comp_tokens:
            np.testing.assert_array_equal(state["comp_count"][b], local.comp_count)
            np.testing.assert_allclose(
                state["comp_log_weight"][b], local.comp_log_weight, atol=1e-6
            )
            used = local.comp_count.numpy() > 0
            np.testing.assert_allclose(
                state["comp"][b][used], local.comp.numpy()[used], atol=TOLERANCE
            )
            n = local.n
            want = self.policy.dropped(n) - self.policy.heavy(n)
            assert state["comp_count"][b].sum(-1).tolist() == [want] * len(local.comp)


SINKS = {1: 0, 3: 2, 8: 1}


@pytest.mark.parametrize("comp_tokens", [0, 1, 4])
@pytest.mark.parametrize("heavy", SINKS)
def test_every_edge(heavy: int, comp_tokens: int) -> None:
    sinks = SINKS[heavy]
    pair = Pair(RazorPolicy(sinks, WINDOW, None, comp_tokens, heavy), (1,))
    full = sinks + WINDOW
    # Prompts that leave one place, fill the places, and drop one token more; the first fold.
    pair.step(full + heavy - 1, full + heavy, full + heavy + 1)
    pair.step(1, 1, 1)
    # One token short of judging, the shortest chunk that does, one more; held rows may lose.
    pair.step(15, 16, 17)
    pair.step(1, 0, 1)  # one idle
    pair.step(0, 40, 3)  # longer than the ring, beside a short chunk and an idle row
    pair.step(1, 1, 1)
    pair.step(100, 0, 65)  # more tokens than there are selecting queries
    pair.step(16, 64, 63)
    for _ in range(3):
        pair.step(1, 1, 1)


@pytest.mark.parametrize("comp_tokens", [0, 1, 4])
@pytest.mark.parametrize("heavy", [1, 3, 8])
def test_single_tokens_from_the_start(heavy: int, comp_tokens: int) -> None:
    """Rows fill up one by one, then clusters; the first fold is a step's. The other rows start late."""
    pair = Pair(RazorPolicy(1, 4, None, comp_tokens, heavy), (0,))
    for i in range(5 + heavy + 8):
        pair.step(1, int(i >= 4), 0 if i != 9 else 1)
    pair.step(1, 15, 30)
    pair.step(17, 1, 1)


@pytest.mark.parametrize("comp_tokens", [0, 4])
def test_growing_window(comp_tokens: int) -> None:
    """Chunks of prompts as engines read them, the window n / 3."""
    pair = Pair(RazorPolicy(2, 6, 3, comp_tokens, 8), (1,))
    for size in (32, 32, 32, 1, 1, 1, 1):
        pair.step(size, max(1, size // 2), size - 1)
    pair.step(200, 100, 150)


@pytest.mark.parametrize("heads", [(), (0, 1, 2), (0, 2)], ids=["no retrieval", "no local", "one"])
def test_head_counts(heads: tuple[int, ...]) -> None:
    pair = Pair(RazorPolicy(2, 5, None, 2, 4), heads)
    pair.step(30, 8, 16)
    pair.step(1, 1, 0)
    pair.step(20, 15, 17)
    pair.step(1, 1, 1)


def test_more_rows_than_the_slot_has_tokens() -> None:
    """H = 64 beside a few tokens: the reserved rows reach behind what is read of a short past."""
    pair = Pair(RazorPolicy(2, 3, None, 2, 64), (1,))
    for size in (1, 4, 1, 16, 1, 60, 1, 90):
        pair.step(size, 1, size // 2)


def test_float16() -> None:
    """Rows are copied, so they are equal to the bit; scores are float32 in both."""
    pair = Pair(RazorPolicy(2, 8, None, 0, 3), (1,), "float16")
    pair.step(40, 20, 12)
    pair.step(1, 1, 1)
    pair.step(30, 0, 17)


def test_zero_values_lose_and_equal_scores_go_to_the_first() -> None:
    """One head, keys all equal: the score is the value's length."""
    policy = RazorPolicy(0, 4, None, 0, 3)
    op = Operator(RazorAttention(1, 1, 2, (), policy, 64))
    qkv = np.zeros((1, 20, 6), np.float32)
    qkv[0, :, 4] = [0, 1, 0, 5, 2, 0, 5, 0, 5, 5, *[0] * 10]  # positions 0 .. 15 are dropped
    qkv[0, :, 5] = 0
    op.run(qkv, [20])
    cache = LayerCache(policy, (), 1, 1, 2, 64)
    q, k, v = torch.from_numpy(qkv[0]).reshape(-1, 3, 2).unbind(1)
    cache.attend(q[None], k[None], v[None])
    assert cache.local is not None
    assert op.state["local_v"][0, 0, :3, 0].tolist() == [5, 5, 5]
    np.testing.assert_array_equal(op.state["local_v"][0, :, :3], cache.local.local_v[:, :3])
    # All zero: −inf everywhere, and the rows there are come first.
    op.run(np.zeros((1, 20, 6), np.float32), [20])
    assert op.state["local_v"][0, 0, :3, 0].tolist() == [5, 5, 5]
    assert np.isfinite(op.state["local_k"]).all()


def test_a_step_computes_no_scores() -> None:
    """Sorting stands in a branch, and its condition is false for a step."""
    model = operator_model(RazorAttention(HQ, HKV, D, (1,), RazorPolicy(2, 5, None, 2, 4), 64))
    assert not any(n.op_type in ("TopK", "CumSum", "Exp") for n in model.graph.node)
    branches = [
        {n.op_type for n in a.g.node}
        for node in model.graph.node
        if node.op_type == "If"
        for a in node.attribute
    ]
    assert sum("TopK" in ops for ops in branches) == 1
    assert sum(ops == {"Identity"} for ops in branches) == 2  # nothing to choose, nothing to seed


def test_no_two_tokens_are_written_to_one_row() -> None:
    """ScatterND leaves it open which of two updates of a row wins: they must be the same."""
    pair = Pair(RazorPolicy(2, 5, None, 2, 6), (1,))
    model = operator_model(pair.op.op)
    writers = [
        n for n in model.graph.node if n.op_type == "ScatterND" and n.output[0][:6] == "local_"
    ]
    names = tuple(name for n in writers for name in n.input[1:])
    assert len(names) == 4
    session = ort.InferenceSession(
        operator_model(pair.op.op, names).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    pair.step(9, 3, 40)
    for chunk in ([1, 1, 1], [17, 0, 30], [15, 2, 16], [0, 40, 1]):
        qkv = pair.rng.standard_normal((3, max(chunk), (HQ + 2 * HKV) * D)).astype(np.float32)
        feeds = {
            "qkv": qkv,
            "past": pair.op.past,
            "chunk": np.array(chunk, np.int32),
            "past_span": np.zeros(pair.op.past.max(), np.int8),
            "cos_sin": np.ones((N_MAX, D), np.float32),
            **pair.op.state,
        }
        found = dict(zip(names, session.run(list(names), feeds), strict=True))
        for n in writers:
            written: dict[tuple[int, ...], np.ndarray] = {}
            update = found[n.input[2]].reshape(-1, D)
            for place, row in zip(found[n.input[1]].reshape(-1, 3).tolist(), update, strict=True):
                assert np.array_equal(written.setdefault(tuple(place), row), row), place
        pair.step(*chunk)


def test_a_reset_slot_is_empty(make_spec, make_checkpoint, make_map, tmp_path: Path) -> None:
    """The ring starts behind H rows: so many more have been written."""
    spec = make_spec()
    options = GraphOptions(RazorPolicy(1, 20, None, 2, 5), make_map(spec, (1,), ()), 60)
    path = export_decoder(make_checkpoint(spec), options, tmp_path)
    session = OrtSession(path, options.caches(spec), 1, 60, 1)
    for n in (10, 40):
        at = np.array([0]), np.array([n]), np.array([[n - 1]])
        session.forward(0, np.arange(n)[None], *at)
        assert session.cache("local_k_1")[0].any(-1).sum(-1).min() >= min(n, 26)
        session.reset(0)
        for t in options.caches(spec):
            empty = -np.inf if t.kind == "comp_log_weight" else 0
            assert (session.cache(t.name) == empty).all(), t.name


def test_alibi_is_refused(make_spec, make_map) -> None:
    spec = make_spec(architecture="baichuan", position="alibi", num_heads=4, num_kv_heads=4)
    options = GraphOptions(RazorPolicy(2, 5, None, 1, 4), make_map(spec, (1,), (0, 3)), 60)
    with pytest.raises(UsageError, match="heavy_hitters: 4 with ALiBi"):
        options.validate(spec)
