"""reference.hf with the kernels (through the shim) against the same without them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [hf]")
sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))
from hf_models import TOKENS, hf_logits, relative
from transformers import LlamaConfig, LlamaForCausalLM

from trt_razor.errors import UsageError
from trt_razor.kernels import RazorKernels
from trt_razor.policy import RazorPolicy
from trt_razor.reference import hf
from trt_razor.reference.hf import cache as hf_cache

HEADS = ((0,), ())


def make(dtype: torch.dtype, head_dim: int = 64) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize(
    "comp_tokens, heavy_hitters", [(0, 0), (1, 0), (4, 0), (1, 4), (0, 30), (4, 5)]
)
def test_kernels_equal_the_reference(
    comp_tokens: int,
    heavy_hitters: int,
    kernels: RazorKernels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt, steps, another chunk; the cache grows on the way and its tensors agree at the end."""
    monkeypatch.setattr(hf_cache, "GROWTH", 16)
    policy = RazorPolicy(2, 8, 5, comp_tokens, heavy_hitters)
    chunks = [21, *[1] * 14, 7, 1]
    if heavy_hitters:
        chunks[-2:] = [17, 1]  # long enough to choose again
    tokens, model = TOKENS[: sum(chunks)], make(torch.float16)
    calls: list[int] = []
    attention = kernels.attention

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return attention(*args, **options)

    monkeypatch.setattr(kernels, "attention", counted)
    caches, logits = [], []
    for choice in (False, kernels):
        with hf.enable(model, HEADS, policy, kernels=choice) as razor:
            caches.append(razor.new_cache())
            logits.append(hf_logits(model, tokens, chunks, caches[-1]))
    assert len(calls) == 2 * len(chunks)
    assert relative(logits[1], logits[0]) <= 5e-3
    for want, got in zip(caches[0].layers, caches[1].layers, strict=True):
        a, b = want.rows[0], got.rows[0]
        assert (a.n, a.local.n, a.n_max) == (b.n, b.local.n, b.n_max)
        index = torch.cat([a.local.row_of(a.local.kept_positions()), a.local.heavy_rows()])
        assert relative(b.local.local_k[:, index], a.local.local_k[:, index]) <= 5e-3
        assert torch.equal(a.local.comp_count, b.local.comp_count)
        if comp_tokens == 1:  # with more, a near tie may put a key elsewhere
            assert relative(b.local.comp, a.local.comp) <= 5e-3


def test_what_the_kernels_do_not_take(kernels: RazorKernels) -> None:
    for dtype, head_dim, words in (
        (torch.float32, 64, "expected float16 or bfloat16, found float32"),
        (torch.float16, 8, "head_dim"),
    ):
        model = make(dtype, head_dim)
        with (
            hf.enable(model, HEADS, RazorPolicy(2, 8), kernels=kernels),
            pytest.raises(UsageError, match=words),
        ):
            hf_logits(model, TOKENS[:5], [5])
