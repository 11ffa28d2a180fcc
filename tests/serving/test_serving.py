"""Answers of a real server equal those of ``trt_razor.generate``, by every way to ask for them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import serving_rig as rig
from serving_model import EOS_ID, Expected, Reference
from serving_server import MODELS, Server

PROMPT = "The quick brown fox jumps over the lazy dög. "
BASE: dict[str, Any] = {"max_new_tokens": 48, "temperature": 1.3, "top_k": 40, "seed": 11}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 48},
    "top_k": BASE,
    "other seed": {**BASE, "seed": 2**64 - 1},
    "top_p": {**BASE, "top_p": 0.4},
    "top_p alone": {"max_new_tokens": 48, "temperature": 0.9, "top_p": 0.3, "seed": 3},
    "repetition": {**BASE, "repetition_penalty": 3.0},
    "presence": {**BASE, "presence_penalty": 2.0},
    "frequency": {**BASE, "frequency_penalty": 1.5},
    "bad words": {**BASE, "bad_words": 2},
    "stop words": {**BASE, "stop": 2},
    "end": {**BASE, "ends": True},
    "min_tokens": {**BASE, "ends": True, "min_tokens": 40},
    "no end": {**BASE, "ends": True, "ignore_eos": True},
    "one token": {**BASE, "max_new_tokens": 1},
}


class Case:
    """One way to sample: the reference's answer, and the inputs that ask a server for it."""

    def __init__(self, name: str, reference: Reference) -> None:
        params = dict(SAMPLING[name])
        if params.pop("ends", False):
            params["seed"] = seed_that_ends(reference)
        plain = reference.run(PROMPT, **{k: v for k, v in params.items() if k in {*BASE}})
        words = {k: words_of(plain.text, params[k]) for k in ("stop", "bad_words") if k in params}
        self.values = {k: v for k, v in params.items() if k not in words and k != "ignore_eos"}
        self.max_tokens = self.values.pop("max_new_tokens")
        self.words = words
        if params.get("ignore_eos"):
            self.values["end_id"] = -1
        self._encode = reference.tokenizer.encode
        given: dict[str, Any] = {k: tuple(v) for k, v in words.items()}
        if "bad_words" in words:
            given["bad_words"] = tuple(tuple(self._encode(w)) for w in words["bad_words"])
        self.expected = reference.run(PROMPT, **{**params, **given})
        # An option that changes nothing would be no test of it.
        changed = params.keys() - {*BASE}
        assert not changed or self.expected.text != plain.text

    @property
    def text_inputs(self) -> dict[str, Any]:
        """Inputs of ``ensemble`` and ``tensorrt_llm_bls``."""
        names = {"stop": "stop_words", "bad_words": "bad_words"}
        words = {names[k]: v for k, v in self.words.items()}
        return {"text_input": PROMPT, "max_tokens": self.max_tokens, **self.values, **words}

    @property
    def ids_inputs(self) -> dict[str, Any]:
        """Inputs of ``tensorrt_llm``."""
        values = {
            {"top_k": "runtime_top_k", "top_p": "runtime_top_p"}.get(k, k): v
            for k, v in self.values.items()
        }
        for k, v in self.words.items():
            name = {"stop": "stop_words_list", "bad_words": "bad_words_list"}[k]
            values[name] = rig.word_list(*(self._encode(w) for w in v))
        return rig.direct(self.expected.prompt, self.max_tokens, **values)


def seed_that_ends(reference: Reference) -> int:
    """A seed with which the model says its end token after some tokens, but before the 32nd."""
    for seed in range(200):
        found = reference.run(PROMPT, **{**BASE, "seed": seed, "max_new_tokens": 32})
        if found.finished == "stop" and len(found.tokens) > 8:
            return seed
    raise AssertionError("no such seed")


def words_of(text: str, length: int) -> list[str]:
    """An ASCII word out of the middle of a text, after one that is not there."""
    found = re.search(f"[!-~]{{{length}}}", text[3:])
    assert found, f"no words in {text!r}"
    return ["absent", found[0]]


@pytest.fixture(params=[*SAMPLING], scope="module")
def case(request: pytest.FixtureRequest, reference: Reference) -> Case:
    return Case(request.param, reference)


def test_every_model_is_ready(server: Server) -> None:
    for model in MODELS:
        assert rig.get(server.http, f"/v2/models/{model}/ready") == ""
    index = rig.post(server.http, "/v2/repository/index", {})
    assert sorted(re.findall(r'"name":"(\w+)","version":"1","state":"READY"', index)) == [*MODELS]


