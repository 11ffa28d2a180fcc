"""Toy runners that worker processes open. A module of its own: a process imports what it is sent."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from eval_doubles import ToyContext, ToyRunner

from trt_razor.errors import UsageError
from trt_razor.evaluation.config import RunConfig


class Deadly(ToyRunner):
    """Ends its process, as the system does when memory ran out, at the 4th context."""

    def read(self, tokens: Any, all_queries: bool = False) -> ToyContext:
        if len(self.reads) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(tokens, all_queries)


class Wrong(ToyRunner):
    def read(self, tokens: Any, all_queries: bool = False) -> ToyContext:
        if len(tokens) > 30:
            raise {"usage": UsageError, "bug": ZeroDivisionError}[self.label]("no such thing")
        return super().read(tokens, all_queries)


class Meeting(ToyRunner):
    """Three processes wait for one another at their first contexts; the first one then waits more."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def read(self, tokens: Any, all_queries: bool = False) -> ToyContext:
        if not self.reads:
            self.folder.mkdir(exist_ok=True)
            first = not any(self.folder.iterdir())
            (self.folder / str(os.getpid())).touch()
            end = time.monotonic() + 60
            while len(list(self.folder.iterdir())) < 3 and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.5 * first)
        return super().read(tokens, all_queries)


def open_together(made: RunConfig) -> Any:
    return Meeting(Path(str(made.model))), None


def open_toy(made: RunConfig) -> Any:
    return ToyRunner(), None


def open_deadly(made: RunConfig) -> Any:
    return Deadly(), None


def open_wrong(made: RunConfig) -> Any:
    return Wrong("usage"), None


def open_buggy(made: RunConfig) -> Any:
    return Wrong("bug"), None


def open_nothing(made: RunConfig) -> Any:
    raise UsageError("model: none here")


def open_dead(made: RunConfig) -> Any:
    os._exit(7)


def open_shares(made: RunConfig) -> Any:
    """Its label says what this worker may use."""
    return ToyRunner(f"{made.threads} {made.device}"), None
