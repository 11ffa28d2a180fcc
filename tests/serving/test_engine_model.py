"""The Python model ``tensorrt_llm`` outside a server: real engines, a strict stand-in for Triton."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from fake_triton import FakeTriton, Request, Sender, TritonError, TritonModelException
from tiny_models import TinyModel, write_model

from trt_razor.cache_layout import kv_at
from trt_razor.engine import Engine
from trt_razor.generate import Completion, Generator, SamplingParams

NAN_TOKEN = 200


class Served:
    """A loaded model and what its engine gives by itself."""

    def __init__(self, module: Any, triton: FakeTriton, engine: Engine, **parameters: str) -> None:
        self.triton, self.engine = triton, engine
        self.model = module.TritonPythonModel()
        given = {"gpt_model_path": str(engine.directory), **parameters}
        self.args = arguments(given)
        self.model.initialize(self.args)

    def __call__(self, *requests: Request, wait: bool = True) -> list[Sender]:
        assert self.model.execute(list(requests)) is None
        senders = [r.sender for r in requests]
        for s in senders if wait else ():
            assert s.ended.wait(20)
        return senders

    def one(self, **tensors: Any) -> Sender:
        return self(ask(**tensors))[0]

    def expected(self, prompt: list[int], params: SamplingParams) -> Completion:
        m, tokenizer = self.engine.manifest, self.engine.tokenizer()
        assert tokenizer is not None
        ends = {*m.spec.eos_token_ids, *tokenizer.eos_token_ids}
        return Generator(self.engine.open(1), m.prefill_chunk, ends, tokenizer).run(
            [prompt], params
        )[0]

    def metric(self, name: str, **labels: str) -> float:
        return self.triton.metric(name, **labels)


def arguments(parameters: dict[str, str], **config: Any) -> dict[str, str]:
    given = {
        "model_transaction_policy": {"decoupled": True},
        "instance_group": [{"count": 1}],
        "parameters": {k: {"string_value": v} for k, v in parameters.items()},
        **config,
    }
    return {
        "model_config": json.dumps(given),
        "model_repository": "/repository/tensorrt_llm",
        "model_name": "tensorrt_llm",
        "model_version": "1",
    }


def ask(prompt: list[int] | None = None, count: int = 6, **tensors: Any) -> Request:
    """A request for one row; arrays are taken as they are, other values become the right ones."""
    ids = [5, 6, 7] if prompt is None else prompt
    kinds: dict[type, Any] = {int: np.int32, float: np.float32, bool: np.bool_}
    given: dict[str, Any] = {
        "input_ids": np.array([ids], np.int32),
        "input_lengths": len(ids),
        "request_output_len": count,
        **{k: v for k, v in tensors.items() if k not in ("id", "outputs", "parameters")},
    }
    return Request(
        {
            k: v if isinstance(v, np.ndarray) else np.array([v], kinds[type(v)])
            for k, v in given.items()
        },
        tensors.get("id", ""),
        tensors.get("outputs", ()),
        tensors.get("parameters", "{}"),
    )


@pytest.fixture(scope="module")
def triton() -> FakeTriton:
    return FakeTriton()


@pytest.fixture(scope="module")
def module(triton: FakeTriton) -> Iterator[Any]:
    """trt_razor.serving.models.engine, imported over the stand-in."""
    names = ("triton_python_backend_utils", "trt_razor.serving.models.engine")
    before = {n: sys.modules.pop(n, None) for n in names}
    sys.modules[names[0]] = triton  # type: ignore[assignment]
    yield importlib.import_module(names[1])
    for n, m in before.items():
        sys.modules.pop(n, None)
        if m is not None:
            sys.modules[n] = m


@pytest.fixture(scope="module")
def served(module: Any, triton: FakeTriton, razor_engine: Engine) -> Iterator[Served]:
    served = Served(module, triton, razor_engine, slots="3", max_queue_size="4",
                    cancellation_check_period_ms="5")  # fmt: skip
    yield served
    served.model.finalize()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


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


def test_bad_requests_have_their_own_words_among_good_ones(served: Served) -> None:
    requests = [
        ask(),
        ask(temperature=float("nan")),
        ask(beam_width=2),
        ask(prompt=[1] * 65),
        ask(parameters='{"request_type": "context_only"}'),
        ask(streaming=True),
    ]
    before = served.metric("requests_total", outcome="error")
    good, *bad, last = served(*requests)
    words = ["temperature: ", "beam_width: 2", "the prompt has 65 tokens", "request_type: "]
    for sender, word in zip(bad, words, strict=True):
        [response] = sender.responses
        assert word in str(response.error)
        assert response.error is not None
        assert response.error.code == TritonError.INVALID_ARG
    assert good.ids() == last.ids()
    until(lambda: served.metric("requests_total", outcome="error") == before + 4)


def test_a_request_that_cannot_be_read_at_all(served: Served) -> None:
    class Broken(Request):
        def request_id(self) -> str:
            raise ValueError("two\nlines")

    request = Broken({})
    bad, good = served(request, ask())
    assert bad.errors == ["internal error: ValueError: two lines"]
    assert not good.errors


def test_stop_by_id(served: Served) -> None:
    running = [ask(count=60, streaming=s, id=i) for s in (True, False) for i in ("a", "b")]
    senders = served(*running, wait=False)
    until(lambda: len(senders[0].responses) > 1)
    [stopped] = served(ask(prompt=[], count=0, stop=True, id="a"))
    assert stopped.responses == []
    for s in senders:
        assert s.ended.wait(20)
    whole = served.expected([5, 6, 7], SamplingParams(max_new_tokens=60))
    for s in (senders[0], senders[2]):
        assert s.responses[-1].tensors["finish_reason"].item() == b"cancelled"
        assert s.ids() == whole.tokens[: len(s.ids())]
        assert len(s.ids()) < len(whole.tokens)
    for s in (senders[1], senders[3]):
        assert s.ids() == whole.tokens
    assert len(senders[2].responses) == 1
    # Unknown, or ended: no error. Without an id nobody can be meant.
    assert served(ask(stop=True, id="a"))[0].responses == []
    assert "stop: expected the id" in served(ask(stop=True))[0].errors[0]


def test_clients_that_go_while_they_wait_or_read(served: Served) -> None:
    before = served.metric("requests_total", outcome="cancelled")
    requests = [ask(count=60, streaming=True) for _ in range(5)]
    for r in (requests[0], requests[3]):
        r.sender.gone = True
    senders = served(*requests)
    for i, s in enumerate(senders):
        assert not s.misuse
        assert (len(s.responses) < 60) == (i in (0, 3))
    assert senders[3].responses == []
    until(lambda: served.metric("requests_total", outcome="cancelled") == before + 2)


def test_a_batch_whose_client_goes_ends_as_a_whole(served: Served) -> None:
    ids = np.full((3, 3), 7, np.int32)
    request = ask(
        input_ids=ids, input_lengths=np.full(3, 3, np.int32),
        request_output_len=np.array([1, 60, 60], np.int32), streaming=True,
    )  # fmt: skip
    [sender] = served(request, wait=False)
    until(lambda: bool(sender.responses))
    sender.gone = True
    assert sender.ended.wait(20)
    assert len(sender.responses) < 121
    assert not sender.misuse


def test_a_full_queue(served: Served) -> None:
    before = served.metric("requests_total", outcome="rejected")
    senders = served(*[ask(count=40) for _ in range(12)])
    refused = [s for s in senders if s.errors]
    assert 1 <= len(refused) <= 5
    assert all("queue is full: 4 requests wait for one of 3 slots" in s.errors[0] for s in refused)
    assert {r.error.code for s in refused for r in s.responses if r.error} == {
        TritonError.UNAVAILABLE
    }
    whole = [s.ids() for s in senders if not s.errors]
    assert all(x == whole[0] for x in whole)
    until(lambda: served.metric("requests_total", outcome="rejected") == before + len(refused))


def test_everything_is_back_where_it_was(served: Served) -> None:
    for _ in range(10):
        served(*[ask(count=2) for _ in range(5)])
    gauges = ("slots_active", "queue_length", "kv_cache_bytes_used")
    assert [served.metric(n) for n in gauges] == [0, 0, 0]
    assert served.metric("slots_total") == 3
    slot = served.engine.manifest.kv_bytes_per_slot
    assert served.metric("kv_cache_bytes_allocated") == 3 * slot
    assert served.model._answers == {}


def test_a_poisoned_request_fails_alone(
    module: Any, triton: FakeTriton, tiny_model: TinyModel, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / tiny_model.spec.name
    write_model(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][NAN_TOKEN] = np.nan
    save_file(weights, folder / "model.safetensors")
    poisoned = TinyModel(folder, tiny_model.spec, tiny_model.heads)
    served = Served(module, triton, poisoned.build(tmp_path / "e", razor=False), slots="2")
    try:
        for _ in range(2):  # the slot that was poisoned serves others afterwards
            good = [ask(prompt=[i, i + 1], count=8, streaming=True) for i in range(4)]
            bad = ask(prompt=[3, NAN_TOKEN], count=8)
            ids = np.array([[3, 4], [3, NAN_TOKEN]], np.int32)
            half = ask(
                input_ids=ids, input_lengths=np.full(2, 2, np.int32),
                request_output_len=np.full(2, 8, np.int32),
            )  # fmt: skip
            served(*good[:2], bad, half, *good[2:])
            assert ["not finite" in e for e in bad.sender.errors] == [True]
            assert [e[:12] for e in half.sender.errors] == ["row 1 of 2: "]
            assert not half.sender.misuse
            for i, r in enumerate(good):
                params = SamplingParams(max_new_tokens=8)
                assert r.sender.ids() == served.expected([i, i + 1], params).tokens
    finally:
        served.model.finalize()


def test_unload_with_requests_under_way_and_load_again(
    module: Any, triton: FakeTriton, razor_engine: Engine
) -> None:
    import threading

    for _ in range(2):
        threads = threading.active_count()
        served = Served(module, triton, razor_engine, slots="1")
        assert served.metric("slots_total") == 1
        [running, waiting] = served(ask(count=60, streaming=True), ask(), wait=False)
        until(lambda: bool(running.responses))  # noqa: B023
        served.model.finalize()
        for s in (running, waiting):
            assert s.ended.is_set()
            assert s.errors == ["the server is shutting down"]
        [late] = served(ask())
        assert late.errors == ["the server is shutting down"]
        assert [served.metric(n) for n in ("slots_total", "kv_cache_bytes_allocated")] == [0, 0]
        assert threading.active_count() <= threads + 1  # the runtime's own one stays


def test_what_cannot_be_loaded_says_why(module: Any, razor_engine: Engine, tmp_path: Path) -> None:
    path = str(razor_engine.directory)
    cases: list[tuple[dict[str, str], dict[str, Any], str]] = [
        ({}, {}, "parameter gpt_model_path: expected an engine directory"),
        ({"gpt_model_path": "1/engine"}, {}, r"^/repository/tensorrt_llm/1/engine: no such engine"),
        ({"gpt_model_path": path, "slots": "4"}, {}, "slots: expected 1..3, the max_batch_size"),
        ({"gpt_model_path": path}, {"instance_group": [{"count": 2}]}, "count 1, found 2"),
        ({"gpt_model_path": path}, {"model_transaction_policy": {}}, "decoupled: true"),
    ]
    for parameters, config, message in cases:
        model = module.TritonPythonModel()
        with pytest.raises(TritonModelException, match=message):
            model.initialize(arguments(parameters, **config))
        model.finalize()


def test_limits_of_the_settings(module: Any, triton: FakeTriton, dense_engine: Engine) -> None:
    served = Served(module, triton, dense_engine, max_input_tokens="4", max_output_tokens="5",
                    exclude_input_in_output="false")  # fmt: skip
    try:
        senders = served(ask([1] * 5, 2), ask(count=6), ask([1] * 4, 5))
        assert "takes at most 4" in senders[0].errors[0]
        assert "expected 1..5, found 6" in senders[1].errors[0]
        assert senders[2].ids()[:4] == [1] * 4
        used, dense = (
            senders[2].responses[0].tensors[f"kv_cache_{n}_bytes"].item() for n in ("used", "dense")
        )
        per_token = dense_engine.manifest.kv_bytes_per_slot // dense_engine.manifest.max_seq_len
        assert used == dense == 8 * per_token
    finally:
        served.model.finalize()
