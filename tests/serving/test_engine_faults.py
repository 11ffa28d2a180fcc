"""Bad requests, cancelling, poison, unloading: the model ``tensorrt_llm`` outside a server."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from engine_rig import Served, arguments, ask, imported, until
from fake_triton import (
    FakeTriton,
    Request,
    Response,
    Sender,
    TritonError,
    TritonModelException,
)
from tiny_models import TinyModel, write_model

from trt_razor.engine import Engine
from trt_razor.generate import SamplingParams

NAN_TOKEN = 200


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


def test_a_last_response_that_cannot_be_sent_ends_all_the_same(served: Served) -> None:
    class Full(Sender):
        def send(self, response: Response | None = None, flags: int = 0) -> None:
            if response is not None:
                raise RuntimeError("no shared memory")
            super().send(response, flags)

    request = ask()
    request.sender = Full()
    bad, good = served(request, ask())  # waits for the end of both
    assert not bad.responses
    assert not bad.misuse
    assert good.ids() == served.one().ids()


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
