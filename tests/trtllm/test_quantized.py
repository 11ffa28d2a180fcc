"""Quantised TensorRT-LLM checkpoints: heads in order, ranks merged and split, what else is in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_cases import (
    POLICY,
    SPECS,
    change_config,
    change_tensors,
    convert,
    moved,
    open_model,
    permute,
    spec_of,
)
from rank_folders import (
    Linear,
    Stored,
    make_model,
    read_model,
    read_safetensors,
    write_folder,
)

from trt_razor.errors import UsageError
from trt_razor.headmap import HeadMap
from trt_razor.models.positions import alibi_slopes
from trt_razor.models.spec import ModelSpec
from trt_razor.reference import ReferenceDecoder
from trt_razor.trtllm.options import RazorSection, TrtLlmOptions
from trt_razor.trtllm.quantized import (
    open_trtllm_checkpoint,
)
from trt_razor.trtllm.rank_tensors import Rule, Share, held
from trt_razor.trtllm.ranks import dense_layout

TOKENS = torch.arange(40) * 17 % 50
ALGOS = (None, "FP8", "W4A16_AWQ")


class Weights:
    """For the reference."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, np.ndarray]) -> None:
        self.spec, self.weights = spec, weights

    def tensor(self, name: str) -> np.ndarray:
        return np.ascontiguousarray(self.weights[name])


def logits(weights: Any, head_map: HeadMap | None) -> torch.Tensor:
    decoder = ReferenceDecoder(weights, torch.float64)
    return decoder.prefill(TOKENS, decoder.new_cache(POLICY, head_map), chunk=7)


# The same function ------------------------------------------------------------------------------
@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("tp", (1, 2))
def test_every_weight_is_the_quantised_one_of_its_head(
    name: str, algo: str | None, tp: int, tmp_path: Path
) -> None:
    spec = SPECS[name]
    model = make_model(spec, algo)
    layout, _ = permute(open_model(tmp_path / "in", model), tmp_path / "out", tp)
    assert any(order != tuple(range(spec.num_kv_heads)) for order in layout.order)
    found = read_model(tmp_path / "out", spec)
    assert found.keys() == spec.tensors().keys()
    for key, value in found.items():
        layer = int(key.split(".")[2]) if ".layers." in key else 0
        expected = moved(spec, key, model.tensor(key), layout.order[layer])
        np.testing.assert_array_equal(value, expected, err_msg=key)


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("name", ("llama", "mistral", "qwen2", "qwen3", "llama-bias", "baichuan"))
def test_the_permuted_model_computes_the_same(name: str, algo: str | None, tmp_path: Path) -> None:
    spec = SPECS[name]
    model = make_model(spec, algo)
    layout, equal = permute(open_model(tmp_path / "in", model), tmp_path / "out", 2)
    before = logits(model, equal)
    after = logits(Weights(spec, read_model(tmp_path / "out", spec)), layout.head_map(equal))
    scale = before.abs().max()
    assert (before - after).abs().max() < 1e-9 * scale
    # It matters which heads retrieve: the test would see heads in the wrong order.
    wrong = logits(Weights(spec, read_model(tmp_path / "out", spec)), equal)
    assert (before - wrong).abs().max() > 1e-4 * scale


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("before", ((2, 1), (1, 3), (2, 2), (4, 1)))
@pytest.mark.parametrize("after", ((1, 1), (2, 3)))
def test_ranks_are_merged_and_split_again(
    algo: str | None, before: tuple[int, int], after: tuple[int, int], tmp_path: Path
) -> None:
    model = make_model(SPECS["qwen2"], algo, kv=True)
    source = open_model(tmp_path / "in", model, *before)
    assert (source.tp_size, source.pp_size) == before
    permute(source, tmp_path / "out", *after, kv="fp8")
    permute(open_model(tmp_path / "one", model), tmp_path / "expected", *after, kv="fp8")
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert len(files) == after[0] * after[1] + 1
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


