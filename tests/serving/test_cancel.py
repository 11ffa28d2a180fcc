"""Clients that give up: their slots are free at once, and the others do not notice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import serving_rig as rig
from serving_model import Reference
from serving_server import Server

LONG_ANSWER = 3500
"""Tokens of an answer that takes seconds: whoever gives up gets only the first few of them."""
PROMPT = "Once upon a time"


def long_inputs(model: str, reference: Reference) -> dict[str, Any]:
    if model == "tensorrt_llm":
        ids = reference.tokenizer.encode(PROMPT)
        return rig.direct(ids, LONG_ANSWER, end_id=-1, streaming=True)
    return {"text_input": PROMPT, "max_tokens": LONG_ANSWER, "end_id": -1, "stream": True}


@contextlib.contextmanager
def one_cancelled(server: Server) -> Iterator[None]:
    """What is inside ends as exactly one cancelled request, long before its last token."""
    before = server.read()
    yield
    rig.wait_until(lambda: ended(server) > before("requests_total"), "the request ended")
    after = rig.wait_idle(server.metrics)
    assert after("generated_tokens_total") - before("generated_tokens_total") < LONG_ANSWER * 0.8
    for outcome in ("stop", "length", "capacity", "error", "rejected"):
        assert after("requests_total", outcome=outcome) == before("requests_total", outcome=outcome)
    cancelled = after("requests_total", outcome="cancelled")
    assert cancelled == before("requests_total", outcome="cancelled") + 1


def ended(server: Server) -> float:
    return server.read()("requests_total")


@pytest.fixture
def neighbour(server: Server, reference: Reference) -> Iterator[None]:
    """A good request that runs all the time beside the one that is given up."""
    expected = reference.run("neighbour", max_new_tokens=400, ignore_eos=True)
    stream = rig.Stream(
        server.grpc,
        "ensemble",
        {"text_input": "neighbour", "max_tokens": 400, "end_id": -1, "stream": True},
    )
    yield
    assert "".join(rig.text_of(r) for r in stream) == expected.text


@pytest.mark.parametrize("model", ["tensorrt_llm", "tensorrt_llm_bls"])
def test_grpc_cancel(server: Server, reference: Reference, model: str) -> None:
    with one_cancelled(server):
        stream = rig.Stream(server.grpc, model, long_inputs(model, reference))
        for _ in range(5):
            stream.next()
        stream.cancel()


@pytest.mark.parametrize("model", ["tensorrt_llm", "tensorrt_llm_bls"])
def test_http_connection_closed(server: Server, reference: Reference, model: str) -> None:
    with one_cancelled(server):
        events = rig.generate_stream(server.http, model, long_inputs(model, reference))
        for _ in range(5):
            next(events)
        events.close()  # type: ignore[attr-defined]


CLIENT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import serving_rig as rig
stream = rig.Stream(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
for i, _ in enumerate(stream):
    if i == 5:
        print("streaming", flush=True)
"""


@pytest.mark.parametrize("model", ["tensorrt_llm", "tensorrt_llm_bls"])
def test_client_killed(server: Server, reference: Reference, model: str) -> None:
    with one_cancelled(server):
        inputs = json.dumps(long_inputs(model, reference))
        command = [sys.executable, "-c", CLIENT, str(Path(__file__).parent), server.grpc, model]
        with subprocess.Popen([*command, inputs], stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"streaming\n"
            os.kill(client.pid, signal.SIGKILL)


@pytest.mark.parametrize("model", ["tensorrt_llm", "ensemble"])
def test_stop_request(server: Server, reference: Reference, model: str) -> None:
    """A request with ``stop`` and the same id, as the stock backend has it."""
    name = str(uuid.uuid4())
    stop = {"input_ids": [0], "input_lengths": 0, "request_output_len": 0, "stop": True}
    with one_cancelled(server):
        stream = rig.Stream(server.grpc, model, long_inputs(model, reference), name)
        for _ in range(5):
            stream.next()
        assert list(rig.Stream(server.grpc, "tensorrt_llm", stop, name)) == []
        last = list(stream)[-1]  # the stream ends of itself
    assert last["finish_reason"].item() == b"cancelled"


def test_stop_without_an_id_or_for_an_unknown_one(server: Server) -> None:
    stop = {"input_ids": [0], "input_lengths": 0, "request_output_len": 0, "stop": True}
    assert list(rig.Stream(server.grpc, "tensorrt_llm", stop, "nobody")) == []
    with pytest.raises(rig.ServerError, match="stop: expected the id of the request to stop"):
        list(rig.Stream(server.grpc, "tensorrt_llm", stop))


def test_stop_touches_nobody_else(server: Server, reference: Reference) -> None:
    """Others without an id, or with another one, go on."""
    stop = {"input_ids": [0], "input_lengths": 0, "request_output_len": 0, "stop": True}
    expected = reference.run(PROMPT, max_new_tokens=300, ignore_eos=True)
    inputs = {"text_input": PROMPT, "max_tokens": 300, "end_id": -1, "stream": True}
    streams = [rig.Stream(server.grpc, "ensemble", inputs, name) for name in ("", "mine")]
    for stream in streams:
        stream.next()
    list(rig.Stream(server.grpc, "tensorrt_llm", stop, "yours"))
    texts = ["".join(rig.text_of(r) for r in s) for s in streams]
    assert all(expected.text.endswith(t) and len(t) > 200 for t in texts)


def test_neighbours_are_unaffected(server: Server, reference: Reference, neighbour: None) -> None:
    """The slot of one that left is used again, with nothing of him in it."""
    for i in range(6):
        stream = rig.Stream(server.grpc, "tensorrt_llm", long_inputs("tensorrt_llm", reference))
        for _ in range(3):
            stream.next()
        stream.cancel()
        server.check_good(reference, f"after cancel {i}", i)


def test_cancelled_while_waiting(server: Server, reference: Reference) -> None:
    """One that waits for a slot leaves the queue."""
    busy = [
        rig.Stream(server.grpc, "tensorrt_llm", long_inputs("tensorrt_llm", reference))
        for _ in range(4)
    ]
    for stream in busy:
        stream.next()
    waiting = rig.Stream(server.grpc, "tensorrt_llm", long_inputs("tensorrt_llm", reference))
    rig.wait_until(lambda: server.read()("queue_length") == 1, "one waits")
    waiting.cancel()
    rig.wait_until(lambda: server.read()("queue_length") == 0, "the queue is empty")
    assert server.read()("slots_active") == 4
    for stream in busy:
        stream.cancel()


def test_ensemble_client_gone(server: Server) -> None:
    """The engine behind an ensemble is not told that the client left: it ends by its length."""
    before = server.read()
    events = rig.generate_stream(
        server.http,
        "ensemble",
        {"text_input": PROMPT, "max_tokens": 400, "end_id": -1, "stream": True},
    )
    for _ in range(5):
        next(events)
    events.close()  # type: ignore[attr-defined]
    rig.wait_until(lambda: ended(server) > before("requests_total"), "the request ended")
    after = rig.wait_idle(server.metrics)
    assert after("generated_tokens_total") == before("generated_tokens_total") + 400
