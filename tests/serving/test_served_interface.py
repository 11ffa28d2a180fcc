"""The models as the real server describes them to its clients, tensor by tensor beside the public ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trtllm_rig
from runtime_config import parse
from serving_server import MODELS, Server

TABLE = json.loads((Path(__file__).parent / "public_interface.json").read_text())["models"]
FRONTS = ("ensemble", "tensorrt_llm_bls")
FORMAT = {"prompt_format": ["TYPE_STRING", [1], "optional"]}
FACTS = {
    "finish_reason": ["TYPE_STRING", [1]],
    "kv_cache_used_bytes": ["TYPE_INT64", [1]],
    "kv_cache_dense_bytes": ["TYPE_INT64", [1]],
}
# What both flavours add, and what models around our own engines add.
ADDED: dict[tuple[str, str], dict[str, list[Any]]] = {
    ("preprocessing", "inputs"): {"PROMPT_FORMAT": FORMAT["prompt_format"]},
    **{(model, "inputs"): FORMAT for model in FRONTS},
}
ADDED_OWN: dict[tuple[str, str], dict[str, list[Any]]] = {
    ("tensorrt_llm", "outputs"): {"text_output": ["TYPE_STRING", [-1]], **FACTS},
    **{(model, "outputs"): FACTS for model in FRONTS},
}


@pytest.fixture(params=("own", "trtllm"))
def served(request: pytest.FixtureRequest, triton_python: Path) -> tuple[str, Server]:
    name = "shared_server" if request.param == "own" else "trtllm_server"
    return request.param, request.getfixturevalue(name)


@pytest.fixture
def logits(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Data type of the logits: the one type of a TensorRT-LLM engine that the server checks."""

    def of(flavour: str) -> str:
        if flavour == "own":
            return "TYPE_FP32"
        engines: trtllm_rig.Engines = request.getfixturevalue("trtllm_engines")
        found = parse((engines("cyclic") / "config.json").read_text()).logits_dtype
        return {"float32": "TYPE_FP32", "float16": "TYPE_FP16"}[found]

    return of


def table_of(server: Server, model: str) -> dict[str, dict[str, list[Any]]]:
    """Inputs and outputs as the server has them, in the form of public_interface.json."""
    import tritonclient.grpc as grpc
    from tritonclient.grpc import model_config_pb2

    with grpc.InferenceServerClient(server.grpc) as client:
        config = client.get_model_config(model).config
        metadata = client.get_model_metadata(model)
    table: dict[str, dict[str, list[Any]]] = {}
    for side, tensors in (("inputs", config.input), ("outputs", config.output)):
        table[side] = {}
        for t in tensors:
            flags = []
            if side == "inputs":
                flags = ["optional"] * t.optional + ["ragged"] * t.allow_ragged_batch
            if t.HasField("reshape"):
                assert list(t.reshape.shape) == []
                flags.append("reshape []")
            kind = model_config_pb2.DataType.Name(t.data_type)
            assert t.name not in table[side]
            table[side][t.name] = [kind, list(t.dims), *flags]
        # What clients ask for says the same, with the batch axis.
        told = {t.name: (t.datatype, list(t.shape)) for t in getattr(metadata, side)}
        assert told == {
            name: (_wire(kind), [-1, *dims]) for name, (kind, dims, *_) in table[side].items()
        }
    return table


def _wire(kind: str) -> str:
    kind = kind.removeprefix("TYPE_")
    return "BYTES" if kind == "STRING" else kind


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_is_the_public_one(
    model: str, served: tuple[str, Server], logits: Callable[[str], str]
) -> None:
    flavour, server = served
    filled = {
        "open: logits": logits(flavour),
        "open: prompt_table": "TYPE_FP16",
        "open: encoder_features": "TYPE_FP16",
    }
    found = table_of(server, model)
    for side in ("inputs", "outputs"):
        added = ADDED.get((model, side), {})
        if flavour == "own":
            added = added | ADDED_OWN.get((model, side), {})
        public = {
            n: [filled.get(kind, kind), *rest] for n, (kind, *rest) in TABLE[model][side].items()
        }
        assert not set(public) & set(added)
        assert found[side] == {**public, **added}


def test_parameters_batches_and_transactions(served: tuple[str, Server]) -> None:
    import tritonclient.grpc as grpc

    flavour, server = served
    with grpc.InferenceServerClient(server.grpc) as client:
        configs = {m: client.get_model_config(m).config for m in MODELS}
    for model, config in configs.items():
        assert set(TABLE[model].get("parameters", ())) <= set(config.parameters), model
        assert config.max_batch_size == configs["tensorrt_llm"].max_batch_size > 1
        assert not any("${" in p.string_value for p in config.parameters.values())
        # Triton makes an ensemble decoupled that has a decoupled step.
        streams = model in ("tensorrt_llm", *FRONTS)
        assert config.model_transaction_policy.decoupled == streams, model
    engine = configs["tensorrt_llm"]
    assert engine.backend == ("python" if flavour == "own" else "tensorrtllm")
    assert configs["ensemble"].platform == "ensemble"
    more = set(engine.parameters) - set(TABLE["tensorrt_llm"]["parameters"])
    assert bool(more) == (flavour == "own")
