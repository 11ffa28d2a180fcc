"""Networks on the double: inputs of engines, plugin layers, symbolic tensors."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import doubles
import pytest
from double_models import FAMILIES, build, make_config, make_model
from doubles import Double


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mapping", [{}, {"world_size": 2, "tp_size": 2}])
def test_dense_network(trtllm: Double, family: str, mapping: dict[str, Any]) -> None:
    changes = FAMILIES[family] | {"mapping": mapping}
    changes |= {"quantization": {"kv_cache_quant_algo": "FP8"}}
    network = doubles.network(build(trtllm, make_model(trtllm, **changes)))
    assert [plugin["type"] for plugin in network["plugins"]] == ["GPTAttention"] * 2
    assert [plugin["fields"]["layer_idx"] for plugin in network["plugins"]] == [0, 1]
    names = [tensor["name"].split(".")[-1] for tensor in network["plugins"][1]["inputs"]]
    position = ["rotary_inv_freq", "embed_positions_for_gpt_attention"]
    position = ["alibi_slopes"] if family == "alibi" else position
    assert names[1:] == [
        "sequence_length",
        "host_past_key_value_lengths",
        "host_max_attention_window_sizes",
        "host_sink_token_length",
        "context_lengths",
        "cache_indirection",
        "host_request_types",
        "kv_cache_block_offsets",
        "host_kv_cache_block_offsets",
        "host_kv_cache_pool_pointers",
        "host_kv_cache_pool_mapping",
        "kv_cache_rcp_scaling_factor",
        "kv_cache_scaling_factor",
        *position,
        "host_context_lengths",
        "host_runtime_perf_knobs",
        "host_context_progress",
    ]
    tp = mapping.get("tp_size", 1)
    heads = 4 // tp + 2 * changes.get("num_key_value_heads", 2) // tp
    assert network["plugins"][0]["inputs"][0]["shape"] == [-1, heads * 64]
    assert ("all_reduce_workspace" in network["inputs"]) == (tp > 1)
    assert network["outputs"] == [{"name": "logits", "dtype": "float32", "shape": [-1, 100]}]
    # As TensorRT-LLM's own plugin gets them: in the model's type.
    slopes = [t for t in network["plugins"][0]["inputs"] if t["name"].endswith("alibi_slopes")]
    assert all(t["dtype"] == "float16" and t["shape"] == [1, 4 // tp, 1, 1] for t in slopes)


def test_pipeline_stages(trtllm: Double) -> None:
    mapping = {"world_size": 2, "pp_size": 2, "rank": 0}
    first = doubles.network(build(trtllm, make_model(trtllm, mapping=mapping, num_hidden_layers=3)))
    mapping["rank"] = 1
    last = doubles.network(build(trtllm, make_model(trtllm, mapping=mapping, num_hidden_layers=3)))
    assert [len(n["plugins"]) for n in (first, last)] == [2, 1]
    assert "hidden_states_input" not in first["inputs"]
    assert "last_token_ids" not in first["inputs"]
    assert last["inputs"]["hidden_states_input"]["shape"] == [-1, 256]
    assert [n["outputs"][0]["name"] for n in (first, last)] == ["hidden_states_output", "logits"]
    assert last["inputs"]["host_kv_cache_pool_mapping"]["shape"] == [1, 2]
    assert last["plugins"][0]["fields"]["layer_idx"] == 0


def attention_inputs(trtllm: Double, **options: Any) -> dict[str, Any]:
    module = trtllm.load("tensorrt_llm")
    kinds = trtllm.load("tensorrt_llm.models.generation_mixin").KVCacheType
    arguments = {
        "max_batch_size": 4,
        "max_beam_width": 1,
        "max_input_len": 128,
        "max_seq_len": 256,
        "num_kv_heads": 2,
        "head_size": 64,
        "num_layers": 6,
        "kv_dtype": trtllm.load("tensorrt").float16,
        "kv_cache_type": kinds.PAGED,
        "remove_input_padding": True,
        "use_gpt_attention_plugin": True,
    }
    model = make_model(trtllm)
    with module.net_guard(module.Network()):
        inputs: dict[str, Any] = model.prepare_attention_inputs(**(arguments | options))
    return inputs


def test_attention_inputs(trtllm: Double) -> None:
    inputs = attention_inputs(trtllm)
    assert list(inputs)[:4] == [
        "attention_mask",
        "sequence_length",
        "host_past_key_value_lengths",
        "host_max_attention_window_sizes",
    ]
    offsets = inputs["kv_cache_block_offsets"]
    assert offsets.shape == (-1, -1, 2, -1)
    assert offsets.dim_range == OrderedDict(
        num_kv_cache_pools=[[1, 1, 6]],
        batch_size_beam_width=[[1, 2, 4]],
        kv=[2],
        max_blocks_per_seq=[[1, 4, 8]],
    )
    more = attention_inputs(trtllm, streamingllm=True)["kv_cache_block_offsets"]
    assert more.dim_range["max_blocks_per_seq"] == [[1, 5, 9]]
    assert inputs["host_max_attention_window_sizes"].shape == (6,)
    assert inputs["past_key_value"] == [None] * 6
    some = attention_inputs(trtllm, attn_layer_idx=[0, 2])
    assert some["host_max_attention_window_sizes"].shape == (2,)
    assert some["host_kv_cache_pool_mapping"].shape == (2, 2)
    with pytest.raises(TypeError):
        attention_inputs(trtllm, window=4)


def test_inputs_are_keyword_only(trtllm: Double) -> None:
    model = make_model(trtllm)
    with pytest.raises(TypeError):
        model.prepare_attention_inputs(4, 1, 128, 256)
    with pytest.raises(TypeError):
        model.prepare_basic_inputs(max_batch_size=4, attn_layer_idx=[0])
    gpt_attention = trtllm.load("tensorrt_llm.functional").gpt_attention
    with pytest.raises(TypeError):
        gpt_attention(None, None)
    layers = trtllm.load("tensorrt_llm.layers")
    with pytest.raises(TypeError):
        layers.Attention(0, 256, 4)
    with pytest.raises(TypeError):
        layers.AttentionParams(cache_indirection=None)
    with pytest.raises(TypeError):
        layers.KeyValueCacheParams(sequence_length=None)
    with pytest.raises(TypeError):
        model.prepare_inputs(4, 128, 256, 512, True, num_layers=4)


def test_more_cache_rows_through_prepare_inputs(trtllm: Double) -> None:
    """The model's own way to say another number of layers."""
    llama = trtllm.load("tensorrt_llm.models").LLaMAForCausalLM

    class Doubled(llama):  # type: ignore[misc, valid-type]
        def prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
            return super().prepare_inputs(*args, **(kwargs | {"num_hidden_layers": 4}))

    network = doubles.network(build(trtllm, Doubled(make_config(trtllm))))
    assert network["inputs"]["host_kv_cache_pool_mapping"]["shape"] == [4, 2]
    assert len(network["plugins"]) == 2


