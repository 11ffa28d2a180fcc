"""The loop without a server: queue, events, cancel, faults, end."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from fake_session import NAN, FakeSession, alone, mixed

from trt_razor.errors import RazorError, UsageError
from trt_razor.generate import Event, Generator, SamplingParams
from trt_razor.serving.loop import EngineLoop, Job, LoopClosed, QueueFull
from trt_razor.serving.statistics import Statistics

MANY = SamplingParams(max_new_tokens=40)


class Gate(FakeSession):
    """A session whose passes wait until they are let through."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passes = threading.Semaphore(0)
        self.free = threading.Event()

    def let(self, passes: int) -> None:
        for _ in range(passes):
            self.passes.release()

    def forward(self, *args: Any) -> np.ndarray:
        while not self.free.is_set() and not self.passes.acquire(timeout=0.005):
            pass
        return super().forward(*args)


class Client:
    """Collects a job's events; notes on which thread they came."""

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams = MANY,
        ask: bool = False,
        fail: bool = False,
    ) -> None:
        self.prompt, self.params = prompt, params
        self.events: list[Event] = []
        self.threads: set[str] = set()
        self.asked = 0
        self.gone = False
        self.fail = fail
        self.ended = threading.Event()
        self.job = Job(prompt, params, self._on_event, self._is_gone if ask else None)

    def _on_event(self, event: Event) -> None:
        assert not self.ended.is_set(), "an event after the last"
        self.threads.add(threading.current_thread().name)
        self.events.append(event)
        if event.finished:
            self.ended.set()
        if self.fail:
            raise OSError("nobody there")

    def _is_gone(self) -> bool:
        assert not self.ended.is_set(), "asked after the end"
        self.threads.add(threading.current_thread().name)
        self.asked += 1
        return self.gone

    @property
    def tokens(self) -> list[int]:
        return [e.token for e in self.events if e.token is not None]

    def wait(self) -> str | None:
        assert self.ended.wait(10)
        return self.events[-1].finished

    def wait_tokens(self, count: int) -> None:
        wait_until(lambda: len(self.tokens) >= count)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)


@pytest.fixture
def make() -> Iterator[Callable[..., EngineLoop]]:
    """Makes loops, started; each must end with its test."""
    loops: list[tuple[EngineLoop, FakeSession]] = []

    def start(
        session: FakeSession, max_queue_size: int = 8, chunk: int = 4, **more: Any
    ) -> EngineLoop:
        statistics = Statistics(session.num_slots, 1000)
        loop = EngineLoop(Generator(session, chunk), max_queue_size, statistics, **more)
        loops.append((loop, session))
        loop.start()
        return loop

    yield start
    for loop, session in loops:
        if isinstance(session, Gate):
            session.free.set()
        assert loop.close(10)
        assert not loop.alive


def now(loop: EngineLoop) -> tuple[int, int]:
    return loop.statistics.slots_active, loop.statistics.queue_length


def test_many_clients_get_what_they_would_alone(make: Callable[..., EngineLoop]) -> None:
    loop = make(FakeSession(3), 100)
    clients = [
        Client(
            [i % 24, *range(i % 7)],
            SamplingParams(max_new_tokens=1 + i % 9, temperature=i % 2 * 0.8, seed=i),
            ask=True,
        )
        for i in range(40)
    ]
    submitters = [
        threading.Thread(target=lambda k=k: [loop.submit(c.job) for c in clients[k::4]])  # type: ignore[misc]
        for k in range(4)
    ]
    for t in submitters:
        t.start()
    for t in submitters:
        t.join()
    for c in clients:
        assert c.wait() == "length"
        assert c.tokens == alone(c.prompt, c.params)
        assert c.threads == {"trt-razor-engine"}
        j = c.job
        assert 0 < j.arrival_ns <= j.scheduled_ns <= j.first_token_ns <= j.last_token_ns
    s = loop.statistics
    wait_until(lambda: now(loop) == (0, 0))
    assert s.requests == {**dict.fromkeys(s.requests, 0), "length": 40}
    assert s.prompt_tokens == sum(len(c.prompt) for c in clients)
    assert s.generated_tokens == sum(len(c.tokens) for c in clients)
    counts = [
        h.cumulative()[-1] for h in (s.queue, s.time_to_first_token, s.request, s.inter_token)
    ]
    assert counts == [40, 40, 40, s.generated_tokens - 40]


def test_slots_are_given_in_order(make: Callable[..., EngineLoop]) -> None:
    session = Gate(1)
    loop = make(session)
    clients = [Client([i], SamplingParams(max_new_tokens=2)) for i in range(5)]
    for c in clients:
        loop.submit(c.job)
    session.free.set()
    for c in clients:
        c.wait()
    times = [c.job.scheduled_ns for c in clients]
    assert times == sorted(times)
    assert all(a.job.last_token_ns <= b.job.scheduled_ns for a, b in pairwise(clients))


