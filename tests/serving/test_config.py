"""config.pbtxt as text: what protobuf reads out of it, its form, and what it refuses."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trt_razor.errors import UsageError
from trt_razor.serving.config import DynamicBatching, ModelConfig, Step, pairs
from trt_razor.serving.flavours import OwnSettings, TrtllmSettings, own_configs, trtllm_configs
from trt_razor.serving.interface import Tensor

text_format = pytest.importorskip("google.protobuf.text_format")
model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")

SMALL = ModelConfig(
    name="small",
    max_batch_size=4,
    inputs=(
        Tensor("ids", "INT32", (-1,), optional=True, ragged=True),
        Tensor("n", "UINT64", (1,), scalar=True),
    ),
    outputs=(Tensor("text", "STRING", (2, -1)),),
    backend="python",
    decoupled=True,
    dynamic_batching=DynamicBatching((2, 4), 100, 7),
    instances=3,
    parameters=pairs({"path": "/a b", "empty": ""}),
    comment="A head.\nTwo lines.",
)
SMALL_TEXT = """\
# A head.
# Two lines.
name: "small"
backend: "python"
max_batch_size: 4
model_transaction_policy { decoupled: true }
dynamic_batching {
  preferred_batch_size: [ 2, 4 ]
  max_queue_delay_microseconds: 100
  default_queue_policy { max_queue_size: 7 }
}
instance_group [ { count: 3 kind: KIND_CPU } ]

input [
  { name: "ids" data_type: TYPE_INT32 dims: [ -1 ] allow_ragged_batch: true optional: true },
  { name: "n" data_type: TYPE_UINT64 dims: [ 1 ] reshape { shape: [ ] } }
]

output [
  { name: "text" data_type: TYPE_STRING dims: [ 2, -1 ] }
]

