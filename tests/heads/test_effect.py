from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from heads_helpers import TinyCheckpoint, tiny_spec

from trt_razor.errors import UsageError
from trt_razor.headmap import HeadMap
from trt_razor.heads.answers import ANSWER, CUE, AnswerProbe, random_probes
from trt_razor.heads.effect import ablation_effect, gradient_effect
from trt_razor.policy import RazorPolicy
from trt_razor.reference.decoder import ReferenceDecoder

NARROW = RazorPolicy(sink_tokens=2, min_window=8, compression=None, comp_tokens=0)
WITH_MEANS = NARROW.with_(comp_tokens=2)


def loss_with_local(
    checkpoint: TinyCheckpoint, probe: AnswerProbe, policy: RazorPolicy, local: set[tuple[int, int]]
) -> float:
    """The answer's loss by the reference's own cache, with these (layer, KV head) local."""
    spec = checkpoint.spec
    heads = tuple(
        tuple(h for h in range(spec.num_kv_heads) if (layer, h) not in local)
        for layer in range(spec.num_layers)
    )
    head_map = HeadMap(
        spec.name, spec.fingerprint(), spec.num_layers, spec.num_kv_heads, heads, "test", "test"
    )
    decoder = ReferenceDecoder(checkpoint, torch.float64)
    cache = decoder.new_cache(policy, head_map, len(probe.context) + len(probe.chunk))
    decoder.forward(probe.context, cache, last_only=True)
    logits = decoder.forward(probe.chunk[:-1], cache)[probe.first - 1 :]
    return float(F.cross_entropy(logits, torch.from_numpy(probe.answer)))


def every_head(checkpoint: TinyCheckpoint) -> list[tuple[int, int]]:
    spec = checkpoint.spec
    return [(layer, h) for layer in range(spec.num_layers) for h in range(spec.num_kv_heads)]


@pytest.mark.parametrize(
    "changes, policy",
    [
        ({}, NARROW),
        ({"num_kv_heads": 1}, WITH_MEANS),
        ({"architecture": "qwen3", "qk_norm": True, "tie_embeddings": True}, WITH_MEANS),
    ],
)
def test_ablation_is_what_the_reference_cache_says(
    changes: dict[str, object], policy: RazorPolicy
) -> None:
    checkpoint = TinyCheckpoint(tiny_spec(**changes), gain=2.0)
    probes = random_probes(checkpoint.spec, 90, 8, 2, seed=3)
    effect = ablation_effect(checkpoint, probes, policy, torch.float64)
    for i, probe in enumerate(probes):
        dense = loss_with_local(checkpoint, probe, policy, set())
        for layer, h in every_head(checkpoint):
            want = loss_with_local(checkpoint, probe, policy, {(layer, h)}) - dense
            assert effect[i, layer, h] == pytest.approx(want, abs=1e-9)
    assert np.abs(effect).max() > 1e-3


def test_weights_are_read_once_for_all_probes() -> None:
    checkpoint = TinyCheckpoint(tiny_spec())
    ablation_effect(checkpoint, random_probes(checkpoint.spec, 90, 8, 3, 0), NARROW)
    layers = {n: c for n, c in checkpoint.reads.items() if n.startswith("model.layers.")}
    assert set(layers.values()) == {1}


def test_gradient_is_the_slope_of_the_gates() -> None:
    """Against finite differences of a model whose attention outputs are mixed by hand."""
    checkpoint = TinyCheckpoint(tiny_spec(), gain=2.0)
    spec = checkpoint.spec
    (probe,) = random_probes(spec, 90, 8, 1, seed=1)
    decoder = ReferenceDecoder(checkpoint, torch.float64)

    def loss(gates: np.ndarray) -> float:
        x, y = decoder.embed(probe.context), decoder.embed(probe.chunk[:-1])
        n, new = len(x), len(y)
        seen = torch.ones(new, n + new, dtype=torch.bool).tril(n)
        near = seen.clone()
        near[:, NARROW.sink_tokens : n - NARROW.min_window] = False
        for layer in range(spec.num_layers):
            q, k, v = decoder.qkv(layer, x, torch.arange(n))
            q2, k2, v2 = decoder.qkv(layer, y, torch.arange(n, n + new))
            both = [torch.cat(p, 1).repeat_interleave(spec.group, 0) for p in ((k, k2), (v, v2))]
            dense = F.scaled_dot_product_attention(
                q, *(t.repeat_interleave(spec.group, 0) for t in (k, v)), is_causal=True
            )
            full, local = (
                F.scaled_dot_product_attention(q2, *both, attn_mask=m) for m in (seen, near)
            )
            a = torch.from_numpy(gates[layer]).repeat_interleave(spec.group)[:, None, None]
            x = decoder.finish(layer, x, dense)
            y = decoder.finish(layer, y, a * full + (1 - a) * local)
        logits = decoder.logits(y)[probe.first - 1 :]
        return float(F.cross_entropy(logits, torch.from_numpy(probe.answer)))

    for points, place in ((1, 1.0), (2, None)):
        got = gradient_effect(checkpoint, [probe], NARROW, points, torch.float64)[0]
        places = [place] if place is not None else [0.25, 0.75]
        for layer, h in every_head(checkpoint):
            want = 0.0
            for at in places:
                up, down = (np.full((spec.num_layers, spec.num_kv_heads), at) for _ in range(2))
                up[layer, h] += 1e-5
                down[layer, h] -= 1e-5
                want -= (loss(up) - loss(down)) / 2e-5 / len(places)
            assert got[layer, h] == pytest.approx(want, abs=1e-6)


def test_integrated_gradients_add_up_to_the_whole_effect() -> None:
    checkpoint = TinyCheckpoint(tiny_spec(), gain=2.0)
    (probe,) = random_probes(checkpoint.spec, 90, 8, 1, seed=0)
    total = gradient_effect(checkpoint, [probe], WITH_MEANS, 32, torch.float64).sum()
    all_local = loss_with_local(checkpoint, probe, WITH_MEANS, set(every_head(checkpoint)))
    dense = loss_with_local(checkpoint, probe, WITH_MEANS, set())
    assert total == pytest.approx(all_local - dense, abs=0.01 * abs(all_local - dense))
    assert abs(all_local - dense) > 0.01


def test_random_probes_ask_for_what_the_context_holds() -> None:
    spec = tiny_spec()
    probes = random_probes(spec, 100, 16, 3, seed=5)
    again = random_probes(spec, 100, 16, 1, seed=7)
    np.testing.assert_array_equal(again[0].context, probes[2].context)
    for probe in probes:
        assert (len(probe.context), len(probe.answer)) == (100, ANSWER)
        assert probe.context[0] == spec.bos_token_id
        text, piece = probe.context.tolist(), probe.chunk.tolist()
        at = text.index(piece[0])
        assert text[at : at + CUE + ANSWER] == piece
        assert CUE + ANSWER <= at <= 100 - 16 - len(piece)
    assert len({p.context.tolist().index(int(p.chunk[0])) for p in probes}) > 1


def test_wrong_probes_are_named() -> None:
    with pytest.raises(UsageError, match=r"effect length: expected at least 82 tokens .* found 81"):
        random_probes(tiny_spec(), 81, 16, 1, 0)
    with pytest.raises(UsageError, match=r"first: expected 1\.\.2, found 3"):
        AnswerProbe(np.arange(4), np.arange(3), 3)
    with pytest.raises(UsageError, match="at least 1 token"):
        AnswerProbe(np.arange(0), np.arange(3), 1)
