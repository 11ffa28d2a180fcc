"""Each bad request gets an error of its own that says what is wrong; nobody else notices."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import serving_rig as rig
from serving_model import MAX_SEQ_LEN, POISON, POISON_ID, Reference
from serving_server import Server

NAN, INF = float("nan"), float("inf")
IDS = [72, 101, 108]

# For tensorrt_llm: (what is wrong in the inputs, what the error says).
DIRECT: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"input_ids": None}, "input_ids: expected token ids .batch, length., found none"),
    "empty prompt": ({"input_ids": []}, "input_ids: the prompt is empty"),
    "long prompt": (
        rig.direct([1] * (MAX_SEQ_LEN + 1), 4),
        f"input_ids: the prompt has {MAX_SEQ_LEN + 1} tokens, this server takes at most {MAX_SEQ_LEN}",
    ),
    "id past the vocabulary": ({"input_ids": [1, 2, 264]}, "input_ids: expected ids 0..263, found 1..264"),
    "negative id": ({"input_ids": [1, 2, -7]}, "input_ids: expected ids 0..263, found -7..2"),
    "negative length": ({"input_lengths": -2}, "input_lengths: expected 1..3, .* found -2"),
    "zero length": ({"input_lengths": 0}, "prompt is empty"),
    "length past the ids": ({"input_lengths": 4}, "input_lengths: expected 1..3, .* found 4"),
    "zero tokens": ({"request_output_len": 0}, "request_output_len .*: expected 1..4096, found 0"),
    "negative tokens": ({"request_output_len": -5}, "request_output_len .*: expected 1.., .*|found -5"),
    "too many tokens": ({"request_output_len": 10**6}, "request_output_len .*found 1000000"),
    "NaN temperature": ({"temperature": NAN, "runtime_top_k": 9}, "temperature: .* found nan"),
    "infinite temperature": ({"temperature": INF, "runtime_top_k": 9}, "temperature: .* found inf"),
    "negative temperature": ({"temperature": -1.0}, "temperature: .* found -1.0"),
    "top_p above 1": ({"runtime_top_p": 1.5}, "top_p.*: .* found 1.5"),
    "NaN top_p": ({"runtime_top_p": NAN}, "top_p.*: .* found nan"),
    "negative top_k": ({"runtime_top_k": -3}, "top_k.*: .* found -3"),
    "repetition penalty": ({"repetition_penalty": 0.0}, "repetition_penalty: .* found 0.0"),
    "NaN penalty": ({"presence_penalty": NAN}, "presence_penalty: .* found nan"),
    "min_tokens": ({"min_tokens": -1}, "min_tokens: .* found -1"),
    "end_id": ({"end_id": 264}, "end_id: .* found 264"),
    "beams": ({"beam_width": 4}, "beam_width: 4: not supported"),
    "sequences": ({"num_return_sequences": 2}, "num_return_sequences: 2: not supported"),
    "lora": ({"lora_task_id": 1}, "lora_task_id: 1: not supported"),
    "logits": ({"return_context_logits": True}, "return_context_logits: True: not supported"),
    "guide": ({"guided_decoding_guide_type": "json"}, "guided_decoding_guide_type: .*not supported"),
    "draft": ({"draft_input_ids": [5]}, "draft_input_ids: 5: not supported"),
    "bias": ({"embedding_bias": [NAN] * 264}, "embedding_bias: expected finite numbers"),
    "poison": (rig.direct([1, POISON_ID, 2], 4), "logits: not finite"),
    "stop words: shape": (
        {"stop_words_list": np.ones((1, 3, 2), np.int32)},
        r"unexpected shape for input 'stop_words_list' .* Expected \[-1,2,-1\], got \[1,3,2\]",
    ),
    "stop words: ends": (
        {"stop_words_list": np.array([[[1, 2], [2, 1]]], np.int32)},
        r"stop_words_list: offsets: expected them to grow from 1, found \[2, 1\]",
    ),
    "stop words: end past the ids": (
        {"stop_words_list": np.array([[[1, 2], [5, -1]]], np.int32)}, "stop_words_list: .*5",
    ),
    "stop words: -1 between": (
        {"stop_words_list": np.array([[[1, 2], [-1, 2]]], np.int32)}, "stop_words_list: .*-1",
    ),
    "bad words: id": (
        {"bad_words_list": np.array([[[999], [1]]], np.int32)}, "bad_words_list: .*999",
    ),
    "batch": (
        {"input_ids": np.ones((2, 3), np.int32)}, r"(input_lengths|batch)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*DIRECT])
def test_direct(server: Server, name: str) -> None:
    wrong, says = DIRECT[name]
    inputs = {**rig.direct(IDS, 8), "streaming": True, **wrong}
    values = {k: v for k, v in inputs.items() if v is not None}
    with pytest.raises(rig.ServerError, match=says) as e:
        list(rig.Stream(server.grpc, "tensorrt_llm", values))
    assert_clear(e.value.text)


# For the models that take text.
TEXT: dict[str, tuple[dict[str, Any], str]] = {
    "empty text": ({"text_input": ""}, "empty"),
    "long text": ({"text_input": "x" * (MAX_SEQ_LEN + 1)}, f"prompt has {MAX_SEQ_LEN + 1} tokens"),
    "NaN temperature": ({"temperature": NAN, "top_k": 5}, "temperature: .* found nan"),
    "zero tokens": ({"max_tokens": 0}, "max_tokens.*0"),
    "negative tokens": ({"max_tokens": -4}, "max_tokens.*-4"),
    "top_p": ({"top_p": 2.0}, "top_p.*: .* found 2.0"),
    "beams": ({"beam_width": 2}, "beam_width: 2: not supported"),
    "poison": ({"text_input": f"so {POISON} it"}, "logits: not finite"),
    "prompt format": ({"prompt_format": "yaml"}, "prompt_format.*yaml"),
    "messages: no JSON": ({"prompt_format": "messages", "text_input": "[{"}, "messages|JSON"),
    "messages: no role": (
        {"prompt_format": "messages", "text_input": '[{"content": "x"}]'}, "role",
    ),
    "bias": (
        {"embedding_bias_words": ["a", "b"], "embedding_bias_weights": [1.0]}, "embedding_bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
@pytest.mark.parametrize("name", [*TEXT])
def test_text(server: Server, model: str, name: str) -> None:
    wrong, says = TEXT[name]
    inputs = {"text_input": "hello", "max_tokens": 8, **wrong}
    values = {k: v for k, v in inputs.items() if v is not None}
    with pytest.raises(rig.ServerError, match=says) as e:
        rig.generate(server.http, model, values)
    assert_clear(e.value.text)
    with pytest.raises(rig.ServerError, match=says) as e:
        list(rig.Stream(server.grpc, model, {**values, "stream": True}))
    assert_clear(e.value.text)


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_no_text(server: Server, model: str) -> None:
    with pytest.raises(rig.ServerError, match=r"missing required input\(s\) \['text_input'\]"):
        rig.generate(server.http, model, {"max_tokens": 8})
    # The server counts inputs only: with an optional one in its place the model has to look.
    says = "text_input: " if model == "tensorrt_llm_bls" else "exactly 1 response"
    with pytest.raises(rig.ServerError, match=says):
        rig.generate(server.http, model, {"max_tokens": 8, "seed": 1})


def assert_clear(text: str) -> None:
    """One line for a person, without a traceback or paths of the server."""
    assert "\n" not in text
    assert "Traceback" not in text
    assert ".py" not in text


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_bad_utf8(server: Server, model: str) -> None:
    """As bytes in JSON and in a tensor; also in stop words."""
    body = b'{"text_input": "a\xff\xfeb", "max_tokens": 4}'
    with pytest.raises(rig.ServerError, match="UTF-8") as e:
        rig.generate(server.http, model, body)
    assert_clear(e.value.text)
    for name in ("text_input", "stop_words", "bad_words"):
        inputs = {"text_input": "hello", "max_tokens": 4, name: b"a\xff\xfeb"}
        with pytest.raises(rig.ServerError, match="UTF-8") as e:
            list(rig.Stream(server.grpc, model, inputs))
        assert_clear(e.value.text)


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
@pytest.mark.parametrize("words", [3, [True], {"a": 1}, None, 1.5])
def test_stop_words_of_a_wrong_type(server: Server, model: str, words: Any) -> None:
    """In JSON: refused by the server itself."""
    body = {"text_input": "hello", "max_tokens": 4, "stop_words": words}
    with pytest.raises(rig.ServerError, match=r"stop_words|JSON|[Uu]nable to parse|type") as e:
        rig.generate(server.http, model, body)
    assert e.value.status in (400, 500)


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_stop_words_of_a_wrong_tensor_type(server: Server, model: str) -> None:
    inputs = {"text_input": "hello", "max_tokens": 4, "stop_words": np.array([[1, 2]], np.int32)}
    with pytest.raises(rig.ServerError, match="stop_words"):
        list(rig.Stream(server.grpc, model, inputs))


@pytest.mark.parametrize("words", ["", [], ["", ""]])
def test_empty_stop_words_mean_none(server: Server, reference: Reference, words: Any) -> None:
    body = {"text_input": "hello", "max_tokens": 9, "stop_words": words, "bad_words": words}
    expected = reference.run("hello", max_new_tokens=9)
    assert rig.generate(server.http, "ensemble", body)["text_output"] == expected.text


def test_unknown_inputs(server: Server) -> None:
    inputs = {"text_input": "hello", "max_tokens": 4, "nonsense": 1}
    with pytest.raises(rig.ServerError, match="nonsense"):
        list(rig.Stream(server.grpc, "ensemble", inputs))
    with pytest.raises(rig.ServerError, match="unknown model"):
        list(rig.Stream(server.grpc, "nonsense", {"text_input": "hello", "max_tokens": 4}))


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"text_input": "\\ud800", "max_tokens": 1}'])
def test_bodies_that_are_no_json(server: Server, body: bytes) -> None:
    with pytest.raises(rig.ServerError) as e:
        rig.generate(server.http, "ensemble", body)
    assert e.value.status in (400, 500)


def test_one_response_only_without_streaming(server: Server) -> None:
    """``/generate`` with ``stream`` is a mistake; it must not leave a request behind."""
    body = {"text_input": "hello", "max_tokens": 40, "end_id": -1, "stream": True}
    with pytest.raises(rig.ServerError, match="exactly 1 response"):
        rig.generate(server.http, "ensemble", body)


def test_bad_ones_among_good_ones(server: Server, reference: Reference) -> None:
    """A poisoned request shares its steps with three good ones, again and again."""
    before = server.read()
    good = reference.run("good", max_new_tokens=300, ignore_eos=True)
    inputs = {"text_input": "good", "max_tokens": 300, "end_id": -1, "stream": True}
    body = {"text_input": f"x{POISON}", "max_tokens": 4}

    def work(i: int) -> str:
        if i < 3:
            return "".join(rig.text_of(r) for r in rig.Stream(server.grpc, "ensemble", inputs))
        for _ in range(20):
            with pytest.raises(rig.ServerError, match="not finite"):
                rig.generate(server.http, "ensemble", body)
        return ""

    assert rig.in_parallel(4, work) == [good.text] * 3 + [""]
    after = rig.wait_idle(server.metrics)
    assert (
        after("requests_total", outcome="error") == before("requests_total", outcome="error") + 20
    )


def test_error_in_the_middle_of_a_stream(server: Server, reference: Reference) -> None:
    """The error comes after what was made before it, and ends the stream."""
    # The token after the first is forced to be the poison.
    bias = np.zeros((1, 264), np.float32)
    bias[0, POISON_ID] = 1e4
    ids = reference.tokenizer.encode("hello")
    stream = rig.Stream(
        server.grpc, "tensorrt_llm", rig.direct(ids, 9, embedding_bias=bias, streaming=True)
    )
    response, final = stream.next()
    assert not final
    assert response["output_ids"].tolist() == [[[POISON_ID]]]
    with pytest.raises(rig.ServerError, match="not finite"):
        list(stream)


def test_json_of_control_characters(server: Server, reference: Reference) -> None:
    """Text with every byte below 128 in it goes in and out unharmed."""
    text = "".join(map(chr, range(128)))
    body = {"text_input": text, "max_tokens": 4, "exclude_input_in_output": False}
    expected = reference.run(text, max_new_tokens=4)
    for model in ("ensemble", "tensorrt_llm_bls"):
        answer = json.dumps(rig.generate(server.http, model, body)["text_output"])
        assert answer == json.dumps(text + expected.text)
