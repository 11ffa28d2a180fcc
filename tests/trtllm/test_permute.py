"""Heads in another order: the same function of tokens, for every architecture."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny_checkpoints import SPECS, VOCAB, RandomModel, head_map_of, spec_of

from trt_razor.errors import RazorError
from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import WeightSource
from trt_razor.models.positions import alibi_slopes
from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy
from trt_razor.reference import ReferenceDecoder
from trt_razor.reference.cache import LayerCache
from trt_razor.trtllm.permute import PermutedCheckpoint, permute, permuted_slopes
from trt_razor.trtllm.ranks import RankLayout, dense_layout, equalise, query_heads, rank_layout

POLICY = RazorPolicy(sink_tokens=3, min_window=8, compression=5, comp_tokens=1)
TOKENS = (torch.arange(38) * 17 + 5) % VOCAB
TIGHT = 1e-11  # float64: only sums over heads run in another order


def caches(
    spec: ModelSpec, head_map: HeadMap | None, layout: RankLayout | None
) -> list[LayerCache]:
    """Empty caches; ALiBi slopes in the layout's order."""
    out = []
    for layer in range(spec.num_layers):
        slopes = None
        if spec.position == "alibi":
            values = alibi_slopes(spec.num_heads)
            if layout is not None:
                values = permuted_slopes(spec, layout.order[layer])
            slopes = torch.from_numpy(values)
        heads = None if head_map is None else head_map.retrieval_heads[layer]
        out.append(
            LayerCache(
                POLICY,
                heads,
                spec.num_heads,
                spec.num_kv_heads,
                spec.head_dim,
                64,
                torch.float64,
                "cpu",
                slopes,
            )
        )
    return out


def logits(
    model: WeightSource, head_map: HeadMap | None, layout: RankLayout | None = None
) -> torch.Tensor:
    """A prompt, a chunk behind it, then tokens one by one."""
    decoder = ReferenceDecoder(model, torch.float64)
    cache = caches(model.spec, head_map, layout)
    return torch.cat([decoder.forward(part, cache) for part in TOKENS.split([30, 6, 1, 1])])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(
    "name, tp_size", [("llama-gqa", 1), ("baichuan-alibi", 1), *((name, 2) for name in SPECS)]
)
def test_permuted_model_is_the_same_function(name: str, tp_size: int) -> None:
    spec = SPECS[name]
    model = RandomModel(spec)
    head_map = equalise(head_map_of(spec), tp_size)
    layout = rank_layout(head_map, tp_size)
    permuted = PermutedCheckpoint(model, layout)
    assert any(order != tuple(range(spec.num_kv_heads)) for order in layout.order)

    razor = logits(model, head_map)
    moved = layout.head_map(head_map)
    assert relative(logits(permuted, moved, layout), razor) < TIGHT
    dense = logits(model, None)
    assert relative(logits(permuted, None, layout), dense) < TIGHT
    # The comparison sees which heads are compressed, and what does not move along.
    assert relative(razor, dense) > 1e-5
    assert relative(logits(permuted, head_map, layout), razor) > 1e-5
    if spec.position == "alibi":
        assert relative(logits(permuted, moved, None), razor) > 1e-5


@pytest.mark.parametrize("name", ["llama-mha-bias", "qwen2-gqa", "qwen3-gqa"])
def test_elements_move_with_their_heads(name: str) -> None:
    """Against the definition, one element at a time."""
    spec = SPECS[name]
    model = RandomModel(spec)
    layout = rank_layout(equalise(head_map_of(spec, seed=3), 2), 2)
    permuted = PermutedCheckpoint(model, layout)
    d, g = spec.head_dim, spec.group
    for layer, order in enumerate(layout.order):
        prefix = f"model.layers.{layer}.self_attn."
        for proj, group in (("q", g), ("k", 1), ("v", 1)):
            for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
                old = model.weights[f"{prefix}{proj}_proj.{kind}"]
                new = permuted.tensor(f"{prefix}{proj}_proj.{kind}")
                for i, head in enumerate(order):
                    for row in range(group * d):
                        assert np.array_equal(new[i * group * d + row], old[head * group * d + row])
        old, new = (
            model.weights[prefix + "o_proj.weight"],
            permuted.tensor(prefix + "o_proj.weight"),
        )
        for i, head in enumerate(order):
            for column in range(g * d):
                assert np.array_equal(new[:, i * g * d + column], old[:, head * g * d + column])


def test_everything_else_stays() -> None:
    spec = dataclasses.replace(SPECS["qwen3-gqa"], o_bias=True, qkv_bias=True)
    model = RandomModel(spec)
    permuted = PermutedCheckpoint(model, rank_layout(equalise(head_map_of(spec), 2), 2))
    moved = {n for n in spec.tensors() if not np.array_equal(permuted.tensor(n), model.weights[n])}
    parts = {n.split(".", 3)[3] for n in moved}
    assert all(n.startswith("model.layers.") for n in moved)
    assert parts == {
        *(f"self_attn.{p}_proj.{k}" for p in "qkv" for k in ("weight", "bias")),
        "self_attn.o_proj.weight",
    }


def test_heads_in_place_cost_no_copy() -> None:
    spec = SPECS["llama-gqa"]
    model = RandomModel(spec)
    permuted = PermutedCheckpoint(model, dense_layout(spec, 2))
    for name in spec.tensors():
        assert permuted.tensor(name) is model.weights[name]
    value = model.weights["model.layers.0.self_attn.q_proj.weight"]
    assert permute(value, spec, (0, 1, 2, 3), "q_proj") is value


def test_permutation_keeps_dtype_and_contiguity() -> None:
    import ml_dtypes

    spec = SPECS["llama-gqa"]
    for projection in ("q_proj", "o_proj"):
        shape = spec.tensors()[f"model.layers.0.self_attn.{projection}.weight"]
        value = np.arange(np.prod(shape)).reshape(shape).astype(ml_dtypes.bfloat16)
        out = permute(value, spec, (3, 1, 0, 2), projection)
        assert out.dtype == value.dtype
        assert out.flags.c_contiguous
        assert out.shape == shape
        assert np.array_equal(permute(out, spec, (2, 1, 3, 0), projection), value)  # the inverse


def test_slopes_of_query_heads_move() -> None:
    spec = spec_of("baichuan", 12, 12, position="alibi")
    order = (11, 0, 5, 1, 2, 3, 4, 6, 7, 8, 9, 10)
    assert np.array_equal(permuted_slopes(spec, order), alibi_slopes(12)[list(order)])
    assert permuted_slopes(spec, order).dtype == np.float32
    grouped = spec_of("llama", 8, 4)
    moved = permuted_slopes(grouped, (2, 0, 1, 3))
    assert np.array_equal(moved, alibi_slopes(8)[query_heads((2, 0, 1, 3), 2)])


def test_layout_of_another_model_is_refused() -> None:
    spec = SPECS["llama-gqa"]
    model = RandomModel(spec)
    for other in (spec_of("llama", 8, 8), dataclasses.replace(spec, num_layers=2)):
        with pytest.raises(RazorError, match=r"^head layout: expected 4 layers x 4 KV heads"):
            PermutedCheckpoint(model, dense_layout(other, 1))
