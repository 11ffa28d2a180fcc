"""The double's RazorGptAttention: fields and inputs are those of the plugin's README."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import doubles
import numpy as np
import pytest
from doubles import Double

CYCLIC, SLOTS = 1, 2
ROPE, ALIBI = 1, 3


def razor_fields(local_cache: int = CYCLIC, position: int = ROPE, fp8: int = 0) -> dict[str, Any]:
    cyclic = local_cache == CYCLIC
    return {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "num_retrieval": 1,
        "position": position,
        "rotary_dim": 64 if position in (1, 2) else 0,
        "scale": 0.125,
        "max_seq_len": 256,
        "sink_tokens": 4,
        "min_window": 32,
        "compression": 4,
        "comp_tokens": 1,
        "heavy_hitters": 0,
        "kv_cache_fp8": fp8,
        "tokens_per_block": 32,
        "local_cache": local_cache,
        "layer_full": 0,
        "layer_local": 1 if cyclic else -1,
        "window": 68 if cyclic else 0,
        "ring_slot_bytes": 0 if cyclic else 1 << 20,
        "comp_slot_bytes": 0 if cyclic else 1 << 12,
    }


def field(trt: Any, name: str, value: Any) -> Any:
    kind = trt.PluginFieldType
    if isinstance(value, float):
        return trt.PluginField(name, np.array([value], np.float32), kind.FLOAT32)
    return trt.PluginField(name, np.array([value], np.int32), kind.INT32)


def creator(trtllm: Double) -> Any:
    registry = trtllm.load("tensorrt").get_plugin_registry()
    registry.load_library(os.environ["TRT_RAZOR_PLUGIN"])
    return registry.get_creator("RazorGptAttention", "1", "trt_razor")


def create(trtllm: Double, fields: list[Any]) -> Any:
    trt = trtllm.load("tensorrt")
    collection = trt.PluginFieldCollection(fields)
    return creator(trtllm).create_plugin("razor", collection, trt.TensorRTPhase.BUILD)


def make_plugin(trtllm: Double, **fields: Any) -> Any:
    trt = trtllm.load("tensorrt")
    return create(trtllm, [field(trt, name, value) for name, value in fields.items()])


def test_creator_comes_with_the_library(trtllm: Double, tmp_path: Path, refused: Any) -> None:
    registry = trtllm.load("tensorrt").get_plugin_registry()
    key = ("RazorGptAttention", "1", "trt_razor")
    assert registry.get_creator(*key) is None
    library = os.environ["TRT_RAZOR_PLUGIN"]
    with pytest.raises(TypeError):
        registry.load_library(Path(library))
    with pytest.raises(refused):
        registry.load_library(str(tmp_path / "other.so"))
    assert registry.load_library(library) is not None
    assert registry.load_library(library) is None
    assert registry.get_creator(*key) is not None
    assert registry.get_creator(*key[:2]) is None
    assert registry.get_creator("RazorGptAttention", "2", "trt_razor") is None
    assert registry.get_plugin_creator(*key) is None


@pytest.mark.parametrize("local_cache", [CYCLIC, SLOTS])
def test_fields_accepted(trtllm: Double, local_cache: int) -> None:
    fields = razor_fields(local_cache)
    assert make_plugin(trtllm, **fields).fields == pytest.approx(fields)
    assert {f.name for f in creator(trtllm).field_names} == set(fields)


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 3},
        {"head_dim": 80},
        {"num_retrieval": 3},
        {"position": 5},
        {"rotary_dim": 0},
        {"scale": 0.0},
        {"scale": 1},  # an integer field
        {"max_seq_len": 0},
        {"max_seq_len": 256.0},  # a float field
        {"kv_cache_fp8": 2},
        {"tokens_per_block": 48},
        {"tokens_per_block": 2048},
        {"local_cache": 0},
        {"layer_full": -1},
        {"layer_local": -1},
        {"num_retrieval": 0},  # with layer_full
        {"num_retrieval": 2},  # with layer_local
        {"window": 70},
        {"window": 0},
        {"ring_slot_bytes": 64},
        {"new_field": 1},
    ],
    ids=str,
)
def test_field_refused(trtllm: Double, refused: Any, change: dict[str, Any]) -> None:
    with pytest.raises(refused):
        make_plugin(trtllm, **(razor_fields() | change))


@pytest.mark.parametrize(
    "change",
    [{"ring_slot_bytes": 40}, {"ring_slot_bytes": 0}, {"comp_slot_bytes": 16}, {"window": 68}],
)
def test_slot_field_refused(trtllm: Double, refused: Any, change: dict[str, Any]) -> None:
    with pytest.raises(refused):
        make_plugin(trtllm, **(razor_fields(SLOTS) | change))


def test_field_forms(trtllm: Double, refused: Any) -> None:
    trt = trtllm.load("tensorrt")
    kind = trt.PluginFieldType
    good = {name: field(trt, name, value) for name, value in razor_fields().items()}
    wide = trt.PluginField("num_heads", np.array([4], np.int64), kind.INT64)
    create(trtllm, list((good | {"num_heads": wide}).values()))
    two = trt.PluginField("num_heads", np.array([4, 4], np.int32), kind.INT32)
    with pytest.raises(refused):
        create(trtllm, list((good | {"num_heads": two}).values()))
    for name in good:
        with pytest.raises(refused, match=name):
            create(trtllm, [f for f in good.values() if f.name != name])
    with pytest.raises(refused):
        create(trtllm, [*good.values(), good["window"]])
    with pytest.raises(refused):
        trt.PluginField("num_heads", np.array([4]), kind.INT32)  # int64 data
    with pytest.raises(TypeError):
        trt.PluginField("num_heads", [4], kind.INT32)
    with pytest.raises(TypeError):
        creator(trtllm).create_plugin("razor", list(good.values()), trt.TensorRTPhase.BUILD)
    with pytest.raises(TypeError):
        creator(trtllm).create_plugin("razor", trt.PluginFieldCollection(good.values()))


def plugin_inputs(trtllm: Double, fields: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A network, and its tensors for a plugin with these fields, by the README's names in order."""
    trt = trtllm.load("tensorrt")
    network = trt.INetworkDefinition()
    half, single, wide = trt.float16, trt.float32, trt.int64

    def weight(name: str, shape: tuple[int, ...]) -> Any:
        return network.record("weight", [], single, shape, name).get_output(0)

    def number(name: str, shape: tuple[int, ...], dtype: Any = trt.int32) -> Any:
        return network.add_input(name, dtype, shape)

    out = {"qkv": network.record("matmul", [], half, (-1, 8 * 64)).get_output(0)}
    for name in ("sequence_length", "host_past_key_value_lengths"):
        out[name] = number(name, (-1,))
    out["host_max_attention_window_sizes"] = number("host_max_attention_window_sizes", (4,))
    out["host_sink_token_length"] = number("host_sink_token_length", (1,))
    out["context_lengths"] = number("context_lengths", (-1,))
    out["cache_indirection"] = number("cache_indirection", (-1, -1, -1))
    out["host_request_types"] = number("host_request_types", (-1,))
    for name in ("kv_cache_block_offsets", "host_kv_cache_block_offsets"):
        out[name] = number(name, (-1, -1, 2, -1))
    out["host_kv_cache_pool_pointers"] = number("host_kv_cache_pool_pointers", (-1, 2), wide)
    out["host_kv_cache_pool_mapping"] = number("host_kv_cache_pool_mapping", (4, 2))
    if fields["kv_cache_fp8"]:
        out["kv_orig_quant_scale"] = weight("attention.kv_cache_rcp_scaling_factor", (1,))
        out["kv_quant_orig_scale"] = weight("attention.kv_cache_scaling_factor", (1,))
    if fields["position"] in (1, 2):
        out["rotary_inv_freq"] = weight("rotary_inv_freq", (32,))
        out["rotary_cos_sin"] = weight("embed_positions_for_gpt_attention", (1, 512 * 64))
    if fields["position"] == ALIBI:
        out["alibi_slopes"] = weight("attention.alibi_slopes", (4,))
    out["host_context_lengths"] = number("host_context_lengths", (-1,))
    out["host_runtime_perf_knobs"] = number("host_runtime_perf_knobs", (16,), wide)
    out["host_context_progress"] = number("host_context_progress", (1,), wide)
    if fields["local_cache"] == SLOTS:
        out["slot_mapping"] = number("slot_mapping", (-1,))
        for name in ("conv_state_ptr", "rnn_state_ptr"):
            out[name] = number(f"{name}_3", (1,), wide)
    return network, out


