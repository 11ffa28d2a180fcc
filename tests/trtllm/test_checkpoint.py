"""Rank files against the weights they were made of, and against what the model computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny_checkpoints import (
    SPECS,
    VOCAB,
    MergedModel,
    RandomModel,
    head_map_of,
    read_ranks,
    spec_of,
)

from trt_razor.errors import RazorError, UsageError
from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import WeightSource, random_checkpoint
from trt_razor.models.positions import alibi_slopes
from trt_razor.policy import RazorPolicy
from trt_razor.reference import ReferenceDecoder
from trt_razor.reference.attention import group_queries
from trt_razor.trtllm import checkpoint as module
from trt_razor.trtllm.checkpoint import convert_checkpoint
from trt_razor.trtllm.options import TrtLlmOptions, razor_section
from trt_razor.trtllm.permute import PermutedCheckpoint
from trt_razor.trtllm.ranks import RankLayout, dense_layout, equalise, query_heads, rank_layout

POLICY = RazorPolicy(sink_tokens=3, min_window=8, compression=5, comp_tokens=1)
TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def quiet(stage: str, done: int, total: int) -> None:
    pass


def convert_razor(
    model: WeightSource, folder: Path, tp: int, pp: int = 1, dtype: str = "float16", **more: Any
) -> tuple[HeadMap, RankLayout]:
    """Convert for Razor with a random head map; returns the equalised map and its layout."""
    folder.mkdir()
    head_map = equalise(head_map_of(model.spec), tp)
    layout = rank_layout(head_map, tp)
    section = razor_section(model.spec, head_map, layout, POLICY)
    convert_checkpoint(model, layout, dtype, TrtLlmOptions(tp, pp, **more), section, folder, quiet)
    return head_map, layout


def convert_dense(
    model: WeightSource, folder: Path, tp: int, pp: int = 1, dtype: str = "float16", **more: Any
) -> None:
    folder.mkdir()
    layout = dense_layout(model.spec, tp)
    convert_checkpoint(model, layout, dtype, TrtLlmOptions(tp, pp, **more), None, folder, quiet)


def assert_same_weights(merged: MergedModel, model: WeightSource, dtype: str) -> None:
    """Bit for bit, and nothing else in the files."""
    spec = model.spec
    for name, shape in spec.tensors().items():
        expected = torch.from_numpy(model.tensor(name).astype(np.float32)).to(TORCH[dtype])
        found = merged.torch_tensor(name)
        assert tuple(found.shape) == shape, name
        assert found.dtype == TORCH[dtype], name
        assert torch.equal(found, expected), name
    if spec.tie_embeddings:
        head = merged.torch_tensor("lm_head.weight")
        assert torch.equal(head, merged.torch_tensor("model.embed_tokens.weight"))
    if spec.position == "alibi":
        for rank, names in enumerate(merged.unread):
            merged.unread[rank] = {n for n in names if not n.endswith(".alibi_slopes")}
    assert not any(merged.unread)


CASES = [
    *((name, 2, 1, "float16") for name in SPECS),
    *((name, 1, 1, "bfloat16") for name in SPECS),
    ("llama-gqa", 2, 2, "bfloat16"),
    ("llama-mha-bias", 1, 4, "float16"),
    ("qwen2-mha-tied", 2, 4, "float16"),
    ("baichuan-alibi", 4, 1, "float16"),
    ("baichuan1-rope", 8, 1, "float16"),
]


@pytest.mark.parametrize("name, tp, pp, dtype", CASES)
def test_merged_ranks_are_the_permuted_weights(
    name: str, tp: int, pp: int, dtype: str, tmp_path: Path
) -> None:
    model = RandomModel(SPECS[name])
    _, layout = convert_razor(model, tmp_path / "out", tp, pp, dtype)
    merged = MergedModel(tmp_path / "out", model.spec)
    assert len(merged.ranks) == tp * pp
    assert_same_weights(merged, PermutedCheckpoint(model, layout), dtype)


@pytest.mark.parametrize(
    "name, tp, pp",
    [("llama-gqa", 4, 1), ("llama-gqa", 8, 2), ("qwen2-gqa", 8, 1), ("mistral-mha", 2, 1)],
)
def test_dense_ranks_are_the_original_weights(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    """With more ranks than KV heads (8 and 4) neighbours hold the same one."""
    model = RandomModel(SPECS[name])
    convert_dense(model, tmp_path / "out", tp, pp)
    assert_same_weights(MergedModel(tmp_path / "out", model.spec), model, "float16")


@pytest.mark.parametrize("name", SPECS)
def test_merged_ranks_compute_the_same_function(name: str, tmp_path: Path) -> None:
    """Logits of the model in the files, under the heads that the files' order implies."""
    spec = SPECS[name]
    model = RandomModel(spec)
    # Weights that float16 holds: conversion then loses nothing.
    for key, value in model.weights.items():
        model.weights[key] = value.astype(np.float16).astype(np.float32)
    head_map, layout = convert_razor(model, tmp_path / "out", 2)
    merged = MergedModel(tmp_path / "out", spec)
    tokens = (torch.arange(30) * 13 + 2) % VOCAB

    def logits(source: Any, heads: HeadMap, moved: bool) -> torch.Tensor:
        decoder = ReferenceDecoder(source, torch.float64)
        cache = decoder.new_cache(POLICY, heads, 64)
        if moved and spec.position == "alibi":
            for layer, part in enumerate(cache):
                name = f"transformer.layers.{layer}.attention.alibi_slopes"
                slopes = torch.cat([s.flatten() for s in merged.get(0, name)])
                part.slopes = group_queries(slopes, spec.num_kv_heads)
        return torch.cat([decoder.forward(part, cache) for part in tokens.split([24, 5, 1])])

    expected = logits(model, head_map, False)
    found = logits(merged, layout.head_map(head_map), True)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-11


