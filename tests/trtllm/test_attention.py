"""The Razor attention layer on the double of TensorRT-LLM: adoption, forward pass, plugin."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import doubles
import numpy as np
import pytest
from razor_models import DIM, HIDDEN, MAX_BATCH, MAX_SEQ_LEN, Case

from trt_razor.errors import RazorError, UsageError
from trt_razor.trtllm.options import TrtLlmOptions
from trt_razor.trtllm.release import LocalCache

EPS = 1e-6


def stock(trtllm: doubles.Double, **changes: Any) -> Any:
    """An attention layer of TensorRT-LLM, as its model classes make them."""
    functional = trtllm.load("tensorrt_llm.functional")
    fields = {
        "local_layer_idx": 0,
        "hidden_size": HIDDEN,
        "attention_head_size": DIM,
        "num_attention_heads": 8,
        "num_kv_heads": 4,
        "max_position_embeddings": 4096,
        "attention_mask_type": functional.AttentionMaskType.causal,
        "position_embedding_type": functional.PositionEmbeddingType.rope_gpt_neox,
        "bias": False,
        "dtype": "float16",
        **changes,
    }
    return trtllm.load("tensorrt_llm.layers.attention").Attention(**fields)


def adopted(trtllm: doubles.Double, **changes: Any) -> Any:
    layer = stock(trtllm, **changes)
    trtllm.load("trt_razor.trtllm.attention").adopt(layer, EPS)
    return layer


@pytest.fixture
def net(trtllm: doubles.Double) -> Iterator[Any]:
    """A network that is being defined."""
    network = trtllm.load("tensorrt_llm.network").Network()
    network.plugin_config.paged_kv_cache = True
    with trtllm.load("tensorrt_llm._common").net_guard(network):
        yield network


def engine_input(trtllm: doubles.Double, name: str, *sizes: int, dtype: str = "float16") -> Any:
    """[tokens, *sizes]."""
    trt = trtllm.load("tensorrt")
    ranges = OrderedDict([("num_tokens", [[1, 8, 64]])])
    ranges.update((f"{name}_{i}", [size]) for i, size in enumerate(sizes))
    return trtllm.load("tensorrt_llm.functional").Tensor(
        name=name, dtype=getattr(trt, dtype), shape=[-1, *sizes], dim_range=ranges
    )


def request_inputs(trtllm: doubles.Double, case: Case, folder: Path) -> dict[str, Any]:
    """What ``prepare_inputs`` of a Razor model makes, in the network of the moment."""
    network = trtllm.load("tensorrt_llm._common").default_net()
    network.plugin_config.use_paged_context_fmha = False
    model = case.model(trtllm, folder)
    inputs: dict[str, Any] = model.prepare_inputs(
        max_batch_size=MAX_BATCH,
        max_input_len=MAX_SEQ_LEN - 1,
        max_seq_len=MAX_SEQ_LEN,
        max_num_tokens=MAX_SEQ_LEN,
        use_cache=True,
    )
    attention = trtllm.load("tensorrt_llm.layers.attention").Attention
    attention.fill_attention_params(model, inputs["attention_params"])
    return inputs


# Adoption -----------------------------------------------------------------------------------------
def test_adopted_layer_is_the_same_object_with_the_same_weights(trtllm: doubles.Double) -> None:
    layer = stock(trtllm, bias=True)
    before = [(name, id(p)) for name, p in layer.named_parameters()]
    attention = trtllm.load("trt_razor.trtllm.attention")
    attention.adopt(layer, EPS)
    assert type(layer) is attention.RazorAttention
    assert [(name, id(p)) for name, p in layer.named_parameters()] == before
    assert "qkv.bias" in dict(before)
    with pytest.raises(UsageError, match=r"expected Attention, found RazorAttention"):
        attention.adopt(layer, EPS)


def _refusals(functional: Any) -> dict[str, tuple[dict[str, Any], str]]:
    masks, positions = functional.AttentionMaskType, functional.PositionEmbeddingType
    return {
        "cross": ({"cross_attention": True}, r"cross_attention: cross attention is not"),
        "relative": ({"relative_attention": True}, r"relative_attention: "),
        "logn": ({"use_logn_scaling": True}, r"use_logn_scaling: log-n"),
        "clip": ({"clip_qkv": 8.0}, r"clip_qkv: clipped"),
        "inner norm": ({"inner_layernorm": True}, r"inner_layernorm: "),
        "soft cap": ({"max_attn_value": 30.0}, r"max_attn_value: soft-capped"),
        "mask": (
            {"attention_mask_type": masks.bidirectional},
            r"attention_mask_type: expected causal, found bidirectional",
        ),
        "learned": (
            {"position_embedding_type": positions.learned_absolute},
            r"position_embedding_type: expected rope_gpt_neox, rope_gptj, alibi, found learned",
        ),
        "mrope": ({"position_embedding_type": positions.mrope}, r"found mrope"),
        "scaled alibi": (
            {"position_embedding_type": positions.alibi_with_scale},
            r"found alibi_with_scale",
        ),
        "dynamic": (
            {"rotary_embedding_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 2.0}},
            r"rotary scaling: expected none, linear, llama3, found dynamic",
        ),
        "yarn": (
            {"rotary_embedding_scaling": {"rope_type": "yarn", "factor": 4.0}},
            r"rotary scaling: .*found yarn",
        ),
        "context parallel": ({"cp_size": 2, "cp_group": [0, 1]}, r"cp_size: expected 1, found 2"),
    }


def test_layers_that_compute_something_else_are_refused(trtllm: doubles.Double) -> None:
    functional = trtllm.load("tensorrt_llm.functional")
    attention = trtllm.load("trt_razor.trtllm.attention")
    for name, (changes, message) in _refusals(functional).items():
        layer = stock(trtllm, local_layer_idx=3, **changes)
        with pytest.raises(UsageError, match=r"attention layer 3: .*" + message) as error:
            attention.adopt(layer, EPS)
        assert "\n" not in str(error.value), name
        assert type(layer) is not attention.RazorAttention


def test_a_norm_for_each_head_is_refused(trtllm: doubles.Double) -> None:
    layer = stock(trtllm, qk_layernorm=True)
    layer.layernorm_share = False
    with pytest.raises(UsageError, match=r"expected one QK-norm weight for all heads"):
        trtllm.load("trt_razor.trtllm.attention").adopt(layer, EPS)


# QK-norm ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("heads, kv_heads, tp_size", [(8, 4, 1), (4, 4, 1), (8, 8, 2)])
def test_norm_of_queries_and_keys_goes_by_sections(
    trtllm: doubles.Double, net: Any, heads: int, kv_heads: int, tp_size: int
) -> None:
    """Rows of q, of k, of v: also where a rank has as many query heads as KV heads."""
    norm = trtllm.load("tensorrt_llm.functional").LayerNormType.RmsNorm
    layer = adopted(
        trtllm,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        tp_size=tp_size,
        tp_group=list(range(tp_size)),
        qk_layernorm=True,
        layernorm_type=norm,
    )
    net.set_named_parameters(layer.named_parameters())
    hq, hkv = heads // tp_size, kv_heads // tp_size
    width = (hq + 2 * hkv) * DIM
    out = layer._normed(engine_input(trtllm, "qkv", width))
    assert out.shape == (-1, width)

    by_name = {o.name: made for made in net.trt_network.layers for o in made.outputs}
    last = by_name[out.trt_tensor.name]
    assert last.plugin == "view"
    joined = by_name[last.inputs[0].name]
    assert joined.plugin == "concat"
    q, k, v = (by_name[t.name] for t in joined.inputs[:3])
    assert (q.plugin, k.plugin, v.plugin) == (f"rms_norm eps={EPS}", f"rms_norm eps={EPS}", "slice")
    weights = [made.inputs[1].origin for made in (q, k)]
    assert weights == ["q_layernorm.weight", "k_layernorm.weight"]
    sections = [by_name[q.inputs[0].name], by_name[k.inputs[0].name], v]
    assert [s.outputs[0].shape for s in sections] == [(-1, hq, DIM), (-1, hkv, DIM), (-1, hkv, DIM)]
    order = [made for made in net.trt_network.layers if made.plugin == "slice"]
    assert [s.name for s in order] == [s.name for s in sections]
    (split_from,) = {s.inputs[0].name for s in sections}
    assert by_name[split_from].outputs[0].shape == (-1, hq + 2 * hkv, DIM)


def test_without_norm_nothing_is_added(trtllm: doubles.Double, net: Any) -> None:
    qkv = engine_input(trtllm, "qkv", 16 * DIM)
    assert adopted(trtllm)._normed(qkv) is qkv
    assert net.trt_network.layers == []


# Forward pass -------------------------------------------------------------------------------------
def test_forward_gives_what_models_unpack(trtllm: doubles.Double, net: Any, tmp_path: Path) -> None:
    case = Case("llama")
    inputs = request_inputs(trtllm, case, tmp_path / "x")
    layer = adopted(trtllm)
    hidden = engine_input(trtllm, "hidden", HIDDEN)
    params = {k: inputs[k] for k in ("kv_cache_params", "attention_params")}
    out, presents = layer(hidden, attention_mask=None, use_cache=True, **params)
    assert presents is None
    assert out.shape == (-1, HIDDEN)
    plain = layer(hidden, spec_decoding_params=None, norm_before_bmm1=False, **params)
    assert plain.shape == (-1, HIDDEN)


def test_all_reduce_gets_the_parameters_of_the_model(
    trtllm: doubles.Double, net: Any, tmp_path: Path
) -> None:
    inputs = request_inputs(trtllm, Case("llama"), tmp_path / "x")
    layer = adopted(trtllm)
    seen: list[dict[str, Any]] = []
    dense = layer.dense
    dense.forward = lambda x, **kwargs: seen.append(kwargs) or x
    params = trtllm.load("tensorrt_llm.functional").AllReduceParams()
    layer(
        engine_input(trtllm, "hidden", HIDDEN),
        all_reduce_params=params,
        **{k: inputs[k] for k in ("kv_cache_params", "attention_params")},
    )
    assert seen == [{"lora_runtime_params": None, "all_reduce_params": params}]


def test_scale_follows_the_models_multiplier(
    trtllm: doubles.Double, net: Any, tmp_path: Path
) -> None:
    inputs = request_inputs(trtllm, Case("llama"), tmp_path / "x")
    layer = adopted(trtllm, q_scaling=2.0)
    layer(
        engine_input(trtllm, "hidden", HIDDEN),
        **{k: inputs[k] for k in ("kv_cache_params", "attention_params")},
    )
    (plugin,) = (made.plugin for made in net.trt_network.layers if made.type.value == "PLUGIN_V3")
    assert plugin.fields["scale"] == pytest.approx(1 / (2.0 * DIM**0.5))


@pytest.mark.parametrize(
    "name, value",
    [
        ("attention_mask", "mask"),
        ("attention_packed_mask", "mask"),
        ("spec_decoding_params", object()),
        ("mrope_params", object()),
        ("encoder_output", object()),
        ("position_embedding", object()),
        ("norm_before_bmm1", True),
        ("lora_layer_params", object()),
        ("cross_kv_cache_gen", object()),
        ("skip_attn", object()),
    ],
)
def test_arguments_that_layers_cannot_honour(
    trtllm: doubles.Double, net: Any, name: str, value: Any
) -> None:
    layer = adopted(trtllm, local_layer_idx=2)
    hidden = engine_input(trtllm, "hidden", HIDDEN)
    with pytest.raises(UsageError, match=rf"attention layer 2: {name}: not supported"):
        layer(hidden, **{name: value})


def test_forward_refuses_what_passes_of_tensorrt_llm_left_behind(
    trtllm: doubles.Double, net: Any, tmp_path: Path
) -> None:
    inputs = request_inputs(trtllm, Case("llama"), tmp_path / "x")
    params = {k: inputs[k] for k in ("kv_cache_params", "attention_params")}
    hidden = engine_input(trtllm, "hidden", HIDDEN)
    layer = adopted(trtllm)
    with pytest.raises(UsageError, match=r"hidden_states: expected packed tokens"):
        layer((hidden, hidden), **params)
    with pytest.raises(UsageError, match=r"hidden_states: expected packed tokens"):
        layer(engine_input(trtllm, "padded", 5, HIDDEN), **params)
    with pytest.raises(UsageError, match=r"the inputs that prepare_inputs of a Razor model"):
        layer(hidden, **{**params, "kv_cache_params": None})
    with pytest.raises(UsageError, match=r"the inputs that prepare_inputs of a Razor model"):
        layer(hidden, **{**params, "attention_params": None})
    layer.qkv_lora = object()
    with pytest.raises(UsageError, match=r"LoRA is not supported"):
        layer(hidden, **params)
    split = adopted(trtllm)
    split.qkv = None  # as TensorRT-LLM's pass for unfused projections does
    with pytest.raises(UsageError, match=r"qkv: expected one projection"):
        split(hidden, **params)


def test_missing_input_is_named(trtllm: doubles.Double, net: Any, tmp_path: Path) -> None:
    inputs = request_inputs(trtllm, Case("llama"), tmp_path / "x")
    inputs["attention_params"].embed_positions_for_gpt_attention = None
    layer = adopted(trtllm)
    with pytest.raises(RazorError, match=r"input rotary_cos_sin: expected a tensor, found none"):
        layer(
            engine_input(trtllm, "hidden", HIDDEN),
            **{k: inputs[k] for k in ("kv_cache_params", "attention_params")},
        )


def test_cache_scales_must_be_there(trtllm: doubles.Double, net: Any, tmp_path: Path) -> None:
    """A layer that was not quantised has none."""
    case = Case("llama", TrtLlmOptions(kv_dtype="fp8"))
    inputs = request_inputs(trtllm, case, tmp_path / "x")
    layer = adopted(trtllm)
    with pytest.raises(RazorError, match=r"input kv_orig_quant_scale: expected a tensor"):
        layer(
            engine_input(trtllm, "hidden", HIDDEN),
            **{k: inputs[k] for k in ("kv_cache_params", "attention_params")},
        )


def test_slopes_stay_in_float32(trtllm: doubles.Double, net: Any, tmp_path: Path) -> None:
    """TensorRT-LLM's own layer rounds them to the model's dtype."""
    alibi = trtllm.load("tensorrt_llm.functional").PositionEmbeddingType.alibi
    case = Case("baichuan-13b", dtype="bfloat16")
    inputs = request_inputs(trtllm, case, tmp_path / "x")
    layer = adopted(
        trtllm,
        hidden_size=768,
        num_attention_heads=12,
        num_kv_heads=12,
        position_embedding_type=alibi,
    )
    layer(
        engine_input(trtllm, "hidden", 768),
        **{k: inputs[k] for k in ("kv_cache_params", "attention_params")},
    )
    (plugin,) = (made for made in net.trt_network.layers if made.type.value == "PLUGIN_V3")
    (slopes,) = (t for t in plugin.inputs if t.origin.endswith("alibi_slopes"))
    assert slopes.dtype == trtllm.load("tensorrt").float32
    assert slopes.shape == (12,)


def test_layer_without_local_heads_borrows_slots(
    trtllm: doubles.Double, net: Any, tmp_path: Path
) -> None:
    """The plugin has the inputs with any state slots; the engine only those of layers with states."""
    case = Case("llama", TrtLlmOptions(local_cache=LocalCache.SLOTS), counts=(4, 4, 1, 2))
    inputs = request_inputs(trtllm, case, tmp_path / "x")
    razor = inputs["attention_params"].razor
    assert [layer.state_layer for layer in razor.plan.layers] == [-1, -1, 3, 5]
    assert sorted(razor.states) == [3, 5]
    layer = adopted(trtllm)
    found = layer._inputs(
        engine_input(trtllm, "qkv", 16 * DIM),
        inputs["kv_cache_params"],
        inputs["attention_params"],
        razor,
    )
    assert found["conv_state_ptr"].name == "conv_state_ptr_3"
    assert found["rnn_state_ptr"].name == "rnn_state_ptr_3"


# The plugin ---------------------------------------------------------------------------------------
def test_library_is_loaded_once(trtllm: doubles.Double) -> None:
    attention = trtllm.load("trt_razor.trtllm.attention")
    registry = trtllm.load("tensorrt").get_plugin_registry()
    assert registry.libraries == []
    attention.load_plugin_library()
    attention.load_plugin_library()
    assert registry.libraries == [str(trtllm.path / doubles.PLUGIN)]


def test_library_that_does_not_load(
    trtllm: doubles.Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = trtllm.load("trt_razor.trtllm.attention")
    registry = trtllm.load("tensorrt").get_plugin_registry()
    monkeypatch.setattr(registry, "load_library", lambda path: None)
    with pytest.raises(RazorError, match=r"trt10\.so: cannot be loaded; .*TensorRT 10\.1"):
        attention.load_plugin_library()


def test_plugin_must_be_registered(trtllm: doubles.Double, net: Any) -> None:
    attention = trtllm.load("trt_razor.trtllm.attention")
    with pytest.raises(RazorError, match=r"RazorGptAttention: not registered with TensorRT"):
        attention.add_plugin("x", {}, {})


def test_plugin_that_refuses_its_fields(
    trtllm: doubles.Double, net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT gives nothing back then, and prints why."""
    inputs = request_inputs(trtllm, Case("llama"), tmp_path / "x")
    plugins = trtllm.load("tensorrt.plugins")
    monkeypatch.setattr(plugins.RazorCreator, "create_plugin", lambda *_: None)
    layer = adopted(trtllm)
    with pytest.raises(
        RazorError, match=r"RazorGptAttention refused the fields of razor_attention_0"
    ):
        layer(
            engine_input(trtllm, "hidden", HIDDEN),
            **{k: inputs[k] for k in ("kv_cache_params", "attention_params")},
        )


def test_wide_fields_are_int64(trtllm: doubles.Double) -> None:
    """Slots may be larger than 2 GiB; all other integers are small."""
    attention, trt = trtllm.load("trt_razor.trtllm.attention"), trtllm.load("tensorrt")
    value, kind = attention._field_data("ring_slot_bytes", 1 << 33)
    assert (int(value[0]), kind) == (1 << 33, trt.PluginFieldType.INT64)
    plan = dataclasses.replace(Case("llama").plan("1.1.0"))
    for name, number in plan.plugin_fields(0, 0, {"scale": 0.125}).items():
        data, kind = attention._field_data(name, number)
        wide = name in ("ring_slot_bytes", "comp_slot_bytes")
        assert data.shape == (1,)
        assert data.dtype == (np.float32 if name == "scale" else np.int64 if wide else np.int32)
        assert (
            kind.name == {"float32": "FLOAT32", "int64": "INT64", "int32": "INT32"}[str(data.dtype)]
        )
