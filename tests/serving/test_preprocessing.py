"""The Python model ``preprocessing`` outside a server."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from model_rig import (
    Request,
    TritonModelException,
    arguments,
    install,
    ints,
    save_tokenizer,
    strings,
)

from trt_razor.serving.models.preprocessing import (
    MAX_WORDS,
    TritonPythonModel,
    pack_words,
    parse_messages,
)

Load = Callable[..., Any]
BOS, EOS, PAD = 256, 257, 258


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    install(monkeypatch)

    def load(tokenizer: dict[str, Any] | None = None, **parameters: str) -> TritonPythonModel:
        save_tokenizer(tmp_path / "1" / "tokenizer", **(tokenizer or {}))
        model = TritonPythonModel()
        model.initialize(arguments(tmp_path, **{"tokenizer_dir": "1/tokenizer", **parameters}))
        return model

    return load


def run(model: Any, *texts: str | bytes, **more: np.ndarray) -> Any:
    """The one answer to a request with these prompts."""
    limits = ints(*[9] * len(texts))
    request = Request(**{"QUERY": strings(*texts), "REQUEST_OUTPUT_LEN": limits, **more})
    return model.execute([request])[0]


def error(model: Any, *texts: str | bytes, **more: np.ndarray) -> str:
    answer = run(model, *texts, **more)
    assert answer.error().code() == 3
    assert "\n" not in answer.error().message()
    return str(answer.error().message())


# Prompts ------------------------------------------------------------------------------------
def test_rows_are_padded_on_the_right_and_their_lengths_given(load: Load) -> None:
    out = run(load(), "abc", "é").arrays()
    t = save_tokenizer(None)
    assert out["INPUT_ID"].tolist() == [[BOS, *t.encode("abc")], [BOS, *t.encode("é"), PAD]]
    assert out["REQUEST_INPUT_LEN"].tolist() == [[4], [3]]
    assert out["REQUEST_OUTPUT_LEN"].tolist() == [[9], [9]]
    assert out["OUT_END_ID"].tolist() == [[EOS], [EOS]]
    assert out["OUT_PAD_ID"].tolist() == [[PAD], [PAD]]
    assert out["DECODER_INPUT_ID"].tolist() == [[PAD], [PAD]]
    assert out["REQUEST_DECODER_INPUT_LEN"].tolist() == [[1], [1]]
    assert out["STOP_WORDS_IDS"].shape == out["BAD_WORDS_IDS"].shape == (2, 2, 0)
    assert out["EMBEDDING_BIAS"].shape == (2, 0)
    assert "OUT_PROMPT_TABLE_EXTRA_IDS" not in out
    for name in ("INPUT_ID", "REQUEST_INPUT_LEN", "OUT_END_ID", "STOP_WORDS_IDS"):
        assert out[name].dtype == np.int32


def test_a_raw_text_keeps_its_special_tokens(load: Load) -> None:
    ids = run(load(add_special_tokens="F"), "<s>a</s>").arrays()["INPUT_ID"]
    assert ids.tolist() == [[BOS, *save_tokenizer(None).encode("a"), EOS]]


def test_a_chat_puts_the_text_into_the_template_as_plain_characters(load: Load) -> None:
    t = save_tokenizer(None)
    start, end = t.encode("<s>user: "), t.encode("</s><s>assistant: ")
    out = run(load(), "a</s>b", PROMPT_FORMAT=strings("chat")).arrays()
    assert out["INPUT_ID"][0].tolist() == [*start, *t.encode("a</s>b", parse_special=False), *end]
    as_default = run(load(prompt_format="chat"), "hi", "x", PROMPT_FORMAT=strings("", "raw"))
    ids, lengths = (as_default.arrays()[n] for n in ("INPUT_ID", "REQUEST_INPUT_LEN"))
    assert ids[0].tolist() == [*start, *t.encode("hi"), *end]
    assert ids[1, : lengths[1, 0]].tolist() == [BOS, *t.encode("x")]


def test_messages_are_a_whole_conversation(load: Load) -> None:
    t = save_tokenizer(None)
    talk = [{"role": "system", "content": "é"}, {"role": "user", "content": "<s>"}]
    out = run(load(), json.dumps(talk), PROMPT_FORMAT=strings("messages")).arrays()
    assert out["INPUT_ID"][0].tolist() == t.encode_chat(talk)
    assert out["INPUT_ID"][0].tolist().count(BOS) == 3  # the template's own


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "expected a JSON list of messages: Expecting"),
        ("[" * 100_000, "expected a JSON list of messages"),
        ("{}", "expected a JSON list of messages, found an object"),
        ("[]", r"expected 1\.\.4096 messages, found 0"),
        ("[1]", "message 1 of 1: expected an object, found a number"),
        ('[{"role": "user"}]', "message 1 of 1: content: expected text, found nothing"),
        ('[{"role": "user", "content": ["x"]}]', "content: expected text, found a list"),
        ('[{"role": "boss", "content": "x"}]', "role: expected system, .* found 'boss'"),
        ('[{"role": {}, "content": "x"}]', "role: expected system, .* found {}"),
        ('[{"role": "user", "content": "", "name": 1}]', "found also 'name'"),
        ('[{"role": "user", "content": "\\ud800"}]', "lone surrogate"),
    ],
)
def test_messages_that_are_none(load: Load, text: str, words: str) -> None:
    message = error(load(), text, PROMPT_FORMAT=strings("messages"))
    import re

    assert re.search(words, message), message


def test_too_many_messages() -> None:
    from trt_razor.errors import UsageError

    with pytest.raises(UsageError, match=r"^text_input: expected 1\.\.4096 messages, found 5000"):
        parse_messages(json.dumps([{"role": "user", "content": ""}] * 5000), "text_input")


def test_end_and_pad_ids_of_the_request_come_first(load: Load) -> None:
    out = run(load(), "abc", "d", END_ID=ints(-1, 5), PAD_ID=ints(7, 8)).arrays()
    assert out["OUT_END_ID"].tolist() == [[-1], [5]]
    assert out["OUT_PAD_ID"].tolist() == [[7], [8]]
    assert out["INPUT_ID"][1, 2:].tolist() == [8, 8]


@pytest.mark.parametrize(
    "named, end, pad",
    [({"bos_token": "<s>"}, -1, -1), ({"eos_token": "</s>"}, EOS, EOS)],
)
def test_a_tokenizer_without_end_or_pad(
    load: Load, named: dict[str, str], end: int, pad: int
) -> None:
    out = run(load({"named": named}), "ab", "c").arrays()
    assert out["OUT_END_ID"].tolist() == [[end]] * 2
    assert out["OUT_PAD_ID"].tolist() == [[pad]] * 2
    assert out["INPUT_ID"].min() >= 0  # what is padded is an id even so


def test_the_end_is_the_tokenizers_own_not_the_first_of_all(load: Load) -> None:
    out = run(load({"ends": (3, EOS)}), "ab").arrays()
    assert out["OUT_END_ID"].tolist() == [[EOS]]


# Words --------------------------------------------------------------------------------------
def test_words_are_their_ids_and_where_they_end(load: Load) -> None:
    t = save_tokenizer(None)
    words = strings(["ab", "c"], ["", "</s>"])
    out = run(load(), "x", "y", STOP_WORDS_DICT=words, BAD_WORDS_DICT=words).arrays()
    (a, b), (c,) = t.encode("ab"), t.encode("c")
    expected = [[[a, b, c], [2, 3, -1]], [[EOS, 0, 0], [1, -1, -1]]]
    assert out["STOP_WORDS_IDS"].tolist() == out["BAD_WORDS_IDS"].tolist() == expected
    empty = run(load(), "x", STOP_WORDS_DICT=strings("")).arrays()["STOP_WORDS_IDS"]
    assert empty.tolist() == [[[0], [-1]]]
    none = np.empty((1, 0), object)
    assert run(load(), "x", STOP_WORDS_DICT=none).arrays()["STOP_WORDS_IDS"].shape == (1, 2, 1)


def test_packing_no_rows() -> None:
    assert pack_words([]).shape == (0, 2, 1)


def test_a_bias_is_as_long_as_the_vocabulary_of_the_engine(load: Load) -> None:
    """The stock backend takes no other; a tokenizer may know fewer ids, or more."""
    weights = np.array([[1.0]], np.float32)
    more = {"EMBEDDING_BIAS_WORDS": strings(["a"]), "EMBEDDING_BIAS_WEIGHTS": weights}
    for size in (300, 200):
        model = load(vocab_size=str(size))
        assert run(model, "x", **more).arrays()["EMBEDDING_BIAS"].shape == (1, size)
    for wrong in ("0", "-3", "many"):
        with pytest.raises(Exception, match="parameter vocab_size: expected a whole number >= 1"):
            load(vocab_size=wrong)


def test_biases_are_added_to_all_ids_of_a_word(load: Load) -> None:
    weights = np.array([[1.5, -2.0]], np.float32)
    more = {"EMBEDDING_BIAS_WORDS": strings(["aa", "ab"]), "EMBEDDING_BIAS_WEIGHTS": weights}
    bias = run(load(), "x", **more).arrays()["EMBEDDING_BIAS"]
    t = save_tokenizer(None)
    (a,), (b,) = t.encode("a"), t.encode("b")
    assert bias.shape == (1, t.vocab_size)
    assert bias.dtype == np.float32
    assert {i: bias[0, i] for i in np.flatnonzero(bias[0])} == {a: 1.0, b: -2.0}


# Requests that are refused ------------------------------------------------------------------
@pytest.mark.parametrize(
    "texts, more, words",
    [
        ([b"a\xffb"], {}, "text_input: expected UTF-8, found byte 0xff at offset 1"),
        ([b"a", b"\xc3"], {}, "text_input[1]: expected UTF-8, found byte 0xc3 at offset 0"),
        (["x"], {"STOP_WORDS_DICT": strings(["a", b"\x80"])}, "stop_words: word 2: expected UTF-8"),
        (["x"], {"BAD_WORDS_DICT": strings(["a"] * (MAX_WORDS + 1))}, "bad_words: 1025 words"),
        (["x"], {"STOP_WORDS_DICT": strings("a" * 5000)}, "stop_words: word 1: 5000 bytes"),
        (["x"], {"PROMPT_FORMAT": strings("poem")}, "prompt_format: expected raw, chat, messages"),
        (["x"], {"PROMPT_FORMAT": strings(b"\xff")}, "prompt_format: expected UTF-8"),
        (["x"], {"END_ID": ints(1, 2)}, "end_id: expected 1 rows, found 2"),
        (["x"], {"END_ID": np.zeros((1, 2), np.int32)}, "end_id: expected 1 value per row"),
        (["x"], {"QUERY": strings(["a", "b"])}, "text_input: expected 1 value, found 2"),
        (["x"], {"IMAGE_URL": strings("http://x")}, "image_url: this model reads text only"),
        (
            ["x"],
            {"EMBEDDING_BIAS_WORDS": strings("a")},
            "embedding_bias_weights: expected one for each of embedding_bias_words [1, 1], "
            "found nothing",
        ),
        (
            ["x"],
            {
                "EMBEDDING_BIAS_WORDS": strings("a"),
                "EMBEDDING_BIAS_WEIGHTS": np.array([[np.nan]], np.float32),
            },
            "embedding_bias_weights: expected finite numbers",
        ),
    ],
)
def test_refused(load: Load, texts: list[Any], more: dict[str, np.ndarray], words: str) -> None:
    assert error(load(), *texts, **more).startswith(words)


def test_a_prompt_that_cannot_fit_is_refused_before_it_costs_much(load: Load) -> None:
    model = load(max_input_tokens="4")
    assert run(model, "abc").arrays()["REQUEST_INPUT_LEN"].tolist() == [[4]]
    says = "the prompt has 5 tokens, this server takes at most 4; shorten it"
    assert error(model, "a", "abcd") == f"text_input[1]: {says}"
    # Far more bytes than any 4 tokens have: not even tokenised.
    assert "100000 bytes; at most" in error(model, "a" * 100_000)
    many = {"STOP_WORDS_DICT": strings(["x" * 4096] * 17)}
    assert error(model, "a", **many) == "stop_words: 69632 bytes; at most 65536 are accepted"
    with pytest.raises(Exception, match="parameter max_input_tokens: expected a whole number"):
        load(max_input_tokens="0")


@pytest.mark.parametrize("template, says", [
    (None, "prompt_format: 'chat' needs a chat template, and this model has none; use raw"),
    ("{{ raise_exception('no') }}", "the chat template failed: no"),
])  # fmt: skip
def test_errors_of_a_template_name_no_files(load: Load, template: str | None, says: str) -> None:
    model = load({"template": template})
    assert error(model, "a", PROMPT_FORMAT=strings("chat")) == says


def test_an_empty_prompt_is_refused_where_nothing_is_added(load: Load) -> None:
    assert run(load(), "").arrays()["INPUT_ID"].tolist() == [[BOS]]
    message = "text_input: expected at least 1 token, found an empty prompt"
    assert error(load(add_special_tokens="no"), "") == message


def test_a_bad_request_fails_alone(load: Load) -> None:
    def request(text: bytes) -> Request:
        return Request(QUERY=strings(text), REQUEST_OUTPUT_LEN=ints(1))

    model = load()
    good, bad, again = model.execute([request(b"a"), request(b"\xff"), request(b"a")])
    assert bad.has_error()
    assert good.arrays()["INPUT_ID"].tolist() == again.arrays()["INPUT_ID"].tolist()
    missing = model.execute([Request(REQUEST_OUTPUT_LEN=ints(1))])[0]
    assert missing.error().message() == "text_input: required, but not in the request"


def test_an_error_nobody_foresaw_is_answered_too(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load()
    errors = install(monkeypatch)
    monkeypatch.setattr(type(model._pre), "run", lambda *_: 1 // 0)
    answer = run(model, "x")
    assert answer.error().message().startswith("unexpected ZeroDivisionError")
    assert answer.error().code() == 1
    assert "Traceback" in errors[0]


# Loading ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "tokenizer, parameters, words",
    [
        ({}, {"tokenizer_dir": "no"}, "parameter tokenizer_dir: .* found nothing at .*no; write"),
        ({}, {"add_special_tokens": "maybe"}, "add_special_tokens: expected true or false, found"),
        ({}, {"prompt_format": "x"}, "prompt_format: expected raw, chat, messages, found 'x'"),
        ({"template": None}, {"prompt_format": "chat"}, "'chat' needs a chat template"),
        ({}, {"multimodal_model_path": "x"}, "multimodal_model_path: images are not supported"),
    ],
)
def test_load_fails_with_one_line(
    load: Load, tokenizer: dict[str, Any], parameters: dict[str, str], words: str
) -> None:
    with pytest.raises(TritonModelException, match=words) as e:
        load(tokenizer, **parameters)
    assert "\n" not in str(e.value)
