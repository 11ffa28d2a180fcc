"""The Python model ``tensorrt_llm_bls`` outside a server, between a real ``preprocessing`` and
engines that say what the test wants."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from model_rig import (
    InferenceResponse,
    ModelRequest,
    Request,
    Tensor,
    TritonError,
    TritonModelException,
    arguments,
    install,
    ints,
    save_tokenizer,
    strings,
)

from trt_razor.serving.models import bls, preprocessing

OUTPUTS = ("text_output", "batch_index", "sequence_index", "num_output_tokens", "cum_log_probs")
T = save_tokenizer(None)
STREAM = {"stream": np.ones((1, 1), np.bool_)}
Responses = Iterator[InferenceResponse]


def response(ids: Sequence[int], text: str | None = None, **more: int) -> InferenceResponse:
    """What an engine gives: ids in its own shapes, or a text."""
    found = {
        "output_ids": np.array([[ids]], np.int32).reshape(1, 1, -1),
        "sequence_length": np.array([[len(ids)]], np.int32),
        "num_output_tokens": np.array([[len(ids)]], np.int32),
        **{name: ints(value) for name, value in more.items()},
    }
    if text is not None:
        found["text_output"] = strings(text)[0]
    return InferenceResponse([Tensor(n, v) for n, v in found.items()])


class Rig:
    """The model, and the engine's requests as they came."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.seen = folder, list[ModelRequest]()
        self.stops: list[str] = []
        self.engine: Callable[[ModelRequest], Responses] = lambda _: iter(())
        models = {"preprocessing": self._pre, "tensorrt_llm": self._take, "other": self._take}
        self.errors = install(monkeypatch, models)
        save_tokenizer(folder / "1" / "tokenizer")
        self.pre = preprocessing.TritonPythonModel()
        self.pre.initialize(arguments(folder, tokenizer_dir="1/tokenizer"))

    def _pre(self, request: ModelRequest) -> Responses:
        yield from self.pre.execute([Request(request.outputs, **request.tensors)])

    def _take(self, request: ModelRequest) -> Responses:
        if "stop" in request.tensors:
            assert request.tensors["stop"].tolist() == [[True]]
            assert {"input_ids", "input_lengths", "request_output_len"} < set(request.tensors)
            self.stops.append(request.id)
            return iter([InferenceResponse()])
        self.seen.append(request)
        return self.engine(request)

    def load(self, decoupled: bool = True, **parameters: str) -> Any:
        model = bls.TritonPythonModel()
        given = {"tokenizer_dir": "1/tokenizer", **parameters}
        model.initialize(arguments(self.folder, OUTPUTS, decoupled, **given))
        return model


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    rig = Rig(tmp_path, monkeypatch)
    yield rig
    assert rig.errors == []


def request(*texts: str | bytes, outputs: Sequence[str] = OUTPUTS, **more: Any) -> Request:
    limits = ints(*[9] * len(texts))
    return Request(outputs, **{"text_input": strings(*texts), "max_tokens": limits, **more})


def texts(r: Request) -> list[str]:
    """The texts of all responses."""
    return [a.arrays()["text_output"].item().decode() for a in r.sender.wait()]


def ask(model: Any, *prompts: str | bytes, **more: Any) -> Request:
    r = request(*prompts, **more)
    assert model.execute([r]) is None
    r.sender.final.wait(20)
    return r


# Requests to the engine ---------------------------------------------------------------------
def test_every_input_reaches_the_engine(rig: Rig) -> None:
    rig.engine = lambda _: iter([response(T.encode("ok"))])
    numbers = {
        "top_k": ("runtime_top_k", np.int32, 3),
        "top_p": ("runtime_top_p", np.float32, 0.5),
        "length_penalty": ("len_penalty", np.float32, 1),
        "temperature": ("temperature", np.float32, 0.25),
        "seed": ("seed", np.uint64, 2**63),
        "min_tokens": ("min_tokens", np.int32, 2),
        "end_id": ("end_id", np.int32, 7),
        "pad_id": ("pad_id", np.int32, 8),
    }
    given = {n: np.array([[v]], dtype) for n, (_, dtype, v) in numbers.items()}
    given["return_log_probs"] = np.array([True])  # [1] in the configuration, without an axis
    given["lora_config"] = np.zeros((1, 2, 3), np.int32)
    more = {"stop_words": strings("xy"), "prompt_format": strings("chat")}
    r = ask(rig.load(), "hi", **given, **more)
    assert texts(r) == ["ok"]
    (seen,) = rig.seen
    for theirs, dtype, value in numbers.values():
        assert seen.tensors[theirs].tolist() == [[value]]
        assert seen.tensors[theirs].dtype == dtype
    ids = T.encode_chat([{"role": "user", "content": "hi"}])
    assert seen.tensors["input_ids"].tolist() == [ids]
    assert seen.tensors["input_lengths"].tolist() == [[len(ids)]]
    assert seen.tensors["request_output_len"].tolist() == [[9]]
    assert seen.tensors["stop_words_list"].tolist() == [[T.encode("xy"), [2, -1]]]
    assert seen.tensors["return_log_probs"].tolist() == [[True]]
    assert seen.tensors["lora_config"].shape == (1, 2, 3)
    assert set(seen.outputs) == {*OUTPUTS, "output_ids", "sequence_length"} - {"text_output"}


