"""Answers of the model ``tensorrt_llm`` of our own engines, outside a server."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from engine_rig import Served, ask, imported
from fake_triton import FakeTriton

from trt_razor.cache_layout import kv_at
from trt_razor.engine import Engine
from trt_razor.generate import SamplingParams


@pytest.fixture(scope="module")
def triton() -> FakeTriton:
    return FakeTriton()


@pytest.fixture(scope="module")
def module(triton: FakeTriton) -> Iterator[Any]:
    with imported(triton) as module:
        yield module


@pytest.fixture(scope="module")
def served(module: Any, triton: FakeTriton, razor_engine: Engine) -> Iterator[Served]:
    served = Served(module, triton, razor_engine, slots="3", max_queue_size="4",
                    cancellation_check_period_ms="5")  # fmt: skip
    yield served
    served.model.finalize()


DRAWN = {"runtime_top_k": 9, "runtime_top_p": 0.9, "temperature": 0.7,
         "seed": np.array([3], np.uint64)}  # fmt: skip
DRAWN_PARAMS: dict[str, Any] = {"top_k": 9, "top_p": 0.9, "temperature": 0.7, "seed": 3}


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_answers_are_those_of_the_generator(served: Served, streaming: bool, drawn: bool) -> None:
    prompt = [256, 80, 81, 82, 83, 84, 85, 86]
    sender = served.one(prompt=prompt, count=20, streaming=streaming, **(DRAWN if drawn else {}))
    params = SamplingParams(max_new_tokens=20, **(DRAWN_PARAMS if drawn else {}))
    expected = served.expected(prompt, params)
    assert sender.ids() == expected.tokens
    assert sender.text() == expected.text
    assert not sender.misuse
    assert sender.threads == {"trt-razor-engine"}
    assert len(sender.responses) == (len(expected.tokens) if streaming else 1)
    reasons = [r.tensors["finish_reason"].item().decode() for r in sender.responses]
    assert reasons == [""] * (len(reasons) - 1) + [expected.finished]
    for r in sender.responses:
        t = r.tensors
        n = t["sequence_length"].item()
        assert n == (1 if streaming else len(expected.tokens))
        assert t["output_ids"].shape == (1, 1, n)
        assert {k: (v.shape, v.dtype) for k, v in t.items() if k != "output_ids"} == {
            "sequence_length": ((1, 1), np.int32),
            "text_output": ((1,), np.object_),
            "finish_reason": ((1, 1), np.object_),
            "kv_cache_used_bytes": ((1, 1), np.int64),
            "kv_cache_dense_bytes": ((1, 1), np.int64),
        }
    m = served.engine.manifest
    assert m.policy is not None
    assert served.engine.head_map is not None
    need = kv_at(m.spec, served.engine.head_map, m.policy, len(prompt) + 19, m.dtype)
    last = sender.responses[-1].tensors
    assert last["kv_cache_used_bytes"].item() == need.razor_bytes
    assert last["kv_cache_dense_bytes"].item() == need.full_bytes


def test_all_the_optional_outputs(served: Served) -> None:
    start = time.time_ns()
    flags = ("return_log_probs", "return_perf_metrics", "return_num_input_tokens",
             "return_num_output_tokens", "streaming")  # fmt: skip
    sender = served.one(**dict.fromkeys(flags, True))
    total = 0.0
    for r in sender.responses:
        t = r.tensors
        assert t["output_log_probs"].shape == (1, 1, 1)
        total += t["output_log_probs"].item()
        assert t["cum_log_probs"].item() == pytest.approx(total, abs=1e-5)
        assert t["cum_log_probs"].shape == (1, 1)
        assert (t["num_input_tokens"].item(), t["num_output_tokens"].item()) == (3, 1)
        blocks = [t[f"kv_cache_{n}_blocks"].item() for n in ("alloc_new", "reused", "alloc_total")]
        assert blocks == [1, 0, 1]
        drafts = [t[n].item() for n in ("total_accepted_draft_tokens", "total_draft_tokens")]
        assert [t["acceptance_rate"].item(), *drafts] == [0.0, 0, 0]
        times = [
            t[f"{n}_time_ns"].item()
            for n in ("arrival", "first_scheduled", "first_token", "last_token")
        ]
        times = [start, *times, time.time_ns()]
        assert times == sorted(times)
        assert t["last_token_time_ns"].dtype == np.int64
    assert total < 0
    assert len(sender.responses) == 6


def test_only_what_was_asked_for(served: Served) -> None:
    request = ask(outputs=["output_ids", "cum_log_probs"], return_log_probs=True)
    [sender] = served(request)
    assert set(sender.responses[0].tensors) == {"output_ids", "cum_log_probs"}


@pytest.mark.parametrize("streaming", [False, True])
def test_the_prompt_comes_first_if_wanted_and_not_streaming(
    served: Served, streaming: bool
) -> None:
    prompt = [256, 70, 71, 72]
    sender = served.one(prompt=prompt, exclude_input_in_output=False, streaming=streaming)
    expected = served.expected(prompt, SamplingParams(max_new_tokens=6))
    tokenizer = served.engine.tokenizer()
    assert tokenizer is not None
    before = [] if streaming else prompt
    assert sender.ids() == before + expected.tokens
    assert sender.text() == tokenizer.decode(before) + expected.text


def test_an_answer_without_tokens_is_one_response(served: Served) -> None:
    first = served.expected([5, 6, 7], SamplingParams(max_new_tokens=1)).tokens[0]
    for streaming in (False, True):
        sender = served.one(end_id=first, streaming=streaming)
        [response] = sender.responses
        assert response.tensors["output_ids"].shape == (1, 1, 0)
        assert response.tensors["sequence_length"].item() == 0
        assert response.tensors["finish_reason"].item() == b"stop"
        assert sender.text() == ""


def test_one_token_and_a_full_slot(served: Served) -> None:
    m = served.engine.manifest
    sender = served.one(count=1)
    assert sender.ids() == served.expected([5, 6, 7], SamplingParams(max_new_tokens=1)).tokens
    sender = served.one(prompt=[9] * m.max_seq_len, count=m.max_seq_len)
    assert len(sender.ids()) == 1
    assert sender.responses[-1].tensors["finish_reason"].item() == b"capacity"


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_batch(served: Served, streaming: bool) -> None:
    ids = np.array([[5, 6, 7], [8, 0, 0], [9, 10, 0]], np.int32)
    lengths, counts = np.array([3, 1, 2], np.int32), np.array([4, 9, 6], np.int32)
    sender = served.one(
        input_ids=ids, input_lengths=lengths, request_output_len=counts, streaming=streaming
    )
    for i in range(3):
        expected = served.expected(
            ids[i, : lengths[i]].tolist(), SamplingParams(max_new_tokens=int(counts[i]))
        )
        assert sender.ids(i) == expected.tokens
    assert all(r.tensors["output_ids"].shape[0] == 1 for r in sender.responses)
    assert len(sender.responses) == (counts.sum() if streaming else 3)
    assert not sender.misuse