parameters { key: "path" value { string_value: "/a b" } }
parameters { key: "empty" value { string_value: "" } }
"""


def parsed(config: ModelConfig) -> Any:
    return text_format.Parse(config.text(), model_config_pb2.ModelConfig())


def test_text_of_a_small_model() -> None:
    assert SMALL.text() == SMALL_TEXT


def test_protobuf_reads_what_the_dataclass_says() -> None:
    m = parsed(SMALL)
    assert (m.name, m.backend, m.platform, m.max_batch_size) == ("small", "python", "", 4)
    assert m.model_transaction_policy.decoupled
    assert list(m.dynamic_batching.preferred_batch_size) == [2, 4]
    assert m.dynamic_batching.max_queue_delay_microseconds == 100
    assert m.dynamic_batching.default_queue_policy.max_queue_size == 7
    assert [(g.count, g.kind) for g in m.instance_group] == [
        (3, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    ]
    assert [t.name for t in m.input] == ["ids", "n"]
    assert m.input[0].optional
    assert m.input[0].allow_ragged_batch
    assert not m.input[0].HasField("reshape")
    assert m.input[1].HasField("reshape")
    assert list(m.input[1].reshape.shape) == []
    assert list(m.output[0].dims) == [2, -1]
    assert {k: v.string_value for k, v in m.parameters.items()} == {"path": "/a b", "empty": ""}


def test_what_is_not_said_is_not_written() -> None:
    bare = ModelConfig("bare", 0, SMALL.inputs[1:], SMALL.outputs, backend="python")
    m = parsed(bare)
    for field in ("model_transaction_policy", "dynamic_batching", "ensemble_scheduling"):
        assert not m.HasField(field)
    assert not m.instance_group
    assert not m.parameters
    empty_block = dataclasses.replace(bare, max_batch_size=1, dynamic_batching=DynamicBatching())
    assert parsed(empty_block).HasField("dynamic_batching")
    sizes = dataclasses.replace(bare, max_batch_size=1, dynamic_batching=DynamicBatching((1,)))
    assert parsed(sizes).dynamic_batching.max_queue_delay_microseconds == 0


def test_text_of_an_ensemble() -> None:
    steps = (
        Step("a", (("IN", "x"),), (("OUT", "_y"),)),
        Step("b", (("IN", "_y"),), (("OUT", "z"),), version=3),
    )
    whole = ModelConfig(
        "whole",
        1,
        (Tensor("x", "FP32", (1,)),),
        (Tensor("z", "FP32", (1,)),),
        platform="ensemble",
        steps=steps,
    )
    m = parsed(whole)
    assert m.platform == "ensemble"
    assert [
        (s.model_name, s.model_version, dict(s.input_map), dict(s.output_map))
        for s in m.ensemble_scheduling.step
    ] == [("a", -1, {"IN": "x"}, {"OUT": "_y"}), ("b", 3, {"IN": "_y"}, {"OUT": "z"})]


NASTY = [
    'a "quoted" folder',
    "back\\slash\\n and \\\\ more\\",
    "it's",
    "Grüße/模型/🙂",
    "line\nend\r\ttab",
    "\x01\x1f\x7f\x85\u2028\u2029 controls",
    "\x0b\x0c\x1c\x1d\x1e line ends of Python",
    "\\x41 \\101 \\u0041",
    "# not a comment",
    "} ] { [",
    "$HOME {x} $ {",
    " spaces ",
]


@pytest.mark.parametrize("value", NASTY)
def test_strings_survive(value: str) -> None:
    config = dataclasses.replace(SMALL, parameters=((value, value),))
    assert {k: v.string_value for k, v in parsed(config).parameters.items()} == {value: value}
    # One line, for editors and for diff: no character of the value ends it.
    lines = config.text().splitlines()
    assert len(lines) == len(SMALL_TEXT.splitlines()) - 1
    assert lines[-1].startswith("parameters {")
    assert lines[-1].endswith("} }")


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0")))
def test_any_string_survives(value: str) -> None:
    config = dataclasses.replace(SMALL, parameters=(("key", value),))
    if "${" in value:
        with pytest.raises(UsageError, match="placeholder"):
            config.text()
    else:
        assert parsed(config).parameters["key"].string_value == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"parameters": (("path", "${engine_dir}"),)},
            "config of model 'small': parameter 'path': '${engine_dir}' has a placeholder that was "
            "not filled in",
        ),
        (
            {"parameters": (("path", "a\0b"),)},
            "config of model 'small': parameter 'path': 'a\\x00b' has a NUL character",
        ),
        (
            {"parameters": (("path", "a\udcff"),)},
            "config of model 'small': parameter 'path': 'a\\udcff' cannot be written as UTF-8; "
            "rename the file or folder",
        ),
        (
            {"parameters": (("slots", 4),)},
            "config of model 'small': parameter 'slots': expected a string, found 4",
        ),
        (
            {"name": "a b"},
            "config of model 'a b': expected a name of letters, digits, '_', '-' and '.'; found 'a b'",
        ),
        (
            {"name": 5},
            "config of model 5: expected a name of letters, digits, '_', '-' and '.'; found 5",
        ),
        (
            {"name": ".."},
            "config of model '..': expected a name of letters, digits, '_', '-' and '.'; found '..'",
        ),
        (
            {"name": "ä"},
            "config of model 'ä': expected a name of letters, digits, '_', '-' and '.'; found 'ä'",
        ),
        (
            {"backend": "py\n"},
            "config of model 'small': expected a name of letters, digits, '_', '-' and '.'; "
            "found 'py\\n'",
        ),
        (
            {"max_batch_size": -1},
            "config of model 'small': max_batch_size: expected a whole number from 0 to 2147483647, "
            "found -1",
        ),
        (
            {"max_batch_size": 4.0},
            "config of model 'small': max_batch_size: expected a whole number from 0 to 2147483647, "
            "found 4.0",
        ),
        (
            {"max_batch_size": True},
            "config of model 'small': max_batch_size: expected a whole number from 0 to 2147483647, "
            "found True",
        ),
        (
            {"instances": 2**31},
            "config of model 'small': instances: expected a whole number from 0 to 2147483647, "
            "found 2147483648",
        ),
        (
            {"decoupled": "true"},
            "config of model 'small': decoupled: expected true or false, found 'true'",
        ),
        (
            {"dynamic_batching": DynamicBatching((2, "4"))},  # type: ignore[arg-type]
            "config of model 'small': preferred_batch_size: expected a whole number from 0 to "
            "2147483647, found '4'",
        ),
        (
            {"dynamic_batching": DynamicBatching(max_queue_size=-1)},
            "config of model 'small': max_queue_size: expected a whole number from 0 to 2147483647, "
            "found -1",
        ),
        (
            {"inputs": (Tensor("x", "TYPE_INT32", (1,)),)},
            "config of model 'small': tensor 'x': expected a data type of BOOL, UINT8, UINT16, "
            "UINT32, UINT64, INT8, INT16, INT32, INT64, FP16, FP32, FP64, STRING, BF16; found "
            "'TYPE_INT32'",
        ),
        (
            {"inputs": (Tensor("x", "INT32", (-2,)),)},
            "config of model 'small': dims of tensor 'x': expected a whole number from -1 to "
            "9223372036854775807, found -2",
        ),
        (
            {"steps": (Step("a", (("IN", "x y"),), ()),)},
            "config of model 'small': expected a name of letters, digits, '_', '-' and '.'; "
            "found 'x y'",
        ),
    ],
)
def test_what_a_file_cannot_have(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as e:
        dataclasses.replace(SMALL, **change).text()
    assert str(e.value) == message


def both_flavours() -> list[ModelConfig]:
    own = OwnSettings('1/engine "x"', max_batch_size=3, slots=5)
    trtllm = TrtllmSettings("/engines/模型\\", max_batch_size=3, max_queue_size=9)
    return own_configs(own) + trtllm_configs(trtllm)


def test_generated_files_parse_and_have_no_placeholder() -> None:
    for config in both_flavours():
        text = config.text()
        assert "${" not in text
        assert text == text.encode().decode("utf-8")
        assert text.isprintable() is False  # it has line ends, and nothing else of that kind:
        assert text.replace("\n", "").isprintable()
        assert max(len(line) for line in text.splitlines()) < 140
        assert parsed(config).max_batch_size == 3


def test_the_same_settings_give_the_same_bytes() -> None:
    assert [c.text() for c in both_flavours()] == [c.text() for c in both_flavours()]


def test_settings_reach_the_files() -> None:
    settings = TrtllmSettings(
        "/engine",
        tokenizer_dir="/tokenizer",
        max_batch_size=6,
        max_queue_size=9,
        decoupled=False,
        prompt_format="chat",
        add_special_tokens=False,
        skip_special_tokens=False,
        exclude_input_in_output=False,
        accumulate_tokens=True,
        preprocessing_instances=2,
        postprocessing_instances=3,
        bls_instances=4,
        parameters={
            "max_attention_window_size": [128, 4096],
            "kv_cache_free_gpu_mem_fraction": 0.25,
            "enable_chunked_context": True,
            "max_tokens_in_paged_kv_cache": 8192,
            "sink_token_length": None,
        },
    )
    models = {c.name: c for c in trtllm_configs(settings)}
    engine = dict(models["tensorrt_llm"].parameters)
    assert engine["gpt_model_path"] == "/engine"
    assert engine["max_attention_window_size"] == "128,4096"
    assert engine["kv_cache_free_gpu_mem_fraction"] == "0.25"
    assert engine["enable_chunked_context"] == "true"
    assert engine["max_tokens_in_paged_kv_cache"] == "8192"
    assert engine["sink_token_length"] == ""
    assert engine["exclude_input_in_output"] == "false"
    bls_default = dict(models["tensorrt_llm_bls"].parameters)["exclude_input_in_output"]
    assert bls_default == "false"
    before = dict(models["preprocessing"].parameters)
    assert (before["tokenizer_dir"], before["prompt_format"]) == ("/tokenizer", "chat")
    assert before["add_special_tokens"] == "false"
    after = dict(models["postprocessing"].parameters)
    assert after["skip_special_tokens"] == "false"
    bls = dict(models["tensorrt_llm_bls"].parameters)
    assert (bls["accumulate_tokens"], bls["text_from_engine"]) == ("true", "false")
    assert (bls["tokenizer_dir"], bls["skip_special_tokens"]) == ("/tokenizer", "false")
    counts = {m: c.instances for m, c in models.items()}
    assert list(counts.values()) == [2, 1, 3, 0, 4]
    assert (models["tensorrt_llm"].decoupled, models["tensorrt_llm_bls"].decoupled) == (
        False,
        False,
    )
    assert models["tensorrt_llm"].dynamic_batching == DynamicBatching((6,), 0, 9)
    assert models["preprocessing"].dynamic_batching == DynamicBatching((6,), 0, 9)


def test_the_bls_model_echoes_the_prompt_as_the_engine_does() -> None:
    """Also where the engine's parameter is given by itself."""
    settings = TrtllmSettings("/engine", parameters={"exclude_input_in_output": False})
    models = {c.name: dict(c.parameters) for c in trtllm_configs(settings)}
    assert models["tensorrt_llm"]["exclude_input_in_output"] == "false"
    assert models["tensorrt_llm_bls"]["exclude_input_in_output"] == "false"


