"""Our generated files against the public templates: tensor by tensor, parameter by parameter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trt_razor.errors import UsageError
from trt_razor.serving.flavours import OwnSettings, TrtllmSettings, own_configs, trtllm_configs
from trt_razor.serving.interface import EXTRA, PUBLIC, DataTypes, Tensor, public_and_extra

text_format = pytest.importorskip("google.protobuf.text_format")
model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")

TEMPLATES = json.loads((Path(__file__).parent / "public_interface.json").read_text())["models"]
OPEN = {
    "open: logits": "TYPE_FP32",
    "open: prompt_table": "TYPE_FP16",
    "open: encoder_features": "TYPE_FP16",
}
FORMAT = ["TYPE_STRING", [1], "optional"]
FACTS: dict[str, list[Any]] = {
    "finish_reason": ["TYPE_STRING", [1]],
    "kv_cache_used_bytes": ["TYPE_INT64", [1]],
    "kv_cache_dense_bytes": ["TYPE_INT64", [1]],
}
# All that we add to the public interface, by flavour, model and kind.
ADDED: dict[str, dict[tuple[str, str], dict[str, list[Any]]]] = {
    "trtllm": {
        ("preprocessing", "inputs"): {"PROMPT_FORMAT": FORMAT},
        ("ensemble", "inputs"): {"prompt_format": FORMAT},
        ("tensorrt_llm_bls", "inputs"): {"prompt_format": FORMAT},
    }
}
ADDED["own"] = {
    **ADDED["trtllm"],
    ("tensorrt_llm", "outputs"): {"text_output": ["TYPE_STRING", [-1]], **FACTS},
    ("ensemble", "outputs"): FACTS,
    ("tensorrt_llm_bls", "outputs"): FACTS,
}
PREPROCESSING_PARAMETERS = {"prompt_format", "vocab_size", "max_input_tokens"}
BLS_PARAMETERS = {
    "text_from_engine",
    "exclude_input_in_output",
    "tokenizer_dir",
    "skip_special_tokens",
}
ADDED_PARAMETERS: dict[str, dict[str, set[str]]] = {
    "trtllm": {"preprocessing": PREPROCESSING_PARAMETERS, "tensorrt_llm_bls": BLS_PARAMETERS},
    "own": {
        "preprocessing": PREPROCESSING_PARAMETERS,
        "tensorrt_llm_bls": BLS_PARAMETERS,
        "tensorrt_llm": {
            "slots",
            "max_queue_size",
            "max_input_tokens",
            "max_output_tokens",
            "verify",
        },
    },
}


def generated(flavour: str, types: DataTypes | None = None) -> dict[str, Any]:
    """The five files as protobuf reads them."""
    settings = {"data_types": types or DataTypes()}
    if flavour == "own":
        configs = own_configs(OwnSettings("1/engine", **settings))
    else:
        configs = trtllm_configs(TrtllmSettings("/engine", **settings))
    return {c.name: text_format.Parse(c.text(), model_config_pb2.ModelConfig()) for c in configs}


@pytest.fixture(scope="module", params=["trtllm", "own"])
def flavour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def models(flavour: str) -> dict[str, Any]:
    return generated(flavour)


def tensors(messages: Any) -> dict[str, list[Any]]:
    """{name: [data type, dims, flags …]} of parsed inputs or outputs, each there once."""
    found = {}
    for t in messages:
        data_type = model_config_pb2.DataType.Name(t.data_type)
        row = [data_type, list(t.dims)]
        if getattr(t, "optional", False):
            row.append("optional")
        if t.HasField("reshape"):
            row.append(f"reshape {list(t.reshape.shape)}")
        if getattr(t, "allow_ragged_batch", False):
            row.append("ragged")
        found[t.name] = row
    assert len(found) == len(messages)
    return found


def filled(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: [OPEN.get(row[0], row[0]), *row[1:]] for name, row in rows.items()}


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
@pytest.mark.parametrize("model", TEMPLATES)
def test_every_public_tensor_is_there_unchanged_and_no_other(
    model: str, kind: str, flavour: str, models: dict[str, Any]
) -> None:
    expected = filled(TEMPLATES[model][kind]) | ADDED[flavour].get((model, kind), {})
    message = models[model]
    assert tensors(message.input if kind == "inputs" else message.output) == expected


def test_counts_of_the_public_templates() -> None:
    """Guards the file that the tests above compare with."""
    counts = {m: (len(t["inputs"]), len(t["outputs"])) for m, t in TEMPLATES.items()}
    assert counts == {
        "preprocessing": (14, 20),
        "tensorrt_llm": (62, 21),
        "postprocessing": (2, 1),
        "ensemble": (36, 19),
        "tensorrt_llm_bls": (43, 19),
    }
    assert len(TEMPLATES["tensorrt_llm"]["parameters"]) == 45


@pytest.mark.parametrize("model", TEMPLATES)
def test_every_public_parameter_is_there(model: str, flavour: str, models: dict[str, Any]) -> None:
    added = ADDED_PARAMETERS[flavour].get(model, set())
    assert set(models[model].parameters) == set(TEMPLATES[model]["parameters"]) | added


def steps(message: Any) -> list[Any]:
    return [
        [s.model_name, s.model_version, dict(s.input_map), dict(s.output_map)]
        for s in message.ensemble_scheduling.step
    ]


def test_wiring_of_the_ensemble(flavour: str, models: dict[str, Any]) -> None:
    expected = [
        [s["model"], s["version"], dict(s["input_map"]), dict(s["output_map"])]
        for s in TEMPLATES["ensemble"]["steps"]
    ]
    expected[0][2]["PROMPT_FORMAT"] = "prompt_format"
    if flavour == "own":
        # The engine has the text, so its ids do not go through postprocessing.
        del expected[2]
        made = expected[1][3]
        assert made.pop("output_ids") == "_TOKENS_BATCH"
        assert made.pop("sequence_length") == "_SEQUENCE_LENGTH"
        made["text_output"] = "text_output"
        made.update((name, name) for name in FACTS)
    assert steps(models["ensemble"]) == expected
    assert [len(steps(models[m])) for m in TEMPLATES if m != "ensemble"] == [0, 0, 0, 0]


def test_kinds_of_the_models(flavour: str, models: dict[str, Any]) -> None:
    engine = "python" if flavour == "own" else "tensorrtllm"
    assert {m: (c.backend, c.platform) for m, c in models.items()} == {
        "preprocessing": ("python", ""),
        "tensorrt_llm": (engine, ""),
        "postprocessing": ("python", ""),
        "ensemble": ("", "ensemble"),
        "tensorrt_llm_bls": ("python", ""),
    }
    decoupled = {m for m, c in models.items() if c.model_transaction_policy.decoupled}
    assert decoupled == {"tensorrt_llm", "tensorrt_llm_bls"}
    queued = {m for m, c in models.items() if c.HasField("dynamic_batching")}
    assert queued == {"preprocessing", "tensorrt_llm", "postprocessing"}
    for model, c in models.items():
        groups = [
            (g.count, model_config_pb2.ModelInstanceGroup.Kind.Name(g.kind))
            for g in c.instance_group
        ]
        # One of tensorrt_llm_bls answers one request at a time.
        count = 4 if model == "tensorrt_llm_bls" else 1
        assert groups == ([] if model == "ensemble" else [(count, "KIND_CPU")])
        assert c.max_batch_size == 8


def test_open_data_types_are_settings(flavour: str) -> None:
    models = generated(flavour, DataTypes("FP16", "BF16", "FP32"))
    given = {
        "open: logits": "TYPE_FP16",
        "open: prompt_table": "TYPE_BF16",
        "open: encoder_features": "TYPE_FP32",
    }
    seen = set()
    for model, template in TEMPLATES.items():
        message = models[model]
        for kind, messages in (("inputs", message.input), ("outputs", message.output)):
            found = tensors(messages)
            for name, row in template[kind].items():
                if row[0] in given:
                    seen.add(row[0])
                    assert found[name][0] == given[row[0]]
                elif (model, name) == ("ensemble", "prompt_embedding_table"):
                    assert found[name][0] == "TYPE_BF16"  # or it would not fit to tensorrt_llm
                else:
                    assert found[name][0] == row[0]
    assert seen == set(given)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"logits": "BF16"}, "data type of logits: expected FP32 or FP16, found 'BF16'"),
        (
            {"prompt_table": "TYPE_FP16"},
            "data type of prompt_table: expected FP16 or BF16 or FP32, found 'TYPE_FP16'",
        ),
        (
            {"encoder_features": ""},
            "data type of encoder_features: expected FP16 or BF16 or FP32, found ''",
        ),
    ],
)
def test_wrong_open_data_types(types: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as e:
        DataTypes(**types)
    assert str(e.value) == message


def test_look_up_of_a_tensor() -> None:
    engine = PUBLIC["tensorrt_llm"]
    assert engine.input("seed") == Tensor("seed", "UINT64", (1,), optional=True, scalar=True)
    assert engine.output("output_ids") == Tensor("output_ids", "INT32", (-1, -1))
    assert engine.input("stop_words_list").dims == (2, -1)
    with pytest.raises(KeyError):
        engine.input("random_seed")  # its name before 1.0
    assert EXTRA["preprocessing"].input("PROMPT_FORMAT").optional
    assert public_and_extra("tensorrt_llm", own=False).output("context_logits").data_type == "FP32"
