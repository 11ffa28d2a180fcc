"""The rotary table against transformers' formulas, ALiBi slopes against the paper's numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from trt_razor.errors import UsageError
from trt_razor.models.positions import alibi_slopes, rope_frequencies, rope_table
from trt_razor.models.spec import ModelSpec, RopeSpec

SCALINGS: dict[str, tuple[RopeSpec, dict[str, Any] | None]] = {
    "none": (RopeSpec(theta=10000.0), None),
    "linear": (
        RopeSpec(theta=10000.0, scaling="linear", factor=4.0),
        {"rope_type": "linear", "factor": 4.0},
    ),
    "llama3": (
        RopeSpec(500000.0, "llama3", 8.0, 8192, 1.0, 4.0),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        RopeSpec(1000000.0, "yarn", 4.0, 32768),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "yarn-short": (  # the ramp is cut off on both sides
        RopeSpec(10000.0, "yarn", 16.0, 256, beta_fast=24.0, beta_slow=2.0, attention_factor=1.25),
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "attention_factor": 1.25,
        },
    ),
}


def make_spec(rope: RopeSpec, head_dim: int = 128, position: str = "rope") -> ModelSpec:
    return ModelSpec(
        name="tiny",
        architecture="llama",
        num_layers=1,
        hidden_size=4 * head_dim,
        intermediate_size=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        vocab_size=16,
        max_positions=131072,
        rms_norm_eps=1e-5,
        position=position,
        rope=rope,
    )


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name: str, head_dim: int) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope, scaling = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_theta=rope.theta,
        rope_scaling=scaling,
    )
    if scaling is None:
        embedding = LlamaRotaryEmbedding(config)
        inv_freq, factor = embedding.inv_freq, embedding.attention_scaling
    else:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    ours, our_factor = rope_frequencies(make_spec(rope, head_dim))
    assert ours.dtype == np.float64
    # transformers works in float32: a few units in the last place, more where terms cancel.
    np.testing.assert_allclose(ours, inv_freq.double().numpy(), rtol=2e-6)
    assert our_factor == pytest.approx(factor, rel=1e-12)


def test_yarn_attention_factor_scales_cos_and_sin() -> None:
    table = rope_table(make_spec(SCALINGS["yarn"][0]), 3)
    factor = 0.1 * math.log(4.0) + 1.0
    np.testing.assert_allclose(table[0, :64], factor, rtol=1e-7)
    radius = np.hypot(table[:, :64].astype(np.float64), table[:, 64:])
    np.testing.assert_allclose(radius, factor, rtol=1e-6)


def test_table_is_float64_exact_at_far_positions() -> None:
    count = 131072
    table = rope_table(make_spec(SCALINGS["none"][0], head_dim=8), count)
    assert table.shape == (count, 8)
    assert table.dtype == np.float32
    for p in (0, 1, 16383, 16384, count - 1):
        angles = [p * 10000.0 ** (-i / 4) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        # float32 angles would be off by 5e-3 here.
        np.testing.assert_allclose(table[p], expected, atol=1e-7)


def test_rope_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UsageError, match=r"unknown 'yarnn'; did you mean yarn"):
        rope_table(make_spec(RopeSpec(scaling="yarnn")), 4)
    with pytest.raises(UsageError, match="even number"):
        rope_table(make_spec(RopeSpec(), head_dim=7), 4)
    with pytest.raises(UsageError, match="'alibi', expected 'rope'"):
        rope_table(make_spec(RopeSpec(), position="alibi"), 4)


def test_alibi_slopes_of_powers_of_two() -> None:
    np.testing.assert_array_equal(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(16), [2.0 ** (-i / 2) for i in range(1, 17)], rtol=1e-7)
    np.testing.assert_array_equal(alibi_slopes(1), np.float32([2.0**-8]))


@pytest.mark.parametrize("heads", [3, 6, 12, 40, 52])
def test_alibi_slopes_in_between(heads: int) -> None:
    whole = 2 ** math.floor(math.log2(heads))
    extra = alibi_slopes(2 * whole)[::2][: heads - whole]
    np.testing.assert_array_equal(alibi_slopes(heads), [*alibi_slopes(whole), *extra])
    assert alibi_slopes(heads).dtype == np.float32


def test_alibi_slopes_of_baichuan_13b() -> None:
    """40 heads: 32 slopes of ratio 2^(-1/4), then 8 of ratio 2^(-1/4) that start at 2^(-1/8)."""
    slopes = alibi_slopes(40).astype(np.float64)
    np.testing.assert_allclose(slopes[[0, 31]], [2.0**-0.25, 2.0**-8], rtol=1e-7)
    np.testing.assert_allclose(
        slopes[32:], [2.0 ** -(0.125 + 0.25 * i) for i in range(8)], rtol=1e-7
    )


def test_alibi_slopes_need_a_head() -> None:
    with pytest.raises(UsageError, match="expected >= 1, found 0"):
        alibi_slopes(0)