@pytest.mark.parametrize("algo", ALGOS)
def test_dense_ranks_may_share_a_kv_head(algo: str | None, tmp_path: Path) -> None:
    """8 ranks, 4 KV heads: what convert_checkpoint duplicates is merged, and duplicated again."""
    spec = SPECS["qwen2"]
    model = make_model(spec, algo)
    source = open_model(tmp_path / "in", model, 8)
    convert(source, dense_layout(spec, 2), None, TrtLlmOptions(2), tmp_path / "two")
    again = open_trtllm_checkpoint(tmp_path / "two", None)
    convert(again, dense_layout(spec, 8), None, TrtLlmOptions(8), tmp_path / "out")
    for rank in range(8):
        expected = read_safetensors(tmp_path / "in" / f"rank{rank}.safetensors")
        found = read_safetensors(tmp_path / "out" / f"rank{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, (dtype, value) in expected.items():
            assert found[name][0] == dtype
            np.testing.assert_array_equal(found[name][1].view(np.uint8), value.view(np.uint8))


def test_scales_stay_with_their_layer(tmp_path: Path) -> None:
    model = make_model(SPECS["llama"], "FP8", kv=True)
    permute(open_model(tmp_path / "in", model, pp=3), tmp_path / "out", 2, kv="fp8")
    for rank in range(2):
        found = read_safetensors(tmp_path / "out" / f"rank{rank}.safetensors")
        for i in range(3):
            at = f"transformer.layers.{i}."
            dtype, scale = found[at + "attention.kv_cache_scaling_factor"]
            assert (dtype, scale.tolist()) == ("F32", [1.5 + i])
            dtype, scale = found[at + "attention.dense.activation_scaling_factor"]
            assert (dtype, scale.tolist()) == ("F32", [0.25])
            assert found[at + "attention.qkv.weight"][0] == "F8_E4M3"


# config.json ------------------------------------------------------------------------------------
def test_config_keeps_what_it_said_and_tells_the_ranks(tmp_path: Path) -> None:
    model = make_model(SPECS["qwen2"], "W4A16_AWQ", kv=True)
    source = open_model(tmp_path / "in", model, 2)
    _, equal = permute(source, tmp_path / "out", 2, 3, kv="fp8")
    before = json.loads((tmp_path / "in" / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    section = RazorSection.from_json(after.pop("razor"))
    assert section.heads == equal.digest()
    assert section.tp_size == 2
    assert after.pop("mapping") == {"world_size": 6, "tp_size": 2, "pp_size": 3}
    assert after.pop("tie_word_embeddings") is False
    del before["mapping"]
    assert after == before
    again = open_trtllm_checkpoint(tmp_path / "out", None)
    assert (again.quant_algo, again.kv_cache_quant_algo) == ("W4A16_AWQ", "FP8")
    assert again.spec.fingerprint() == SPECS["qwen2"].fingerprint()


def test_an_fp8_cache_without_scales_gets_ones(tmp_path: Path) -> None:
    model = make_model(SPECS["llama"], "FP8")
    permute(open_model(tmp_path / "in", model), tmp_path / "out", kv="fp8")
    found = read_safetensors(tmp_path / "out" / "rank0.safetensors")
    dtype, scale = found["transformer.layers.1.attention.kv_cache_scaling_factor"]
    assert (dtype, scale.tolist()) == ("F32", [1.0])
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert (quantization["quant_algo"], quantization["kv_cache_quant_algo"]) == ("FP8", "FP8")


def test_an_fp8_cache_is_not_dropped_silently(tmp_path: Path) -> None:
    source = open_model(tmp_path / "in", make_model(SPECS["llama"], "FP8", kv=True))
    with pytest.raises(UsageError, match="--kv-dtype fp8"):
        permute(source, tmp_path / "out")


def test_float_weights_that_are_quantised_at_build_time(tmp_path: Path) -> None:
    model = make_model(SPECS["llama"])
    folder = write_folder(tmp_path / "in", model)
    change_config(folder, lambda c: c["quantization"].update(quant_algo="W8A16"))
    layout, _ = permute(open_trtllm_checkpoint(folder, None), tmp_path / "out", 2)
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["quantization"]["quant_algo"] == "W8A16"
    found = read_model(tmp_path / "out", model.spec)
    key = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(
        found[key], moved(model.spec, key, model.tensor(key), layout.order[0])
    )


# What else lies in the files --------------------------------------------------------------------
def test_unsigned_bytes_become_signed_ones(tmp_path: Path) -> None:
    model = make_model(SPECS["llama"], "W4A16_AWQ")
    folder = write_folder(tmp_path / "in", model)
    change_tensors(
        folder,
        lambda ts: ts.update(
            {n: ("U8", v.view(np.uint8)) for n, (d, v) in ts.items() if d == "I8"}
        ),
    )
    permute(open_trtllm_checkpoint(folder, None), tmp_path / "out")
    permute(open_model(tmp_path / "signed", model), tmp_path / "expected")
    file = "rank0.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


def test_the_larger_of_two_cache_scales_counts(tmp_path: Path) -> None:
    def two(tensors: Stored) -> None:
        for i in range(3):
            at = f"transformer.layers.{i}.attention."
            del tensors[at + "kv_cache_scaling_factor"]
            tensors[at + "k_cache_scaling_factor"] = "F32", np.array(2.0 + i, np.float32)
            tensors[at + "v_cache_scaling_factor"] = "F32", np.array(3.0 - i, np.float32)

    folder = write_folder(tmp_path / "in", make_model(SPECS["llama"], "FP8", kv=True))
    change_tensors(folder, two)
    permute(open_trtllm_checkpoint(folder, None), tmp_path / "out", kv="fp8")
    found = read_safetensors(tmp_path / "out" / "rank0.safetensors")
    names = [f"transformer.layers.{i}.attention.kv_cache_scaling_factor" for i in range(3)]
    assert [found[n][1].tolist() for n in names] == [[3.0], [3.0], [4.0]]
    assert not any(".k_cache" in n or ".v_cache" in n for n in found)


def test_tables_of_positions_are_left_to_tensorrt_llm(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", make_model(SPECS["llama"]))
    table = "F32", np.zeros((1, 128, 16), np.float32)
    names = ("embed_positions", "rotary_inv_freq", "embed_positions_for_gpt_attention")
    change_tensors(folder, lambda ts: ts.update(dict.fromkeys(names, table)))
    permute(open_trtllm_checkpoint(folder, None), tmp_path / "out")
    found = read_safetensors(tmp_path / "out" / "rank0.safetensors")
    assert not found.keys() & set(names)
    assert "transformer.layers.0.attention.qkv.weight" in found


@pytest.mark.parametrize("stored", (False, True))
def test_alibi_slopes_go_with_their_heads(stored: bool, tmp_path: Path) -> None:
    spec = SPECS["baichuan-alibi"]
    folder = write_folder(tmp_path / "in", make_model(spec, "FP8"), 2)
    if stored:  # as TensorRT-LLM's converter leaves them
        for rank in range(2):
            slopes = alibi_slopes(8)[4 * rank : 4 * rank + 4].reshape(1, 4, 1, 1)
            add_slopes(folder, slopes, f"rank{rank}.safetensors")
    layout, _ = permute(open_trtllm_checkpoint(folder, None), tmp_path / "out", 2)
    for rank in range(2):
        found = read_safetensors(tmp_path / "out" / f"rank{rank}.safetensors")
        for i, order in enumerate(layout.order):
            dtype, slopes = found[f"transformer.layers.{i}.attention.alibi_slopes"]
            assert (dtype, slopes.shape) == ("F32", (1, 4, 1, 1))
            heads = order[4 * rank : 4 * rank + 4]
            expected = [2.0 ** -(h + 1) for h in heads]  # of 8 heads
            np.testing.assert_allclose(slopes.reshape(-1), expected, rtol=1e-6)


def test_slopes_of_heads_in_another_order_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", make_model(SPECS["baichuan-alibi"]))
    add_slopes(folder, alibi_slopes(8)[::-1].reshape(1, 8, 1, 1))
    source = open_trtllm_checkpoint(folder, None)
    with pytest.raises(UsageError, match="slopes of ALiBi"):
        permute(source, tmp_path / "out")


def add_slopes(folder: Path, slopes: np.ndarray, file: str = "rank0.safetensors") -> None:
    names = [f"transformer.layers.{i}.attention.alibi_slopes" for i in range(3)]
    change_tensors(folder, lambda ts: ts.update(dict.fromkeys(names, ("F32", slopes))), file)


@pytest.mark.parametrize("stored", (False, True))
def test_tied_embeddings_are_found_and_written_twice(stored: bool, tmp_path: Path) -> None:
    """Model Optimizer does not say that they are tied; the head map's fingerprint depends on it."""
    spec = spec_of("qwen2", qkv_bias=True, tie_embeddings=True)
    folder = write_folder(tmp_path / "in", make_model(spec, "FP8"), 2, 3)
    if not stored:  # then the config must say it
        change_config(folder, lambda c: c.update(tie_word_embeddings=True))
        for rank in (4, 5):
            file = f"rank{rank}.safetensors"
            change_tensors(folder, lambda ts: ts.pop("lm_head.weight"), file)
    source = open_trtllm_checkpoint(folder, None)
    assert source.spec.fingerprint() == spec.fingerprint()
    convert(source, dense_layout(spec, 4), None, TrtLlmOptions(4), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    embedding, head = (
        np.concatenate(
            [
                read_safetensors(tmp_path / "out" / f"rank{r}.safetensors")[name][1]
                for r in range(ranks)
            ]
        )
        for name, ranks in (("transformer.vocab_embedding.weight", 1), ("lm_head.weight", 4))
    )
    assert head.shape == (52, 32)  # 13 rows each
    np.testing.assert_array_equal(head[:50], embedding)
    assert not head[50:].any()


def test_layers_that_were_not_quantised_stay_as_they_are(tmp_path: Path) -> None:
    model = make_model(SPECS["llama"], "FP8")
    key = "model.layers.1.self_attn.o_proj.weight"
    model.weights[key] = Linear(model.tensor(key).astype(np.float16))
    layout, _ = permute(open_model(tmp_path / "in", model), tmp_path / "out", 2)
    found = read_model(tmp_path / "out", model.spec)
    np.testing.assert_array_equal(
        found[key], moved(model.spec, key, model.tensor(key), layout.order[1])
    )


def test_numbers_of_excluded_layers_mean_other_layers_in_other_stages(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", make_model(SPECS["llama"], "FP8"), pp=3)
    names = ["lm_head", "transformer.layers.0.attention.dense"]
    change_config(folder, lambda c: c["quantization"].update(exclude_modules=names))
    source = open_trtllm_checkpoint(folder, None)
    with pytest.raises(UsageError, match="use --pp-size 3"):
        permute(source, tmp_path / "out")


# Groups of AWQ ----------------------------------------------------------------------------------
def test_heads_that_share_scales_move_only_together(tmp_path: Path) -> None:
    """Groups of 32 inputs hold two heads of 16 each."""
    spec = SPECS["llama"]  # two query heads to a KV head: each group is one KV head's
    model = make_model(spec, "W4A16_AWQ", group=32)
    layout, _ = permute(open_model(tmp_path / "in", model), tmp_path / "out", 2)
    found = read_model(tmp_path / "out", spec)
    key = "model.layers.2.self_attn.o_proj.weight"
    np.testing.assert_array_equal(found[key], moved(spec, key, model.tensor(key), layout.order[2]))

    model = make_model(SPECS["mistral"], "W4A16_AWQ", group=32)  # MHA: two KV heads
    source = open_model(tmp_path / "mha", model)
    with pytest.raises(
        UsageError, match=r"attention\.dense\..*32 inputs share a scale.*group size"
    ):
        permute(source, tmp_path / "no")
    assert not list((tmp_path / "no").iterdir())
    dense = dense_layout(model.spec, 2)  # where nothing moves there is no need
    convert(source, dense, None, TrtLlmOptions(2), tmp_path / "dense")
    np.testing.assert_array_equal(
        read_model(tmp_path / "dense", model.spec)[key], model.tensor(key)
    )


def test_ranks_that_would_cut_a_group_are_refused(tmp_path: Path) -> None:
    spec = spec_of(intermediate_size=48)  # 3 groups
    source = open_model(tmp_path / "in", make_model(spec, "W4A16_AWQ"))
    with pytest.raises(
        UsageError, match=r"mlp\.proj\.weights_scaling_factor: 16 inputs share a scale"
    ):
        permute(source, tmp_path / "out", 2)


# Shares of ranks --------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    order=st.permutations(range(4)),
    group=st.integers(1, 3),
    tp=st.sampled_from((1, 2, 4)),
    unit=st.sampled_from((1, 2, 8)),
)
def test_ranks_share_out_every_entry_once(order: list[int], group: int, tp: int, unit: int) -> None:
    spec = spec_of(num_heads=4 * group, head_dim=8)
    size = (spec.q_size + 2 * spec.kv_size) // unit
    rule = Rule((size, 3), Share.QKV, 0, unit)
    parts = [held("qkv", rule, spec, tp, rank, tuple(order)) for rank in range(tp)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(size))
    # The first key row of a rank is that of its first KV head.
    first = parts[-1][spec.q_size // tp // unit] * unit - spec.q_size
    assert first == order[4 - 4 // tp] * spec.head_dim


def test_neighbours_of_two_groups_are_no_group() -> None:
    spec = spec_of(num_heads=4)  # heads of 16, groups of 32
    rule = Rule((32, 2), Share.HEADS, 1, 32)
    assert held("dense", rule, spec, 2, 0, (2, 3, 0, 1)).tolist() == [1]
    with pytest.raises(UsageError, match="dense: 32 inputs share a scale"):
        held("dense", rule, spec, 2, 0, (1, 2, 0, 3))