@pytest.mark.parametrize("size", [0, 2])
def test_a_full_queue_refuses_and_takes_again(make: Callable[..., EngineLoop], size: int) -> None:
    session = Gate(2)
    loop = make(session, size)
    clients = [Client([i]) for i in range(2 + size)]
    for c in clients:
        loop.submit(c.job)
    with pytest.raises(
        QueueFull, match=rf"^queue is full: {size} requests wait for one of 2 slots "
    ):
        loop.submit(Client([9]).job)
    loop.cancel(clients[0].job)
    session.free.set()
    assert clients[0].wait() == "cancelled"
    late = Client([9])
    wait_until(lambda: all(c.ended.is_set() for c in clients))
    loop.submit(late.job)
    assert late.wait() == "length"
    assert late.tokens == alone([9], MANY)


def test_rows_come_in_together_or_not_at_all(make: Callable[..., EngineLoop]) -> None:
    session = Gate(2)
    loop = make(session, 1)
    with pytest.raises(UsageError, match=r"^this request has 4 rows, .* never take more than 3; "):
        loop.submit(*[Client([i]).job for i in range(4)])
    rows = [Client([i]) for i in range(3)]
    loop.submit(rows[0].job)
    with pytest.raises(QueueFull, match=r"try again later \(this request has 3 rows\)$"):
        loop.submit(*[Client([i]).job for i in range(3)])
    loop.submit(*[c.job for c in rows[1:]])
    session.free.set()
    assert [c.wait() for c in rows] == ["length"] * 3


@pytest.mark.parametrize("way", ["cancel", "client"])
def test_cancel_while_waiting_reading_and_decoding(
    make: Callable[..., EngineLoop], way: str
) -> None:
    session = Gate(2)
    loop = make(session, cancel_check_s=0.01)
    decoding, reading = Client([1], ask=True), Client([2] * 60, ask=True)
    waiting, other = Client([3], ask=True), Client([4], ask=True)
    for c in (decoding, reading, waiting, other):
        loop.submit(c.job)
    session.let(3)
    decoding.wait_tokens(2)
    for c in (decoding, reading, waiting):
        if way == "cancel":
            loop.cancel(c.job)
        c.gone = way == "client"
    time.sleep(0.06)  # more than the time between two questions to one that waits
    session.free.set()
    assert [c.wait() for c in (decoding, reading, waiting)] == ["cancelled"] * 3
    assert [c.job.gone for c in (decoding, reading, waiting)] == [way == "client"] * 3
    assert (reading.tokens, waiting.tokens) == ([], [])
    assert other.wait() == "length"
    assert other.tokens == alone([4], MANY)
    loop.cancel(decoding.job)  # ended already: nothing
    assert loop.statistics.requests["cancelled"] == 3


def test_clients_are_not_asked_in_every_step(make: Callable[..., EngineLoop]) -> None:
    loop = make(FakeSession(1), cancel_check_s=3600)
    c = Client([1], ask=True)
    loop.submit(c.job)
    c.wait()
    assert (len(c.tokens), c.asked) == (40, 1)


def test_a_client_that_cannot_be_told_is_dropped(make: Callable[..., EngineLoop]) -> None:
    loop = make(FakeSession(2))
    bad, good = Client([1], fail=True), Client([2])
    loop.submit(bad.job, good.job)
    assert good.wait() == "length"
    assert good.tokens == alone([2], MANY)
    assert bad.wait() == "cancelled"
    assert len(bad.tokens) == 1
    assert bad.job.gone


def test_a_poisoned_sequence_fails_alone(make: Callable[..., EngineLoop]) -> None:
    def logits(sequence: list[int]) -> np.ndarray:
        return mixed(sequence) if sequence[0] != 13 or len(sequence) < 4 else np.full(24, NAN)

    loop = make(FakeSession(2, logits=logits))
    clients = [Client([i]) for i in (1, 13, 2, 3)]
    loop.submit(*[c.job for c in clients])
    assert [c.wait() for c in clients] == ["length", "error", "length", "length"]
    assert "not finite" in (clients[1].events[-1].error or "")
    assert clients[1].tokens == alone([13], MANY)[:3]
    for c in (clients[0], *clients[2:]):
        assert c.tokens == alone(c.prompt, MANY)


def test_an_unexpected_failure_ends_what_runs_and_nothing_else(
    make: Callable[..., EngineLoop], caplog: pytest.LogCaptureFixture
) -> None:
    class Breaks(Gate):
        broken = False

        def forward(self, *args: Any) -> np.ndarray:
            out = super().forward(*args)
            if len(self.calls) == 9:
                raise MemoryError("no room\nfor a tensor")
            return out

    session = Breaks(2)
    loop = make(session)
    running, waiting = [Client([1]), Client([2])], [Client([3]), Client([4])]
    loop.submit(*[c.job for c in running + waiting])
    session.free.set()
    assert [c.wait() for c in running] == ["error"] * 2
    message = "the engine failed unexpectedly: MemoryError: no room for a tensor"
    assert [c.events[-1].error for c in running] == [message] * 2
    for c in waiting:
        assert c.wait() == "length"
        assert c.tokens == alone(c.prompt, MANY)
    assert loop.alive
    assert "MemoryError" in caplog.text


