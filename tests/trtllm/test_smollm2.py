"""Real weights: SmolLM2's heads in order for TensorRT-LLM are the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import MergedModel

from trt_razor.backends.base import EngineOptions
from trt_razor.graph.options import GraphOptions
from trt_razor.models.checkpoint import Checkpoint, open_checkpoint
from trt_razor.policy import RazorPolicy
from trt_razor.recipes import recipe_heads
from trt_razor.reference import ReferenceDecoder
from trt_razor.trtllm.backend import TensorRtLlmBackend
from trt_razor.trtllm.ranks import rank_layout
from trt_razor.trtllm.release import release_of

POLICY = RazorPolicy(4, 64, 5, 1)
TEXT = Path(__file__).resolve().parents[2] / "docs" / "demo-prompt.txt"


class Rounded:
    """Weights as float16 files have them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.spec = checkpoint, checkpoint.spec

    def tensor(self, name: str) -> np.ndarray[Any, Any]:
        return self.checkpoint.tensor(name).astype(np.float16).astype(np.float32)


@pytest.mark.real
def test_heads_in_order_change_nothing(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("smollm2-135m", None)
    found = recipe_heads(checkpoint.spec)
    assert found is not None
    maker = TensorRtLlmBackend(release=release_of("1.0.0"), convert_only=True)
    head_map = maker.heads(found[1])
    graph = GraphOptions(POLICY, head_map, 1024, "float16")
    maker.convert(checkpoint, EngineOptions(graph, 16, 0), tmp_path, lambda *_: None)
    layout = rank_layout(head_map, 1)
    assert any(order != (0, 1, 2) for order in layout.order), "no head moves: nothing is shown"

    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    tokens = torch.tensor(tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:320])
    original = ReferenceDecoder(Rounded(checkpoint))
    moved = ReferenceDecoder(MergedModel(tmp_path, checkpoint.spec))
    caches = (
        original.new_cache(POLICY, head_map, 1024),
        moved.new_cache(POLICY, layout.head_map(head_map), 1024),
    )
    # The prompt in one go, then a few tokens, which see only what the heads kept.
    for start, end in ((0, 300), *((i, i + 1) for i in range(300, 306))):
        expected = original.forward(tokens[start:end], caches[0], last_only=True)
        got = moved.forward(tokens[start:end], caches[1], last_only=True)
        assert float((got - expected).abs().max()) <= 1e-3 * float(expected.abs().max())
    wrong = moved.new_cache(POLICY, head_map, 1024)  # heads where they were: others are compressed
    moved.forward(tokens[:300], wrong, last_only=True)
    other = moved.forward(tokens[300:301], wrong, last_only=True)
    again = original.new_cache(POLICY, head_map, 1024)
    original.forward(tokens[:300], again, last_only=True)
    expected = original.forward(tokens[300:301], again, last_only=True)
    assert float((other - expected).abs().max()) > 1e-2 * float(expected.abs().max())
