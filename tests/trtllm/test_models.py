"""Razor model classes on the double of TensorRT-LLM: inputs, plugins, weights, configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import doubles
import numpy as np
import pytest
import tiny_checkpoints
from razor_models import (
    CLASSES,
    DIM,
    LAYERS,
    MAX_BATCH,
    MAX_SEQ_LEN,
    POSITIONS,
    SPECS,
    Case,
    build,
    caches,
    network,
)

from trt_razor.errors import RazorError
from trt_razor.headmap import HeadMap
from trt_razor.trtllm.checkpoint import convert_checkpoint
from trt_razor.trtllm.options import SECTION, TrtLlmOptions, razor_section
from trt_razor.trtllm.permute import permuted_slopes
from trt_razor.trtllm.ranks import RankLayout, equalise, rank_layout
from trt_razor.trtllm.release import LocalCache

CYCLIC, SLOTS = LocalCache.CYCLIC, LocalCache.SLOTS
KINDS = tuple(SPECS)


def options(**fields: Any) -> TrtLlmOptions:
    return TrtLlmOptions(**fields)


def attention_fields(case: Case) -> dict[str, Any]:
    tp, spec = case.options.tp_size, case.spec
    alibi = spec.position == "alibi"
    return {
        "num_heads": spec.num_heads // tp,
        "num_kv_heads": spec.num_kv_heads // tp,
        "head_dim": DIM,
        "position": POSITIONS[case.kind],
        "rotary_dim": 0 if alibi else DIM,
        "scale": DIM**-0.5,
    }


def input_names(case: Case, plan: Any, layer: int) -> list[str]:
    """What the plugin of a layer reads, by name of the engine's input or by kind of weight."""
    alibi = case.spec.position == "alibi"
    state = plan.layers[layer].state_layer
    if plan.local_cache is SLOTS and state < 0:
        state = min(p.state_layer for p in plan.layers if p.state_layer >= 0)
    return [
        "qkv",
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
        *(["kv_cache_rcp_scaling_factor", "kv_cache_scaling_factor"] if plan.fp8 else []),
        *(["alibi_slopes"] if alibi else ["rotary_inv_freq", "embed_positions_for_gpt_attention"]),
        "host_context_lengths",
        "host_runtime_perf_knobs",
        "host_context_progress",
        *(
            ["slot_mapping", f"conv_state_ptr_{state}", f"rnn_state_ptr_{state}"]
            if plan.local_cache is SLOTS
            else []
        ),
    ]