def test_shapes_of_a_rank(tmp_path: Path) -> None:
    """Spelled out for one model: 8 query heads and 4 KV heads of 8 elements, 2 ranks, 2 stages."""
    spec = SPECS["qwen2-gqa"]
    convert_razor(RandomModel(spec), tmp_path / "out", 2, 2)
    _, ranks = read_ranks(tmp_path / "out")
    layer = {
        "input_layernorm.weight": (48,),
        "attention.qkv.weight": ((4 + 2 + 2) * 8, 48),
        "attention.qkv.bias": ((4 + 2 + 2) * 8,),
        "attention.dense.weight": (48, 32),
        "post_layernorm.weight": (48,),
        "mlp.fc.weight": (20, 48),
        "mlp.gate.weight": (20, 48),
        "mlp.proj.weight": (48, 20),
    }
    layers = {
        f"transformer.layers.{i}.{name}": shape for i in (0, 1) for name, shape in layer.items()
    }
    first = {"transformer.vocab_embedding.weight": (61, 48), **layers}
    last = {**layers, "transformer.ln_f.weight": (48,), "lm_head.weight": (31, 48)}
    found = [{name: tuple(t.shape) for name, t in rank.items()} for rank in ranks]
    assert found == [first, first, last, last]


def test_biases_that_are_added_once(tmp_path: Path) -> None:
    convert_razor(RandomModel(SPECS["llama-mha-bias"]), tmp_path / "out", 2)
    _, ranks = read_ranks(tmp_path / "out")
    shapes = {
        name.split("layers.0.")[1]: tuple(t.shape) for name, t in ranks[0].items() if "s.0." in name
    }
    biases = {name: shape for name, shape in shapes.items() if name.endswith("bias")}
    assert biases == {
        "attention.qkv.bias": (3 * 2 * 8,),
        "attention.dense.bias": (48,),
        "mlp.fc.bias": (20,),
        "mlp.gate.bias": (20,),
        "mlp.proj.bias": (48,),
    }


def test_alibi_slopes_follow_their_heads(tmp_path: Path) -> None:
    spec = SPECS["baichuan-alibi-12"]
    _, layout = convert_razor(RandomModel(spec), tmp_path / "out", 2)
    _, ranks = read_ranks(tmp_path / "out")
    slopes = alibi_slopes(spec.num_heads)
    for layer, order in enumerate(layout.order):
        for rank, tensors in enumerate(ranks):
            found = tensors[f"transformer.layers.{layer}.attention.alibi_slopes"]
            assert found.dtype == torch.float32
            assert tuple(found.shape) == (1, 6, 1, 1)
            expected = slopes[query_heads(order, spec.group)][rank * 6 : rank * 6 + 6]
            assert np.array_equal(found.flatten().numpy(), expected)


def test_dense_alibi_leaves_slopes_to_tensorrt_llm(tmp_path: Path) -> None:
    convert_dense(RandomModel(SPECS["baichuan-alibi"]), tmp_path / "out", 2)
    _, ranks = read_ranks(tmp_path / "out")
    assert not any("alibi" in name for rank in ranks for name in rank)


