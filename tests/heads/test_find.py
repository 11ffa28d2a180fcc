from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from heads_helpers import TinyCheckpoint, tiny_spec

from trt_razor.errors import UsageError
from trt_razor.headmap import HeadMap
from trt_razor.heads.find import FindOptions, examine_heads, find_heads, probe_scores
from trt_razor.heads.probe import Probe, make_probe
from trt_razor.reference.decoder import ReferenceDecoder, WeightSource

SMALL = {"probe_length": 24, "repeats": 3}


def scores_by_attention_maps(
    checkpoint: WeightSource, probe: Probe
) -> tuple[np.ndarray, np.ndarray]:
    """Both scores from whole n x n maps, float64, nothing shared with the scorer but the decoder."""
    spec = checkpoint.spec
    decoder = ReferenceDecoder(checkpoint, torch.float64, keep_weights=False)
    x = decoder.embed(torch.from_numpy(probe.tokens))
    n, back = len(x), probe.length
    out = np.zeros((2, spec.num_layers, spec.num_kv_heads))
    for layer in range(spec.num_layers):
        q, k, v = decoder.qkv(layer, x, torch.arange(n))
        k, v = (t.repeat_interleave(spec.group, 0) for t in (k, v))
        logits = q @ k.transpose(1, 2) / math.sqrt(spec.head_dim)
        weights = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)
        for kind in (0, 1):
            total = torch.zeros(spec.num_heads, dtype=torch.float64)
            for row in range(probe.offset + back, n):
                for earlier in range(row - back, probe.offset - 1, -back):
                    total += weights[:, row, earlier + kind]
            mean = total / (n - probe.offset - back)
            out[kind, layer] = mean.view(spec.num_kv_heads, spec.group).amax(1)
        x = decoder.finish(layer, x, weights @ v)
    return out[0], out[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 4},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1},
        {"architecture": "qwen2", "qkv_bias": True, "bos_token_id": None},
        {"architecture": "qwen3", "qk_norm": True, "tie_embeddings": True},
    ],
)
def test_scores_against_whole_attention_maps(changes: dict[str, object]) -> None:
    checkpoint = TinyCheckpoint(tiny_spec(**changes), gain=2.0)
    probe = make_probe(checkpoint.spec, **{"length": 24, "repeats": 3})
    echo, induction = probe_scores(checkpoint, [probe])
    want_echo, want_induction = scores_by_attention_maps(checkpoint, probe)
    np.testing.assert_allclose(echo[0], want_echo, atol=1e-5, rtol=0)
    np.testing.assert_allclose(induction[0], want_induction, atol=1e-5, rtol=0)
    assert want_echo.max() > 1e-3  # far above the tolerance: the comparison says something


def test_head_map_says_what_was_done(tmp_path: Path) -> None:
    checkpoint = TinyCheckpoint(tiny_spec())
    head_map = find_heads(checkpoint, FindOptions(**SMALL, seed=5, min_echo=2))  # type: ignore[arg-type]
    assert head_map.num_retrieval in (2, 3)  # 14 % of 6 is 1 by induction, 2 by echo
    assert head_map.method == "paper"
    assert head_map.fingerprint == checkpoint.spec.fingerprint()
    assert head_map.checkpoint == checkpoint.identity()
    assert head_map.source == "probe: 24 random tokens x 3, seed 5"
    assert dict(head_map.options) == {
        "probe_length": 24,
        "repeats": 3,
        "bos": True,
        "seeds": [5],
        "dtype": "float32",
        "induction_share": 0.14,
        "echo_share": 0.01,
        "min_echo": 2,
        "warnings": [],
    }
    path = tmp_path / "map.json"
    head_map.save(path)
    assert HeadMap.load(path) == head_map


def test_seeds_are_averaged_and_their_agreement_reported() -> None:
    checkpoint = TinyCheckpoint(tiny_spec(), gain=2.0)
    options = FindOptions(**SMALL, seeds=3, method="combined", combined_share=0.5)  # type: ignore[arg-type]
    found = examine_heads(checkpoint, options)
    single = [find_heads(checkpoint, FindOptions(**SMALL, seed=s)) for s in range(3)]  # type: ignore[arg-type]
    for name in ("echo", "induction"):
        mean = np.mean([m.scores[name] for m in single], axis=0)
        np.testing.assert_allclose(found.head_map.scores[name], mean, rtol=1e-4)
    assert found.stability is not None
    assert [(a, b) for a, b, _ in found.stability.overlaps] == [(0, 1), (0, 2), (1, 2)]
    assert found.head_map.options["stability"] == found.stability.to_json()
    json.dumps(found.head_map.to_json())


