"""Every parameter has a type; wrong values are refused by name, before a file is written."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from trt_razor.errors import UsageError
from trt_razor.serving.flavours import OwnSettings, TrtllmSettings, own_configs, trtllm_configs
from trt_razor.serving.parameters import PARAMETERS, fill, problems

STOCK = TrtllmSettings("/engine")
OWN = OwnSettings("1/engine")


def stock(name: str, value: Any) -> str:
    """The value as the file has it."""
    configs = trtllm_configs(dataclasses.replace(STOCK, parameters={name: value}))
    return dict(configs[1].parameters)[name]


INT = "expected a whole number from {} to 2147483647, or nothing, found {!r}"
BOOL = "expected true or false, or nothing, found {!r}"
LEFT_OPEN = "expected a value, found the placeholder '${}'"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        # The backend reads these two as 4096 and as "not set".
        ("max_tokens_in_paged_kv_cache", "4096abc", INT.format(1, "4096abc")),
        ("max_tokens_in_paged_kv_cache", "abc", INT.format(1, "abc")),
        ("max_tokens_in_paged_kv_cache", 0, INT.format(1, "0")),
        ("max_tokens_in_paged_kv_cache", -1, INT.format(1, "-1")),
        ("max_tokens_in_paged_kv_cache", 4096.0, INT.format(1, "4096.0")),
        ("max_tokens_in_paged_kv_cache", True, INT.format(1, "true")),
        ("max_tokens_in_paged_kv_cache", "2147483648", INT.format(1, "2147483648")),
        ("max_tokens_in_paged_kv_cache", "9" * 21, INT.format(1, "9" * 21)),
        ("max_tokens_in_paged_kv_cache", "08", INT.format(1, "08")),
        ("max_tokens_in_paged_kv_cache", " 8", INT.format(1, " 8")),
        ("max_tokens_in_paged_kv_cache", "8\n", INT.format(1, "8\n")),
        ("max_tokens_in_paged_kv_cache", "٨", INT.format(1, "٨")),
        ("max_tokens_in_paged_kv_cache", "${x}", LEFT_OPEN.format("{x}")),
        ("sink_token_length", "-1", INT.format(0, "-1")),
        (
            "max_attention_window_size",
            "128,,4096",
            "expected whole numbers from 1 to 2147483647 with ',' between them, or nothing, "
            "found '128,,4096'",
        ),
        (
            "max_attention_window_size",
            [128, 0],
            "expected whole numbers from 1 to 2147483647 with ',' between them, or nothing, "
            "found '128,0'",
        ),
        (
            "max_attention_window_size",
            "128;4096",
            "expected whole numbers from 1 to 2147483647 with ',' between them, or nothing, "
            "found '128;4096'",
        ),
        (
            "kv_cache_free_gpu_mem_fraction",
            1.0,
            "expected a number between 0 and 1, or nothing, found '1.0'",
        ),
        (
            "kv_cache_free_gpu_mem_fraction",
            90,
            "expected a number between 0 and 1, or nothing, found '90'",
        ),
        (
            "kv_cache_free_gpu_mem_fraction",
            "0.0",
            "expected a number between 0 and 1, or nothing, found '0.0'",
        ),
        (
            "kv_cache_free_gpu_mem_fraction",
            float("nan"),
            "expected a number between 0 and 1, or nothing, found 'nan'",
        ),
        (
            "kv_cache_free_gpu_mem_fraction",
            "0,9",
            "expected a number between 0 and 1, or nothing, found '0,9'",
        ),
        (
            "gpu_weights_percent",
            "1.5",
            "expected a number from 0 to 1, or nothing, found '1.5'",
        ),
        (
            "kv_cache_host_memory_bytes",
            "1GB",
            "expected a number of bytes, or nothing, found '1GB'",
        ),
        (
            "kv_cache_host_memory_bytes",
            2**63,
            f"expected a number of bytes, or nothing, found '{2**63}'",
        ),
        ("enable_chunked_context", "yes", BOOL.format("yes")),
        ("multi_block_mode", "True", BOOL.format("True")),
        ("exclude_input_in_output", "", "expected true or false, found nothing"),
        (
            "gpt_model_type",
            "inflight",
            "expected inflight_fused_batching or inflight_batching or V1 or v1, found 'inflight'",
        ),
        (
            "gpt_model_type",
            "",
            "expected inflight_fused_batching or inflight_batching or V1 or v1, found nothing",
        ),
        (
            "batch_scheduler_policy",
            "max_utilisation",
            "expected guaranteed_no_evict or max_utilization, found 'max_utilisation'",
        ),
        (
            "guided_decoding_backend",
            "outlines",
            "expected xgrammar, or nothing, found 'outlines'",
        ),
        ("gpt_model_path", "", "expected an absolute path of a folder, found nothing"),
        (
            "gpt_model_path",
            "engine",
            "expected an absolute path of a folder, found 'engine'",
        ),
        (
            "gpt_model_path",
            "/a\nb",
            "expected an absolute path of a folder, found '/a\\nb'",
        ),
        (
            "xgrammar_tokenizer_info_path",
            "info.json",
            "expected an absolute path of a file, or nothing, found 'info.json'",
        ),
        ("executor_worker_path", "", "expected a path, found nothing"),
        ("executor_worker_path", "  ", "expected a path, found '  '"),
        (
            "gpu_device_ids",
            "0,a;1",
            "expected lists of whole numbers: ',' inside a list, ';' between lists, or nothing, "
            "found '0,a;1'",
        ),
        (
            "participant_ids",
            "1,2147483648",
            "expected lists of whole numbers: ',' inside a list, ';' between lists, or nothing, "
            "found '1,2147483648'",
        ),
        (
            "medusa_choices",
            "{0}, 1}",
            "expected lists of whole numbers in braces, such as {0, 0}, {0, 1}, or nothing, "
            "found '{0}, 1}'",
        ),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: Any, reason: str) -> None:
    with pytest.raises(UsageError) as e:
        stock(name, value)
    assert str(e.value) == f"model 'tensorrt_llm': parameter {name!r}: {reason}"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("max_tokens_in_paged_kv_cache", 2**31 - 1, "2147483647"),
        ("max_tokens_in_paged_kv_cache", "", ""),
        ("sink_token_length", 0, "0"),
        ("max_attention_window_size", (4096,), "4096"),
        ("kv_cache_free_gpu_mem_fraction", 0.999, "0.999"),
        ("kv_cache_free_gpu_mem_fraction", ".5", ".5"),
        ("kv_cache_free_gpu_mem_fraction", 1e-05, "1e-05"),
        ("gpu_weights_percent", 1, "1"),
        ("gpu_weights_percent", 0.0, "0.0"),
        ("kv_cache_host_memory_bytes", 2**63 - 1, str(2**63 - 1)),
        ("multi_block_mode", False, "false"),
        ("decoding_mode", "", ""),
        ("gpu_device_ids", "0,1;2,3", "0,1;2,3"),
        ("gpu_device_ids", [0, 1], "0,1"),
        ("medusa_choices", "{0, 0}, {0, 1},{2}", "{0, 0}, {0, 1},{2}"),
        ("gpt_model_path", '/mit "Leerzeichen" ü\\', '/mit "Leerzeichen" ü\\'),
    ],
)
def test_good_values(name: str, value: Any, text: str) -> None:
    assert stock(name, value) == text


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"max_attention_windows": 4},
            "model 'tensorrt_llm': unknown parameter 'max_attention_windows'; did you mean "
            "max_attention_window_size or max_beam_width?",
        ),
        (
            {"enable_trt_overlap": "true"},
            "model 'tensorrt_llm': unknown parameter 'enable_trt_overlap'; ",
        ),
        (
            {"EXECUTION_ENV_PATH": "/env"},
            "model 'tensorrt_llm': unknown parameter 'EXECUTION_ENV_PATH'; ",
        ),
        (
            {"decoding_mode": "lookahead", "lookahead_window_size": 3, "lookahead_ngram_size": 3},
            "model 'tensorrt_llm': parameter 'lookahead_verification_set_size': expected a value, as "
            "decoding_mode is lookahead; found nothing",
        ),
        (
            {"guided_decoding_backend": "xgrammar"},
            "model 'tensorrt_llm': parameter 'xgrammar_tokenizer_info_path': expected a value, as "
            "guided_decoding_backend is xgrammar; found nothing",
        ),
    ],
)
def test_wrong_parameters_of_the_stock_backend(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as e:
        trtllm_configs(dataclasses.replace(STOCK, parameters=parameters))
    assert str(e.value).startswith(message)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        (
            {"sink_token_length": 4},
            "parameter 'sink_token_length' does not apply here; leave it empty",
        ),
        (
            {"enable_kv_cache_reuse": True},
            "parameter 'enable_kv_cache_reuse': expected false, found 'true'",
        ),
        ({"max_beam_width": 2}, "parameter 'max_beam_width': expected 1, found '2'"),
        (
            {"gpt_model_path": ""},
            "parameter 'gpt_model_path': expected a path of a folder, found nothing",
        ),
        (
            {"slots": 0},
            "parameter 'slots': expected a whole number from 1 to 2147483647, or nothing, found '0'",
        ),
        (
            {"max_queue_size": ""},
            "parameter 'max_queue_size': expected a whole number from 0 to 2147483647, found nothing",
        ),
        ({"verify": "no"}, "parameter 'verify': expected true or false, found 'no'"),
    ],
)
def test_wrong_parameters_of_our_own_engines(parameters: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError) as e:
        own_configs(dataclasses.replace(OWN, parameters=parameters))
    assert str(e.value) == f"model 'tensorrt_llm': {reason}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompt_format": "jinja"},
            "model 'preprocessing': parameter 'prompt_format': expected raw or chat or messages, "
            "found 'jinja'",
        ),
        (
            {"tokenizer_dir": ""},
            "model 'preprocessing': parameter 'tokenizer_dir': expected a path of a folder, found nothing",
        ),
        (
            {"add_special_tokens": "maybe"},
            "model 'preprocessing': parameter 'add_special_tokens': expected true or false, "
            "found 'maybe'",
        ),
    ],
)
def test_wrong_settings_of_the_python_models(settings: dict[str, Any], message: str) -> None:
    for base, configs in ((STOCK, trtllm_configs), (OWN, own_configs)):
        with pytest.raises(UsageError) as e:
            configs(dataclasses.replace(base, **settings))  # type: ignore[operator, type-var]
        assert str(e.value) == message


def test_public_parameters_that_do_not_apply_to_our_own_engines() -> None:
    """Which of the 45 are empty there; every other one says what the engine really does."""
    filled = dict(own_configs(OWN)[1].parameters)
    named = {k: v for k, v in filled.items() if v and k in PARAMETERS[False]["tensorrt_llm"]}
    assert named == {
        "max_beam_width": "1",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "yes",
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": "1/engine",
        "batch_scheduler_policy": "guaranteed_no_evict",
        "exclude_input_in_output": "true",
        "cancellation_check_period_ms": "100",
        "enable_kv_cache_reuse": "false",
        "enable_chunked_context": "true",
        "num_nodes": "1",
        "decoding_mode": "top_k_top_p",
    }


def test_a_number_of_any_length_is_a_problem_and_no_crash() -> None:
    values = fill("tensorrt_llm", True, {"gpt_model_path": "1/engine"})
    for digits in ("9" * 5000, "9" * 21, "4" * 11):
        found = list(problems("tensorrt_llm", True, {**values, "slots": digits}))
        assert found == [
            "parameter 'slots': expected a whole number from 1 to 2147483647, or nothing, "
            f"found {digits!r:.80}"
        ]


def test_missing_parameters_are_problems() -> None:
    values = fill("postprocessing", True, {"tokenizer_dir": "1/tokenizer"})
    assert list(problems("postprocessing", True, values)) == []
    del values["skip_special_tokens"]
    assert list(problems("postprocessing", True, values)) == [
        "parameter 'skip_special_tokens' is missing"
    ]
    assert list(problems("ensemble", True, {"x": "y"})) == [
        "unknown parameter 'x'; this model has none"
    ]
