"""What the command line prints: decisions, progress with time left, errors. All on stderr."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
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

INTERRUPTED = 130

err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)


class Bars:
    """Progress bars by stage: ``bars(stage, done, total)``; a finished stage stays on screen.

    Without a terminal, one line at the start and one at the end of each stage.
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
            transient=False,
        )
        self._tasks: dict[str, TaskID] = {}
        self._done: set[str] = set()

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
            if stage not in self._tasks:
                self._tasks[stage] = TaskID(0)
                err.print(f"{stage} …")
            if total and done >= total and stage not in self._done:
                self._done.add(stage)
                err.print(f"{stage} done")
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total or None)
        self._progress.update(self._tasks[stage], completed=done, total=total or None)


def say(line: str) -> None:
    """One line about a decision taken."""
    err.print(line, markup=False)


@contextlib.contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that staging folders are removed."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def guarded(run: Callable[[], int]) -> int:
    """Run a command and turn what users can act on into one line and an exit code.

    Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted.
    """
    try:
        with _terminate_like_interrupt():
            return run()
    except RazorError as e:
        err.print("error:", style="bold red", end=" ")
        err.print(str(e), markup=False)
        return e.exit_code
    except KeyboardInterrupt:
        err.print("interrupted; nothing half-made was left", style="yellow")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (… | head): not an error of ours. Keep Python from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        err.print("error:", style="bold red", end=" ")
        err.print("out of memory; choose a smaller --max-seq-len or --max-batch-size")
        return 1
    except OSError as e:
        err.print("error:", style="bold red", end=" ")
        err.print(f"{e.filename or 'file'}: {e.strerror or e}", markup=False)
        return 1