@pytest.mark.parametrize("pp", [1, 2])
def test_fp8_cache_has_scales_of_one(pp: int, tmp_path: Path) -> None:
    spec = SPECS["llama-gqa"]
    convert_razor(RandomModel(spec), tmp_path / "out", 2, pp, kv_dtype="fp8")
    config, ranks = read_ranks(tmp_path / "out")
    assert config["quantization"]["kv_cache_quant_algo"] == "FP8"
    for rank in ranks:
        scales = {n: t for n, t in rank.items() if n.endswith("scaling_factor")}
        assert set(scales) == {
            f"transformer.layers.{i}.attention.kv_cache_scaling_factor"
            for i in range(spec.num_layers // pp)
        }
        for scale in scales.values():
            assert scale.dtype == torch.float32
            assert scale.tolist() == [1.0]


def test_lm_head_is_filled_up_on_the_last_ranks(tmp_path: Path) -> None:
    """5 rows on 4 ranks: 2, 2, 1 and none."""
    spec = dataclasses.replace(spec_of("llama", 8, 4), vocab_size=5)
    model = RandomModel(spec)
    convert_dense(model, tmp_path / "out", 4)
    _, ranks = read_ranks(tmp_path / "out")
    head = model.weights["lm_head.weight"].astype(np.float16)
    for rank, used in enumerate((2, 2, 1, 0)):
        found = ranks[rank]["lm_head.weight"].numpy()
        assert found.shape == (2, 48)
        assert np.array_equal(found[:used], head[2 * rank : 2 * rank + used])
        assert not found[used:].any()


# One pass, little memory ------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["qwen2-mha-tied", "baichuan-alibi"])
def test_every_weight_is_read_once(name: str, tmp_path: Path) -> None:
    model = RandomModel(SPECS[name])
    convert_razor(model, tmp_path / "out", 2)
    assert sorted(model.reads) == sorted(model.spec.tensors())


@pytest.mark.parametrize("elements", [1, 100, 1000])
def test_conversion_in_small_steps_changes_nothing(
    elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RandomModel(SPECS["llama-mha-bias"])
    convert_razor(model, tmp_path / "whole", 2, 2, "bfloat16", kv_dtype="fp8")
    monkeypatch.setattr(module, "_CHUNK", elements)
    convert_razor(model, tmp_path / "steps", 2, 2, "bfloat16", kv_dtype="fp8")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "steps" / path.name).read_bytes()


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_any_stored_dtype(stored: str, dtype: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(SPECS["llama-gqa"], dtype=stored)
    convert_dense(checkpoint, tmp_path / "out", 2, dtype=dtype)
    assert_same_weights(MergedModel(tmp_path / "out", checkpoint.spec), checkpoint, dtype)


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    spec = SPECS["llama-gqa"]
    seen: list[tuple[str, int, int]] = []
    convert_checkpoint(
        RandomModel(spec),
        dense_layout(spec, 1),
        "float16",
        TrtLlmOptions(),
        None,
        tmp_path,
        lambda *step: seen.append(step),
    )
    total = spec.num_parameters()
    assert len(seen) == len(spec.tensors())
    assert {(stage, t) for stage, _, t in seen} == {("convert", total)}
    done = [d for _, d, _ in seen]
    assert done == sorted(done)
    assert done[-1] == total


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    """Some readers insist on a header that names a framework."""
    convert_razor(RandomModel(SPECS["llama-gqa"]), tmp_path / "out", 2)
    with safe_open(tmp_path / "out" / "rank1.safetensors", framework="pt") as f:
        assert f.metadata() == {"format": "pt"}


# Failures ---------------------------------------------------------------------------------------
class Broken(RandomModel):
    def tensor(self, name: str) -> np.ndarray[Any, Any]:
        if name == "model.layers.3.mlp.down_proj.weight":
            raise RazorError("the disk is gone")
        return super().tensor(name)


def test_config_comes_last(tmp_path: Path) -> None:
    with pytest.raises(RazorError, match="the disk is gone"):
        convert_dense(Broken(SPECS["llama-gqa"]), tmp_path / "out", 2)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["rank0.safetensors", "rank1.safetensors"]


def test_float16_overflow_names_the_tensor(tmp_path: Path) -> None:
    model = RandomModel(SPECS["llama-gqa"])
    name = "model.layers.2.mlp.up_proj.weight"
    model.weights[name][5, 7] = -70000.0
    message = rf"^{name}: weights do not fit into float16 \(largest magnitude 7e\+04\); use --dtype bfloat16$"
    with pytest.raises(RazorError, match=message):
        convert_dense(model, tmp_path / "half", 2)
    convert_dense(model, tmp_path / "brain", 2, dtype="bfloat16")
    merged = MergedModel(tmp_path / "brain", model.spec)
    assert float(merged.torch_tensor(name)[5, 7]) == -70144.0  # the nearest that bfloat16 has
    model.weights[name][5, 7] = np.nan  # no other dtype would help
    with pytest.raises(
        RazorError, match=rf"^{name}: expected finite weights, found infinity or NaN"
    ):
        convert_dense(model, tmp_path / "damaged", 2)


@pytest.mark.parametrize(
    "tp, layout, kind, message",
    [
        (
            2,
            dense_layout(SPECS["llama-gqa"], 4),
            RazorError,
            "^head layout: expected 2 ranks, found 4$",
        ),
        (
            1,
            dense_layout(SPECS["baichuan-alibi"], 1),
            RazorError,
            "^head layout: expected 4 layers x 4",
        ),
        (
            16,
            dense_layout(SPECS["llama-gqa"], 16),
            UsageError,
            "^tp_size: expected a divisor of the int",
        ),
    ],
)
def test_what_does_not_fit_writes_nothing(
    tp: int, layout: RankLayout, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    model = RandomModel(SPECS["llama-gqa"])
    with pytest.raises(kind, match=message):
        convert_checkpoint(model, layout, "float16", TrtLlmOptions(tp), None, tmp_path, quiet)
    assert not list(tmp_path.iterdir())
