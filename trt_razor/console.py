"""What the command line prints: decisions, progress with time left, errors.

Results go to standard output, all else to standard error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from trt_razor.errors import RazorError
from trt_razor.files import STOP_SIGNALS

INTERRUPTED = 130
TRACEBACK_ENV = "TRT_RAZOR_TRACEBACK"
LINE_SECONDS = 30.0
"""Without a terminal: a long stage says where it is once in so many seconds."""


class _Messages(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads the messages any more (2>&1 | head): the work goes on without them."""
        self.quiet = True


class _Results(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


err = _Messages(stderr=True, highlight=False, soft_wrap=True)
out = _Results(highlight=False, soft_wrap=True)


class Bars:
    """Progress by stage: ``bars(stage, done, total)``, total 0 = unknown.

    On a terminal a bar with the time left for each stage, which stays on the screen when it is
    done. Otherwise a line at the start and the end of each stage, and now and then in between.
    """

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err,
        )
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, _Line] = {}

    def __enter__(self) -> Bars:
        if err.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        if err.is_terminal:
            self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not err.is_terminal:
            if stage not in self._lines:
                self._lines[stage] = _Line(stage)
            self._lines[stage].update(done, total)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total or None)
        self._progress.update(self._tasks[stage], completed=done, total=total or None)


class _Line:
    """Progress of one stage for a log: few lines, each whole."""

    def __init__(self, stage: str) -> None:
        self.stage, self.finished = stage, False
        self.start = self.last = time.monotonic()
        say(f"{stage} …")

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.finished or not total:
            return
        if done >= total:
            self.finished = True
            say(f"{self.stage} done in {now - self.start:.1f} s")
        elif done > 0 and now - self.last >= LINE_SECONDS:
            self.last = now
            left = (now - self.start) * (total - done) / done
            say(f"{self.stage} {done / total:.0%}, about {left:.0f} s left")


def say(line: str) -> None:
    """One line about a decision taken."""
    err.print(_one_line(line), markup=False)


def fail(message: str) -> None:
    """The line that says why a command failed."""
    err.print("error:", style="bold red", end=" ")
    err.print(_one_line(message), markup=False)


def _one_line(text: str) -> str:
    """Names and messages from elsewhere may hold line ends and terminal control codes."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


@contextlib.contextmanager
def _stop_like_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind like Ctrl-C, so that staging folders are removed."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {}
    try:
        for s in STOP_SIGNALS:
            # Ignored signals stay ignored: nohup.
            if s != signal.SIGINT and signal.getsignal(s) == signal.SIG_DFL:
                with contextlib.suppress(ValueError):  # not the main thread
                    before[s] = signal.signal(s, stop)
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def guarded(run: Callable[[], int]) -> int:
    """Run a command and turn whatever ends it into one line and an exit code.

    Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted. For a failure of the program itself
    the environment variable TRT_RAZOR_TRACEBACK=1 shows where it happened.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # replaced by a test, or closed
            # A model may say what the terminal's encoding lacks.
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with _stop_like_interrupt():
            code = run()
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a failure can be told
            return code
    except RazorError as e:
        fail(str(e))
        return e.exit_code
    except KeyboardInterrupt:
        err.print("interrupted; nothing half-made was left", style="yellow")
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()  # the reader went away (… | head): not an error of ours
        return 0
    except MemoryError:
        fail("out of memory: use fewer --slots, or build with a smaller --max-seq-len")
        return 1
    except OSError as e:
        where = f"{os.fsdecode(e.filename)}: " if isinstance(e.filename, (str, bytes)) else ""
        fail(f"{where}{e.strerror or e}")
        _forget_stdout()  # what is still buffered may be what failed
        return 1
    except Exception as e:
        if os.environ.get(TRACEBACK_ENV):
            raise
        fail(
            f"a bug in trt-razor: {type(e).__name__}: {e}; please report it with what "
            f"{TRACEBACK_ENV}=1 prints"
        )
        return 1


def _forget_stdout() -> None:
    """Keep Python from failing once more when it flushes standard output at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