CASES = [(CYCLIC, ROPE, 0), (CYCLIC, ALIBI, 1), (SLOTS, ROPE, 1), (SLOTS, ALIBI, 0), (SLOTS, 4, 0)]


@pytest.mark.parametrize("case", CASES)
def test_inputs_accepted(trtllm: Double, case: tuple[int, int, int]) -> None:
    fields = razor_fields(*case)
    network, tensors = plugin_inputs(trtllm, fields)
    plugin = make_plugin(trtllm, **fields)
    layer = network.add_plugin_v3(list(tensors.values()), [], plugin)
    assert layer.get_output(0).shape == (-1, 4 * 64)
    assert layer.get_output(0).dtype == tensors["qkv"].dtype
    assert layer.get_output(1) is None
    with pytest.raises(TypeError):
        network.add_plugin_v2(list(tensors.values()), plugin)
    with pytest.raises(TypeError):
        network.add_plugin_v3(list(tensors.values()), plugin)


@pytest.mark.parametrize("case", CASES[:4])
def test_order_of_inputs_matters(trtllm: Double, refused: Any, case: tuple[int, int, int]) -> None:
    fields = razor_fields(*case)
    network, tensors = plugin_inputs(trtllm, fields)
    plugin = make_plugin(trtllm, **fields)
    right = list(tensors.values())
    for i in range(len(right)):
        with pytest.raises(refused):
            network.add_plugin_v3(right[:i] + right[i + 1 :], [], plugin)
        with pytest.raises(refused):
            network.add_plugin_v3([*right[:i], right[i], *right[i:]], [], plugin)
        if i:
            swapped = [*right[: i - 1], right[i], right[i - 1], *right[i + 1 :]]
            with pytest.raises(refused):
                network.add_plugin_v3(swapped, [], plugin)


