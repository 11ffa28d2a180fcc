"""The stand-in itself: what it understands and refuses, so that loading there means something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trtllm_rig
from standin_engine import read_engine
from standin_parameters import DEFAULTS, Refused, read, understood
from standin_requests import BadRequest, read_request, sparse_list
from standin_tokens import reply


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("int", "4096abc", 4096),
        ("int", "", None),
        ("int", "${x}", None),
        ("float", "0.5x", 0.5),
        ("bool", "True", True),
        ("bool", "0", False),
        ("bool", "yes", None),
        ("ints", "1,2,3", [1, 2, 3]),
        ("ints", "1,x", None),
        ("groups", "0,1;2,3", [[0, 1], [2, 3]]),
        ("string", "${x}", "${x}"),
    ],
)
def test_values_are_understood_as_by_the_stock_backend(kind: str, text: str, value: Any) -> None:
    assert understood(text, kind) == value


def parameters(folder: Path, **changes: str | None) -> dict[str, Any]:
    values: dict[str, str | None] = {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": str(folder),
        "tokenizer_dir": "",
        "guided_decoding_backend": "",
        "xgrammar_tokenizer_info_path": "",
        **changes,
    }
    return {k: {"string_value": v} for k, v in values.items() if v is not None}


def test_defaults(tmp_path: Path) -> None:
    found = read(parameters(tmp_path))
    assert found == {
        **DEFAULTS,
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": str(tmp_path),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sink_token_length": "${sink_token_length}"}, "a placeholder was left"),
        ({"sink_token_length": "4 tokens"}, "not plain numbers"),
        ({"sink_token_length": "four"}, "ignored by the stock backend"),
        ({"max_attention_window_size": "64, 20"}, "not plain numbers"),
        ({"enable_kv_cache_reuse": "no"}, "ignored by the stock backend"),
        ({"max_attention_window": "64"}, "no parameter of this backend"),
        ({"tokenizer_dir": None}, "the key must exist"),
        ({"gpt_model_type": None}, "Invalid gpt_model_type"),
        ({"gpt_model_path": "/no/such/folder"}, "gpt_model_path: expected"),
        ({"batch_scheduler_policy": "fair"}, "replaced by the default"),
        ({"kv_cache_free_gpu_mem_fraction": "1.5"}, "expected 0 .. 1"),
    ],
)
def test_what_no_repository_of_ours_may_say(
    changes: dict[str, str | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=message):
        read(parameters(tmp_path, **changes))


WINDOWS = [2048, 420, 2048, 420, 420]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("cyclic", {}, ""),
        ("cyclic", {"max_attention_window_size": [2048]}, "max_attention_window_size: the engine"),
        ("cyclic", {"max_attention_window_size": WINDOWS[:2]}, "max_attention_window_size"),
        ("cyclic", {"sink_token_length": 8}, "sink_token_length: the engine has 4"),
        ("cyclic", {"enable_kv_cache_reuse": True}, "enable_kv_cache_reuse: not with this engine"),
        ("cyclic", {"enable_chunked_context": True}, "reads prompts in one go"),
        ("cyclic", {"gpt_model_path": "/no/engine"}, "config.json: no such file"),
        ("slots", {"max_attention_window_size": [2048]}, ""),
        (
            "slots",
            {"max_attention_window_size": [2048], "sink_token_length": 4},
            "the engine has None",
        ),
        ("two-ranks", {}, "needs 2 ranks, MPI started 1"),
    ],
)
def test_settings_must_be_those_of_the_engine(
    kind: str, changes: dict[str, Any], message: str, trtllm_engines: trtllm_rig.Engines
) -> None:
    engine, preload = trtllm_engines(kind), str(trtllm_engines.preload(kind))
    settings = {**DEFAULTS, "gpt_model_path": str(engine), "enable_kv_cache_reuse": False}
    if kind == "cyclic":
        settings |= {"max_attention_window_size": WINDOWS, "sink_token_length": 4}
    settings |= changes
    if not message:
        found = read_engine(settings, 0, 1, preload)
        assert found.sinks == (4 if kind == "cyclic" else 0)
        with pytest.raises(Refused, match="RazorGptAttention is not registered"):
            read_engine(settings, 0, 1, "")
        with pytest.raises(Refused, match=r"no rank1\.engine"):
            read_engine(settings, 1, 1, preload)
        return
    with pytest.raises(Refused, match=message):
        read_engine(settings, 0, 1, preload)


def test_word_lists() -> None:
    words = np.array([[5, 6, 7, 0], [2, 3, -1, -1]], np.int32)
    assert sparse_list(words) == ((5, 6), (7,))
    assert sparse_list(np.zeros((2, 0), np.int32)) == ()
    for ends, message in (([2, 9], "beyond"), ([2, 1], "rise"), ([-1, 2], "-1 in")):
        with pytest.raises(BadRequest, match=message):
            sparse_list(np.array([[1, 2], ends], np.int32))


def test_replies() -> None:
    prompt = [1, 2, 9, 3]
    assert list(reply(prompt, 6)) == [1, 2, 9, 3, 1, 2]
    assert list(reply(prompt, 6, end_id=9)) == [1, 2]
    assert list(reply(prompt, 6, end_id=9, min_tokens=4)) == [1, 2, 3, 1, 2]
    assert list(reply(prompt, 6, stop=[(2, 9)])) == [1, 2, 9]
    assert list(reply(prompt, 6, bad=[(9, 3)])) == [1, 2, 9, 1, 2, 9]
    assert list(reply([1], 6, bad=[(1,)])) == []


def test_rows_and_limits() -> None:
    tensors = {
        "input_ids": np.array([[1, 2, 3], [4, 0, 0]], np.int32),
        "input_lengths": np.array([3, 1], np.int32),
        "request_output_len": np.array([50, 2], np.int32),
    }
    first, second = read_request(tensors, True, False, 9, 10, 100)
    assert (first.prompt, first.max_tokens) == ((1, 2, 3), 7)
    assert (second.prompt, second.max_tokens) == ((4,), 2)
    with pytest.raises(BadRequest, match="decoupled"):
        read_request(tensors, False, False, 9, 10, 100)
    # One row is the whole prompt, whatever input_lengths says.
    one = {name: value[:1] for name, value in tensors.items()} | {"input_lengths": np.array([1])}
    assert read_request(one, False, False, 9, 10, 100)[0].prompt == (1, 2, 3)
