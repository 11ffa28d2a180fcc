"""Repositories of TensorRT-LLM engines in the real server, with a stand-in for the stock backend.

The stand-in answers with the prompt over and over (standin_tokens.reply); it refuses settings that
the stock backend would ignore, or that are not the engine's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving_rig as rig
import trtllm_rig
from serving_server import MODELS, Server
from standin_tokens import log_prob, reply
from trtllm_rig import EOS, MAX_SEQ_LEN

from trt_razor.errors import RazorError
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.trtllm.cache_settings import read_settings

FRONTS = ("ensemble", "tensorrt_llm_bls")


@pytest.fixture(scope="module")
def tokenizer(trtllm_engines: trtllm_rig.Engines) -> Tokenizer:
    return Tokenizer.load(trtllm_engines("cyclic") / "tokenizer")


def expected(tokenizer: Tokenizer, prompt: str, max_tokens: int, **values: Any) -> str:
    ids = tokenizer.encode(prompt)
    return tokenizer.decode(list(reply(ids, max_tokens, values.pop("end_id", EOS), **values)))


# Loading ------------------------------------------------------------------------------------------
def check_loaded(server: Server, record: Path, engine: Path, decoupled: bool = True) -> None:
    """All five are ready, and the backend understood what the engine's own config.json says."""
    for model in MODELS:
        assert server.triton.get(f"/v2/models/{model}/ready")[0] == 200, model
    check_understood(json.loads((record / "rank0.json").read_text()), engine, decoupled)


def check_understood(found: dict[str, Any], engine: Path, decoupled: bool = True) -> None:
    settings, own = found["settings"], read_settings(engine)
    assert tuple(settings.get("max_attention_window_size", ())) == own.window_list
    assert settings.get("sink_token_length", 0) == own.sink_tokens
    assert settings["enable_kv_cache_reuse"] is False
    assert settings["gpt_model_type"] == "inflight_fused_batching"
    assert settings["kv_cache_free_gpu_mem_fraction"] == 0.9
    assert found["decoupled"] is decoupled
    assert found["engine"]["windows"] == list(own.windows)


def test_cyclic_razor_engine(
    trtllm_server: Server, trtllm_record: Path, trtllm_engines: trtllm_rig.Engines
) -> None:
    engine = trtllm_engines("cyclic")
    check_loaded(trtllm_server, trtllm_record, engine)
    found = json.loads((trtllm_record / "rank0.json").read_text())
    assert found["settings"]["gpt_model_path"] == str(engine)
    # Two layers with both kinds of heads are two cache layers each, one has local heads alone.
    assert len(found["settings"]["max_attention_window_size"]) == 5
    assert found["settings"]["sink_token_length"] == 4


def test_razor_engine_with_slots_copied_into_the_repository(
    trtllm_unary_server: Server, trtllm_engines: trtllm_rig.Engines
) -> None:
    server = trtllm_unary_server
    record = server.triton.repository.parent
    check_loaded(server, record, trtllm_engines("slots"), decoupled=False)
    settings = json.loads((record / "rank0.json").read_text())["settings"]
    assert Path(settings["gpt_model_path"]) == server.triton.repository / "tensorrt_llm/1/engine"
    assert "sink_token_length" not in settings
    assert settings["exclude_input_in_output"] is False


def test_server_does_not_start_with_settings_that_do_not_fit(
    trtllm_repository: Path,
    trtllm_engines: trtllm_rig.Engines,
    triton_python: Path,
    tmp_path: Path,
) -> None:
    """Or the tests above would show nothing; more of it in test_standin.py."""
    copy = shutil.copytree(trtllm_repository, tmp_path / "models")
    config = copy / "tensorrt_llm" / "config.pbtxt"
    text = config.read_text()
    assert text.count('"2048,420,2048,420,420"') == 1
    config.write_text(text.replace('"2048,420,2048,420,420"', '"2048"'))
    preload = trtllm_engines.preload("cyclic")
    with (
        pytest.raises(RazorError) as e,
        trtllm_rig.serving(copy, triton_python, tmp_path, preload, models=("tensorrt_llm",)),
    ):
        pass
    assert "the engine has (2048, 420, 2048, 420, 420)" in str(e.value)