# One answer, all ways --------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_generate(server: Server, case: Case, model: str) -> None:
    answer = rig.generate(server.http, model, case.text_inputs)
    assert answer["text_output"] == case.expected.text
    assert answer["finish_reason"] == case.expected.finished
    assert answer["model_name"] == model


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_generate_stream(server: Server, case: Case, model: str) -> None:
    body = {**case.text_inputs, "stream": True}
    events = list(rig.generate_stream(server.http, model, body))
    assert_streamed([e["text_output"] for e in events], case.expected)
    assert [e["finish_reason"] for e in events] == reasons(len(events), case.expected)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_grpc(server: Server, case: Case, model: str, stream: bool) -> None:
    responses = list(rig.Stream(server.grpc, model, {**case.text_inputs, "stream": stream}))
    texts = [rig.text_of(r) for r in responses]
    if stream:
        assert_streamed(texts, case.expected)
    else:
        assert texts == [case.expected.text]
    assert reasons_of(responses) == reasons(len(responses), case.expected)


@pytest.mark.parametrize("stream", [False, True])
def test_grpc_direct(server: Server, case: Case, stream: bool) -> None:
    responses = list(
        rig.Stream(server.grpc, "tensorrt_llm", {**case.ids_inputs, "streaming": stream})
    )
    assert rig.ids_of(responses) == case.expected.tokens
    assert "".join(rig.text_of(r) for r in responses) == case.expected.text
    assert reasons_of(responses) == reasons(len(responses), case.expected)
    if stream:
        assert len(responses) >= len(case.expected.tokens)
    else:
        assert len(responses) == 1


def assert_streamed(texts: list[str], expected: Expected) -> None:
    """Texts come piece by piece, and joined they are the answer."""
    assert "".join(texts) == expected.text
    assert sum(map(bool, texts)) > len(expected.text) / 3 or len(expected.tokens) < 4


def reasons_of(responses: list[rig.Response]) -> list[str]:
    return [r["finish_reason"].item().decode() for r in responses]


def reasons(count: int, expected: Expected) -> list[str]:
    """``finish_reason`` of every response: only the last has one."""
    return [""] * (count - 1) + [expected.finished]


# Parts of an answer ----------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls", "tensorrt_llm"])
def test_characters_are_never_torn(server: Server, reference: Reference, model: str) -> None:
    """Every token is one byte; a stream brings whole characters."""
    for seed in range(100):
        params = {**BASE, "max_new_tokens": 100, "seed": seed, "ignore_eos": True}
        expected = reference.run(PROMPT, **params)
        whole = [c for c in expected.text if ord(c) > 127 and c != "\ufffd"]
        if len(whole) >= 5:
            break
    else:
        raise AssertionError("no text with whole characters")
    values = {"temperature": 1.3, "seed": seed, "end_id": -1}
    if model == "tensorrt_llm":
        inputs = rig.direct(expected.prompt, 100, runtime_top_k=40, streaming=True, **values)
    else:
        inputs = {"text_input": PROMPT, "max_tokens": 100, "top_k": 40, "stream": True, **values}
    texts = [rig.text_of(r) for r in rig.Stream(server.grpc, model, inputs)]
    assert "".join(texts) == expected.text
    assert len(texts) >= 100


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls", "tensorrt_llm"])
def test_log_probs(server: Server, reference: Reference, model: str, stream: bool) -> None:
    expected = reference.run(PROMPT, **BASE, logprobs=True)
    values = {"temperature": 1.3, "seed": 11, "return_log_probs": True}
    if model == "tensorrt_llm":
        inputs = rig.direct(expected.prompt, 48, runtime_top_k=40, streaming=stream, **values)
    else:
        inputs = {"text_input": PROMPT, "max_tokens": 48, "top_k": 40, "stream": stream, **values}
    responses = list(rig.Stream(server.grpc, model, inputs))
    sums, found = np.cumsum(expected.logprobs), []
    for r in responses:
        found += r["output_log_probs"].reshape(-1).tolist()
        np.testing.assert_allclose(r["cum_log_probs"].item(), sums[len(found) - 1], rtol=1e-4)
    np.testing.assert_allclose(found, expected.logprobs, atol=2e-4)
    assert len(responses) == 1 or stream


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_prompt_in_answer(server: Server, reference: Reference, model: str) -> None:
    body = {"text_input": PROMPT, "max_tokens": 9, "exclude_input_in_output": False}
    expected = reference.run(PROMPT, max_new_tokens=9)
    assert rig.generate(server.http, model, body)["text_output"] == PROMPT + expected.text