@pytest.mark.parametrize(
    "name, change",
    [
        ("qkv", {"shape": (-1, 4 * 64)}),
        ("qkv", {"dtype": "float32"}),
        ("sequence_length", {"dtype": "int64"}),
        ("host_sink_token_length", {"shape": (2,)}),
        ("kv_cache_block_offsets", {"shape": (-1, 2, -1)}),
        ("kv_cache_block_offsets", {"shape": (-1, -1, 3, -1)}),
        ("host_kv_cache_pool_pointers", {"dtype": "int32"}),
        ("host_kv_cache_pool_mapping", {"shape": (5, 2)}),  # four windows
        ("alibi_slopes", {"dtype": "float16"}),
        ("alibi_slopes", {"shape": (1, 4, 1, 1)}),
        ("kv_quant_orig_scale", {"dtype": "float16"}),
        ("rnn_state_ptr", {"origin": "rnn_state_ptr_5"}),
        ("conv_state_ptr", {"dtype": "int32"}),
        ("slot_mapping", {"dtype": "int64"}),
    ],
)
def test_wrong_input_refused(
    trtllm: Double, refused: Any, name: str, change: dict[str, Any]
) -> None:
    trt = trtllm.load("tensorrt")
    fields = razor_fields(SLOTS, ALIBI, 1)
    network, tensors = plugin_inputs(trtllm, fields)
    for key, value in change.items():
        setattr(tensors[name], key, getattr(trt, value) if key == "dtype" else value)
    with pytest.raises(refused):
        network.add_plugin_v3(list(tensors.values()), [], make_plugin(trtllm, **fields))


def test_expectations_are_the_readme(tmp_path: Path) -> None:
    """A row that the README gains, or another dtype there, changes what the double accepts."""
    with doubles.installed(tmp_path / "a", "1.0.0") as double:
        copy = double.path / "tensorrt/razor_gpt_attention.md"
        text = copy.read_text()
        text = text.replace(
            "| `host_context_lengths` |", "| `new_input` | [B] | |\n| `host_context_lengths` |"
        )
        copy.write_text(
            text.replace("| `kv_cache_fp8` |", "| `new_field` | 0, 1 | |\n| `kv_cache_fp8` |")
        )
        refused = double.load("tensorrt").ContractError
        with pytest.raises(refused, match="new_field"):
            make_plugin(double, **razor_fields())
        plugin = make_plugin(double, **razor_fields(), new_field=0)
        network, tensors = plugin_inputs(double, razor_fields())
        with pytest.raises(refused, match="new_input"):
            network.add_plugin_v3(list(tensors.values()), [], plugin)
