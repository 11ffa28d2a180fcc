"""Tensors of a request as prompts and sampling parameters, and every refusal in words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_models import TEMPLATE, byte_tokenizer_json

from trt_razor.errors import UsageError
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.sampling import SamplingParams
from trt_razor.serving import interface
from trt_razor.serving.requests import (
    GenerationRequest,
    Limits,
    prompt_text,
    read_request,
    wants_stop,
)
from trt_razor.serving.settings import EngineSettings
from trt_razor.serving.words import MAX_CHARACTERS, StopRules, stop_rules, words_of

LIMITS = Limits(264, 30, 50, frozenset({257, 3}))
TOKENIZER = Tokenizer(
    byte_tokenizer_json(), {"bos_token": "<s>", "eos_token": "</s>"}, 256, (257,), TEMPLATE, "test"
)
NAN, INF = float("nan"), float("inf")


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def flag(value: bool) -> np.ndarray:
    return np.array([value])


BASE: dict[str, np.ndarray] = {
    "input_ids": np.array([[1, 2, 4]], np.int32),
    "input_lengths": i32(3),
    "request_output_len": i32(5),
}


def read(**tensors: np.ndarray | None) -> GenerationRequest:
    given = {k: v for k, v in {**BASE, **tensors}.items() if v is not None}
    return read_request(given, LIMITS, TOKENIZER)


def params(**tensors: np.ndarray | None) -> SamplingParams:
    return read(**tensors).params[0]


def test_the_least_request_is_greedy_and_whole() -> None:
    r = read()
    assert r.prompts == ([1, 2, 4],)
    assert r.params == (SamplingParams(max_new_tokens=5, temperature=0.0),)
    assert r.exclude_input
    flags = (r.streaming, r.log_probs, r.perf_metrics, r.num_input_tokens, r.num_output_tokens)
    assert flags == (False,) * 5
    assert not read_request(BASE, LIMITS, None, exclude_input=False).exclude_input
    assert read(exclude_input_in_output=flag(False)).exclude_input is False


@pytest.mark.parametrize("k, p, t, expected", [
    (None, None, None, (0.0, 0, 1.0)),
    (None, None, 0.7, (0.0, 0, 1.0)),  # stock clients always send a temperature
    (0, 0.0, 1.0, (0.0, 0, 1.0)),
    (1, -1.0, 1.0, (0.0, 0, 1.0)),
    (40, None, None, (1.0, 40, 1.0)),
    (40, 0.0, 0.7, (0.7, 40, 1.0)),
    (40, 0.9, 0.7, (0.7, 40, 0.9)),
    (None, 0.9, 0.1, (0.1, 0, 0.9)),
    (0, 1.0, None, (1.0, 0, 1.0)),
    (1, 0.9, 0.7, (0.7, 1, 0.9)),
    (40, 0.9, 0.0, (0.0, 40, 0.9)),
])  # fmt: skip
def test_what_is_greedy_and_what_is_drawn(
    k: int | None, p: float | None, t: float | None, expected: tuple[float, int, float]
) -> None:
    found = params(
        runtime_top_k=None if k is None else i32(k),
        runtime_top_p=None if p is None else f32(p),
        temperature=None if t is None else f32(t),
    )
    # Decimals as the client wrote them, not the float32 beside them.
    assert (found.temperature, found.top_k, found.top_p) == expected


def test_everything_that_is_understood() -> None:
    hi = tuple(TOKENIZER.encode("hi"))
    found = params(
        seed=np.array([2**64 - 1], np.uint64),
        min_tokens=i32(2),
        repetition_penalty=f32(1.1),
        presence_penalty=f32(-0.3),
        frequency_penalty=f32(0.2),
        return_log_probs=flag(True),
        embedding_bias=f32(0, 0, -3.5, 0)[None],
        bad_words_list=np.array([[[5, 6, 7], [2, 3, -1]]], np.int32),
        stop_words_list=np.array([[[*hi, 257], [2, 3, -1]]], np.int32),
    )
    assert found == SamplingParams(
        max_new_tokens=5, temperature=0.0, seed=2**64 - 1, min_tokens=2, repetition_penalty=1.1,
        presence_penalty=-0.3, frequency_penalty=0.2, logprobs=True, logit_bias=((2, -3.5),),
        bad_words=((5, 6), (7,)), stop=("hi",), stop_token_ids=(257,),
        stop_sequences=(hi,),
    )  # fmt: skip


@pytest.mark.parametrize("end, ids, ignore", [
    (None, (), False), (257, (), False), (3, (), False), (-1, (), True), (9, (9,), True),
])  # fmt: skip
def test_end_id(end: int | None, ids: tuple[int, ...], ignore: bool) -> None:
    found = params(end_id=None if end is None else i32(end))
    assert (found.stop_token_ids, found.ignore_eos) == (ids, ignore)


def test_rows_of_a_batch_have_their_own_numbers() -> None:
    r = read(
        input_ids=np.array([[1, 2, 4], [5, 6, 0]], np.int32),
        input_lengths=np.array([[3], [2]], np.int32),
        request_output_len=np.array([[5], [7]], np.int32),
        runtime_top_k=i32(2, 1),
        temperature=f32(0.5, 0.6),
        seed=np.array([8, 9], np.uint64),
        stop_words_list=np.array([[[5, 0], [1, -1]], [[0, 0], [-1, -1]]], np.int32),
        streaming=np.array([True, True]),
    )
    assert r.prompts == ([1, 2, 4], [5, 6])
    assert [p.max_new_tokens for p in r.params] == [5, 7]
    assert [p.seed for p in r.params] == [8, 9]
    assert [p.temperature for p in r.params] == [0.5, 0.0]
    assert [p.stop_sequences for p in r.params] == [((5,),), ()]
    assert r.streaming


def test_a_padded_row_is_trimmed() -> None:
    assert read(input_lengths=i32(2)).prompts == ([1, 2],)
    assert read(input_lengths=None).prompts == ([1, 2, 4],)


@pytest.mark.parametrize("tensors", [
    {"beam_width": i32(1)}, {"beam_width": i32(0)}, {"num_return_sequences": i32(1)},
    {"decoder_input_ids": np.array([[7]], np.int32), "decoder_input_lengths": i32(1)},
    {"pad_id": i32(5)}, {"len_penalty": f32(2.0)}, {"early_stopping": flag(True)},
    {"embedding_bias": np.zeros((1, 0), np.float32)}, {"embedding_bias": np.zeros((1, 9), np.float32)},
    {"stop_words_list": np.zeros((1, 2, 0), np.int32)}, {"stop_words_list": np.array([[[0], [-1]]], np.int32)},
    {"return_context_logits": flag(False), "return_generation_logits": flag(False)},
    {"prompt_embedding_table": np.zeros((1, 0, 0), np.float16), "prompt_vocab_size": i32(0)},
    {"prompt_table_extra_ids": np.zeros((1, 4), np.uint64)}, {"lora_task_id": np.zeros(0, np.uint64)},
    {"guided_decoding_guide_type": np.array([[b""]], object)}, {"runtime_top_p_decay": f32(1.0)},
    {"draft_input_ids": np.zeros((1, 0), np.int32)}, {"min_tokens": i32(0)},
])  # fmt: skip
def test_values_that_change_nothing_pass(tensors: dict[str, np.ndarray]) -> None:
    assert read(**tensors) == read()


REFUSED: list[tuple[str, np.ndarray, str]] = [
    ("beam_width", i32(4), "beam_width: 4: not supported by this engine; .* set it to 1"),
    ("beam_width", i32(-1), "beam_width: -1: not supported"),
    ("num_return_sequences", i32(2), "num_return_sequences: 2: not supported"),
    ("lora_task_id", np.array([0], np.uint64), "lora_task_id: 0: not supported"),
    ("prompt_embedding_table", np.ones((1, 2, 2), np.float16), r"a tensor \[1, 2, 2\]: not"),
    ("draft_input_ids", np.array([[1]], np.int32), "draft_input_ids: 1: not supported"),
    ("guided_decoding_guide_type", np.array([[b"json"]], object), "guide_type: 'json': not"),
    ("return_context_logits", flag(True), "return_context_logits: True: not supported"),
    ("return_generation_logits", flag(True), "return_generation_logits: True: not"),
    ("runtime_top_p_decay", f32(0.5), "runtime_top_p_decay: 0.5: not supported"),
    ("lookahead_window_size", i32(3), "lookahead_window_size: 3: not supported"),
    ("encoder_input_features", f32(NAN)[None], "encoder_input_features: nan: not supported"),
    ("something_new", i32(1), "something_new: 1: not supported"),
    ("temperature", f32(NAN), "^temperature: expected a number in 0 .. 10000, found nan"),
    ("temperature", f32(INF), "^temperature: .* found inf"),
    ("temperature", f32(-0.5), "^temperature: .* found -0.5"),
    ("temperature", f32(1, 1), r"^temperature: expected 1 number for each of 1 rows, found \[2\]"),
    ("runtime_top_p", f32(NAN), "top_p.*: expected a number up to 1, found nan"),
    ("runtime_top_p", f32(1.01), "top_p.* found 1.01"),
    ("runtime_top_p", f32(-INF), "top_p.* found -inf"),
    ("runtime_top_k", i32(-1), "top_k.*: expected an integer >= 0, found -1"),
    ("runtime_top_k", f32(2.0), "runtime_top_k: expected an integer"),
    ("repetition_penalty", f32(0), r"repetition_penalty: expected a number in \(0, 100\], found 0.0"),
    ("repetition_penalty", f32(NAN), "repetition_penalty: .* nan"),
    ("presence_penalty", f32(INF), r"presence_penalty: expected a number in \[-100, 100\]"),
    ("frequency_penalty", f32(-101), "frequency_penalty: .* -101.0"),
    ("min_tokens", i32(6), r"min_tokens: expected 0..5 \(request_output_len\), found 6"),
    ("min_tokens", i32(-1), "min_tokens: .* found -1"),
    ("request_output_len", i32(0), r"max_tokens\): expected 1..50, found 0"),
    ("request_output_len", i32(51), "expected 1..50, found 51"),
    ("end_id", i32(264), "end_id: expected an id 0..263, or -1 for none, found 264"),
    ("end_id", i32(-2), "end_id: .* found -2"),
    ("input_ids", np.array([[1, 264, -1]], np.int32), "input_ids: expected ids 0..263, found -1..264"),
    ("input_ids", i32(1, 2, 3), r"input_ids: expected int32 \[batch, length\], found int32 \[3\]"),
    ("input_ids", np.zeros((0, 3), np.int32), "input_ids: expected at least 1 row"),
    ("input_ids", np.zeros((1, 0), np.int32), "the prompt is empty"),
    ("input_lengths", i32(0), "the prompt is empty"),
    ("input_lengths", i32(-3), "input_lengths: expected 1..3, .*, found -3"),
    ("input_lengths", i32(4), "input_lengths: expected 1..3, .*, found 4"),
    ("input_lengths", i32(1, 2), "input_lengths: expected 1 number for each of 1 rows"),
    ("embedding_bias", np.ones((1, 265), np.float32), r"embedding_bias: expected \[1, up to 264\]"),
    ("embedding_bias", f32(NAN)[None], "embedding_bias: expected finite numbers"),
]  # fmt: skip


@pytest.mark.parametrize("name, value, message", REFUSED, ids=lambda x: str(x)[:24])
def test_every_refusal_says_what_and_why(name: str, value: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match=message) as e:
        read(**{name: value})
    assert "\n" not in str(e.value)


def test_what_is_missing_or_too_long() -> None:
    with pytest.raises(UsageError, match=r"input_ids: expected token ids .* found none"):
        read(input_ids=None)
    with pytest.raises(UsageError, match="request_output_len: expected the number of tokens"):
        read(request_output_len=None)
    with pytest.raises(UsageError, match="the prompt has 31 tokens, this server takes at most 30"):
        read(input_ids=np.ones((1, 31), np.int32), input_lengths=i32(31))
    with pytest.raises(UsageError, match=r"^row 1 of 2: input_lengths: expected 1..3, .*, found 9"):
        read(input_ids=np.ones((2, 3), np.int32), input_lengths=i32(3, 9))
    with pytest.raises(UsageError, match=r"^row 1 of 2: min_tokens: expected 0..5"):
        read(
            input_ids=np.ones((2, 3), np.int32), input_lengths=i32(3, 3),
            request_output_len=i32(5, 5), min_tokens=i32(1, 7),
        )  # fmt: skip


def test_every_public_input_is_understood_neutral_or_refused() -> None:
    """None is ignored by accident: a value that asks for something is told so."""
    silent = {
        "decoder_input_ids", "decoder_input_lengths", "pad_id", "len_penalty", "early_stopping",
        "beam_search_diversity_rate", "runtime_top_p_min", "runtime_top_p_reset_ids",
        "prompt_vocab_size", "draft_acceptance_threshold",
    }  # fmt: skip
    read_by_us = {
        "input_ids", "input_lengths", "request_output_len", "end_id", "stop_words_list",
        "bad_words_list", "embedding_bias", "temperature", "runtime_top_k", "runtime_top_p",
        "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "seed",
        "return_log_probs", "return_perf_metrics", "return_num_input_tokens",
        "return_num_output_tokens", "exclude_input_in_output", "stop", "streaming",
    }  # fmt: skip
    names = {t.name for t in interface.PUBLIC["tensorrt_llm"].inputs}
    assert read_by_us | silent <= names
    for name in names - read_by_us - silent:
        with pytest.raises(UsageError, match=f"^{name}: 7: not supported by this engine"):
            read(**{name: i32(7)})


def test_stop_requests() -> None:
    assert wants_stop({"stop": np.array([[True]])})
    assert not wants_stop({"stop": flag(False)})
    assert not wants_stop({})


def test_prompt_text() -> None:
    ids = [256, *TOKENIZER.encode("né")]
    assert prompt_text(TOKENIZER, ids) == "né"
    assert prompt_text(None, ids) == ""


# Words ----------------------------------------------------------------------------------------
def words(ids: list[int], ends: list[int]) -> tuple[tuple[int, ...], ...]:
    return words_of({"w": np.array([[ids, ends]], np.int32)}, "w", 0, 1, 264)


def test_words() -> None:
    assert words([1, 2, 3, 0], [2, 3, -1, -1]) == ((1, 2), (3,))
    assert words([1, 2], [1, 2]) == ((1,), (2,))
    assert words([0], [-1]) == ()
    assert words_of({"w": np.array([[4, 5], [2, -1]], np.int32)}, "w", 0, 1, 264) == ((4, 5),)


@pytest.mark.parametrize("ids, ends, message", [
    ([1, 2], [0, -1], "w: offsets: expected them to grow from 1, found"),
    ([1, 2], [2, 1], "w: offsets: expected them to grow"),
    ([1, 2], [-2, -1], "w: offsets: expected them to grow"),
    ([1, 2], [3, -1], "w: offsets: expected at most 2, found"),
    ([1, 2, 3], [1, -1, 2], "w: offsets: expected -1 only at the end"),
    ([1, 264], [2, -1], "w: expected ids 0..263, found"),
    ([1, -1], [2, -1], "w: expected ids 0..263, found"),
])  # fmt: skip
def test_words_that_are_none(ids: list[int], ends: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        words(ids, ends)


@pytest.mark.parametrize("x", [
    np.zeros((1, 3, 4), np.int32), np.zeros((2, 2, 4), np.int32), np.zeros((4,), np.int32),
    np.zeros((1, 2, 4), np.float32), np.zeros((1, 2, 4097), np.int32),
])  # fmt: skip
def test_lists_of_a_wrong_form(x: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"^w: expected"):
        words_of({"w": x}, "w", 0, 1, 264)


def test_stop_rules() -> None:
    emoji = TOKENIZER.encode("🎉")
    ab = tuple(TOKENIZER.encode("ab"))
    given = [ab, (257,), (257, 97), tuple(emoji[:2]), ab]
    assert stop_rules(given, TOKENIZER) == StopRules(
        ("ab",), (257,), (ab, (257, 97), tuple(emoji[:2]), ab)
    )
    assert stop_rules(given, None) == StopRules((), (), tuple(given))
    assert stop_rules((), TOKENIZER) == StopRules()
    one = tuple(TOKENIZER.encode("abcdefgh")) * 4096
    assert len(stop_rules([one], TOKENIZER).texts[0]) == MAX_CHARACTERS
    with pytest.raises(UsageError, match=r"stop_words_list: expected at most 32768 .* found 32770"):
        stop_rules([one, ab], TOKENIZER)


# Settings -------------------------------------------------------------------------------------
def test_settings(tmp_path: Path) -> None:
    assert EngineSettings.from_parameters(
        {"gpt_model_path": "1/engine", "slots": ""}, tmp_path
    ) == (EngineSettings(tmp_path / "1/engine"))
    given = {
        "gpt_model_path": "/e", "slots": "3", "max_queue_size": "0", "max_input_tokens": "7",
        "max_output_tokens": "8", "verify": "false", "exclude_input_in_output": "False",
        "cancellation_check_period_ms": "50", "sink_token_length": "whatever",
    }  # fmt: skip
    found = EngineSettings.from_parameters(given, tmp_path)
    assert found == EngineSettings(Path("/e"), 3, 0, 7, 8, False, False, 50)


@pytest.mark.parametrize("name, values", [
    ("slots", ["0", "-1", "x", "1.5", "1_0", "٣", "9999999999"]), ("max_queue_size", ["-1", "no"]),
    ("verify", ["yes", "2"]), ("exclude_input_in_output", ["${x}"]), ("gpt_model_path", [""]),
    ("cancellation_check_period_ms", ["0"]),
])  # fmt: skip
def test_settings_that_are_none(name: str, values: list[str], tmp_path: Path) -> None:
    for value in values:
        given: dict[str, Any] = {"gpt_model_path": "/e", name: value}
        with pytest.raises(UsageError, match=f"^parameter {name}: expected"):
            EngineSettings.from_parameters(given, tmp_path)
