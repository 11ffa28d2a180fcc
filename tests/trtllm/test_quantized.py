"""Quantised TensorRT-LLM checkpoints: heads in order, ranks merged and split, untrusted files refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_folders import (
    Linear,
    Model,
    Stored,
    make_model,
    read_model,
    read_safetensors,
    write_folder,
    write_safetensors,
)

from trt_razor.errors import RazorError, UsageError
from trt_razor.headmap import HeadMap
from trt_razor.models.positions import alibi_slopes
from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy
from trt_razor.reference import ReferenceDecoder
from trt_razor.trtllm.options import RazorSection, TrtLlmOptions, razor_section
from trt_razor.trtllm.quantized import (
    TrtLlmCheckpoint,
    is_trtllm_checkpoint,
    open_trtllm_checkpoint,
    permute_checkpoint,
)
from trt_razor.trtllm.rank_tensors import Rule, Share, held
from trt_razor.trtllm.ranks import RankLayout, dense_layout, equalise, rank_layout

POLICY = RazorPolicy(sink_tokens=2, min_window=6, compression=5, comp_tokens=1)
TOKENS = torch.arange(40) * 17 % 50
ALGOS = (None, "FP8", "W4A16_AWQ")


def spec_of(architecture: str = "llama", **changes: Any) -> ModelSpec:
    fields: dict[str, Any] = {
        "name": "tiny",
        "architecture": architecture,
        "num_layers": 3,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 16,
        "vocab_size": 50,
        "max_positions": 128,
        "rms_norm_eps": 1e-5,
    }
    return ModelSpec(**{**fields, **changes})


SPECS = {
    "llama": spec_of(),
    "mistral": spec_of("mistral", num_kv_heads=8),
    "qwen2": spec_of("qwen2", qkv_bias=True),
    "qwen3": spec_of("qwen3", qk_norm=True),
    "llama-bias": spec_of(qkv_bias=True, o_bias=True),
    "baichuan": spec_of("baichuan", hidden_size=128, num_kv_heads=8),
    "baichuan-alibi": spec_of("baichuan", hidden_size=128, num_kv_heads=8, position="alibi"),
}


def head_map_of(spec: ModelSpec) -> HeadMap:
    """Retrieval heads that are in no order of ranks, with scores for the next ones."""
    last = spec.num_kv_heads - 1
    retrieval = ((last,), (1, last), (0, last - 1))[: spec.num_layers]
    row = tuple(float(h * 7 % 5) for h in range(spec.num_kv_heads))
    scores = {"echo": (row,) * spec.num_layers}
    return HeadMap(
        spec.name,
        spec.fingerprint(),
        spec.num_layers,
        spec.num_kv_heads,
        retrieval,
        method="test",
        source="chosen by hand",
        scores=scores,
    )


def permute(
    source: TrtLlmCheckpoint, target: Path, tp: int = 1, pp: int = 1, kv: str = "auto"
) -> tuple[RankLayout, HeadMap]:
    """Permute for a Razor engine; returns the layout and the map that it was made of."""
    spec = source.spec
    equal = equalise(head_map_of(spec), tp)
    layout = rank_layout(equal, tp)
    section = razor_section(spec, equal, layout, POLICY)
    convert(source, layout, section, TrtLlmOptions(tp, pp, kv), target)
    return layout, equal


def convert(
    source: TrtLlmCheckpoint,
    layout: RankLayout,
    section: RazorSection | None,
    options: TrtLlmOptions,
    target: Path,
) -> None:
    target.mkdir(exist_ok=True)
    permute_checkpoint(source, layout, section, options, target, lambda *_: None)


def open_model(folder: Path, model: Model, tp: int = 1, pp: int = 1) -> TrtLlmCheckpoint:
    return open_trtllm_checkpoint(write_folder(folder, model, tp, pp), None)


def moved(spec: ModelSpec, name: str, value: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """A weight with its KV heads in another order, head by head."""
    match = re.search(r"self_attn\.([qkvo])_proj\.(weight|bias)$", name)
    if match is None or match[0].endswith("o_proj.bias"):
        return value
    dim = spec.head_dim
    groups = spec.group if match[1] in "qo" else 1
    rows = value.T if match[1] == "o" else value
    heads = [h * groups + g for h in order for g in range(groups)]
    out = np.concatenate([rows[h * dim : (h + 1) * dim] for h in heads])
    return out.T if match[1] == "o" else out


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


# Formats whose heads cannot move ----------------------------------------------------------------
@pytest.mark.parametrize(
    "algo, reason, way",
    (
        ("W8A16", "interleaved", "--convert-only"),
        ("W4A16", "interleaved", "--convert-only"),
        ("W4A16_GPTQ", "interleaved", "FP8 or W4A16_AWQ"),
        ("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "attention layer of its own", "FP8 or W4A16_AWQ"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "attention layer of its own", "FP8 or W4A16_AWQ"),
        ("W4A8_QSERVE_PER_GROUP", "attention layer of its own", "FP8 or W4A16_AWQ"),
        ("MIXED_PRECISION", "another format", "FP8 or W4A16_AWQ"),
        ("NVFP4", "not supported", "FP8 or W4A16_AWQ"),
        ("W4A8_AWQ", "not supported", "FP8 or W4A16_AWQ"),
        ("NEVER_HEARD_OF", "not supported", "FP8 or W4A16_AWQ"),
    ),
)
def test_other_formats_are_refused_with_a_reason_and_a_way_out(
    algo: str, reason: str, way: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "in", make_model(SPECS["llama"], "FP8"))
    change_config(folder, lambda c: c["quantization"].update(quant_algo=algo))
    source = open_trtllm_checkpoint(folder, None)  # a dense engine may still be built of it
    assert source.quant_algo == algo
    with pytest.raises(UsageError) as e:
        permute(source, tmp_path / "out")
    message = str(e.value)
    assert algo in message
    assert reason in message
    assert way in message
    assert "\n" not in message


def test_int8_caches_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", make_model(SPECS["llama"]))
    change_config(folder, lambda c: c["quantization"].update(kv_cache_quant_algo="INT8"))
    with pytest.raises(
        UsageError, match="kv_cache_quant_algo: expected 'FP8' or null, found 'INT8'"
    ):
        permute(open_trtllm_checkpoint(folder, None), tmp_path / "out")


def test_heads_are_not_ordered_twice(tmp_path: Path) -> None:
    permute(open_model(tmp_path / "in", make_model(SPECS["llama"])), tmp_path / "once")
    source = open_trtllm_checkpoint(tmp_path / "once", None)
    with pytest.raises(UsageError, match="in a Razor order already"):
        permute(source, tmp_path / "twice")


def test_a_layout_of_other_ranks_or_layers_is_an_error(tmp_path: Path) -> None:
    source = open_model(tmp_path / "in", make_model(SPECS["llama"]))
    layout = dense_layout(SPECS["llama"], 2)
    with pytest.raises(RazorError, match="expected 1 ranks, 3 layers and 4 KV heads"):
        convert(source, layout, None, TrtLlmOptions(1), tmp_path / "out")
    with pytest.raises(UsageError, match=r"pp_size: expected 1\.\.3"):
        convert(source, layout, None, TrtLlmOptions(2, 4), tmp_path / "out")


# Untrusted and damaged files --------------------------------------------------------------------
def change_config(folder: Path, change: Callable[[Any], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def change_tensors(
    folder: Path, change: Callable[[Stored], object], file: str = "rank0.safetensors"
) -> None:
    tensors = read_safetensors(folder / file)
    change(tensors)
    write_safetensors(folder / file, tensors)


@pytest.fixture(scope="module")
def _fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model(SPECS["llama"], "FP8", kv=True)
    return write_folder(tmp_path_factory.mktemp("fp8") / "in", model, 2)


@pytest.fixture
def fp8(_fp8: Path, tmp_path: Path) -> Path:
    """An FP8 checkpoint of two ranks, to be damaged."""
    return Path(shutil.copytree(_fp8, tmp_path / "in"))


QKV = "transformer.layers.1.attention.qkv"


@pytest.mark.parametrize(
    "change, message",
    (
        (lambda ts: ts.pop(f"{QKV}.weight"), "expected on 2 ranks, found on 1"),
        (lambda ts: ts.update({"a\nb": ("F32", np.zeros(1, np.float32))}), r"a\\nb: expected on 2"),
        (
            lambda ts: ts.update({f"{QKV}.weight": ("F8_E4M3", np.zeros((128, 31), np.uint8))}),
            r"attention\.qkv\.weight \(expected \[128, 32\], found \[128, 31\]\)",
        ),
        (
            lambda ts: ts.update({"transformer.ln_f.weight": ("F32", np.ones(32, np.float32))}),
            r"rank1\.safetensors: transformer\.ln_f\.weight: dtype: expected F32, found F16",
        ),
        (
            lambda ts: ts.update({"transformer.layers.3.x": ("F16", np.zeros(1, np.float16))}),
            "expected layers 0..2",
        ),
    ),
)
def test_tensors_of_one_rank_that_do_not_fit(
    change: Callable[[Stored], object], message: str, fp8: Path
) -> None:
    change_tensors(fp8, change)
    with pytest.raises(UsageError, match=message):
        open_trtllm_checkpoint(fp8, None)


@pytest.mark.parametrize(
    "change, message",
    (
        (lambda ts: ts.pop(f"{QKV}.weight"), rf"missing: {re.escape(QKV)}\.weight"),
        (lambda ts: ts.pop(f"{QKV}.weights_scaling_factor"), r"missing: .*weights_scaling_factor"),
        (lambda ts: ts.pop("lm_head.weight"), r"missing: lm_head\.weight"),
        (
            lambda ts: ts.pop("transformer.layers.2.attention.kv_cache_scaling_factor"),
            r"missing: transformer\.layers\.2\.attention\.kv_cache_scaling_factor",
        ),
        (
            lambda ts: ts.update({"../../etc/x\n": ("F32", np.zeros(1, np.float32))}),
            r"1 unexpected: \.\./\.\./etc/x\\n",
        ),
        (
            lambda ts: ts.update({f"{QKV}.weight": ("I8", np.zeros((128, 1, 32), np.int8))}),
            "mis-shaped",
        ),
        (
            lambda ts: ts.update(
                {f"{QKV}.activation_scaling_factor": ("U8", np.zeros(1, np.uint8))}
            ),
            "dtype: expected BF16 or F16 or F32, found U8",
        ),
    ),
)
def test_tensors_of_all_ranks_that_do_not_fit(
    change: Callable[[Stored], object], message: str, fp8: Path
) -> None:
    for rank in range(2):
        change_tensors(fp8, change, f"rank{rank}.safetensors")
    with pytest.raises(UsageError, match=message) as e:
        open_trtllm_checkpoint(fp8, None)
    assert "\n" not in str(e.value)


def test_scales_that_differ_between_ranks_are_refused(fp8: Path, tmp_path: Path) -> None:
    name = f"{QKV}.weights_scaling_factor"
    change_tensors(fp8, lambda ts: ts.update({name: ("F32", np.array([7], np.float32))}))
    with pytest.raises(UsageError, match=r"rank1.*expected the same values as in rank0.*one scale"):
        permute(open_trtllm_checkpoint(fp8, None), tmp_path / "out", kv="fp8")


def test_ranks_that_share_a_kv_head_must_agree(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", make_model(SPECS["llama"]), 8)

    def other_keys(tensors: Stored) -> None:
        dtype, value = tensors[f"{QKV}.weight"]
        value = value.copy()
        value[16] += 1  # the first row behind the query head
        tensors[f"{QKV}.weight"] = dtype, value

    change_tensors(folder, other_keys, "rank3.safetensors")
    source = open_trtllm_checkpoint(folder, None)
    with pytest.raises(UsageError, match="share a KV head hold different weights"):
        permute(source, tmp_path / "out")


def test_missing_and_surplus_ranks(fp8: Path) -> None:
    shutil.copy(fp8 / "rank1.safetensors", fp8 / "rank2.safetensors")
    with pytest.raises(UsageError, match=r"says 2 ranks, but there is rank2\.safetensors"):
        open_trtllm_checkpoint(fp8, None)
    (fp8 / "rank2.safetensors").unlink()
    (fp8 / "rank1.safetensors").unlink()
    with pytest.raises(UsageError, match=r"rank1\.safetensors: no such file"):
        open_trtllm_checkpoint(fp8, None)


def _header(size: int, header: bytes) -> bytes:
    return size.to_bytes(8, "little") + header


_HUGE = json.dumps(
    {f"{QKV}.weight": {"dtype": "F16", "shape": [1 << 40, 32], "data_offsets": [0, 1 << 46]}}
).encode()


@pytest.mark.parametrize(
    "damage",
    (
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: _header((1 << 64) - 1, data[8:]),
        lambda data: _header(1 << 40, data[8:]),
        lambda data: _header(4, b"[[[["),
        lambda data: _header(len(_HUGE), _HUGE),
        lambda data: data[:8] + data[8:].replace(b'"shape"', b'"shbpe"', 1),
    ),
)
def test_damaged_rank_files(damage: Callable[[bytes], bytes], fp8: Path) -> None:
    path = fp8 / "rank1.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RazorError, match=r"rank1\.safetensors: damaged") as e:
        open_trtllm_checkpoint(fp8, None)
    assert "\n" not in str(e.value)


def test_a_file_cut_after_it_was_opened(fp8: Path, tmp_path: Path) -> None:
    source = open_trtllm_checkpoint(fp8, None)
    data = (fp8 / "rank1.safetensors").read_bytes()
    (fp8 / "rank1.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(RazorError, match="became shorter"):
        permute(source, tmp_path / "out", kv="fp8")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "change, message",
    (
        (lambda c: c["mapping"].update(tp_size=10**9), "mapping.tp_size: expected 1..1024"),
        (lambda c: c["mapping"].update(pp_size=True), "mapping.pp_size: expected"),
        (lambda c: c["mapping"].update(pp_size=0), "mapping.pp_size: expected"),
        (lambda c: c["mapping"].update(tp_size="2"), "mapping.tp_size: expected"),
        (lambda c: c["mapping"].update(world_size=3), "world_size: expected tp_size . pp_size = 2"),
        (lambda c: c["mapping"].update(tp_size=1, pp_size=9, world_size=9), "at most the 3 layers"),
        (lambda c: c["mapping"].update(tp_size=3, world_size=3), "tp_size: expected a divisor"),
        (lambda c: c["mapping"].update(cp_size=2), "cp_size: expected 1"),
        (lambda c: c.update(mapping=[2]), "mapping: expected an object"),
        (lambda c: c.update(quantization="FP8"), "quantization: expected an object"),
        (lambda c: c["quantization"].update(quant_algo=8), "quant_algo: expected a name or null"),
        (lambda c: c["quantization"].update(quant_algo=["FP8"]), "quant_algo: expected a name"),
        (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers"),
        (lambda c: c.update(hidden_size=10**12), "hidden_size"),
        (lambda c: c.update(architecture="../../GPT"), "architecture"),
        (lambda c: c.update(intermediate_size=127), "mlp.fc.weight: 127 elements do not divide"),
        (
            lambda c: c["quantization"].update(quant_algo=None),
            "quant_algo: None does not fit the rank files, whose weights are F8_E4M3",
        ),
        (
            lambda c: c["quantization"].update(quant_algo="W4A16_AWQ", group_size=0),
            "group_size: expected 2..4096, found 0",
        ),
        (
            lambda c: c["quantization"].update(quant_algo="W4A16_AWQ", group_size=1 << 70),
            "group_size: expected 2..4096",
        ),
        (
            lambda c: c["quantization"].update(quant_algo="W4A16_AWQ", group_size=24),
            "do not come in pairs and in groups of 24",
        ),
        (
            lambda c: c["quantization"].update(
                quant_algo="W4A16_AWQ", group_size=16, has_zero_point=True
            ),
            "has_zero_point: expected false",
        ),
    ),
)
def test_configs_that_do_not_fit(change: Callable[[Any], object], message: str, fp8: Path) -> None:
    change_config(fp8, change)
    with pytest.raises(UsageError, match=message) as e:
        open_trtllm_checkpoint(fp8, None)
    assert "\n" not in str(e.value)


def test_quantised_by_name_only(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", make_model(SPECS["llama"]))
    change_config(folder, lambda c: c["quantization"].update(quant_algo="FP8"))
    with pytest.raises(
        UsageError, match="'FP8' does not fit the rank files, whose weights are not"
    ):
        open_trtllm_checkpoint(folder, None)


@pytest.mark.parametrize("text", ("", "{", "[]", "\xff", '{"architecture": 1}'))
def test_damaged_config(text: str, fp8: Path) -> None:
    (fp8 / "config.json").write_bytes(text.encode("latin-1"))
    assert is_trtllm_checkpoint(fp8)
    with pytest.raises(RazorError, match=r"config\.json"):
        open_trtllm_checkpoint(fp8, None)


def test_the_source_is_never_written_over(fp8: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(fp8)
    before = (fp8 / "rank0.safetensors").read_bytes()
    for target in (fp8, fp8 / ".." / "in", tmp_path / "link"):
        with pytest.raises(UsageError, match="is the checkpoint itself"):
            permute(open_trtllm_checkpoint(fp8, None), target, kv="fp8")
    assert (fp8 / "rank0.safetensors").read_bytes() == before


# Opening ----------------------------------------------------------------------------------------
def test_what_is_a_tensorrt_llm_checkpoint(fp8: Path, tmp_path: Path) -> None:
    assert is_trtllm_checkpoint(fp8)
    assert not is_trtllm_checkpoint(tmp_path)
    assert not is_trtllm_checkpoint(fp8 / "config.json")
    assert not is_trtllm_checkpoint(tmp_path / "nowhere")
    (fp8 / "rank0.safetensors").unlink()
    assert is_trtllm_checkpoint(fp8)  # the error will say what is missing
    for config in ({"architectures": ["LlamaForCausalLM"]}, {"pretrained_config": {}}):
        (fp8 / "config.json").write_text(json.dumps(config))
        assert not is_trtllm_checkpoint(fp8)


def test_identity_and_tokenizer(fp8: Path, tmp_path: Path) -> None:
    source = open_trtllm_checkpoint(fp8, None)
    identity = source.identity()
    assert open_trtllm_checkpoint(fp8, None).identity() == identity
    assert source.nbytes() == sum(
        value.nbytes
        for rank in range(2)
        for _, value in read_safetensors(fp8 / f"rank{rank}.safetensors").values()
    )
    assert source.tokenizer() is None
    assert Path(source.location) == fp8
    assert source.spec.torch_dtype == "float16"

    def change(tensors: Stored) -> None:
        dtype, value = tensors[f"{QKV}.weight"]
        value = value.view(np.uint8).copy()
        value[0, 0] ^= 1
        tensors[f"{QKV}.weight"] = dtype, value

    change_tensors(fp8, change, "rank1.safetensors")  # the same name as in rank 0
    assert open_trtllm_checkpoint(fp8, None).identity() != identity


def test_another_model_than_named(fp8: Path) -> None:
    with pytest.raises(UsageError, match="not the model llama2-7b: "):
        open_trtllm_checkpoint(fp8, "llama2-7b")


def test_progress_counts_bytes_to_the_end(fp8: Path, tmp_path: Path) -> None:
    source = open_trtllm_checkpoint(fp8, None)
    calls: list[tuple[str, int, int]] = []
    options = TrtLlmOptions(1, kv_dtype="fp8")
    (tmp_path / "out").mkdir()
    permute_checkpoint(
        source,
        dense_layout(source.spec, 1),
        None,
        options,
        tmp_path / "out",
        lambda *call: calls.append(call),
    )
    written = read_safetensors(tmp_path / "out" / "rank0.safetensors")
    total = sum(value.nbytes for _, value in written.values())
    assert calls[-1] == ("convert", total, total)
    assert [done for _, done, _ in calls] == sorted({done for _, done, _ in calls})


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