def test_only_wanted_outputs_are_asked_and_given(rig: Rig) -> None:
    rig.engine = lambda _: iter([response(T.encode("ok"))])
    r = ask(rig.load(tensorrt_llm_model_name="other"), "hi", outputs=["text_output"])
    assert set(r.sender.wait()[0].arrays()) == {"text_output"}
    assert rig.seen[0].model == "other"
    names = {"output_ids", "sequence_length", "batch_index", "sequence_index"}
    assert set(rig.seen[0].outputs) == names


# Texts --------------------------------------------------------------------------------------
def test_a_stream_never_breaks_a_character(rig: Rig) -> None:
    ids = T.encode("aé🎉")
    rig.engine = lambda _: iter([*(response([i]) for i in ids), response(ids[-4:-1])])
    r = ask(rig.load(), "hi", **STREAM)
    pieces = texts(r)
    assert [p for p in pieces if p] == ["a", "é", "🎉", "\ufffd"]
    answers = [a.arrays() for a in r.sender.responses]
    assert [a["num_output_tokens"].item() for a in answers] == [1] * 7 + [3, 0]
    total = ask(rig.load(accumulate_tokens="True"), "hi", **STREAM)
    assert texts(total)[-3:] == ["aé🎉", "aé🎉", "aé🎉\ufffd"]


def test_a_stop_word_ends_a_stream_and_the_engine(rig: Rig) -> None:
    def engine(_: ModelRequest) -> Responses:
        for i in T.encode("ab\n\nUser: more"):
            yield response([i])
        assert rig.stops
        yield response(T.encode("late"))

    rig.engine = engine
    r = ask(rig.load(), "hi", stop_words=strings("\n\nUser"), **STREAM)
    assert "".join(texts(r)) == "ab\n\nUser"
    assert rig.stops == [rig.seen[0].id]


def test_rows_are_answered_each_by_itself(rig: Rig) -> None:
    first, second = T.encode("é")
    rig.engine = lambda _: iter(
        [
            response([first], batch_index=0),
            response(T.encode("x"), batch_index=1),
            response([second], batch_index=0),
        ]
    )
    stream = {"stream": np.ones((2, 1), np.bool_)}
    r = ask(rig.load(), "hi", "you", **stream)
    assert texts(r) == ["", "x", "é"]
    index = [a.arrays()["batch_index"].tolist() for a in r.sender.responses]
    assert index == [[[0]], [[1]], [[0]]]


def test_the_engines_own_text_is_passed_on(rig: Rig) -> None:
    rig.engine = lambda _: iter([response([], "a"), response([], "b", batch_index=0)])
    r = ask(rig.load(text_from_engine="true"), "hi", **STREAM)
    assert texts(r) == ["a", "b"]
    assert "output_ids" not in rig.seen[0].outputs
    assert "text_output" in rig.seen[0].outputs
    more = rig.load(text_from_engine="true", accumulate_tokens="1")
    assert texts(ask(more, "hi", **STREAM)) == ["a", "ab"]


# Answers all at once ------------------------------------------------------------------------
def test_a_model_that_is_not_decoupled_answers_once(rig: Rig) -> None:
    rig.engine = lambda r: iter(
        [
            response(T.encode("second"), batch_index=1),
            response(T.encode("1st"), batch_index=0),
        ][-len(r.tensors["input_ids"]) :]
    )
    model = rig.load(decoupled=False)
    (both,) = ask(model, "hi", "you").sender.wait()
    assert both.arrays()["text_output"].tolist() == [b"1st", b"second"]
    assert both.arrays()["batch_index"].tolist() == [[0], [1]]
    assert texts(ask(model, "hi")) == ["1st"]
    refused = ask(model, "hi", **STREAM).sender
    assert refused.error().startswith("stream: tensorrt_llm_bls answers all at once")
    rig.engine = lambda _: iter([])
    assert ask(model, "hi").sender.error() == "tensorrt_llm: ended without an answer"


# Errors -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "more, words",
    [
        ({"text_input": strings(b"a\xff")}, "text_input: expected UTF-8, found byte 0xff"),
        ({"text_input": np.empty((1, 0), object)}, "text_input: required"),
        ({"max_tokens": ints(0)}, "max_tokens: expected at least 1, found 0"),
        ({"image_url_input": strings("x")}, "image_url_input: images are not supported"),
        ({"num_draft_tokens": ints(2)}, "num_draft_tokens: speculative decoding"),
        ({"prompt_format": strings("x")}, "prompt_format: expected raw"),
    ],
)
def test_a_bad_request_is_refused_before_the_engine(
    rig: Rig, more: dict[str, Any], words: str
) -> None:
    sender = ask(rig.load(), "hi", **more).sender
    assert sender.error().startswith(words)
    assert len(sender.responses) == 1
    assert sender.responses[0].error().code() == TritonError.INVALID_ARG
    assert rig.seen == []


