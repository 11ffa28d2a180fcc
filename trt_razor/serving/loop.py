"""The thread that moves a Generator on: a bounded queue in front of its slots.

``EngineLoop`` knows nothing of Triton. Requests (``Job``) come from any thread; whatever a job is
told (``on_event``) or asked (``is_cancelled``) happens on the loop's thread only.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trt_razor.errors import RazorError, UsageError
from trt_razor.generate import Event, Generator
from trt_razor.sampling import SamplingParams
from trt_razor.serving.statistics import Statistics

log = logging.getLogger(__name__)

PUBLISH_S = 0.25
"""Seconds between two publications of the statistics while requests run."""

IDLE_PUBLISH_S = 2.0
"""Seconds between two publications while nothing runs."""

SHUTTING_DOWN = "the server is shutting down"


class QueueFull(RazorError):
    """No room for a request now; later there may be."""


class LoopClosed(RazorError):
    """The loop takes no requests any more."""


@dataclass(eq=False)
class Job:
    """One sequence to generate.

    Attributes:
        prompt, params: as for ``Generator.submit``.
        on_event: told every event. The last one has ``finished`` set; besides Generator's reasons
            that may be ``cancelled``.
        is_cancelled: asked now and then whether nobody waits for this job any more.
        arrival_ns, scheduled_ns, first_token_ns, last_token_ns: ``time.time_ns()``, 0 = not yet.
        gone: ``is_cancelled`` said so.
    """

    prompt: Sequence[int]
    params: SamplingParams
    on_event: Callable[[Event], None]
    is_cancelled: Callable[[], bool] | None = None
    arrival_ns: int = field(default_factory=time.time_ns)
    scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    gone: bool = False
    _arrival: float = field(default_factory=time.monotonic)
    _last: float = 0.0
    _asked: float = -math.inf  # when is_cancelled was called last
    _request: int = -1
    _cancel: bool = False
    done: bool = False


class EngineLoop:
    """Steps a generator on a thread of its own as long as there is something to do.

    Args:
        generator: used by this loop alone from ``start`` on.
        max_queue_size: most jobs that wait while all slots are taken; 0 = none.
        statistics: kept up to date here.
        publish: called on the loop's thread after changes of the statistics, now and then while
            jobs run and always before the loop rests.
        kv_bytes: bytes kept by a sequence of so many cached tokens.
        cancel_check_s: seconds between two questions to ``is_cancelled`` of a running job; of a
            waiting one it takes five times as long.
    """

    def __init__(
        self,
        generator: Generator,
        max_queue_size: int,
        statistics: Statistics,
        publish: Callable[[], None] | None = None,
        kv_bytes: Callable[[int], int] | None = None,
        cancel_check_s: float = 0.1,
    ) -> None:
        self.slots = generator.session.num_slots
        self.max_queue_size = max_queue_size
        self.statistics = statistics
        self._generator = generator
        self._publish = publish
        self._kv_bytes = kv_bytes
        self._cancel_check_s = cancel_check_s
        self._wake = threading.Condition()
        # Guarded by _wake:
        self._queue: deque[Job] = deque()
        self._busy = 0  # jobs in slots
        self._changed = True  # statistics to publish
        self._closing = ""  # or why nothing new is taken
        # Of the loop's thread:
        self._running: dict[int, Job] = {}
        self._published = 0.0
        self._thread = threading.Thread(target=self._run, name="trt-razor-engine", daemon=True)

    # From any thread --------------------------------------------------------------------------
    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, *jobs: Job) -> None:
        """Queue jobs in order, all or none.

        Raises:
            QueueFull: no room for all of them. LoopClosed: after ``close``. UsageError: more than
                there ever is room for.
        """
        with self._wake:
            if self._closing:
                raise LoopClosed(self._closing)
            most = self.max_queue_size + self.slots
            if len(jobs) > most:
                raise UsageError(
                    f"this request has {len(jobs)} rows, and {self.slots} slots with a queue of "
                    f"{self.max_queue_size} never take more than {most}; send fewer rows"
                )
            free = max(0, self.slots - self._busy)
            room = self.max_queue_size + free - len(self._queue)
            if len(jobs) > room:
                many = f" (this request has {len(jobs)} rows)" if len(jobs) > 1 else ""
                waiting = max(0, len(self._queue) - free)
                raise QueueFull(
                    f"queue is full: {waiting} requests wait for one of {self.slots} slots "
                    f"(max_queue_size {self.max_queue_size}); try again later{many}"
                )
            self._queue.extend(jobs)
            self._wake.notify_all()

    def cancel(self, job: Job) -> None:
        """End a job wherever it is, with a ``cancelled`` event; nothing if it has ended."""
        with self._wake:
            job._cancel = True
            self._wake.notify_all()

    def count(self, outcome: str) -> None:
        """A request that never came to the loop ended so."""
        self.statistics.count_request(outcome)
        with self._wake:
            self._changed = True
            self._wake.notify_all()

    def close(self, timeout: float | None = 30.0) -> bool:
        """Take nothing new, end all jobs with an error and the thread; whether it has ended.

        A step that is under way ends first.
        """
        with self._wake:
            self._closing = self._closing or SHUTTING_DOWN
            self._wake.notify_all()
        if self._thread.ident is None:  # never started
            self._end_all()
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # The thread -------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while self._wait():
                self._turn()
        except Exception:  # a bug here must not leave clients waiting for ever
            log.exception("the engine's loop ended unexpectedly")
        finally:
            with self._wake:
                self._closing = self._closing or "the engine has failed; load the model again"
            self._end_all()
            self._publish_now()

    def _wait(self) -> bool:
        """Rest until there is something to do; False when the loop is to end."""
        with self._wake:
            while not (self._closing or self._queue or self._running or self._changed):
                if not self._wake.wait(IDLE_PUBLISH_S):
                    self._changed = True
            return not self._closing

    def _turn(self) -> None:
        self._drop_cancelled()
        self._admit()
        if self._running:
            try:
                events = self._generator.step()
            except Exception as e:  # of a runtime, or out of memory: nobody's state is sure now
                log.exception("a step failed unexpectedly")
                reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
                self._fail_running(f"the engine failed unexpectedly: {reason}")
                events = []
            for event in events:
                if event.request in self._running:
                    self._tell(self._running[event.request], event)
        self._look()

    def _admit(self) -> None:
        """Jobs in order into free slots."""
        while len(self._running) < self.slots:
            with self._wake:
                if not self._queue:
                    break
                job = self._queue.popleft()
                self._busy += 1
            now = time.monotonic()
            job.scheduled_ns = time.time_ns()
            try:
                job._request = self._generator.submit(job.prompt, job.params)
            except RazorError as e:
                self._finish(job, Event(-1, None, "", "error", str(e)))
                continue
            self._running[job._request] = job
            self.statistics.queue.observe(now - job._arrival)
            if self._asked_to_end(job, now, self._cancel_check_s):
                self._end(job, Event(job._request, None, "", "cancelled"))

    def _drop_cancelled(self) -> None:
        now = time.monotonic()
        with self._wake:
            waiting = list(self._queue)
        period = self._cancel_check_s
        for job in self._running.copy().values():
            if self._asked_to_end(job, now, period):
                self._end(job, Event(job._request, None, "", "cancelled"))
        for job in waiting:
            if self._asked_to_end(job, now, 5 * period):
                self._end(job, Event(job._request, None, "", "cancelled"))

    def _asked_to_end(self, job: Job, now: float, period: float) -> bool:
        if job._cancel:
            return True
        if job.is_cancelled is None or now - job._asked < period:
            return False
        job._asked = now
        try:
            job.gone = job.is_cancelled()
        except Exception:
            log.exception("cannot ask whether a request is cancelled")
        return job.gone

    # Ends and events --------------------------------------------------------------------------
    def _tell(self, job: Job, event: Event) -> None:
        """Count an event and pass it on."""
        if event.token is not None:
            now, stamp = time.monotonic(), time.time_ns()
            s = self.statistics
            if not job.first_token_ns:
                job.first_token_ns = stamp
                s.time_to_first_token.observe(now - job._arrival)
                s.prompt_tokens += len(job.prompt)
            else:
                s.inter_token.observe(now - job._last)
            job._last, job.last_token_ns = now, stamp
            s.generated_tokens += 1
        if event.finished:
            self._finish(job, event)
        elif not self._call(job, event):
            # What it made cannot be sent: nobody is there.
            job.gone = True
            self._end(job, Event(job._request, None, "", "cancelled"))

    def _end(self, job: Job, event: Event) -> None:
        """Take a job out of wherever it is; ``event`` is its last."""
        if job.done:
            return
        if job._request in self._running:
            self._generator.cancel(job._request)
        with self._wake:
            if job in self._queue:
                self._queue.remove(job)
                self._busy += 1  # _finish gives it back
        self._finish(job, event)

    def _finish(self, job: Job, event: Event) -> None:
        job.done = True
        self._running.pop(job._request, None)
        with self._wake:
            self._busy -= 1
            self._changed = True
        self.statistics.count_request(event.finished or "error")
        self.statistics.request.observe(time.monotonic() - job._arrival)
        if not self._running and not self._queue:
            self._publish_now()  # the client that sees the end sees the metrics of the end
        self._call(job, event)

    def _call(self, job: Job, event: Event) -> bool:
        try:
            job.on_event(event)
        except Exception:
            log.exception("a response could not be sent")
            return False
        return True

    def _fail_running(self, message: str) -> None:
        for request, job in list(self._running.items()):
            self._end(job, Event(request, None, "", "error", message))

    def _end_all(self) -> None:
        with self._wake:
            waiting = list(self._queue)
        for job in [*self._running.values(), *waiting]:
            self._end(job, Event(job._request, None, "", "error", self._closing))

    # Statistics -------------------------------------------------------------------------------
    def _look(self) -> None:
        """Publish if it is time to, or if the loop is about to rest."""
        with self._wake:
            rests = not (self._queue or self._running)
        if rests or time.monotonic() - self._published >= PUBLISH_S:
            self._publish_now()

    def _publish_now(self) -> None:
        with self._wake:
            self._changed = False
            self.statistics.queue_length = len(self._queue)
            self.statistics.slots_active = len(self._running)
        if self._kv_bytes:
            kv = self._kv_bytes
            cached = self._generator.cached_tokens if self._running else []
            self.statistics.kv_bytes_used = sum(kv(n) for n in cached)
        self._published = time.monotonic()
        if self._publish:
            try:
                self._publish()
            except Exception:
                log.exception("the metrics could not be published")