def test_short_list_of_caches_drops_layers(trtllm: Double) -> None:
    llama = trtllm.load("tensorrt_llm.models").LLaMAForCausalLM

    class Halved(llama):  # type: ignore[misc, valid-type]
        def prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
            return super().prepare_inputs(*args, **(kwargs | {"num_hidden_layers": 1}))

    assert len(doubles.network(build(trtllm, Halved(make_config(trtllm))))["plugins"]) == 1


def test_dimension_names_mean_one_range(trtllm: Double, refused: Any) -> None:
    trt, functional = trtllm.load("tensorrt"), trtllm.load("tensorrt_llm.functional")
    llama = trtllm.load("tensorrt_llm.models").LLaMAForCausalLM

    class Extra(llama):  # type: ignore[misc, valid-type]
        size = 4

        def prepare_inputs(self, **kwargs: Any) -> Any:
            dims = OrderedDict(batch_size_beam_width=[[1, 2, self.size]])
            functional.Tensor("slot_mapping", trt.int32, [-1], dims)
            return super().prepare_inputs(**kwargs)

    network = doubles.network(build(trtllm, Extra(make_config(trtllm))))
    assert network["inputs"]["slot_mapping"] == {
        "dtype": "int32",
        "shape": [-1],
        "dims": ["batch_size_beam_width"],
        "profiles": [[[1, 2, 4]]],
    }
    Extra.size = 5
    with pytest.raises(refused, match="batch_size_beam_width"):
        build(trtllm, Extra(make_config(trtllm)))


def test_tensors(trtllm: Double, refused: Any) -> None:
    llm, trt = trtllm.load("tensorrt_llm"), trtllm.load("tensorrt")
    f = trtllm.load("tensorrt_llm.functional")
    network = llm.Network()
    with llm.net_guard(network):
        x = llm.Tensor("x", trt.float16, [-1, 8], OrderedDict(n=[[1, 2, 4]], w=[8]))
        with pytest.raises(refused):
            llm.Tensor("x", trt.float16, [-1], OrderedDict(n=[[1, 2, 4]]))
        with pytest.raises(refused):
            llm.Tensor("y", trt.float16, [-1, 8], OrderedDict(n=[[1, 2, 4]]))
        with pytest.raises(refused):
            llm.Tensor("y", trt.float16, [8], OrderedDict(w=[[1, 4, 8]]))
        with pytest.raises(refused):
            llm.Tensor("y", trt.float16, [-1], {"n": [[1, 2, 4]]})
        if trtllm.release < "1.1":
            with pytest.raises(AssertionError):
                llm.Tensor("y", "float16", [-1], OrderedDict(n=[[1, 2, 4]]))
        assert f.cast(x, "float16") is x
        assert f.cast(x, trt.float32).dtype == trt.float32
        with pytest.raises(refused):
            x + f.cast(x, "float32")
        assert x.view([-1, 2, 4]).shape == (-1, 2, 4)
        assert x.view(f.concat([f.shape(x, 0), 2, 4])).shape == (-1, 2, 4)
        with pytest.raises(refused):
            x.view([-1, 3])
        assert [t.shape for t in f.split(x, [2, 6], dim=-1)] == [(-1, 2), (-1, 6)]
        with pytest.raises(refused):
            f.split(x, [2, 5], dim=-1)
        with pytest.raises(refused):
            trtllm.load("tensorrt_llm.layers").ColumnLinear(16, 4, dtype="float16")(x)
        assert x.view([-1, 2, 4]).trt_tensor.origin == "x"
        assert (x + x).trt_tensor.origin == "<add>"
        with pytest.raises(refused):
            trtllm.load("tensorrt_llm.layers").RmsNorm(8, dtype="float32")(x)
