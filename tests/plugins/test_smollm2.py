"""A real model through the kernels: SmolLM2-135M, every layer's attention by the library, float16.

Prompt in two unequal chunks, then single tokens, beyond the window: logits against the reference with
the same head map and policy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from trt_razor.headmap import HeadMap
from trt_razor.kernels import Caches, LayerConfig
from trt_razor.models.checkpoint import open_checkpoint
from trt_razor.models.positions import rope_table
from trt_razor.policy import RazorPolicy
from trt_razor.reference import ReferenceDecoder

if TYPE_CHECKING:
    from trt_razor.kernels import RazorKernels

pytestmark = [pytest.mark.real, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
N_MAX, CHUNKS = 128, (57, 24, 1, 1, 1)
POLICY = RazorPolicy(sink_tokens=4, min_window=24, compression=None, comp_tokens=4)


def test_logits_of_a_real_model(kernels: RazorKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint("smollm2-135m", None)
    spec = checkpoint.spec
    heads = HeadMap.load(ROOT / "engines" / "recipes" / "smollm2-135m.heads.json")
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    tokens = tokenizer.encode((ROOT / "LICENSE").read_text())[: sum(CHUNKS)]
    decoder = ReferenceDecoder(checkpoint)

    reference_cache = decoder.new_cache(POLICY, heads, N_MAX)
    dense_cache = decoder.new_cache(None, None, N_MAX)
    want, dense = [], []
    start = 0
    for chunk in CHUNKS:
        part = tokens[start : start + chunk]
        want.append(decoder.forward(part, reference_cache, last_only=True)[0])
        dense.append(decoder.forward(part, dense_cache, last_only=True)[0])
        start += chunk

    # The same decoder up to the kernels, which rotate by themselves.
    monkeypatch.setattr("trt_razor.reference.decoder.rotate", lambda x, cos_sin: x)
    layers = [
        LayerConfig.from_spec(spec, POLICY, heads.retrieval_heads[i], N_MAX, dtype="float16")
        for i in range(spec.num_layers)
    ]
    caches = [Caches.empty(layer, 1, "cpu") for layer in layers]
    table = torch.from_numpy(rope_table(spec, N_MAX))
    start = 0
    for chunk, expected, other in zip(CHUNKS, want, dense, strict=True):
        x = decoder.embed(tokens[start : start + chunk])
        positions = torch.arange(start, start + chunk)
        for i, layer in enumerate(layers):
            parts = [p.transpose(0, 1).flatten(1) for p in decoder.qkv(i, x, positions)]
            out = kernels.attention(
                layer,
                torch.cat(parts, dim=1).to(torch.float16)[None],
                caches[i],
                past=torch.tensor([start], dtype=torch.int32),
                chunk=torch.tensor([chunk], dtype=torch.int32),
                cos_sin=table,
            )
            attention = out[0].float().unflatten(1, (spec.num_heads, -1)).transpose(0, 1)
            x = decoder.finish(i, x, attention)
        got = decoder.logits(x[-1:])[0]
        start += chunk
        scale = float(expected.abs().max())
        # float16 rounds queries, keys, values and outputs of 30 layers
        error = float((got - expected).abs().max()) / scale
        assert error < 0.008, f"after {start} tokens: {error}"
        if POLICY.dropped(start - chunk):  # then it is Razor's answer, not dense attention's
            assert error < 0.05 * float((other - expected).abs().max()) / scale