def test_what_the_generator_refuses_is_an_error_of_its_job(make: Callable[..., EngineLoop]) -> None:
    loop = make(FakeSession(1))
    bad, good = Client([99]), Client([5])
    loop.submit(bad.job, good.job)
    assert bad.wait() == "error"
    assert "expected token ids 0..23" in (bad.events[-1].error or "")
    assert good.wait() == "length"
    assert loop.statistics.requests["error"] == 1


def test_close_ends_everything_with_an_error(make: Callable[..., EngineLoop]) -> None:
    session = Gate(1)
    loop = make(session)
    running, waiting = Client([1]), Client([2])
    loop.submit(running.job, waiting.job)
    session.let(3)
    running.wait_tokens(2)
    assert not loop.close(0.01)  # a pass is under way
    with pytest.raises(LoopClosed, match="shutting down"):
        loop.submit(Client([3]).job)
    session.free.set()
    assert [c.wait() for c in (running, waiting)] == ["error"] * 2
    assert {c.events[-1].error for c in (running, waiting)} == {"the server is shutting down"}
    assert loop.close(10)
    assert now(loop) == (0, 0)


def test_close_before_the_start() -> None:
    loop = EngineLoop(Generator(FakeSession(1)), 4, Statistics())
    c = Client([1])
    loop.submit(c.job)
    assert loop.close()
    assert c.wait() == "error"


def test_an_idle_loop_publishes_now_and_then(
    make: Callable[..., EngineLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another process wrote over its gauges is right again soon."""
    monkeypatch.setattr("trt_razor.serving.loop.IDLE_PUBLISH_S", 0.02)
    published: list[int] = []
    make(FakeSession(1), publish=lambda: published.append(1))
    wait_until(lambda: len(published) > 3)


def test_an_idle_loop_rests(make: Callable[..., EngineLoop]) -> None:
    published: list[int] = []
    loop = make(FakeSession(1), publish=lambda: published.append(1))
    c = Client([1])
    loop.submit(c.job)
    c.wait()
    wait_until(lambda: now(loop) == (0, 0))
    time.sleep(0.05)
    assert loop._thread.ident is not None
    clock = time.pthread_getcpuclockid(loop._thread.ident)  # of its thread alone
    before = len(published), time.clock_gettime(clock)
    time.sleep(0.3)
    assert len(published) == before[0]
    assert time.clock_gettime(clock) - before[1] < 0.05  # it does not spin
    loop.count("rejected")  # has to wake it, so that metrics show it
    wait_until(lambda: len(published) > before[0])
    assert loop.statistics.requests["rejected"] == 1


def test_statistics_while_jobs_run_and_before_the_last_event(
    make: Callable[..., EngineLoop],
) -> None:
    seen: list[tuple[int, int, int]] = []
    session = Gate(2)
    loop = make(
        session,
        publish=lambda: seen.append((s.slots_active, s.queue_length, s.kv_bytes_used)),
        kv_bytes=lambda n: 100 * n,
    )
    s = loop.statistics
    at_end: list[tuple[int, int]] = []
    clients = [Client([1, 2, 3]), Client([4]), Client([5])]
    for c in clients:
        on_event = c.job.on_event

        def look(e: Event, on_event: Callable[[Event], None] = on_event) -> None:
            on_event(e)
            if e.finished:
                at_end.append((s.slots_active, s.kv_bytes_used))

        c.job.on_event = look
    loop.submit(*[c.job for c in clients])
    session.let(2)
    for c in clients[:2]:
        c.wait_tokens(1)
    time.sleep(0.3)
    session.let(1)
    wait_until(lambda: any(x[0] == 2 for x in seen))
    assert (2, 1, 100 * (3 + 1 + 2)) in seen or (2, 1, 100 * (3 + 1)) in seen
    session.free.set()
    for c in clients:
        c.wait()
    wait_until(lambda: len(at_end) == 3)
    assert at_end[-1] == (0, 0)


def test_a_loop_that_breaks_leaves_nobody_waiting(
    make: Callable[..., EngineLoop],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    session = Gate(1)
    loop = make(session)
    running, waiting = Client([1]), Client([2])
    loop.submit(running.job, waiting.job)
    session.let(2)
    running.wait_tokens(1)
    monkeypatch.setattr(loop, "_admit", lambda: 1 / 0)
    session.free.set()
    assert [c.wait() for c in (running, waiting)] == ["error"] * 2
    assert running.events[-1].error == "the engine has failed; load the model again"
    with pytest.raises(LoopClosed, match="load the model again"):
        loop.submit(Client([3]).job)
    assert "ZeroDivisionError" in caplog.text


def test_errors_are_razor_errors() -> None:
    assert issubclass(QueueFull, RazorError)
    assert issubclass(LoopClosed, RazorError)
