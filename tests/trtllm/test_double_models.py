"""Models on the double: weights, assignment, quantisation, loading."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import doubles
import pytest
import torch
from double_models import FAMILIES, build, make_config, make_model
from doubles import Double
from safetensors.torch import save_file


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_names(trtllm: Double, family: str) -> None:
    parameters = dict(make_model(trtllm, **FAMILIES[family]).named_parameters())
    prefix = "transformer.layers.1."
    mine = {n.removeprefix(prefix): p.shape for n, p in parameters.items() if n.startswith(prefix)}
    kv = FAMILIES[family].get("num_key_value_heads", 2)
    expected = {
        "input_layernorm.weight": (256,),
        "attention.qkv.weight": ((4 + 2 * kv) * 64, 256),
        "attention.dense.weight": (256, 256),
        "mlp.fc.weight": (512, 256),
        "mlp.gate.weight": (512, 256),
        "mlp.proj.weight": (256, 512),
        "post_layernorm.weight": (256,),
    }
    if family == "qwen2":
        expected["attention.qkv.bias"] = (512,)
    if family == "qwen3":
        expected |= {f"attention.{n}_layernorm.weight": (64,) for n in "qk"}
    if family == "alibi":
        expected["attention.alibi_slopes"] = (1, 4, 1, 1)
    assert mine == expected
    others = {name for name in parameters if not name.startswith("transformer.layers.")}
    tables = {"embed_positions", "rotary_inv_freq", "embed_positions_for_gpt_attention"}
    weights = {"transformer.vocab_embedding.weight", "transformer.ln_f.weight", "lm_head.weight"}
    assert others == weights | (set() if family == "alibi" else tables)


def test_qk_norm_default_eps(trtllm: Double) -> None:
    """The layers do not pass the model's norm_epsilon on."""
    model = make_model(trtllm, **FAMILIES["qwen3"], norm_epsilon=1e-6)
    assert model.transformer.layers[0].attention.q_layernorm.eps == 1e-5
    assert model.transformer.layers[0].input_layernorm.eps == 1e-6


def test_qk_norm_takes_equal_heads_interleaved(trtllm: Double) -> None:
    """With Hq = Hkv the columns are read as [heads, 3, D]."""
    for heads, first in ((2, [-1, 8, 64]), (4, [-1, 4, 3, 64])):
        model = make_model(trtllm, **(FAMILIES["qwen3"] | {"num_key_value_heads": heads}))
        llm, f = trtllm.load("tensorrt_llm"), trtllm.load("tensorrt_llm.functional")
        network = llm.Network()
        with llm.net_guard(network):
            dims = OrderedDict(n=[[1, 2, 4]], w=[(4 + 2 * heads) * 64])
            shape = [-1, (4 + 2 * heads) * 64]
            qkv = f.Tensor("qkv", trtllm.load("tensorrt").float16, shape, dims)
            assert model.transformer.layers[0].attention._normalise(qkv).shape == tuple(shape)
        views = [layer for layer in network.trt_network.layers if layer.plugin == "view"]
        assert list(views[0].get_output(0).shape) == first


def test_module_assignment(trtllm: Double) -> None:
    model = make_model(trtllm)
    layer = model.transformer.layers[0]
    names = [name for name, _ in model.named_parameters()]
    attention = layer.attention
    layer.attention = make_model(trtllm).transformer.layers[0].attention
    assert [name for name, _ in model.named_parameters()] == names
    assert layer.attention is not attention
    layer.attention = None  # hides the module, which keeps yielding weights
    assert layer.attention is None
    assert [name for name, _ in model.named_parameters()] == names
    model.extra = attention.qkv.weight
    other = model.transformer.layers[1].attention
    model.second = other.qkv
    later = [name for name, _ in model.named_parameters()]
    assert "extra" in later
    assert len([name for name in later if name.startswith("second")]) == 0  # under its first name
    model.transformer.layers[-1] = other
    assert model.transformer.layers[1] is other
    attention.qkv_lora = attention.dense  # None before: gone, not hidden
    assert attention.qkv_lora is attention.dense
    with pytest.raises(AttributeError):
        _ = model.unknown


def swapped(trtllm: Double) -> tuple[Any, Any]:
    """A model class whose constructor replaces its attention layers, and their class."""
    attention = trtllm.load("tensorrt_llm.layers").Attention
    llama = trtllm.load("tensorrt_llm.models").LLaMAForCausalLM

    class Swapped(attention):  # type: ignore[misc, valid-type]
        pass

    class Model(llama):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.transformer.layers:
                layer.attention.__class__ = Swapped

    return Model, Swapped