def test_neutral_values_of_what_is_refused_pass(rig: Rig) -> None:
    rig.engine = lambda _: iter([response(T.encode("ok"))])
    more = {"num_draft_tokens": ints(0), "image_url_input": strings("")}
    assert texts(ask(rig.load(), "hi", **more)) == ["ok"]


def test_an_error_of_the_engine_goes_on_with_its_code(rig: Rig) -> None:
    def engine(_: ModelRequest) -> Responses:
        yield response(T.encode("a"))
        yield InferenceResponse(error=TritonError("the engine's words", TritonError.UNAVAILABLE))

    rig.engine = engine
    sender = ask(rig.load(), "hi", **STREAM).sender
    assert sender.error() == "the engine's words"
    assert sender.responses[-1].error().code() == TritonError.UNAVAILABLE
    assert sender.responses[0].arrays()["text_output"].tolist() == [b"a"]
    assert rig.stops == [rig.seen[0].id]  # other rows of the request may still run


def test_an_error_nobody_foresaw_ends_the_request(rig: Rig) -> None:
    def engine(_: ModelRequest) -> Responses:
        yield response(T.encode("a"))
        raise OSError("pipe")

    rig.engine = engine
    sender = ask(rig.load(), "hi", **STREAM).sender
    assert sender.error() == "unexpected OSError: pipe"
    assert len(rig.errors) == 1
    rig.errors.clear()
    left = [1, 2]

    def wrong(_: ModelRequest) -> Responses:
        while left:
            left.pop()
            yield InferenceResponse([Tensor("cum_log_probs", ints(1))])

    rig.engine = wrong
    assert ask(rig.load(), "hi").sender.error() == "tensorrt_llm: no output_ids in its response"
    assert left == []


# Clients that leave, and many one after another -------------------------------------------------
@pytest.mark.parametrize("decoupled", [True, False])
def test_a_client_that_left_in_the_queue_costs_nothing(rig: Rig, decoupled: bool) -> None:
    r = request("hi")
    r.sender.cancelled = True
    rig.load(decoupled).execute([r])
    assert rig.seen == []
    assert not texts(r) if decoupled else r.sender.error() == "cancelled"


@pytest.mark.parametrize("decoupled", [True, False])
def test_a_client_that_leaves_stops_the_engine(
    rig: Rig, decoupled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bls, "POLL_SECONDS", 0)
    r, other = request("hi"), request("you")
    fetched = []

    def engine(_: ModelRequest) -> Responses:
        for i, token in enumerate(T.encode("abcdef")):
            r.sender.cancelled = i == 2
            yield response([token])
            fetched.append(i)

    rig.engine = engine
    model = rig.load(decoupled)
    model.execute([r])
    if decoupled:
        assert "".join(texts(r)) == "abc"
    else:
        assert r.sender.error() == "cancelled"
        assert r.sender.responses[0].error().code() == TritonError.CANCELLED
    assert rig.stops == [rig.seen[0].id]
    assert fetched == [*range(6)]  # the engine is never left waiting
    asked = r.sender.asked
    rig.engine = lambda _: iter([response(T.encode("ok"))])
    model.execute([other])
    assert texts(other) == ["ok"]
    assert r.sender.asked == asked


def test_a_client_is_not_looked_after_at_every_token(rig: Rig) -> None:
    rig.engine = lambda _: iter([response([i]) for i in T.encode("abcdef")])
    assert ask(rig.load(), "hi", **STREAM).sender.asked <= 1


def test_requests_of_one_call_are_answered_in_order(rig: Rig) -> None:
    def engine(r: ModelRequest) -> Responses:
        number = T.decode(r.tensors["input_ids"][0].tolist())
        return iter([response(T.encode(f"answer {number}"))])

    rig.engine = engine
    requests = [request(b"\xff" if i == 3 else f"{i}") for i in range(6)]
    rig.load().execute(requests)
    assert requests.pop(3).sender.error().startswith("text_input: expected UTF-8")
    assert [texts(r)[0] for r in requests] == [f"answer {i}" for i in (0, 1, 2, 4, 5)]
    assert len({r.id for r in rig.seen}) == 5


# Loading ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "parameters, words",
    [
        ({"tokenizer_dir": "../no"}, "tokenizer_dir: expected the tokenizer's folder, found"),
        ({"text_from_engine": "perhaps"}, "text_from_engine: expected true or false"),
        ({"tensorrt_llm_draft_model_name": "d"}, "tensorrt_llm_draft_model_name: not supported"),
        ({"multimodal_encoders_name": "d"}, "multimodal_encoders_name: not supported"),
    ],
)
def test_load_fails_with_one_line(rig: Rig, parameters: dict[str, str], words: str) -> None:
    with pytest.raises(TritonModelException, match=words) as e:
        rig.load(**parameters)
    assert "\n" not in str(e.value)


def test_the_engines_own_text_needs_no_tokenizer(rig: Rig) -> None:
    rig.load(text_from_engine="true", tokenizer_dir="../no")
