"""The requests of the public clients, on both flavours of repository.

Own engines: answers are those of ``trt_razor.generate``. TensorRT-LLM engines: those of the stand-in
backend, which repeats the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import official_tools as tools
import pytest
import serving_rig as rig
from official_clients import (
    PERF_METRICS,
    ClientFailed,
    run_engine_client,
    run_text_client,
)
from serving_model import Reference
from serving_server import Server
from standin_tokens import log_prob, reply
from trtllm_rig import EOS

from trt_razor.models.tokenizer import Tokenizer

FRONTS = ("ensemble", "tensorrt_llm_bls")
PROMPT = "Grüße aus der Küche: "


@dataclass
class Answer:
    """What must come for a prompt: ids, their text, log-probabilities."""

    ids: list[int]
    text: str
    log_probs: list[float]


@dataclass
class Target:
    """A server of one flavour. ``reference``: of our own engine; None = the stand-in answers."""

    server: Server
    tokenizer: Tokenizer
    reference: Reference | None

    @property
    def http(self) -> str:
        return self.server.http

    @property
    def grpc(self) -> str:
        return self.server.grpc

    @property
    def own(self) -> bool:
        return self.reference is not None

    def answer(self, prompt: str, max_tokens: int, min_tokens: int = 0, bad: str = "") -> Answer:
        ids = self.tokenizer.encode(prompt)
        words = (tuple(self.tokenizer.encode(bad)),) if bad else ()
        if self.reference is None:
            out = list(reply(ids, max_tokens, EOS, bad=words, min_tokens=min_tokens))
            return Answer(out, self.tokenizer.decode(out), [log_prob(t) for t in out])
        done = self.reference.run(
            ids,
            max_new_tokens=max_tokens,
            min_tokens=min_tokens,
            bad_words=words,
            logprobs=True,
        )
        return Answer(done.tokens, done.text, done.logprobs)

    def stopped(self, text: str, word: str) -> str:
        """A text up to a stop word; what our engines give ends before it, the stock backend's after."""
        end = text.index(word)
        return text[: end if self.own else end + len(word)]


@pytest.fixture(params=("own", "trtllm"))
def target(request: pytest.FixtureRequest, triton_python: Any) -> Target:
    if request.param == "own":
        reference = request.getfixturevalue("reference")
        return Target(request.getfixturevalue("server"), reference.tokenizer, reference)
    engine = request.getfixturevalue("trtllm_engines")("cyclic")
    server = request.getfixturevalue("trtllm_server")
    return Target(server, Tokenizer.load(engine / "tokenizer"), None)


# end_to_end_grpc_client.py ------------------------------------------------------------------------
@pytest.mark.parametrize("model", FRONTS)
def test_text_client(target: Target, model: str) -> None:
    wanted = target.answer(PROMPT, 30).text
    found = run_text_client(target.grpc, [PROMPT], model=model, max_tokens=30)
    assert (found.errors, found.responses) == ([], 1)
    assert found.text() == PROMPT + wanted
    found = run_text_client(
        target.grpc, [PROMPT], model=model, max_tokens=30, exclude_input_in_output=True
    )
    assert found.text() == wanted


@pytest.mark.parametrize("model", FRONTS)
def test_text_client_streams(target: Target, model: str) -> None:
    # The stock ensemble cannot put split characters together.
    prompt = PROMPT if target.own or model != "ensemble" else "plain "
    found = run_text_client(target.grpc, [prompt], model=model, max_tokens=30, streaming=True)
    wanted = target.answer(prompt, 30)
    assert found.errors == []
    assert found.text() == wanted.text
    assert found.responses >= len(wanted.ids)


def test_text_client_with_several_prompts(target: Target) -> None:
    prompts = ["one", "the second is longer", "3"]
    wanted = [target.answer(p, 12).text for p in prompts]
    common: dict[str, Any] = {"max_tokens": 12, "exclude_input_in_output": True}
    for batch in (False, True):
        for streaming in (False, True):
            found = run_text_client(
                target.grpc, prompts, batch_inputs=batch, streaming=streaming, **common
            )
            assert found.errors == []
            assert [found.text(i) for i in range(3)] == wanted, (batch, streaming)


@pytest.mark.parametrize("model", FRONTS)
def test_text_client_with_stop_and_bad_words(target: Target, model: str) -> None:
    whole = target.answer("to be ", 40).text
    start = next(i for i in range(6, 30) if whole[i : i + 2].isascii())
    word = whole[start : start + 2]
    common: dict[str, Any] = {"model": model, "max_tokens": 40, "exclude_input_in_output": True}
    for streaming in (False, True):
        found = run_text_client(
            target.grpc, ["to be "], stop_words=[word, "zzz"], streaming=streaming, **common
        )
        assert found.text() == target.stopped(whole, word), streaming
    found = run_text_client(target.grpc, ["to be "], bad_words=[word], **common)
    assert found.text() == target.answer("to be ", 40, bad=word).text != whole