def test_prompt_in_ids(server: Server, reference: Reference) -> None:
    expected = reference.run(PROMPT, max_new_tokens=9)
    inputs = rig.direct(expected.prompt, 9, exclude_input_in_output=False)
    (response,) = rig.Stream(server.grpc, "tensorrt_llm", inputs)
    assert rig.ids_of([response]) == expected.prompt + expected.tokens
    assert rig.text_of(response) == PROMPT + expected.text


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
@pytest.mark.parametrize("way", ["chat", "messages", "raw"])
def test_prompt_format(server: Server, reference: Reference, model: str, way: str) -> None:
    text = "Hi </s> there"  # a control token spelled out: plain characters, except in "raw"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    ids = {
        "chat": reference.tokenizer.encode_chat(messages[1:]),
        "messages": reference.tokenizer.encode_chat(messages),
        "raw": reference.tokenizer.encode(text),
    }
    assert EOS_ID in ids["raw"]
    assert ids["chat"].count(EOS_ID) == 1
    expected = reference.run(ids[way], **BASE)
    assert len({reference.run(x, **BASE).text for x in ids.values()}) == 3
    json_text = (
        '[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi </s> there"}]'
    )
    values = {k: BASE[k] for k in ("temperature", "top_k", "seed")}
    body = {"text_input": json_text if way == "messages" else text, "prompt_format": way}
    answer = rig.generate(server.http, model, {**body, "max_tokens": 48, **values})
    assert answer["text_output"] == expected.text


@pytest.mark.parametrize("stream", [False, True])
def test_batch_of_one_request(server: Server, reference: Reference, stream: bool) -> None:
    prompts = ["a", "bcdefghijk", "lmn"]
    expected = [reference.run(p, max_new_tokens=12) for p in prompts]
    ids = np.zeros((3, 10), np.int32)
    for row, e in zip(ids, expected, strict=True):
        row[: len(e.prompt)] = e.prompt
    inputs = {
        "input_ids": ids,
        "input_lengths": np.array([[len(p)] for p in prompts], np.int32),
        "request_output_len": np.full((3, 1), 12, np.int32),
        "streaming": np.full((3, 1), stream),
    }
    responses = list(rig.Stream(server.grpc, "tensorrt_llm", inputs))
    rows: list[list[rig.Response]] = [[], [], []]
    for r in responses:
        rows[int(r["batch_index"].item())].append(r)
    for row_responses, e in zip(rows, expected, strict=True):
        assert rig.ids_of(row_responses) == e.tokens
        assert "".join(rig.text_of(r) for r in row_responses) == e.text
    assert len(responses) == 3 or stream


def test_end_of_capacity(server: Server, reference: Reference) -> None:
    limit = reference.engine.manifest.max_seq_len
    prompt = [i % 250 for i in range(limit - 6)]
    expected = reference.run(prompt, max_new_tokens=50)
    assert expected.finished == "capacity"
    responses = list(rig.Stream(server.grpc, "tensorrt_llm", rig.direct(prompt, 50)))
    assert rig.ids_of(responses) == expected.tokens
    assert reasons_of(responses) == ["capacity"]


def test_counts_of_tokens(server: Server, reference: Reference) -> None:
    inputs = rig.direct(
        reference.tokenizer.encode(PROMPT), 7, return_num_input_tokens=True,
        return_num_output_tokens=True,
    )  # fmt: skip
    (response,) = rig.Stream(server.grpc, "tensorrt_llm", inputs)
    assert response["num_input_tokens"].item() == len(PROMPT.encode())
    assert response["num_output_tokens"].item() == 7


def test_kv_cache_figures(server: Server, reference: Reference) -> None:
    """Bytes that Razor keeps, and what dense attention would: the planner's, to the byte."""
    from trt_razor.cache_layout import kv_at

    engine = reference.engine
    m = engine.manifest
    assert m.policy is not None
    assert engine.head_map is not None
    used: Callable[[int], Any] = lambda n: kv_at(m.spec, engine.head_map, m.policy, n, m.dtype)  # noqa: E731
    prompt = [i % 250 for i in range(400)]
    inputs = rig.direct(prompt, 30, end_id=-1, streaming=True)
    cached = len(prompt)
    for r in rig.Stream(server.grpc, "tensorrt_llm", inputs):
        if r["sequence_length"].item():
            need = used(cached)
            assert r["kv_cache_used_bytes"].item() == need.razor_bytes
            assert r["kv_cache_dense_bytes"].item() == need.full_bytes
            assert need.full_bytes > 1.4 * need.razor_bytes
            cached += 1
    assert cached == len(prompt) + 30
