"""Contexts computed by several processes, each with its own copy of the model.

The parent plans, makes the samples, writes the records and shows the progress; a worker gets one
context at a time and sends its records back one by one, so a run that is stopped has kept them. The
parent holds no model. Workers share nothing, and what they compute does not depend on their number,
but for what a library's thread count does to the order of its sums.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from trt_razor.errors import RazorError, UsageError
from trt_razor.evaluation.config import RunConfig
from trt_razor.evaluation.records import Record
from trt_razor.evaluation.run import Unit, lanes_of, open_runners, records_of
from trt_razor.evaluation.runners.interface import Context, Runner
from trt_razor.models.tokenizer import Tokenizer

Open = Callable[[RunConfig], tuple[Runner | None, Runner | None]]

_LAST_SECONDS = 10.0
"""How long the parent waits for the end of a process that cannot go on."""


class RemoteRunner:
    """What the parent knows of a runner that its workers have; it computes nothing."""

    def __init__(self, label: str, tokenizer: Tokenizer) -> None:
        self.label, self.tokenizer = label, tokenizer

    def read(self, tokens: Sequence[int], all_queries: bool = False) -> Context:
        raise AssertionError("contexts are read by the workers")


@dataclass(frozen=True)
class _Opened:
    """First message of a worker: its model's runner and its engine's, as far as there are any."""

    runners: tuple[RemoteRunner | None, RemoteRunner | None]


@dataclass(frozen=True)
class _Failed:
    """Last message of a worker. ``kind``: whose error it is; ``trace``: for a bug."""

    kind: type[Exception]
    text: str
    trace: str = ""


class _Worker:
    """The parent's side of one process.

    Attributes:
        ready: it has opened its model. busy: it computes a context.
    """

    def __init__(self, number: int, jobs: int, config: RunConfig, open_: Open) -> None:
        self.number, self.jobs, self.ready, self.busy = number, jobs, False, False
        # A new interpreter: a fork of one that has threads (torch) can hang.
        spawn = multiprocessing.get_context("spawn")
        self.link, far = spawn.Pipe()
        self.process = spawn.Process(
            target=_work, args=(far, config, number, jobs, open_), daemon=True
        )
        try:
            self.process.start()
        except OSError as e:
            self.link.close()
            raise RazorError(f"{self}: cannot be started: {e.strerror or e}") from None
        finally:
            far.close()  # else its end would never be seen

    def __str__(self) -> str:
        return f"worker {self.number + 1} of {self.jobs}"

    def send(self, unit: Unit) -> None:
        self.busy = True
        try:
            self.link.send(unit)
        except (BrokenPipeError, ConnectionResetError):
            raise self._ended() from None

    def receive(self) -> Any:
        """Its next message. Raises RazorError if the process has ended."""
        try:
            return self.link.recv()
        except (EOFError, ConnectionResetError):
            raise self._ended() from None

    def _ended(self) -> RazorError:
        self.process.join(_LAST_SECONDS)
        code = self.process.exitcode
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was ended by signal {-code}"
            with contextlib.suppress(ValueError):
                how = f"was ended by {signal.Signals(-code).name}"
        return RazorError(
            f"{self} (process {self.process.pid}) {how}; results are kept and the same command goes "
            "on; if memory ran out, give fewer --jobs"
        )


class Workers:
    """Up to ``jobs`` processes. Use it in a ``with`` block: none of them outlives it.

    Args:
        config: of the run. ``threads`` counts for each worker; None: the cores divided by ``jobs``.
            With ``device: cuda`` workers go round the GPUs.
        jobs: how many. The first one starts at once, the others as there are contexts for them.
        open_: opens the runners, in the worker; a function of a module.

    Attributes:
        runners: of the first worker, for ``lanes_of``: what is computed with, and the tokenizer.

    Raises:
        UsageError, RazorError: what a worker raises, or that it has ended.
    """

    runners: tuple[RemoteRunner | None, RemoteRunner | None]

    def __init__(self, config: RunConfig, jobs: int, open_: Open = open_runners) -> None:
        self.config, self.jobs, self._open = config, jobs, open_
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        try:
            self._start()
            while not self._workers[0].ready:
                for _ in self._arrived(None):
                    pass
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End all processes, whatever they do: they have nothing to lose."""
        for w in self._workers:
            w.process.kill()
        for w in self._workers:
            w.process.join(_LAST_SECONDS)
            w.link.close()
        self._workers = []

    def records(self, units: Iterator[Unit]) -> Iterator[Record]:
        """``run.Compute``: records as they come, those of one unit in order.

        At most 2 · jobs units are in memory: one that each worker computes, and as many that wait.

        Raises:
            UsageError, RazorError: see the class. RuntimeError: a bug in a worker.
        """
        waiting: deque[Unit] = deque()
        more = True
        while True:
            for w in self._workers:
                if waiting and w.ready and not w.busy:
                    w.send(waiting.popleft())
            timeout: float | None = None
            if more and len(waiting) < self.jobs:
                unit = next(units, None)
                more = unit is not None
                if unit is not None:
                    waiting.append(unit)
                    free = sum(not w.busy for w in self._workers)
                    if len(waiting) > free and len(self._workers) < self.jobs:
                        self._start()
                timeout = 0.0
            elif not waiting and not any(w.busy for w in self._workers):
                return
            yield from self._arrived(timeout)

    def _start(self) -> None:
        # It would unblock the signal below when it is started by the first process.
        resource_tracker.ensure_running()
        with _without_interrupt():
            worker = _Worker(len(self._workers), self.jobs, self.config, self._open)
            self._workers.append(worker)

    def _arrived(self, timeout: float | None) -> Iterator[Record]:
        """Take one message of each worker that has sent some; its records."""
        links = {w.link: w for w in self._workers}
        for link in wait(list(links), timeout):
            worker = links[link]  # type: ignore[index]
            message = worker.receive()
            if isinstance(message, Record):
                yield message
            elif isinstance(message, _Failed):
                raise message.kind(message.text) from _trace(message)
            elif isinstance(message, _Opened):
                worker.ready = True
                if worker.number == 0:
                    self.runners = message.runners
            else:
                worker.busy = False