@pytest.mark.parametrize("model", FRONTS)
def test_text_client_with_biases(target: Target, model: str) -> None:
    """The tokenizer knows fewer ids than the engine has, but the stock backend wants them all."""
    common: dict[str, Any] = {"model": model, "max_tokens": 5, "exclude_input_in_output": True}
    found = run_text_client(target.grpc, ["abc"], embedding_bias={"q": 100.0}, **common)
    assert found.errors == []
    # The stand-in chooses nothing by logits.
    assert found.text() == ("qqqqq" if target.own else target.answer("abc", 5).text)


@pytest.mark.parametrize("model", FRONTS)
def test_text_client_with_figures(target: Target, model: str) -> None:
    wanted = target.answer("abc", 8)
    flags = ("return_perf_metrics", "return_log_probs")
    found = run_text_client(target.grpc, ["abc"], model=model, max_tokens=8, flags=flags)
    assert found.errors == []
    (metrics,), (total,) = found.metrics, found.cum_log_probs
    assert float(total[0][0]) == pytest.approx(sum(wanted.log_probs), rel=1e-4)
    check_metrics(metrics)


def test_text_client_with_figures_of_every_chunk(target: Target) -> None:
    """It reads them in all responses; the stock backend has them in the last one alone."""
    flags = ("return_perf_metrics", "return_log_probs")
    ask: dict[str, Any] = {"max_tokens": 8, "flags": flags, "streaming": True}
    if not target.own:
        with pytest.raises(ClientFailed, match="not subscriptable"):
            run_text_client(target.grpc, ["abc"], **ask)
        return
    found = run_text_client(target.grpc, ["abc"], **ask)
    assert len(found.metrics) == found.responses >= 8
    check_metrics(found.metrics[-1])


def check_metrics(found: Mapping[str, float]) -> None:
    assert list(found) == list(PERF_METRICS)
    times = [found[name] for name in PERF_METRICS if name.endswith("_time_ns")]
    assert times[0] > 0
    assert times == sorted(times)
    assert times[0] < times[-1]
    assert found["kv_cache_alloc_total_blocks"] >= 1
    assert found["kv_cache_reused_blocks"] == found["acceptance_rate"] == 0


@pytest.mark.parametrize("model", FRONTS)
def test_text_client_prints_errors_and_goes_on(target: Target, model: str) -> None:
    prompts = ["x" * 5000, "fine"]
    ask: dict[str, Any] = {"model": model, "max_tokens": 6, "exclude_input_in_output": True}
    found = run_text_client(target.grpc, prompts, **ask)
    (error,) = found.errors
    assert "5000" in error
    assert "Traceback" not in error
    assert list(found.texts) == [1]
    assert found.text(1) == target.answer("fine", 6).text
    found = run_text_client(target.grpc, ["fine"], beam_width=2, **ask)
    assert "beam_width" in found.errors[0]
    assert not found.texts


# inflight_batcher_llm_client.py -------------------------------------------------------------------
def ask_engine(target: Target, prompt: str, **values: Any) -> Any:
    ids = target.tokenizer.encode(prompt)
    common: dict[str, Any] = {"end_id": EOS, "pad_id": EOS, "streaming": True}
    return run_engine_client(target.grpc, ids, **{**common, **values})


def test_token_client_streams(target: Target) -> None:
    found = ask_engine(target, PROMPT)
    wanted = target.answer(PROMPT, 16)
    assert found.tokens == target.tokenizer.encode(PROMPT) + wanted.ids
    assert set(found.chunks) == {1}


def test_token_client_with_figures(target: Target) -> None:
    flags = ("return_log_probs", "return_perf_metrics")
    counts = ("return_num_input_tokens", "return_num_output_tokens")
    found = ask_engine(target, "abc", request_output_len=7, flags=(*flags, *counts))
    wanted = target.answer("abc", 7)
    assert found.tokens[3:] == wanted.ids
    assert found.cum_log_probs == pytest.approx(sum(wanted.log_probs), rel=1e-4)
    assert found.last["num_input_tokens"].item() == 3
    check_metrics({name: found.last[name][0][0] for name in PERF_METRICS})


def test_token_client_names_its_outputs(target: Target) -> None:
    outputs = ("output_ids", "sequence_length")
    found = ask_engine(target, "abc", requested_outputs=outputs)
    assert found.tokens[3:] == target.answer("abc", 16).ids


def test_token_client_with_ids_from_a_file(target: Target) -> None:
    """Then it has no tokenizer and sends end_id -1 and pad_id 50256, in no vocabulary of ours."""
    ids = [104, 101, EOS, 121]
    found = run_engine_client(target.grpc, ids, end_id=-1, pad_id=50256, streaming=True)
    assert len(found.tokens) == 4 + 16
    if target.reference is None:
        assert found.tokens == ids * 5
    else:
        done = target.reference.run(ids, max_new_tokens=16, ignore_eos=True)
        assert found.tokens[4:] == done.tokens