def test_weights_are_read_once_for_all_seeds() -> None:
    checkpoint = TinyCheckpoint(tiny_spec())
    find_heads(checkpoint, FindOptions(**SMALL, seeds=3))  # type: ignore[arg-type]
    assert set(checkpoint.reads.values()) == {1}
    assert "lm_head.weight" not in checkpoint.reads


def test_progress_counts_every_step() -> None:
    calls: list[tuple[str, int, int]] = []
    checkpoint = TinyCheckpoint(tiny_spec())
    find_heads(checkpoint, FindOptions(**SMALL, seeds=2), lambda *a: calls.append(a))  # type: ignore[arg-type]
    assert calls == [("scoring heads", i, 6) for i in range(7)]


def test_a_probe_past_the_models_positions_is_noted() -> None:
    checkpoint = TinyCheckpoint(tiny_spec(max_positions=64))
    found = examine_heads(checkpoint, FindOptions(**SMALL))  # type: ignore[arg-type]
    assert len(found.warnings) == 1
    assert "made for 64 positions" in found.warnings[0]
    assert found.head_map.options["warnings"] == list(found.warnings)
    with pytest.raises(UsageError, match="largest probe length with 3 repeats is 170"):
        find_heads(checkpoint, FindOptions(probe_length=171, repeats=3))


def test_alibi_models_are_scored_by_scope() -> None:
    spec = tiny_spec(architecture="baichuan", position="alibi", num_kv_heads=4, head_dim=8)
    checkpoint = TinyCheckpoint(spec, gain=0.1)
    found = examine_heads(checkpoint, FindOptions(window=500, eps=1e-4))
    scopes = np.array(found.head_map.scores["scope"])
    want = tuple(tuple(int(h) for h in np.flatnonzero(row > 500)) for row in scopes)
    assert found.head_map.retrieval_heads == want
    assert 0 < found.head_map.num_retrieval < 12
    assert found.head_map.method == "alibi-scope"
    assert found.stability is None
    everything = examine_heads(checkpoint, FindOptions(window=1))
    assert everything.head_map.share == 1.0
    assert "no cache is saved" in everything.warnings[0]
    with pytest.raises(UsageError, match="probes RoPE models"):
        find_heads(checkpoint, FindOptions(method="combined"))
    with pytest.raises(UsageError, match="come from the weights alone"):
        find_heads(checkpoint, FindOptions(seeds=2))


def test_scope_is_refused_for_rope_models() -> None:
    with pytest.raises(UsageError, match="'alibi-scope' is for ALiBi models"):
        find_heads(TinyCheckpoint(tiny_spec()), FindOptions(method="alibi-scope"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": 0}, "seeds: expected 1..64, found 0"),
        ({"dtype": "float16"}, "dtype 'float16'"),
        ({"method": "papre"}, "did you mean paper"),
        ({"eps": 0.0}, "eps: expected"),
        ({"window": 0}, "window: expected"),
        ({"echo_share": 1.5}, "echo_share: expected a share between 0 and 1"),
        ({"scope_share": -0.5}, "scope_share: expected a share"),
    ],
)
def test_wrong_options_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FindOptions(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", "cpu:x"])
def test_wrong_devices_are_named(device: str) -> None:
    with pytest.raises(UsageError, match="device '"):
        find_heads(TinyCheckpoint(tiny_spec()), FindOptions(**SMALL, device=device))  # type: ignore[arg-type]


def test_interrupting_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_heads(TinyCheckpoint(tiny_spec()), FindOptions(**SMALL), stop)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real
def test_smollm2_scores_against_whole_attention_maps() -> None:
    from trt_razor.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint("smollm2-135m", None)
    probe = make_probe(checkpoint.spec, length=32, repeats=3)
    echo, induction = probe_scores(checkpoint, [probe])
    want_echo, want_induction = scores_by_attention_maps(checkpoint, probe)
    np.testing.assert_allclose(echo[0], want_echo, atol=1e-5, rtol=0)
    np.testing.assert_allclose(induction[0], want_induction, atol=1e-5, rtol=0)
    assert induction.max() > 0.3  # a trained model has induction heads, random weights do not