def _trace(failed: _Failed) -> Exception | None:
    """Where a bug happened, for whoever reads the parent's traceback."""
    return RuntimeError(f"in a worker:\n{failed.trace}") if failed.trace else None


@contextlib.contextmanager
def _without_interrupt() -> Iterator[None]:
    """What is started inside never gets Ctrl-C: it is the parent's, which ends its workers."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# The other process --------------------------------------------------------------------------------
def _work(link: Connection, config: RunConfig, number: int, jobs: int, open_: Open) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        config = _own_share(config, number, jobs)
        model, engine = open_(config)
        lanes = lanes_of(config, model, engine)
        link.send(_Opened((_remote(model), _remote(engine))))
        while True:
            unit = link.recv()
            for record in records_of(config, lanes, unit):
                link.send(record)
            link.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except Exception as e:
        with contextlib.suppress(OSError):
            link.send(_failed(e))


def _failed(e: Exception) -> _Failed:
    if isinstance(e, RazorError):
        return _Failed(UsageError if isinstance(e, UsageError) else RazorError, str(e))
    if isinstance(e, MemoryError):
        return _Failed(RazorError, "out of memory: give fewer --jobs, or shorter contexts")
    if isinstance(e, OSError):
        where = f"{os.fsdecode(e.filename)}: " if isinstance(e.filename, (str, bytes)) else ""
        return _Failed(RazorError, f"{where}{e.strerror or e}")
    return _Failed(RuntimeError, f"{type(e).__name__}: {e}", traceback.format_exc())


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _remote(runner: Runner | None) -> RemoteRunner | None:
    return None if runner is None else RemoteRunner(runner.label, runner.tokenizer)


def _own_share(config: RunConfig, number: int, jobs: int) -> RunConfig:
    """A worker's settings: its threads, its GPU."""
    allowed = _allowed_cores()
    each = config.threads or max(1, len(allowed) // jobs)
    if config.engine is not None and hasattr(os, "sched_setaffinity"):
        # An engine takes as many threads as it has cores, and lets them spin.
        os.sched_setaffinity(0, cores_of(allowed, number, each))
    device = config.device
    if device == "cuda":
        import torch

        device = gpu_of(number, torch.cuda.device_count())
    return replace(config, threads=each, device=device)


def _allowed_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores_of(allowed: Sequence[int], number: int, each: int) -> set[int]:
    """The ``each`` cores of a worker, counted on from its forerunner's, round and round."""
    return {allowed[(number * each + i) % len(allowed)] for i in range(each)}


def gpu_of(number: int, count: int) -> str:
    """Device of a worker that was told ``cuda``, where there are ``count``."""
    return f"cuda:{number % count}" if count > 1 else "cuda"