def check_network(net: dict[str, Any], case: Case, plan: Any, stage: range) -> None:
    """Everything in a recorded network that hangs on the plan."""
    plugins = [p for p in net["plugins"] if p["type"] == "RazorGptAttention"]
    assert len(plugins) == len(stage) == len(net["plugins"])
    for layer, plugin in zip(stage, plugins, strict=True):
        expected = plan.plugin_fields(layer, stage[0], attention_fields(case))
        assert plugin["fields"] == pytest.approx(expected)
        assert {k: v for k, v in plugin["fields"].items() if k != "scale"} == {
            k: v for k, v in expected.items() if k != "scale"
        }
        found = [tensor["name"].rsplit(".", 1)[-1] for tensor in plugin["inputs"]]
        assert found[1:] == input_names(case, plan, layer)[1:]
    inputs = net["inputs"]
    rows = sum((plan.layers[i].full_row >= 0) + (plan.layers[i].local_row >= 0) for i in stage)
    assert inputs["host_max_attention_window_sizes"]["shape"] == [rows]
    assert inputs["host_kv_cache_pool_mapping"]["shape"] == [rows, 2]
    block = plan.tokens_per_block
    most = MAX_SEQ_LEN + (block - 1 if plan.bubble else 0)
    for name in ("kv_cache_block_offsets", "host_kv_cache_block_offsets"):
        (profile,) = inputs[name]["profiles"]
        assert [high for _, _, high in profile] == [rows, MAX_BATCH, 2, -(-most // block)]
        assert [low for low, _, _ in profile] == [1, 1, 2, 1]
    states = {n: i for n, i in inputs.items() if "state_ptr" in n}
    numbers = [plan.layers[i].state_layer for i in stage if plan.layers[i].state_layer >= 0]
    assert sorted(states) == sorted(f"{k}_state_ptr_{n}" for k in ("conv", "rnn") for n in numbers)
    assert all((s["dtype"], s["shape"]) == ("int64", [1]) for s in states.values())
    assert ("slot_mapping" in inputs) == bool(numbers)
    if numbers:
        assert inputs["slot_mapping"]["dtype"] == "int32"
        assert inputs["slot_mapping"]["profiles"] == inputs["sequence_length"]["profiles"]


# Networks -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_network_is_what_the_plan_says(
    trtllm: doubles.Double, tmp_path: Path, kind: str, tp_size: int, fp8: bool
) -> None:
    for cache in caches(trtllm.release):
        chosen = options(tp_size=tp_size, kv_dtype="fp8" if fp8 else "auto", local_cache=cache)
        case = Case(kind, chosen)
        plan = case.plan(trtllm.release)
        assert plan.local_cache is cache
        kinds = {(p.full_row >= 0, p.local_row >= 0 or p.state_layer >= 0) for p in plan.layers}
        assert kinds == {(True, True), (True, False), (False, True)}
        for rank in range(tp_size):
            net = network(trtllm, case, tmp_path / cache.name, rank)
            check_network(net, case, plan, range(LAYERS))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral"])
def test_pipeline_stages_count_rows_from_their_own(tmp_path: Path, kind: str) -> None:
    with doubles.installed(tmp_path / "double", "1.0.0") as trtllm:
        case = Case(kind, options(pp_size=2), counts=(1,) * LAYERS)
        plan = case.plan("1.0.0")
        assert plan.local_cache is CYCLIC
        for stage, layers in enumerate((range(2), range(2, 4))):
            net = network(trtllm, case, tmp_path / "x", stage)
            check_network(net, case, plan, layers)
            rows = [(p["fields"]["layer_full"], p["fields"]["layer_local"]) for p in net["plugins"]]
            assert rows == [(0, 1), (2, 3)]
            assert ("hidden_states_input" in net["inputs"]) == (stage == 1)


def test_release_decides_where_local_heads_live(trtllm: doubles.Double, tmp_path: Path) -> None:
    """Without a word in the checkpoint: the pools where they have sinks, else the slots."""
    net = network(trtllm, Case("llama"), tmp_path / "x")
    cyclic = trtllm.release.startswith("1.0")
    assert {p["fields"]["local_cache"] for p in net["plugins"]} == {1 if cyclic else 2}


def test_equal_names_of_dimensions_have_equal_ranges(
    trtllm: doubles.Double, tmp_path: Path
) -> None:
    """TensorRT takes dimensions of one name for one size."""
    for cache in caches(trtllm.release):
        net = network(trtllm, Case("qwen2", options(local_cache=cache)), tmp_path / cache.name)
        ranges: dict[str, Any] = {}
        for name, found in net["inputs"].items():
            for axis, dim in enumerate(found["dims"]):
                limits = [profile[axis] for profile in found["profiles"]]
                assert ranges.setdefault(dim, limits) == limits, (name, dim)
        assert ranges["batch_size_beam_width"][0][2] == MAX_BATCH


def test_several_profiles(trtllm: doubles.Double, tmp_path: Path) -> None:
    """State inputs have as many profiles as all others."""
    case = Case("llama", options(local_cache=SLOTS))
    model = case.model(trtllm, tmp_path / "x")
    model.razor_plan = case.plan(trtllm.release)
    common, network_module = (
        trtllm.load("tensorrt_llm._common"),
        trtllm.load("tensorrt_llm.network"),
    )
    cache_type = trtllm.load("tensorrt_llm.models.generation_mixin").KVCacheType.PAGED
    net = network_module.Network()
    with common.net_guard(net):
        model.prepare_attention_inputs(
            max_batch_size=8,
            max_beam_width=1,
            max_input_len=1000,
            max_seq_len=MAX_SEQ_LEN,
            num_kv_heads=4,
            head_size=DIM,
            num_layers=LAYERS,
            kv_dtype="float16",
            kv_cache_type=cache_type,
            num_profiles=3,
            remove_input_padding=True,
            use_gpt_attention_plugin=True,
            mapping=model.config.mapping,
        )
    ranges = {name: tensor.dim_range for name, tensor in net.get_inputs().items()}
    assert {len(r) for dims in ranges.values() for r in dims.values()} == {3}
    assert ranges["slot_mapping"] == ranges["sequence_length"]
    assert "conv_state_ptr_1" in ranges


def test_optimal_batch_is_the_same_for_slots(trtllm: doubles.Double, tmp_path: Path) -> None:
    """Python callers may give one: prepare_inputs must not leave the slots behind."""
    case = Case("llama", options(local_cache=SLOTS))
    model = case.model(trtllm, tmp_path / "x")
    common, network_module = (
        trtllm.load("tensorrt_llm._common"),
        trtllm.load("tensorrt_llm.network"),
    )
    net = network_module.Network()
    net.plugin_config.paged_kv_cache = True
    net.plugin_config.use_paged_context_fmha = False
    with common.net_guard(net):
        model.prepare_inputs(
            max_batch_size=8,
            max_input_len=1000,
            max_seq_len=MAX_SEQ_LEN,
            max_num_tokens=1024,
            use_cache=True,
            opt_batch_size=3,
        )
    (slots,) = (t for n, t in net.get_inputs().items() if n == "slot_mapping")
    assert slots.dim_range["batch_size_beam_width"] == [[1, 3, 8]]
    assert net.get_inputs()["sequence_length"].dim_range == slots.dim_range


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_called_as_in_the_stock_class(
    trtllm: doubles.Double, tmp_path: Path, kind: str
) -> None:
    case = Case(kind, options(kv_dtype="fp8", tp_size=2))
    razor = case.model(trtllm, tmp_path / "razor")
    dense = case.model(trtllm, tmp_path / "dense", razor=False)
    described = [
        [(n, p.shape, p.dtype, p.is_buffer) for n, p in model.named_parameters()]
        for model in (razor, dense)
    ]
    assert described[0] == described[1]
    assert len(described[0]) > 8 * LAYERS


def test_dense_network_is_the_stock_class(trtllm: doubles.Double, tmp_path: Path) -> None:
    case = Case("qwen3")
    model = case.model(trtllm, tmp_path / "x", razor=False)
    assert type(model).__module__ == "tensorrt_llm.models.qwen.model"
    net = doubles.network(build(trtllm, model, case.options))
    assert "RazorGptAttention" not in json.dumps(net)
    assert net["inputs"]["host_kv_cache_pool_mapping"]["shape"] == [LAYERS, 2]


def test_dense_engines_need_no_plugin(
    trtllm: doubles.Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRT_RAZOR_PLUGIN", str(tmp_path / "nothing.so"))
    case = Case("llama")
    case.model(trtllm, tmp_path / "dense", razor=False)
    with pytest.raises(RazorError, match=r"TRT_RAZOR_PLUGIN: expected the file libtrt_razor"):
        case.model(trtllm, tmp_path / "razor")


@pytest.mark.parametrize("algorithm", ["FP8", "W4A16_AWQ", "W8A16", "W4A16"])
def test_quantised_layers_stay_razor_layers(
    trtllm: doubles.Double, tmp_path: Path, algorithm: str
) -> None:
    case = Case("qwen2", options(kv_dtype="fp8"), quant={"quant_algo": algorithm})
    model = case.model(trtllm, tmp_path / "x")
    names = dict(model.named_parameters())
    scale = "weights_scaling_factor" if algorithm in ("FP8", "W4A16_AWQ") else "per_channel_scale"
    assert f"transformer.layers.0.attention.qkv.{scale}" in names
    net = doubles.network(build(trtllm, model, case.options))
    check_network(net, case, case.plan(trtllm.release), range(LAYERS))


# Configuration ------------------------------------------------------------------------------------
def test_config_tells_the_model_first_and_the_caches_later(
    trtllm: doubles.Double, tmp_path: Path
) -> None:
    for cache in caches(trtllm.release):
        case = Case("qwen2", options(local_cache=cache))
        config = case.config(trtllm, tmp_path / cache.name)
        before = config.to_dict()
        models = trtllm.load("trt_razor.trtllm.models")
        model = models.model_class(config.architecture, True)(config)
        assert config.to_dict() == before  # what save_checkpoint would write
        assert isinstance(config, trtllm.load("tensorrt_llm.models.qwen.config").QWenConfig)
        engine = build(trtllm, model, case.options)
        after = config.to_dict()
        plan = case.plan(trtllm.release)
        assert model.razor_plan == plan
        assert after == plan.pretrained_config(before)
        assert after["num_hidden_layers"] == len(plan.layer_types) != LAYERS
        assert config.num_hidden_layers == LAYERS
        assert not [key for key in after if key.startswith("_")]
        engine.save(str(tmp_path / "engine" / cache.name))
        saved = json.loads((tmp_path / "engine" / cache.name / "config.json").read_text())
        assert saved["pretrained_config"]["num_kv_heads_per_layer"] == list(plan.kv_heads)
        assert saved["pretrained_config"][SECTION] == before[SECTION]
        plugins = saved["build_config"]["plugin_config"]
        assert plugins["paged_kv_cache"] is True
        assert plugins["streamingllm"] is False
        if cache is SLOTS:
            assert saved["pretrained_config"]["architecture"] == "RecurrentGemmaForCausalLM"
            assert plugins["paged_state"] is True
            assert plugins["mamba_conv1d_plugin"] == "float16"
        else:
            assert saved["pretrained_config"]["architecture"] == "Qwen2ForCausalLM"
            assert plugins["paged_state"] is False


def test_a_second_engine_of_the_same_config(trtllm: doubles.Double, tmp_path: Path) -> None:
    """Another length: the plan of the first is forgotten."""
    case = Case("llama")
    config = case.config(trtllm, tmp_path / "x")
    before = config.to_dict()
    cls = trtllm.load("trt_razor.trtllm.models").RAZOR_CLASSES[config.architecture]
    build(trtllm, cls(config), case.options)
    model = cls(config)
    assert config.to_dict() == before
    build(trtllm, model, case.options, max_seq_len=2048)
    assert model.razor_plan == case.plan(trtllm.release, 2048)


# Checkpoints --------------------------------------------------------------------------------------
def _converted(kind: str, folder: Path, tp_size: int) -> tuple[Case, RankLayout]:
    """A checkpoint of a random model, heads scattered, converted for Razor."""
    source = tiny_checkpoints.RandomModel(SPECS[kind])
    chosen = options(tp_size=tp_size)
    heads: HeadMap = equalise(tiny_checkpoints.head_map_of(source.spec), tp_size)
    layout = rank_layout(heads, tp_size)
    section = razor_section(source.spec, heads, layout, Case(kind).section.policy)
    folder.mkdir()
    convert_checkpoint(source, layout, "float16", chosen, section, folder, lambda *_: None)
    return Case(kind, chosen, counts=layout.num_retrieval), layout


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_converted_checkpoints_load(
    trtllm: doubles.Double, tmp_path: Path, kind: str, tp_size: int
) -> None:
    case, layout = _converted(kind, tmp_path / "checkpoint", tp_size)
    models = trtllm.load("trt_razor.trtllm.models")
    modeling = trtllm.load("tensorrt_llm.models.modeling_utils")
    for rank in range(tp_size):
        config = modeling.PretrainedConfig.from_checkpoint(str(tmp_path / "checkpoint"))
        config.set_rank(rank)
        cls = getattr(models, CLASSES[kind])
        model = cls.from_checkpoint(str(tmp_path / "checkpoint"), config=config)
        assert all(parameter.is_inited() for parameter in model.parameters())
        net = doubles.network(build(trtllm, model, case.options))
        check_network(net, case, case.plan(trtllm.release), range(LAYERS))
        if case.spec.position == "alibi":
            heads = case.spec.num_heads // tp_size
            for layer, order in enumerate(layout.order):
                slopes = model.transformer.layers[layer].attention.alibi_slopes
                mine = permuted_slopes(case.spec, order)[rank * heads :][:heads]
                np.testing.assert_array_equal(np.asarray(slopes.raw_value).reshape(-1), mine)


def test_trtllm_build_finds_the_class_in_the_file(trtllm: doubles.Double, tmp_path: Path) -> None:
    """As ``--model_cls_file FILE --model_cls_name NAME``: the file becomes the module ``models``."""
    import trt_razor.trtllm

    _converted("qwen3", tmp_path / "checkpoint", 1)
    file = Path(trt_razor.trtllm.__path__[0]) / "models.py"
    command = trtllm.load("tensorrt_llm.commands.build")
    command.main(
        [
            "--checkpoint_dir",
            str(tmp_path / "checkpoint"),
            "--model_cls_file",
            str(file),
            "--model_cls_name",
            "RazorQWenForCausalLM",
            "--output_dir",
            str(tmp_path / "engine"),
            "--max_seq_len",
            str(MAX_SEQ_LEN),
            "--max_input_len",
            "1000",
            "--max_batch_size",
            "4",
            "--use_paged_context_fmha",
            "disable",
        ]
    )
    net = doubles.network(tmp_path / "engine/rank0.engine")
    assert {p["type"] for p in net["plugins"]} == {"RazorGptAttention"}
    saved = json.loads((tmp_path / "engine/config.json").read_text())
    assert "num_kv_heads_per_layer" in saved["pretrained_config"]