# Text ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", FRONTS)
def test_text_in_one_piece(model: str, trtllm_server: Server, tokenizer: Tokenizer) -> None:
    prompt = "Grüße, 世界 🙂! "
    answer = rig.generate(trtllm_server.http, model, {"text_input": prompt, "max_tokens": 40})
    assert answer["text_output"] == expected(tokenizer, prompt, 40)
    body = {"text_input": prompt, "max_tokens": 40, "exclude_input_in_output": False}
    answer = rig.generate(trtllm_server.http, model, body)
    assert answer["text_output"] == prompt + expected(tokenizer, prompt, 40)


@pytest.mark.parametrize("model", FRONTS)
def test_text_in_pieces(model: str, trtllm_server: Server, tokenizer: Tokenizer) -> None:
    body = {"text_input": "to be or not ", "max_tokens": 30, "stream": True}
    pieces = [x["text_output"] for x in rig.generate_stream(trtllm_server.http, model, body)]
    assert "".join(pieces) == expected(tokenizer, "to be or not ", 30)
    assert len(pieces) == 30
    by_grpc = [rig.text_of(r) for r in rig.Stream(trtllm_server.grpc, model, body)]
    assert by_grpc == pieces


def test_bls_streams_whole_characters(trtllm_server: Server, tokenizer: Tokenizer) -> None:
    """The ensemble cannot: its postprocessing sees each response alone."""
    body = {"text_input": "ä世🙂 ", "max_tokens": 23, "stream": True}
    url = trtllm_server.http
    pieces = [x["text_output"] for x in rig.generate_stream(url, "tensorrt_llm_bls", body)]
    whole = expected(tokenizer, "ä世🙂 ", 23)
    assert "".join(pieces) == whole
    # 10 bytes twice, then ä and the first byte of 世, which never becomes whole.
    assert whole.endswith("ä\ufffd")
    assert whole.count("\ufffd") == 1
    assert "\ufffd" not in "".join(pieces[:-1])


@pytest.mark.parametrize("model", FRONTS)
def test_end_stop_and_bad_words(model: str, trtllm_server: Server, tokenizer: Tokenizer) -> None:
    url = trtllm_server.http

    def ask(prompt: str, **values: Any) -> str:
        body = {"text_input": prompt, "max_tokens": 30, **values}
        return str(rig.generate(url, model, body)["text_output"])

    assert ask("one</s>two") == "one"
    assert ask("one</s>two", end_id=-1) == expected(tokenizer, "one</s>two", 30, end_id=None)
    assert ask("one</s>two", min_tokens=5) == "onetwoone"
    # The stop word stays, as it does among the stock backend's ids.
    assert ask("one two three ", stop_words=["two", "three"]) == "one two"
    assert ask("one two ", stop_words="") == expected(tokenizer, "one two ", 30)
    bad = [tokenizer.encode("tw")]
    assert ask("one two ", bad_words=["tw"]) == expected(tokenizer, "one two ", 30, bad=bad)
    values = {"stream": True, "stop_words": ["two"], "max_tokens": 30}
    body = {"text_input": "one two ", **values}
    pieces = [x["text_output"] for x in rig.generate_stream(url, model, body)]
    assert "".join(pieces) == "one two"


def test_stop_word_that_ids_do_not_show(trtllm_server: Server) -> None:
    """Between a and b is a token without text. Only tensorrt_llm_bls can see the word there: it
    ends the text and stops the engine."""
    url, before = trtllm_server.http, made(trtllm_server)
    body = {"text_input": "a<s>b ", "max_tokens": 1500, "stop_words": ["ab"], "stream": True}
    pieces = [x["text_output"] for x in rig.generate_stream(url, "tensorrt_llm_bls", body)]
    assert "".join(pieces) == "ab"
    wait_idle(trtllm_server)
    assert made(trtllm_server) - before < 500
    body = {**body, "max_tokens": 12, "stream": False}
    assert rig.generate(url, "tensorrt_llm_bls", body)["text_output"] == "ab"
    assert rig.generate(url, "ensemble", body)["text_output"] == "ab ab ab "


def test_rows_of_a_batch(trtllm_server: Server, tokenizer: Tokenizer) -> None:
    prompts = ["first ", "the second, longer ", "3"]
    values = {
        "text_input": np.array([[p.encode()] for p in prompts], object),
        "max_tokens": np.array([[9], [14], [20]], np.int32),
        "stream": np.array([[True]] * 3),
    }
    for model in FRONTS:
        texts = [""] * 3
        for r in rig.Stream(trtllm_server.grpc, model, values):
            texts[int(r["batch_index"].item())] += rig.text_of(r)
        wanted = [expected(tokenizer, p, n) for p, n in zip(prompts, (9, 14, 20), strict=True)]
        assert texts == wanted, model