def test_quantised_after_the_whole_constructor(trtllm: Double) -> None:
    model_class, attention_class = swapped(trtllm)
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    model = model_class(make_config(trtllm, quantization=quantization))
    attention = model.transformer.layers[0].attention
    assert type(attention) is attention_class
    parameters = dict(attention.named_parameters())
    assert parameters["qkv.weight"].dtype == trtllm.load("tensorrt").fp8
    for name in ("qkv.activation_scaling_factor", "dense.weights_scaling_factor"):
        assert parameters[name].shape == (1,)
    for name in ("kv_cache_scaling_factor", "kv_cache_rcp_scaling_factor"):
        assert parameters[name].shape == (1,)
    assert type(model.lm_head).__name__ == "Linear"
    network = doubles.network(build(trtllm, model))
    assert model.transformer.layers[0].attention.attention_output_orig_quant_scale is not None
    assert len(network["plugins"]) == 2


def test_rowwise_quantisation_replaces_attention(trtllm: Double) -> None:
    model_class, _ = swapped(trtllm)
    quantization = {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    model = model_class(make_config(trtllm, quantization=quantization))
    assert type(model.transformer.layers[0].attention).__name__ == "Fp8RowwiseAttention"


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {
        n: torch.zeros(p.shape, dtype=torch.float16)
        for n, p in model.named_parameters()
        if not p.is_inited()
    }


def test_loading(trtllm: Double, tmp_path: Path) -> None:
    models = trtllm.load("tensorrt_llm.models")
    config = make_config(trtllm, **FAMILIES["alibi"])
    weights = weights_of(models.BaichuanForCausalLM(config))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))

    def load() -> Any:
        save_file(weights, tmp_path / "rank0.safetensors")
        return models.BaichuanForCausalLM.from_checkpoint(str(tmp_path))

    weights["razor.other"] = torch.zeros(1)
    name = "transformer.layers.0.attention.alibi_slopes"
    weights[name] = torch.tensor([4.0, 3.0, 2.0, 1.0]).reshape(1, 4, 1, 1)
    model = load()
    network = doubles.network(build(trtllm, model))
    slopes = [t for t in network["plugins"][0]["inputs"] if t["name"] == name]
    assert slopes[0]["values"] == [4.0, 3.0, 2.0, 1.0]  # a buffer: from the file where it is there
    lines = trtllm.load("tensorrt_llm.logger").logger.lines
    assert any("razor.other" in text for kind, text in lines if kind == "warning")
    weights["lm_head.weight"] = torch.zeros(101, 256, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"lm_head\.weight"):
        load()
    del weights["lm_head.weight"]
    load()  # tied to the embedding
    del weights["transformer.ln_f.weight"]
    with pytest.raises(RuntimeError, match=r"ln_f\.weight"):
        load()


def test_quantised_weights_are_loaded(trtllm: Double, tmp_path: Path) -> None:
    models = trtllm.load("tensorrt_llm.models")
    quantization = {"quant_algo": "W4A16_AWQ", "group_size": 64, "kv_cache_quant_algo": "FP8"}
    config = make_config(trtllm, quantization=quantization)
    weights = weights_of(models.LLaMAForCausalLM(config))
    for name in list(weights):
        if name.endswith("weights_scaling_factor"):
            prefix = name.removesuffix("weights_scaling_factor")
            groups, out = weights[name].shape
            weights[prefix + "weight"] = torch.zeros(out // 2, groups * 64, dtype=torch.int8)
            weights[name] = torch.ones(out, groups, dtype=torch.float16)
            scale = prefix + "prequant_scaling_factor"
            weights[scale] = torch.ones(groups * 64, dtype=torch.float16)
        elif name.endswith("rcp_scaling_factor"):
            del weights[name]
        elif name.endswith("kv_cache_scaling_factor"):
            weights[name] = torch.tensor(0.25)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(weights, tmp_path / "rank0.safetensors")
    model = models.LLaMAForCausalLM.from_checkpoint(str(tmp_path))
    attention = model.transformer.layers[1].attention
    assert float(attention.kv_cache_rcp_scaling_factor.raw_value[0]) == 4.0
    assert attention.qkv.weight.shape == (256, 128)
    name = "transformer.layers.0.attention.qkv.weights_scaling_factor"
    weights[name] = torch.ones(256, 2, dtype=torch.float16)
    save_file(weights, tmp_path / "rank0.safetensors")
    with pytest.raises(trtllm.load("tensorrt").ContractError, match="weights_scaling_factor"):
        models.LLaMAForCausalLM.from_checkpoint(str(tmp_path))
