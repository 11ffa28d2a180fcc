"""Many clients at a time: all right, in order, bounded, and nothing left behind."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
import serving_rig as rig
from serving_model import POISON, SLOTS, Expected, Reference
from serving_server import Server

QUEUE = 64  # requests that may wait (the default)
WAYS = ("generate", "generate_stream", "grpc", "bls", "direct")


def ask(server: Server, way: str, e: Expected, prompt: str, values: dict[str, Any]) -> str:
    """The text of an answer, asked for in one of the ways."""
    body = {"text_input": prompt, **values}
    if way == "generate":
        return str(rig.generate(server.http, "ensemble", body)["text_output"])
    if way == "generate_stream":
        events = rig.generate_stream(server.http, "ensemble", {**body, "stream": True})
        return "".join(x["text_output"] for x in events)
    if way == "direct":
        v = dict(values)
        inputs = rig.direct(e.prompt, v.pop("max_tokens"), runtime_top_k=v.pop("top_k"), **v)
        responses = list(rig.Stream(server.grpc, "tensorrt_llm", {**inputs, "streaming": True}))
        assert rig.ids_of(responses) == e.tokens
    else:
        model = "ensemble" if way == "grpc" else "tensorrt_llm_bls"
        responses = list(rig.Stream(server.grpc, model, {**body, "stream": True}))
    return "".join(rig.text_of(r) for r in responses)


def test_32_clients(server: Server, reference: Reference) -> None:
    """Mixed lengths, mixed ways, each with parameters of its own; two rounds at once."""
    # With other numbers (1, for example) a draw is so close between two tokens, or two tokens at the
    # edge of top-k, that rounding in batches of another shape decides.
    rng = random.Random(8)
    jobs = []
    for i in range(32):
        prompt = "".join(rng.choices("abc defghij klmnö", k=rng.choice([1, 3, 20, 100, 700])))
        values = {
            "max_tokens": rng.choice([1, 5, 40, 120]),
            "temperature": rng.choice([0.5, 1.0, 1.4]),
            "top_k": rng.choice([2, 20, 40]),
            "seed": i,
        }
        params = {k: v for k, v in values.items() if k != "max_tokens"}
        expected = reference.run(prompt, max_new_tokens=values["max_tokens"], **params)
        jobs.append((expected, prompt, values))

    def client(i: int) -> None:
        for turn in range(2):
            expected, prompt, values = jobs[(i + 7 * turn) % 32]
            way = WAYS[(i + turn) % len(WAYS)]
            assert ask(server, way, expected, prompt, values) == expected.text

    rig.in_parallel(32, client)


def test_slots_run_together(server: Server, reference: Reference) -> None:
    """As many streams as slots: each gets tokens while the others still run."""
    ids = reference.tokenizer.encode("together")
    inputs = rig.direct(ids, 1500, end_id=-1, streaming=True)
    streams = [rig.Stream(server.grpc, "tensorrt_llm", inputs) for _ in range(SLOTS)]
    for _ in range(10):
        for stream in streams:
            assert not stream.next()[1]
    rig.wait_until(lambda: server.read()("slots_active") == SLOTS, "all slots are taken")
    now = server.read()
    assert now("slots_total") == SLOTS
    assert 0 < now("kv_cache_bytes_used") <= now("kv_cache_bytes_allocated")
    for stream in streams:
        stream.cancel()


def test_short_prompt_while_long_ones_are_read(server: Server, reference: Reference) -> None:
    """It is answered to its end before the long ones have their first token."""
    long_ids = [i % 250 for i in range(4000)]
    whole = reference.run(long_ids, max_new_tokens=3)
    short = reference.run("short", max_new_tokens=4, ignore_eos=True)
    values = {"end_id": -1, "streaming": True, "return_perf_metrics": True}
    for _ in range(10):
        reading = [
            rig.Stream(server.grpc, "tensorrt_llm", rig.direct(long_ids, 3, **values))
            for _ in range(SLOTS - 1)
        ]
        time.sleep(0.05)
        inputs = rig.direct(short.prompt, 4, **values)
        responses = list(rig.Stream(server.grpc, "tensorrt_llm", inputs))
        assert rig.ids_of(responses) == short.tokens
        others = [list(stream) for stream in reading]
        for answer in others:
            assert rig.ids_of(answer) == whole.tokens
        arrival, end = (
            int(responses[-1][n].item()) for n in ("arrival_time_ns", "last_token_time_ns")
        )
        starts = [int(a[-1]["first_scheduled_time_ns"].item()) for a in others]
        firsts = [int(a[-1]["first_token_time_ns"].item()) for a in others]
        if max(starts) < arrival < min(starts) + (min(firsts) - min(starts)) / 2:
            assert end < min(firsts)
            return
    raise AssertionError("the short prompt never came while the long ones were read")


def test_queue_full(server: Server, reference: Reference) -> None:
    """10 times more clients than slots and queue hold: a clear rejection, or the right answer."""
    before = server.read()
    expected = reference.run("crowd", max_new_tokens=20, ignore_eos=True)
    busy = rig.direct(reference.tokenizer.encode("busy"), 3000, end_id=-1, streaming=True)
    holding = [rig.Stream(server.grpc, "tensorrt_llm", busy) for _ in range(SLOTS)]
    for stream in holding:
        stream.next()
    count = 10 * SLOTS + QUEUE
    inputs = rig.direct(expected.prompt, 20, end_id=-1, streaming=True)

    def client(i: int) -> str:
        try:
            responses = list(rig.Stream(server.grpc, "tensorrt_llm", inputs))
        except rig.ServerError as e:
            return e.text
        assert rig.ids_of(responses) == expected.tokens
        return ""

    def let_go() -> None:
        rejected = before("requests_total", outcome="rejected") + count - QUEUE
        rig.wait_until(
            lambda: server.read()("requests_total", outcome="rejected") == rejected, "rejections"
        )
        assert server.read()("queue_length") == QUEUE
        for stream in holding:
            stream.cancel()

    release = threading.Thread(target=let_go)
    release.start()
    answers = rig.in_parallel(count, client)
    release.join()
    rejections = [a for a in answers if a]
    assert len(rejections) == count - QUEUE
    for text in rejections:
        assert f"queue is full: {QUEUE} requests wait for one of {SLOTS} slots" in text
        assert "try again later" in text


KINDS: dict[str, dict[str, Any]] = {
    "good": {"text_input": "good", "max_tokens": 8, "seed": 1, "top_k": 20},
    "long": {"text_input": "long" * 50, "max_tokens": 3, "seed": 2, "top_k": 20},
    "poison": {"text_input": POISON, "max_tokens": 8},
    "refused": {"text_input": "x", "max_tokens": -1},
    "left": rig.direct([1, 2, 3], 3000, end_id=-1, streaming=True),
}
ENDS = {"length": 640, "error": 192, "cancelled": 128, "rejected": 0}
"""Of 1,024 requests; the other 64 were refused by tensorrt_llm_bls already."""
TURN = ("good", "long", "good", "poison", "long", "refused", "good", "left")


def test_a_thousand_requests(server: Server, reference: Reference) -> None:
    """Good and bad ones, some given up: counts add up, memory does not grow."""
    right = {}
    for kind in ("good", "long"):
        body = KINDS[kind]
        right[kind] = reference.run(
            body["text_input"],
            max_new_tokens=body["max_tokens"],
            temperature=1.0,
            top_k=20,
            seed=body["seed"],
        )
        assert right[kind].finished == "length"

    def client(i: int, turns: int) -> None:
        for turn in range(turns):
            kind = TURN[(i + turn) % len(TURN)]
            model = ("ensemble", "tensorrt_llm_bls")[turn // len(TURN) % 2]
            if kind == "left":
                events = rig.generate_stream(server.http, "tensorrt_llm", KINDS[kind])
                next(events)
                events.close()  # type: ignore[attr-defined]
            elif kind in right:
                answer = rig.generate(server.http, model, KINDS[kind])
                assert answer["text_output"] == right[kind].text
            else:
                with pytest.raises(rig.ServerError, match=r"not finite|max_tokens"):
                    rig.generate(server.http, model, KINDS[kind])

    def memory() -> dict[str, int]:
        processes = [("server", server.pid), *rig.stubs(server.pid)]
        return {f"{name} {pid}": rig.rss(pid) for name, pid in processes}

    def rounds(turns: int) -> tuple[rig.Metrics, dict[str, int]]:
        # Of every second TURN one was refused by tensorrt_llm_bls already.
        ends = server.read()("requests_total") + 8 * (turns - turns // (2 * len(TURN)))
        rig.in_parallel(8, lambda i: client(i, turns), timeout=120)
        # Gauges may still be those of a moment before the last ones came.
        rig.wait_until(lambda: server.read()("requests_total") >= ends, "all requests ended")
        return rig.wait_idle(server.metrics), memory()

    before, at_start = rounds(24)  # buffers find their size
    after, at_end = rounds(128)
    for name, size in at_end.items():
        # Pools still grow a little; 2 KiB left over by a request would be as much.
        assert size - at_start[name] < 2 << 20, f"{name} grew from {at_start[name]} to {size}"
    assert after("kv_cache_bytes_allocated") == before("kv_cache_bytes_allocated")
    for outcome, count in ENDS.items():
        found = after("requests_total", outcome=outcome) - before("requests_total", outcome=outcome)
        assert found == count, outcome
