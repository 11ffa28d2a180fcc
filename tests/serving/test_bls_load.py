"""Many streams at a time through ``tensorrt_llm_bls``, whose process serves all of them."""

from __future__ import annotations

import serving_rig as rig
from serving_model import Reference
from serving_server import Server


def test_streams(server: Server, reference: Reference) -> None:
    """All outputs of every response, of many short streams side by side."""
    expected = reference.run("stream", max_new_tokens=20, ignore_eos=True)
    inputs = {
        "text_input": "stream",
        "max_tokens": 20,
        "end_id": -1,
        "stream": True,
        "return_log_probs": True,
    }
    stubs = server.stubs("tensorrt_llm_bls")

    def client(i: int) -> None:
        for _ in range(20):
            responses = list(rig.Stream(server.grpc, "tensorrt_llm_bls", inputs))
            assert "".join(rig.text_of(r) for r in responses) == expected.text

    rig.in_parallel(8, client, timeout=60)
    assert server.stubs("tensorrt_llm_bls") == stubs


def test_clients_that_leave(server: Server, reference: Reference) -> None:
    """Most clients close their connection after the first piece of text."""
    before = server.read()
    expected = reference.run("stay", max_new_tokens=8)
    stay = {"text_input": "stay", "max_tokens": 8}
    leave = {"text_input": "left", "max_tokens": 3000, "end_id": -1, "stream": True}

    def client(i: int) -> None:
        for turn in range(12):
            if (i + turn) % 3 == 0:
                answer = rig.generate(server.http, "tensorrt_llm_bls", stay)
                assert answer["text_output"] == expected.text
            else:
                events = rig.generate_stream(server.http, "tensorrt_llm_bls", leave)
                next(events)
                events.close()  # type: ignore[attr-defined]

    rig.in_parallel(8, client, timeout=60)
    rig.wait_until(lambda: server.read()("requests_total") >= before("requests_total") + 96, "ends")
    after = rig.wait_idle(server.metrics)
    cancelled = after("requests_total", outcome="cancelled")
    assert cancelled == before("requests_total", outcome="cancelled") + 64