def test_token_client_without_streaming_needs_a_model_that_is_not_decoupled(
    target: Target,
) -> None:
    """So it is with the stock backend."""
    with pytest.raises(ClientFailed, match="decoupled transaction policy"):
        ask_engine(target, "abc", streaming=False)


def test_token_client_without_streaming(trtllm_unary_server: Server) -> None:
    target = Target(trtllm_unary_server, _tokenizer(trtllm_unary_server), None)
    for exclude in (None, False, True):
        found = ask_engine(
            target, PROMPT, streaming=False, exclude_input_in_output=exclude, request_output_len=9
        )
        ids = target.tokenizer.encode(PROMPT)
        assert found.tokens == ([] if exclude else ids) + target.answer(PROMPT, 9).ids
    flags = ("return_log_probs", "return_perf_metrics")
    found = ask_engine(target, "abc", streaming=False, flags=flags)
    assert found.cum_log_probs == sum(target.answer("abc", 16).log_probs)
    check_metrics({name: found.last[name][0][0] for name in PERF_METRICS})
    with pytest.raises(ClientFailed, match="streaming needs a decoupled"):
        ask_engine(target, "abc", streaming=True)


def _tokenizer(server: Server) -> Tokenizer:
    return Tokenizer.load(server.triton.repository / "preprocessing/1/tokenizer")


def test_text_clients_of_a_model_that_is_not_decoupled(trtllm_unary_server: Server) -> None:
    target = Target(trtllm_unary_server, _tokenizer(trtllm_unary_server), None)
    wanted = PROMPT + target.answer(PROMPT, 30).text
    for model in FRONTS:
        found = run_text_client(target.grpc, [PROMPT], model=model, max_tokens=30)
        assert found.text() == wanted
        status, text = tools.curl(
            target.http, f"/v2/models/{model}/generate", tools.curl_body(PROMPT, 30)
        )
        assert (status, json.loads(text)["text_output"]) == (200, wanted)
        found = run_text_client(target.grpc, [PROMPT], model=model, streaming=True)
        assert len(found.errors) == 1
        assert not found.texts


# Stopping early -----------------------------------------------------------------------------------
LONG_ANSWER = 1900


def test_token_client_stops_early(target: Target) -> None:
    common = {"request_output_len": LONG_ANSWER, "end_id": -1, "stop_after_ms": 150}
    found = ask_engine(target, "for ever ", request_id="early", **common)
    assert len(found.tokens) - 9 < LONG_ANSWER
    found = ask_engine(target, "for ever ", stop_via_request_cancel=True, **common)
    assert found.cancelled
    with pytest.raises(ClientFailed, match=r"expected (a request id|the id of the request)"):
        ask_engine(target, "for ever ", **{**common, "request_output_len": 300})


def test_token_client_stops_early_without_streaming(trtllm_unary_server: Server) -> None:
    target = Target(trtllm_unary_server, _tokenizer(trtllm_unary_server), None)
    common = {"request_output_len": LONG_ANSWER, "end_id": -1, "streaming": False}
    found = ask_engine(target, "for ever ", stop_after_ms=150, request_id="early", **common)
    assert found.cancelled  # the answer to the stop request itself
    assert 9 <= len(found.tokens) < LONG_ANSWER
    found = ask_engine(
        target, "for ever ", stop_after_ms=150, stop_via_request_cancel=True, **common
    )
    assert found.cancelled


# curl ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", FRONTS)
def test_documented_curl_commands(target: Target, model: str) -> None:
    wanted = target.answer("What is machine learning? ", 20).text
    path = f"/v2/models/{model}/generate"
    body = tools.curl_body("What is machine learning? ", 20)
    status, text = tools.curl(target.http, path, body)
    assert status == 200, text
    answer = json.loads(text)
    assert answer["text_output"] == wanted
    assert answer["model_name"] == model
    assert isinstance(answer["model_version"], str)
    status, text = tools.curl(target.http, path + "_stream", {**body, "stream": True})
    assert status == 200
    pieces = [event["text_output"] for event in tools.events(text)]
    assert "".join(pieces) == wanted
    assert len(pieces) >= 20
    status, text = tools.curl(target.http, path, {**body, "max_tokens": 0})
    assert status == 400
    assert set(json.loads(text)) == {"error"}


# genai-perf ---------------------------------------------------------------------------------------
def test_requests_of_genai_perf(target: Target) -> None:
    prompts = [f"prompt number {i} of genai-perf " for i in range(8)]
    found = tools.run_perf_analyzer(target.grpc, prompts, 16)
    for prompt, texts in zip(prompts, found, strict=True):
        assert "".join(texts) == target.answer(prompt, 16, min_tokens=16).text
        assert 16 <= len(texts) <= 18


def test_server_is_idle_after_all(trtllm_server: Server) -> None:
    """Of the own flavour each test says so."""

    def active() -> float:
        samples = rig.Metrics.read(trtllm_server.metrics).samples
        return sum(v for (name, _), v in samples.items() if name == "nv_trt_llm_request_metrics")

    rig.wait_until(lambda: active() == 0, "no request left")
