"""Every field of config.json that may be wrong, against the reader that the tests have of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_configs import engine, finished, put, written
from runtime_config import LoadError, ParseError, parse, without_comments

from trt_razor.errors import RazorError
from trt_razor.trtllm import engine_json
from trt_razor.trtllm.engine_json import check_engine_json, finish, plan_of
from trt_razor.trtllm.release import LocalCache

# Fields --------------------------------------------------------------------------------------------
P, B, G = "pretrained_config", "build_config", "build_config.plugin_config"
REQUIRED = {
    **dict.fromkeys((f"{P}.num_hidden_layers", f"{P}.num_attention_heads"), 2.5),
    **dict.fromkeys((f"{P}.vocab_size", f"{P}.hidden_size", f"{P}.mapping.tp_size"), "4"),
    f"{P}.architecture": 5,
    f"{P}.dtype": "int8",
    f"{P}.quantization": None,
    f"{B}.lora_config": None,
    **dict.fromkeys((f"{G}.remove_input_padding", f"{G}.context_fmha"), None),
    **dict.fromkeys((f"{G}.use_paged_context_fmha", f"{G}.paged_kv_cache"), None),
    f"{G}.tokens_per_block": "32",
}
"""Without these, or with these values, the runtime throws."""


@pytest.mark.parametrize("path", REQUIRED)
@pytest.mark.parametrize("cache", [None, *LocalCache])
def test_what_the_runtime_asks_for_is_asked_for(
    path: str, cache: LocalCache | None, tmp_path: Path
) -> None:
    """Both ways: our check refuses it, and the runtime would have thrown."""
    config, plan = engine(cache)
    if plan is not None:
        config = finish(written(tmp_path, config), plan)
    check_engine_json(config, plan)
    parse(json.dumps(config))
    for value in (..., REQUIRED[path]):
        broken = put(config, path, value)
        with pytest.raises(ParseError, match=path.rpartition(".")[2]):
            parse(json.dumps(broken))
        with pytest.raises(RazorError, match=f"^config.json: {path}: expected") as e:
            check_engine_json(broken, plan)
        assert "\n" not in str(e.value)


STATES = ["state_size", "conv_kernel", "rnn_hidden_size", "rnn_conv_dim_size"]


@pytest.mark.parametrize("name", STATES)
def test_a_hybrid_engine_must_have_its_state_sizes(name: str, tmp_path: Path) -> None:
    config, plan = finished(tmp_path, LocalCache.SLOTS)
    broken = put(config, f"{P}.{name}", ...)
    with pytest.raises(ParseError, match=f"{name}: absent"):
        parse(json.dumps(broken))
    with pytest.raises(RazorError, match=f"{name}: expected an integer in 1.."):
        check_engine_json(broken, plan)


CONTRADICTIONS: dict[str, tuple[LocalCache | None, str, Any, str]] = {
    "one count too few": (
        LocalCache.CYCLIC,
        f"{P}.num_kv_heads_per_layer",
        [1, 3, 4, 4, 2],
        "one count for each of 6 attention layers, found 5",
    ),
    "counts of all layers": (
        LocalCache.SLOTS,
        f"{P}.num_kv_heads_per_layer",
        [1, 3, 4, 4, 2, 2],
        "one count for each of 3 attention layers",
    ),
    "no heads": (
        LocalCache.CYCLIC,
        f"{P}.num_kv_heads_per_layer",
        [1, 3, 0, 4, 2, 2],
        r"\[2\]: expected a pos",
    ),
    "kinds": (
        LocalCache.SLOTS,
        f"{P}.layer_types",
        ["attention", "state"],
        "layer_types: expected a list of",
    ),
    "no states": (
        LocalCache.SLOTS,
        f"{P}.layer_types",
        ["attention"],
        "one count for each of 6|'recurrent'",
    ),
    "states in a dense architecture": (
        None,
        f"{P}.layer_types",
        ["attention", "recurrent"],
        "no 'recurrent' layer without",
    ),
    "a dense hybrid": (
        None,
        f"{P}.architecture",
        "RecurrentGemmaForCausalLM",
        "state_size: expected",
    ),
    "GLM": (None, f"{P}.architecture", "ChatGLMForCausalLM", "architecture: expected no 'GLM'"),
    "no Mamba plugin": (
        LocalCache.SLOTS,
        f"{G}.mamba_conv1d_plugin",
        None,
        "mamba_conv1d_plugin: expected float16, found null",
    ),
    "no paged state": (LocalCache.SLOTS, f"{G}.paged_state", False, "paged_state: expected true"),
    "reuse": (
        LocalCache.SLOTS,
        f"{G}.use_paged_context_fmha",
        True,
        "expected false: a reused prefix",
    ),
    "one conv row": (LocalCache.SLOTS, f"{P}.conv_kernel", 1, "conv_kernel: expected >= 2"),
    "head of state": (LocalCache.SLOTS, f"{P}.rnn_head_size", 4, "rnn_head_size: expected none"),
    "beams": (None, f"{B}.max_beam_width", 4, "max_beam_width: expected 1, found 4"),
    "no beam": (LocalCache.SLOTS, f"{B}.max_beam_width", 0, "max_beam_width: expected 1, found 0"),
    "prompts": (
        None,
        f"{B}.max_input_len",
        1001,
        "max_input_len: expected at most max_seq_len = 1000",
    ),
    "no paging": (None, f"{B}.kv_cache_type", "CONTINUOUS", "kv_cache_type: expected 'PAGED'"),
    "no attention plugin": (
        None,
        f"{G}.gpt_attention_plugin",
        None,
        "gpt_attention_plugin: expected",
    ),
    "LoRA": (None, f"{G}.lora_plugin", "auto", "lora_plugin: expected null"),
    "LoRA modules": (
        None,
        f"{B}.lora_config.lora_target_modules",
        ["attn_q"],
        "expected no modules",
    ),
    "speculation": (
        None,
        f"{B}.speculative_decoding_mode",
        2,
        "speculative_decoding_mode: expected 1",
    ),
    "drafts": (None, f"{B}.max_draft_len", 5, "max_draft_len: expected 0"),
    "version": (None, "version", "none", "version: expected a version"),
    "ranks": (
        None,
        f"{P}.mapping.tp_size",
        3,
        "num_attention_heads: expected a multiple of tp_size = 3",
    ),
    "context ranks": (None, f"{P}.mapping.cp_size", 2, "cp_size: expected 1, found 2"),
    "logits": (
        None,
        f"{P}.logits_dtype",
        "bfloat16",
        "logits_dtype: expected 'float32' or 'float16'",
    ),
    "layers without end": (None, f"{P}.num_hidden_layers", 1 << 40, "num_hidden_layers: expected"),
    "number too large": (
        None,
        f"{B}.max_num_tokens",
        1 << 31,
        "max_num_tokens: expected an integer in",
    ),
    "flag for a number": (None, f"{B}.max_batch_size", True, "max_batch_size: expected an integer"),
    "razor in a dense engine": (None, f"{P}.razor", {"version": 1}, "expected a dense engine"),
    # Against the plan.
    "other heads": (
        LocalCache.CYCLIC,
        f"{P}.num_kv_heads_per_layer",
        [3, 1, 4, 4, 2, 2],
        r"num_kv_heads_per_layer: expected \[1, 3, 4, 4, 2, 2\], found \[3, 1, 4, 4, 2, 2\]",
    ),
    "other windows": (
        LocalCache.CYCLIC,
        f"{P}.runtime_defaults.max_attention_window",
        [1000, 100],
        r"runtime_defaults: expected .*\[1000, 68\].* found .*\[1000, 100\]",
    ),
    "smaller slots": (
        LocalCache.SLOTS,
        f"{P}.rnn_conv_dim_size",
        52224,
        "rnn_conv_dim_size: expected 69632",
    ),
    "shorter": (
        LocalCache.CYCLIC,
        f"{B}.max_seq_len",
        999,
        "max_input_len|max_seq_len: expected 1000",
    ),
    "other blocks": (
        LocalCache.CYCLIC,
        f"{G}.tokens_per_block",
        64,
        "tokens_per_block: expected 32, found 64",
    ),
    "other dtype": (
        LocalCache.SLOTS,
        f"{P}.dtype",
        "bfloat16",
        "dtype: expected float16, found bfloat16",
    ),
    "other head size": (
        LocalCache.SLOTS,
        f"{P}.head_size",
        64,
        "head_size: expected 128, found 64",
    ),
    "fp8": (
        LocalCache.SLOTS,
        f"{P}.quantization.kv_cache_quant_algo",
        "FP8",
        "expected null, found FP8",
    ),
    "other section": (
        LocalCache.SLOTS,
        f"{P}.razor.num_retrieval",
        [1] * 4,
        r"razor\.num_retrieval: expected",
    ),
    "other policy": (
        LocalCache.CYCLIC,
        f"{P}.razor.policy.min_window",
        62,
        r"razor\.policy: expected",
    ),
    "other stages": (
        LocalCache.CYCLIC,
        f"{P}.mapping.pp_size",
        2,
        r"mapping\.pp_size: expected 1, found 2",
    ),
    "stages of slots": (
        LocalCache.SLOTS,
        f"{P}.mapping.pp_size",
        2,
        r"mapping\.pp_size: expected 1 with state slots, found 2",
    ),
    "ordered for other ranks": (
        LocalCache.CYCLIC,
        f"{P}.razor.tp_size",
        2,
        r"razor\.tp_size: expected 1, found 2",
    ),
    "no section": (
        LocalCache.CYCLIC,
        f"{P}.razor",
        ...,
        "razor: expected an object, found NoneType",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_named(case: str, tmp_path: Path) -> None:
    cache, path, value, message = CONTRADICTIONS[case]
    config, plan = engine(cache)
    if plan is not None:
        config = finish(written(tmp_path, config), plan)
    with pytest.raises(RazorError, match=message):
        check_engine_json(put(config, path, value), plan)


def test_other_ranks_than_planned_are_named(tmp_path: Path) -> None:
    config, plan = finished(tmp_path, LocalCache.CYCLIC, counts=(2,) * 4)
    with pytest.raises(RazorError, match=r"mapping\.tp_size: expected 1, found 2"):
        check_engine_json(put(config, f"{P}.mapping.tp_size", 2), plan)


def test_heads_that_ranks_cannot_share_are_named(tmp_path: Path) -> None:
    """The runtime would round up, and read past the heads that a rank has."""
    config, plan = finished(tmp_path, LocalCache.CYCLIC)
    with pytest.raises(
        RazorError, match=r"layer\[0\]: expected a positive multiple of tp_size = 2"
    ):
        check_engine_json(put(config, f"{P}.mapping.tp_size", 2), plan)


def test_no_quantisation_has_two_spellings(tmp_path: Path) -> None:
    config, plan = finished(tmp_path, LocalCache.CYCLIC)
    spelled = put(config, f"{P}.quantization.kv_cache_quant_algo", "NO_QUANT")
    check_engine_json(spelled, plan)
    assert plan_of(spelled, "tiny") == plan


def test_of_what_finish_sets_nothing_else_will_do(tmp_path: Path) -> None:
    for cache in LocalCache:
        config, plan = finished(tmp_path, cache)
        assert engine_json.first_difference(plan, config) is None
        for name in plan.pretrained_config({}):
            if name == "razor_architecture":
                continue
            field, expected, found = engine_json.first_difference(
                plan, put(config, f"{P}.{name}", ...)
            ) or ("", None, None)
            assert (field, found) == (f"{P}.{name}", "nothing")
            assert expected == config[P][name]


def test_a_config_of_no_known_shape_is_refused() -> None:
    for config in (
        {},
        {"version": "1.0.0", P: [], B: 3},
        {"version": "1.0.0", P: {"mapping": 1}, B: {}},
    ):
        with pytest.raises(RazorError):
            check_engine_json(config, None)


# The test's own runtime ------------------------------------------------------------------------------
def test_the_runtime_repeats_a_group_of_kinds(tmp_path: Path) -> None:
    config, _ = finished(tmp_path, LocalCache.SLOTS, counts=(1,) * 4)
    config[P]["layer_types"] = ["attention", "recurrent"]
    model = parse(json.dumps(config))
    assert model.layer_types == ("attention", "recurrent") * 4
    assert model.state_inputs()[-1] == ("conv_state_ptr_7", "rnn_state_ptr_7")
    config[P]["num_hidden_layers"] = 7  # the last group is not whole
    assert parse(json.dumps(config)).layer_types.count("attention") == 4
    config[P]["layer_types"] = ["attention", "recurrent", "no_op"]
    with pytest.raises(ParseError, match="4 counts, 3 attention layers"):
        parse(json.dumps(config))


def test_the_runtime_divides_heads_and_rounds_up(tmp_path: Path) -> None:
    config, _ = finished(tmp_path, LocalCache.CYCLIC)
    config[P]["mapping"]["tp_size"] = 2
    assert parse(json.dumps(config)).kv_heads == (1, 2, 2, 2, 1, 1)
    config[P]["num_kv_heads_per_layer"] = []
    config[P]["mapping"]["tp_size"] = 8
    assert parse(json.dumps(config)).kv_heads == (1,) * 6


def test_the_runtime_cannot_load_what_we_refuse(tmp_path: Path) -> None:
    config, _ = finished(tmp_path, LocalCache.SLOTS)
    for path, value, message in (
        (f"{G}.paged_state", False, "not paged"),
        (f"{G}.mamba_conv1d_plugin", None, "without mamba_conv1d_plugin"),
        (f"{B}.max_beam_width", 0, "with beams"),
        (f"{P}.mapping.pp_size", 2, "several pipeline stages"),
        (f"{G}.remove_input_padding", False, "no in-flight batching"),
    ):
        with pytest.raises(LoadError, match=message):
            parse(json.dumps(put(config, path, value))).check_in_flight()
    with pytest.raises(LoadError, match="below 1"):
        parse(json.dumps(config)).windows([0])


def test_comments_are_skipped_outside_strings() -> None:
    text = '{"a": "x // y", /* 1 */ "b": "\\"/*", // end\n "c": 2}'
    assert json.loads(without_comments(text)) == {"a": "x // y", "b": '"/*', "c": 2}
    with pytest.raises(ParseError, match="without an end"):
        without_comments("{} /* ")