def test_settings_of_our_own_engines_reach_the_file() -> None:
    settings = OwnSettings(
        "1/engine", slots=5, max_queue_size=9, max_input_tokens=7, max_output_tokens=8, verify=False
    )
    models = {c.name: c for c in own_configs(settings)}
    found = dict(models["tensorrt_llm"].parameters)
    ours = (
        "gpt_model_path",
        "slots",
        "max_queue_size",
        "max_input_tokens",
        "max_output_tokens",
        "verify",
    )
    assert [found[k] for k in ours] == ["1/engine", "5", "9", "7", "8", "false"]
    # Its own queue has the limit: the server hands everything over at once.
    assert models["tensorrt_llm"].dynamic_batching == DynamicBatching((8,), 0, 0)
    bls = dict(models["tensorrt_llm_bls"].parameters)
    assert (bls["text_from_engine"], bls["tokenizer_dir"]) == (
        "true",
        "../preprocessing/1/tokenizer",
    )
    limits = dict(own_configs(OwnSettings("/e"))[1].parameters)
    assert (limits["slots"], limits["max_input_tokens"], limits["max_output_tokens"]) == (
        "",
        "",
        "",
    )


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("max_batch_size", 0, 1),
        ("max_batch_size", "8", 1),
        ("preprocessing_instances", 0, 1),
        ("postprocessing_instances", True, 1),
        ("bls_instances", 1.5, 1),
        ("max_queue_size", -1, 0),
    ],
)
def test_wrong_settings(name: str, value: Any, least: int) -> None:
    with pytest.raises(UsageError) as e:
        TrtllmSettings("/engine", **{name: value})
    expected = f"{name}: expected a whole number of at least {least}, found {value!r}"
    assert str(e.value) == expected


def test_one_tensor_a_line() -> None:
    config = next(c for c in both_flavours() if c.name == "tensorrt_llm")
    lines = [line for line in config.text().splitlines() if "data_type:" in line]
    assert len(lines) == len(config.inputs) + len(config.outputs)
    assert all(re.fullmatch(r"  \{ name: .* \},?", line) for line in lines)
