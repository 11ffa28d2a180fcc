"""The real SmolLM2-135M: engine graph against the reference and against transformers, float32.

One export serves whole and chunked prefill; rows of unequal length run beside each other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trt_razor.backends.onnxruntime import OrtSession, flatten
from trt_razor.graph.decoder import export_decoder
from trt_razor.graph.options import GraphOptions
from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import open_checkpoint
from trt_razor.policy import PRESETS, RazorPolicy
from trt_razor.reference import ReferenceDecoder

pytestmark = [pytest.mark.real, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
N_MAX, STEPS = 1600, 64
TOLERANCE = 1e-4
POLICIES = {
    "one mean": RazorPolicy(sink_tokens=4, min_window=128, compression=5, comp_tokens=1),
    "tight": PRESETS["tight"],  # heavy hitters and 16 clusters
}


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint("smollm2-135m", None)


@pytest.fixture(scope="module")
def head_map(checkpoint) -> HeadMap:
    return HeadMap.load(ROOT / "engines" / "recipes" / "smollm2-135m.heads.json")


@pytest.fixture(scope="module")
def text(checkpoint) -> np.ndarray:
    """Token ids of English prose: long enough for a prompt and the steps after it."""
    ids = checkpoint.tokenizer().encode((ROOT / "LICENSE").read_text())
    assert len(ids) > 1500 + STEPS
    return np.array(ids, np.int32)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def session_for(checkpoint, options, folder: Path, slots: int) -> OrtSession:
    graph = export_decoder(checkpoint, options, folder)
    flatten(graph)
    return OrtSession(graph, options.caches(checkpoint.spec), slots, N_MAX)


def prefill(session, slot: int, tokens: np.ndarray, chunk: int) -> np.ndarray:
    parts = []
    for a in range(0, len(tokens), chunk):
        part = tokens[None, a : a + chunk]
        size = part.shape[1]
        parts.append(
            session.forward(slot, part, np.array([a]), np.array([size]), np.arange(size)[None])[0]
        )
    return np.concatenate(parts)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_razor_engine_equals_reference(policy, checkpoint, head_map, text, tmp_path):
    """1,500 tokens whole, 1,100 in chunks, 300 whole; then 64 steps together, far past the window."""
    options = GraphOptions(policy, head_map, N_MAX)
    session = session_for(checkpoint, options, tmp_path, 3)
    reference = ReferenceDecoder(checkpoint, torch.float32)
    lengths, chunks = [1500, 1100, 300], [1500, 400, 300]
    caches = [reference.new_cache(policy, head_map, N_MAX) for _ in lengths]
    for slot, (n, chunk) in enumerate(zip(lengths, chunks, strict=True)):
        want = reference.prefill(torch.tensor(text[:n]), caches[slot], chunk).numpy()
        assert relative(prefill(session, slot, text[:n], chunk), want) <= TOLERANCE
    past, worst = np.array(lengths), 0.0
    for step in range(STEPS):
        tokens = text[past][:, None]
        got = session.forward(0, tokens, past, np.ones(3, int), np.zeros((3, 1), int))[:, 0]
        for slot in range(3):
            want = reference.forward(torch.tensor(tokens[slot]), caches[slot]).numpy()[0]
            worst = max(worst, relative(got[slot], want))
        past = past + 1
        assert worst <= TOLERANCE, f"step {step}"
    assert policy.dropped(1500) > 1000  # the comparison really was past the window


def test_dense_engine_equals_transformers_and_a_long_window(checkpoint, head_map, text, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra [test]")
    from trt_razor.reference.hf.load import checkpoint_model

    model = checkpoint_model(checkpoint)
    with torch.no_grad():
        want = model(torch.tensor(text[None, :700].astype(np.int64))).logits[0].numpy()
    del model

    (tmp_path / "dense").mkdir()
    session = session_for(
        checkpoint, GraphOptions(RazorPolicy(), None, N_MAX), tmp_path / "dense", 1
    )
    dense = prefill(session, 0, text[:700], 700)
    assert relative(dense, want) <= TOLERANCE
    session.reset(0)
    assert relative(prefill(session, 0, text[:700], 256), want) <= TOLERANCE
    del session

    (tmp_path / "razor").mkdir()
    options = GraphOptions(RazorPolicy(min_window=N_MAX), head_map, N_MAX)
    session = session_for(checkpoint, options, tmp_path / "razor", 1)
    assert relative(prefill(session, 0, text[:700], 300), dense) <= 1e-5