def test_tensors_beside_the_text(trtllm_server: Server, tokenizer: Tokenizer) -> None:
    flags = ("return_log_probs", "return_num_input_tokens", "return_num_output_tokens")
    body = {"text_input": "abc", "max_tokens": 5, **dict.fromkeys(flags, True)}
    ids = list(reply(tokenizer.encode("abc"), 5, EOS))
    for model in FRONTS:
        (r,) = rig.Stream(trtllm_server.grpc, model, body)
        assert r["output_log_probs"].tolist() == [[[log_prob(t) for t in ids]]], model
        assert r["cum_log_probs"].item() == sum(log_prob(t) for t in ids)
        assert (r["num_input_tokens"].item(), r["num_output_tokens"].item()) == (3, 5)


# Cancelling and errors ----------------------------------------------------------------------------
def figure(server: Server, name: str) -> float:
    samples = rig.Metrics.read(server.metrics).samples
    return sum(value for (found, _), value in samples.items() if found == name)


def made(server: Server) -> float:
    """Tokens that the stand-in has made."""
    return figure(server, "standin_tokens")


def wait_idle(server: Server) -> None:
    rig.wait_until(lambda: figure(server, "nv_trt_llm_request_metrics") == 0, "engine idle")


@pytest.mark.parametrize("model", ("tensorrt_llm_bls", "tensorrt_llm"))
def test_client_that_leaves_frees_the_engine(model: str, trtllm_server: Server) -> None:
    if model == "tensorrt_llm":
        values = rig.direct([5, 6, 7], MAX_SEQ_LEN - 20, streaming=True)
    else:
        values = {"text_input": "for ever ", "max_tokens": MAX_SEQ_LEN - 20, "stream": True}
    for _ in range(5):  # on a busy machine the stand-in may be done before anybody has looked
        before = made(trtllm_server)
        stream = rig.Stream(trtllm_server.grpc, model, values)
        for _ in range(5):
            stream.next()
        stream.cancel()
        wait_idle(trtllm_server)
        if 5 <= made(trtllm_server) - before < MAX_SEQ_LEN / 2:
            return
    raise AssertionError("it went on to its end, every time")


def test_stop_request_with_the_same_id(trtllm_server: Server) -> None:
    stream = rig.Stream(
        trtllm_server.grpc,
        "ensemble",
        {"text_input": "x", "max_tokens": MAX_SEQ_LEN - 20, "stream": True},
        request_id="mine",
    )
    got = [stream.next()]
    stop = {"input_ids": [0], "input_lengths": 0, "request_output_len": 0, "stop": True}
    assert list(rig.Stream(trtllm_server.grpc, "tensorrt_llm", stop, request_id="mine")) == []
    while not got[-1][1]:
        got.append(stream.next())
    stream.close()
    assert len(got) < MAX_SEQ_LEN / 2
    with pytest.raises(rig.ServerError, match="stop: expected a request id"):
        list(rig.Stream(trtllm_server.grpc, "tensorrt_llm", stop))


@pytest.mark.parametrize("model", FRONTS)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_input": "x" * MAX_SEQ_LEN}, r"expected 1 \.\. 2047 ids, found"),
        ({"beam_width": 2}, "beam_width"),
        ({"temperature": -1.0}, "temperature"),
        ({"text_input": ""}, "text_input: expected at least 1 token"),
    ],
)
def test_errors_reach_the_client(
    model: str, values: dict[str, Any], message: str, trtllm_server: Server
) -> None:
    body = {"text_input": "hello", "max_tokens": 5, **values}
    for stream in (False, True):
        with pytest.raises(rig.ServerError, match=message):
            list(rig.Stream(trtllm_server.grpc, model, {**body, "stream": stream}))
    with pytest.raises(rig.ServerError, match=message) as e:
        rig.generate(trtllm_server.http, model, body)
    assert "Traceback" not in e.value.text
    assert rig.generate(trtllm_server.http, model, {"text_input": "ok", "max_tokens": 4})


def test_many_at_once(trtllm_server: Server, tokenizer: Tokenizer) -> None:
    def ask(i: int) -> tuple[str, str]:
        prompt = f"client {i}: "
        body = {"text_input": prompt, "max_tokens": 30 + i, "stream": True}
        url = trtllm_server.http
        texts = [x["text_output"] for x in rig.generate_stream(url, FRONTS[i % 2], body)]
        return "".join(texts), expected(tokenizer, prompt, 30 + i)

    for found, wanted in rig.in_parallel(12, ask):
        assert found == wanted
