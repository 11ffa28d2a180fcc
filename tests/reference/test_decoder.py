"""ReferenceDecoder against transformers (dense), against plain ALiBi, and with Razor caches."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trt_razor.errors import RazorError, UsageError
from trt_razor.headmap import HeadMap
from trt_razor.models.positions import alibi_slopes, rope_frequencies
from trt_razor.models.spec import ModelSpec, RopeSpec
from trt_razor.policy import RazorPolicy
from trt_razor.reference import ReferenceDecoder

LAYERS, HIDDEN, INNER, HEADS, KV, DIM, VOCAB = 2, 32, 48, 4, 2, 16, 61


class DictCheckpoint:
    """Weights in a dict; counts how often each is read."""

    def __init__(self, spec: ModelSpec, weights: dict[str, np.ndarray[Any, Any]]) -> None:
        self.spec, self.weights = spec, weights
        self.reads: dict[str, int] = {}

    def tensor(self, name: str) -> np.ndarray[Any, Any]:
        self.reads[name] = self.reads.get(name, 0) + 1
        return self.weights[name]


def make_spec(**changes: Any) -> ModelSpec:
    spec = ModelSpec("tiny", "llama", LAYERS, HIDDEN, INNER, HEADS, KV, DIM, VOCAB, 512, 1e-5)
    return dataclasses.replace(spec, **changes)


def random_weights(spec: ModelSpec, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor random, biases and norms too, so that leaving one out shows."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in spec.tensors().items():
        noise = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            weights[name] = (1 + 0.3 * noise).astype(np.float32)
        else:
            weights[name] = (noise * (0.5 if len(shape) == 1 else 0.2)).astype(np.float32)
    return weights


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


TOKENS = torch.arange(70) * 17 % VOCAB
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.5}

CASES: dict[str, tuple[str, dict[str, Any], ModelSpec]] = {
    "llama": ("Llama", {}, make_spec()),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, make_spec(tie_embeddings=True)),
    "llama-linear": (
        "Llama",
        {"rope_scaling": LINEAR},
        make_spec(rope=RopeSpec(scaling="linear", factor=2.5)),
    ),
    "llama3": (
        "Llama",
        {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
        make_spec(rope=RopeSpec(500000.0, "llama3", 4.0, 64, 1.0, 4.0)),
    ),
    "llama-yarn": (
        "Llama",
        {"rope_scaling": YARN},
        make_spec(rope=RopeSpec(10000.0, "yarn", 4.0, 64)),
    ),
    "llama-bias": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True},
        make_spec(qkv_bias=True, o_bias=True, mlp_bias=True),
    ),
    "mistral": ("Mistral", {"sliding_window": None}, make_spec(architecture="mistral")),
    "qwen2": ("Qwen2", {}, make_spec(architecture="qwen2", qkv_bias=True)),
    "qwen3": ("Qwen3", {}, make_spec(architecture="qwen3", qk_norm=True)),
}


def transformers_logits(
    family: str,
    options: dict[str, Any],
    weights: dict[str, np.ndarray[Any, Any]],
    dtype: torch.dtype,
) -> Tensor:
    transformers = pytest.importorskip("transformers")
    settings = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        **options,
    }
    config = getattr(transformers, f"{family}Config")(**settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    state = {name: torch.from_numpy(w) for name, w in weights.items()}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


@pytest.mark.parametrize("name", CASES)
def test_dense_equals_transformers(name: str) -> None:
    family, options, spec = CASES[name]
    weights = random_weights(spec)
    expected = transformers_logits(family, options, weights, torch.float32)
    decoder = ReferenceDecoder(DictCheckpoint(spec, weights))
    whole = decoder.forward(TOKENS, decoder.new_cache(n_max=70))
    assert whole.shape == (70, VOCAB)
    assert relative(whole, expected) <= 1e-5
    chunked = decoder.prefill(TOKENS, decoder.new_cache(n_max=70), chunk=9)
    assert relative(chunked, expected) <= 1e-5


def test_float64_equals_transformers_with_its_own_table() -> None:
    """With the same rotary table (theirs is float32 arithmetic) nothing but float64 rounding is left."""
    family, options, spec = CASES["qwen3"]
    weights = random_weights(spec)
    expected = transformers_logits(family, options, weights, torch.float64)
    decoder = ReferenceDecoder(DictCheckpoint(spec, weights), torch.float64)
    inv_freq = torch.from_numpy(rope_frequencies(spec)[0]).float()
    theirs = 1.0 / (10000.0 ** (torch.arange(0, DIM, 2, dtype=torch.float) / DIM))
    torch.testing.assert_close(inv_freq, theirs, rtol=1e-6, atol=0)
    angles = torch.arange(70).float()[:, None] * theirs
    decoder._cos_sin = torch.cat([angles.cos(), angles.sin()], -1).double()
    logits = decoder.forward(TOKENS, decoder.new_cache(n_max=70))
    assert logits.dtype == torch.float64
    # RMSNorm of transformers stays in float32 whatever the model's dtype.
    assert relative(logits, expected) <= 2e-6


def plain_alibi_logits(spec: ModelSpec, weights: dict[str, np.ndarray[Any, Any]]) -> Tensor:
    """An independent forward pass: one sequence, masked maps, ALiBi as a bias on each pair."""
    w = {name: torch.from_numpy(x).double() for name, x in weights.items()}
    n, x = len(TOKENS), w["model.embed_tokens.weight"][TOKENS]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + spec.rms_norm_eps).sqrt() * w[name]

    for i in range(spec.num_layers):
        p = f"model.layers.{i}."
        h = norm(x, p + "input_layernorm.weight")
        heads = []
        for head in range(spec.num_heads):
            rows = slice(head * DIM, (head + 1) * DIM)
            q, k, v = (h @ w[f"{p}self_attn.{c}_proj.weight"][rows].T for c in "qkv")
            scores = q @ k.T / math.sqrt(DIM)
            for t in range(n):
                for s in range(n):
                    slope = 2.0 ** (-8.0 * (head + 1) / spec.num_heads)
                    scores[t, s] += -slope * (t - s) if s <= t else -math.inf
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, p + "post_attention_layernorm.weight")
        gate, up = (h @ w[f"{p}mlp.{c}_proj.weight"].T for c in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[p + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def test_alibi_equals_a_plain_computation() -> None:
    spec = make_spec(architecture="baichuan", position="alibi", num_kv_heads=HEADS)
    weights = random_weights(spec)
    decoder = ReferenceDecoder(DictCheckpoint(spec, weights), torch.float64)
    expected = plain_alibi_logits(spec, weights)
    assert relative(decoder.forward(TOKENS, decoder.new_cache(n_max=70)), expected) <= 1e-12
    chunked = decoder.prefill(TOKENS, decoder.new_cache(n_max=70), chunk=11)
    assert relative(chunked, expected) <= 1e-12
    assert alibi_slopes(HEADS).tolist() == [0.25, 0.0625, 0.015625, 0.00390625]


def head_map(spec: ModelSpec, *heads: tuple[int, ...]) -> HeadMap:
    return HeadMap(
        spec.name, spec.fingerprint(), spec.num_layers, spec.num_kv_heads, heads, "test", "test"
    )


@pytest.mark.parametrize("alibi", [False, True])
def test_razor_with_a_window_that_drops_nothing_equals_dense(alibi: bool) -> None:
    spec = make_spec(position="alibi" if alibi else "rope")
    decoder = ReferenceDecoder(DictCheckpoint(spec, random_weights(spec)), torch.float64)
    dense = decoder.forward(TOKENS, decoder.new_cache(n_max=70))
    cache = decoder.new_cache(RazorPolicy(4, 66, None, 1), head_map(spec, (1,), ()), 70)
    assert relative(decoder.prefill(TOKENS, cache, chunk=8), dense) <= 1e-13


@pytest.mark.parametrize("comp_tokens", [0, 1, 4])
def test_razor_prefills_dense_then_decodes_compressed(comp_tokens: int) -> None:
    spec = make_spec()
    decoder = ReferenceDecoder(DictCheckpoint(spec, random_weights(spec)), torch.float64)
    policy, heads = RazorPolicy(2, 6, None, comp_tokens), head_map(spec, (0,), (1,))
    dense = decoder.forward(TOKENS, decoder.new_cache(n_max=70))
    cache = decoder.new_cache(policy, heads, 70)
    prompt = decoder.prefill(TOKENS[:60], cache)
    assert relative(prompt, dense[:60]) <= 1e-13
    steps = torch.cat([decoder.forward(TOKENS[i : i + 1], cache) for i in range(60, 70)])
    assert relative(steps, dense[60:]) > 1e-3
    assert [c.n for c in cache] == [70, 70]
    local = cache[0].local
    assert local is not None
    assert local.comp_count.sum().item() == (policy.dropped(70) if comp_tokens else 0)


def test_last_only_is_the_last_row() -> None:
    spec = make_spec(tie_embeddings=True)
    decoder = ReferenceDecoder(DictCheckpoint(spec, random_weights(spec)), torch.float64)
    rows = decoder.prefill(TOKENS, decoder.new_cache(n_max=70), chunk=16)
    last = decoder.prefill(TOKENS, decoder.new_cache(n_max=70), chunk=16, last_only=True)
    assert last.shape == (1, VOCAB)
    assert relative(last, rows[-1:]) <= 1e-14


@pytest.mark.parametrize("keep", [True, False])
def test_weights_are_kept_or_streamed_with_equal_results(keep: bool) -> None:
    spec = make_spec(qkv_bias=True)
    weights = random_weights(spec)
    checkpoint = DictCheckpoint(spec, weights)
    decoder = ReferenceDecoder(checkpoint, keep_weights=keep)
    cache = decoder.new_cache(n_max=70)
    decoder.prefill(TOKENS[:40], cache, chunk=20)
    assert set(checkpoint.reads) == set(weights)
    assert set(checkpoint.reads.values()) == ({1} if keep else {2})
    other = ReferenceDecoder(checkpoint, keep_weights=not keep)
    cache = decoder.new_cache(n_max=70), other.new_cache(n_max=70)
    assert torch.equal(decoder.forward(TOKENS, cache[0]), other.forward(TOKENS, cache[1]))


def test_half_precision_weights_are_read_exactly() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    spec = make_spec()
    for dtype in (np.float16, ml_dtypes.bfloat16):
        half = {name: w.astype(dtype) for name, w in random_weights(spec).items()}
        wide = {name: w.astype(np.float32) for name, w in half.items()}
        for w in half.values():
            w.flags.writeable = False  # memory-mapped files are read-only
        a, b = (ReferenceDecoder(DictCheckpoint(spec, w)) for w in (half, wide))
        assert torch.equal(
            a.forward(TOKENS, a.new_cache(n_max=70)), b.forward(TOKENS, b.new_cache(n_max=70))
        )
        streamed = ReferenceDecoder(DictCheckpoint(spec, half), keep_weights=False)
        assert torch.equal(streamed.embed([3, 5]), b.embed([3, 5]))


def test_rope_table_grows_with_the_positions() -> None:
    spec = make_spec()
    decoder = ReferenceDecoder(DictCheckpoint(spec, random_weights(spec)), torch.float64)
    x = decoder.embed([1, 2])
    near = decoder.qkv(0, x, torch.tensor([0, 300]))
    far = decoder.qkv(0, x, torch.tensor([10_000, 10_300]))
    # Attention sees position differences only.
    a, b = ((q[0, 1] @ k[0, 0]) for q, k, _ in (near, far))
    assert float(abs(a - b) / abs(a)) <= 1e-5
    assert near[0].shape == (HEADS, 2, DIM)
    assert near[1].shape == near[2].shape == (KV, 2, DIM)


def test_wrong_arguments_are_named() -> None:
    spec = make_spec()
    weights = random_weights(spec)
    decoder = ReferenceDecoder(DictCheckpoint(spec, weights))
    cache = decoder.new_cache(n_max=10)
    with pytest.raises(UsageError, match=r"tokens: expected ids 0\.\.60, found -1\.\.99"):
        decoder.forward([-1, 99], cache)
    with pytest.raises(UsageError, match="tokens: expected at least 1"):
        decoder.forward([], cache)
    with pytest.raises(UsageError, match="tokens: expected at least 1"):
        decoder.prefill([], cache)
    with pytest.raises(UsageError, match="chunk: expected >= 1"):
        decoder.prefill([1], cache, chunk=0)
    with pytest.raises(UsageError, match="cache: expected 2 layers, found 1"):
        decoder.forward([1], cache[:1])
    with pytest.raises(RazorError, match="n_max = 10"):
        decoder.forward(list(range(11)), cache)
    with pytest.raises(UsageError, match="policy: missing"):
        decoder.new_cache(head_map=head_map(spec, (0,), (0,)))
    with pytest.raises(UsageError, match="dtype: expected float32 or float64"):
        ReferenceDecoder(DictCheckpoint(spec, weights), torch.bfloat16)
    alibi = make_spec(position="alibi")
    with pytest.raises(UsageError, match="comp_tokens"):
        ReferenceDecoder(DictCheckpoint(alibi, weights)).new_cache(
            RazorPolicy(comp_tokens=2), head_map(alibi, (0,), (0,)), 64
        )
    weights["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 3), np.float32)
    with pytest.raises(
        RazorError, match=r"up_proj.weight: expected shape \[48, 32\], found \[3, 3\]"
    ):
        ReferenceDecoder(DictCheckpoint(spec, weights)).forward([1], decoder.new_cache(n_max=4))


def test_activation_is_swiglu() -> None:
    """finish() alone: zero attention output leaves the residual plus down(silu(gate)·up)."""
    spec = make_spec()
    weights = random_weights(spec)
    decoder = ReferenceDecoder(DictCheckpoint(spec, weights), torch.float64)
    x = decoder.embed(TOKENS[:5])
    out = decoder.finish(0, x, torch.zeros(HEADS, 5, DIM))
    w = {k: torch.from_numpy(a).double() for k, a in weights.items()}
    p = "model.layers.0."
    h = F.rms_norm(x, (HIDDEN,), w[p + "post_attention_layernorm.weight"], 1e-5)
    gate, up = h @ w[p + "mlp.gate_proj.weight"].T, h @ w[p + "mlp.up_proj.weight"].T
    expected = x + (F.silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
