"""A server that is told to stop ends its streams, its processes and what it shared."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import serving_rig as rig
import serving_server
from serving_model import Reference
from serving_server import Server

from trt_razor.engine import Engine


def shared_memory() -> set[str]:
    """Of servers that this process started."""
    return {p.name for p in Path("/dev/shm").glob(f"trt_razor_{os.getpid()}_*")}


@pytest.fixture(scope="module")
def repository(serving_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of as few processes as can be: Triton stops one after the other."""
    output = tmp_path_factory.mktemp("few") / "models"
    return serving_server.write(serving_engine, output, bls_instances=1)


def test_sigterm_while_streaming(
    repository: Path, reference: Reference, start_server: Callable[..., object]
) -> None:
    """Streams that end soon are whole, whatever the protocol; nothing is left."""
    expected = reference.run("bye", max_new_tokens=300, ignore_eos=True)
    with start_server(repository) as server:  # type: ignore[attr-defined]
        pids = [server.pid, *server.stubs()]
        text = {"text_input": "bye", "max_tokens": 300, "end_id": -1, "stream": True}
        direct = rig.direct(expected.prompt, 300, end_id=-1, streaming=True)
        streams = [
            rig.Stream(server.grpc, "tensorrt_llm", direct),
            rig.Stream(server.grpc, "ensemble", text),
            rig.Stream(server.grpc, "tensorrt_llm_bls", text),
        ]
        events = rig.generate_stream(server.http, "ensemble", text)
        firsts = [stream.next()[0] for stream in streams]
        first_event = next(events)
        server.triton.process.send_signal(signal.SIGTERM)
        texts = [
            "".join(rig.text_of(r) for r in [first, *stream])
            for first, stream in zip(firsts, streams, strict=True)
        ]
        texts.append("".join(e["text_output"] for e in [first_event, *events]))
        assert texts == [expected.text] * 4
        with pytest.raises((rig.ServerError, OSError)):
            rig.generate(server.http, "ensemble", {"text_input": "x", "max_tokens": 1})
        code = server.triton.stop()
    assert code == 0
    assert not [pid for pid in pids if rig.alive(pid)]


def test_stop_does_not_wait_for_ever(
    repository: Path, reference: Reference, start_server: Callable[..., object]
) -> None:
    """A stream without an end is cut: its client is told or disconnected, and all processes end."""
    before = shared_memory()
    with start_server(repository) as server:  # type: ignore[attr-defined]
        pids = [server.pid, *server.stubs()]
        streams = [endless(server, reference) for _ in range(4)]
        for stream in streams:
            stream.next()
        start = time.monotonic()
        server.triton.stop(3)
        assert time.monotonic() - start < 10
        for stream in streams:
            with pytest.raises(rig.ServerError):
                list(stream)
    assert not [pid for pid in pids if rig.alive(pid)]
    assert shared_memory() <= before


def endless(server: Server, reference: Reference) -> rig.Stream:
    """Prompts that take long to read and answers up to the capacity."""
    ids = reference.tokenizer.encode("endless")
    return rig.Stream(server.grpc, "tensorrt_llm", rig.direct(ids, 4000, end_id=-1, streaming=True))
