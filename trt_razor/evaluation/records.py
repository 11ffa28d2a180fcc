"""What a run has found out so far, record by record, in a folder that outlives a kill.

``run.json`` says which run it is; ``records.jsonl`` holds a line for each sample under each method.
A line is written at once, so a killed process leaves at most its last line torn; that one is dropped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

from trt_razor.errors import RazorError, UsageError
from trt_razor.files import write_text_atomic
from trt_razor.models.stored import read_json

RUN_FILE, RECORDS_FILE = "run.json", "records.jsonl"
MAX_RECORDS_BYTES = 1 << 30
FORMAT = 1
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "str | None": (str, type(None)),
    "list[float]": (list,),
    "list[str]": (list,),
    "dict[str, Any]": (dict,),
}


@dataclass(frozen=True)
class Record:
    """One sample under one method.

    Attributes:
        task, method: their labels. sample, context, group, meta: as in ``samples.Sample``.
        context_tokens: length of the context.
        kv_ratio: bits kept / bits of a dense 16-bit cache, after compression; kv_most: the largest
            while the sample was asked.
        scores: 0 … 1 of each scored turn; score: their mean, None without any.
        texts: what was generated, if it was.
        tokens: predicted tokens that nll (mean, nats), kl (mean over tokens of KL(dense ‖ method),
            nats) and agree (share of tokens with the dense model's most probable one) are taken over.
        seconds: compressing (shared by the context's samples), asking and comparing.
        read_seconds: reading the context (shared by its samples; equal for all methods).
        error: why there are no results.
        nll_curve, kl_curve: nll and kl of each whole span (``nearness.SPAN`` tokens) of a continuation
            of at least two; else empty.
    """

    task: str
    method: str
    sample: str
    context: str
    group: str
    context_tokens: int
    kv_ratio: float | None = None
    kv_most: float | None = None
    score: float | None = None
    scores: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    nll: float | None = None
    kl: float | None = None
    agree: float | None = None
    seconds: float = 0.0
    read_seconds: float = 0.0
    error: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    nll_curve: list[float] = field(default_factory=list)
    kl_curve: list[float] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task, self.sample, self.method

    def line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, data: Any) -> Record:
        """Raises ValueError where a field is missing, unknown or of another kind."""
        if not isinstance(data, dict):
            raise ValueError("not a mapping")
        known: dict[str, str] = {f.name: str(f.type) for f in fields(cls)}
        for name, value in data.items():
            if name not in known:
                raise ValueError(f"unknown field '{name}'")
            wrong_bool = isinstance(value, bool)
            if wrong_bool or not isinstance(value, _KINDS[known[name]]):
                raise ValueError(f"field '{name}': expected {known[name]}, found {value!r:.60}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"field '{name}': not a finite number")
            inner = {"list[float]": "float", "list[str]": "str"}.get(known[name])
            if inner and not all(isinstance(v, _KINDS[inner]) for v in data[name]):
                raise ValueError(f"field '{name}': expected {known[name]}")
        try:
            return cls(**data)
        except TypeError as e:
            raise ValueError(str(e)) from None


class RecordFolder:
    """The output folder of a run, open for appending. Use it in a ``with`` block.

    Only one process at a time; a second one is refused.
    """

    def __init__(self, folder: Path, run: str, settings: dict[str, Any], restart: bool) -> None:
        """
        Args:
            run: ``RunConfig.hash()``. settings: ``RunConfig.to_json()``.
            restart: forget what is there.

        Raises:
            UsageError: the folder holds another run, or something that is none, or is in use.
            RazorError: cannot be written, or a damaged record.
        """
        self.folder, self.run, self.settings = folder, run, settings
        self.records: dict[tuple[str, str, str], Record] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / RECORDS_FILE, "a+b")  # noqa: SIM115 (closed by __exit__)
        except OSError as e:
            raise RazorError(f"{folder}: cannot write results there: {e.strerror or e}") from None
        try:
            self._lock()
            self._take_over(restart)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{self.folder}: another run writes there; give --output DIR"
            ) from None
        except OSError:
            return  # a file system without locks

    def _take_over(self, restart: bool) -> None:
        path = self.folder / RECORDS_FILE
        old = read_run(self.folder) if (self.folder / RUN_FILE).exists() else None
        if restart:
            self._file.truncate(0)
            old = None
        elif old is not None and old["run"] != self.run and path.stat().st_size:
            changed = _first_difference(old.get("config"), self.settings)
            raise UsageError(
                f"{self.folder}: holds results of other settings ({changed}); "
                "give another --output DIR, or --restart to forget them"
            )
        elif old is None and path.stat().st_size:
            raise UsageError(
                f"{path}: records without {RUN_FILE}: not known of which run; --restart forgets them"
            )
        if old is not None and old["run"] != self.run:
            old = None  # it never had a result
        whole = 0
        for record, end in _lines(path):
            self.records[record.key] = record
            whole = end
        self._file.truncate(whole)  # the torn line of a killed process
        environments = [] if old is None else list(old.get("environments", []))
        self._about: dict[str, Any] = {
            "environments": environments,
            "planned": 0 if old is None else old.get("planned", 0),
            "query_aware": [] if old is None else old.get("query_aware", []),
            "groups": {} if old is None else old.get("groups", {}),
        }
        self._write_run()

    def describe(
        self,
        environment: dict[str, Any],
        planned: int,
        query_aware: list[str],
        groups: dict[str, list[str]] | None = None,
    ) -> None:
        """Say where the run is computed, how many records make it complete, which methods see the
        first question before they compress, and each task's groups in their order."""
        if environment not in self._about["environments"]:
            self._about["environments"].append(environment)
        self._about |= {"planned": planned, "query_aware": query_aware, "groups": groups or {}}
        self._write_run()

    def _write_run(self) -> None:
        about = {"format": FORMAT, "run": self.run, "config": self.settings, **self._about}
        write_text_atomic(
            self.folder / RUN_FILE, json.dumps(about, indent=1, ensure_ascii=False) + "\n"
        )

    def drop_errors(self) -> int:
        """Forget the records of methods that failed, so that they are tried again; their number.

        In the file the old record stays; of two records of one sample and method the last counts.
        """
        kept = {k: r for k, r in self.records.items() if r.error is None}
        count = len(self.records) - len(kept)
        self.records = kept
        return count

    def add(self, record: Record) -> None:
        """Append one record, at once.

        Raises:
            RazorError: the disk is full, or the file cannot be written.
        """
        try:
            self._file.write(record.line().encode("utf-8"))
            self._file.flush()
        except OSError as e:
            path = self.folder / RECORDS_FILE
            raise RazorError(f"{path}: cannot write: {e.strerror or e}") from None
        self.records[record.key] = record

    def __enter__(self) -> RecordFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._file.close()


def read_run(folder: Path) -> dict[str, Any]:
    """``run.json`` of a results folder.

    Raises:
        UsageError: there is none. RazorError: damaged, or of another version.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        raise UsageError(f"{folder}: no results of trt-razor eval there ({RUN_FILE} is missing)")
    data = read_json(path, "the run")
    if data.get("format") != FORMAT:
        raise RazorError(
            f"{path}: expected format {FORMAT}, found {data.get('format')!r:.40}; --restart writes "
            "a new one"
        )
    config = data.get("config")
    if not isinstance(data.get("run"), str) or not isinstance(config, dict):
        raise RazorError(f"{path}: damaged: run or config is missing; --restart writes a new one")
    return data


def read_records(folder: Path) -> list[Record]:
    """All whole records of a folder, the last one of each sample and method.

    Raises:
        RazorError: a damaged record, or a file too large.
    """
    path = folder / RECORDS_FILE
    if not path.is_file():
        return []
    found = {record.key: record for record, _ in _lines(path)}
    return list(found.values())


def _lines(path: Path) -> Iterator[tuple[Record, int]]:
    """Whole records and where in the file each ends."""
    size = os.path.getsize(path)
    if size > MAX_RECORDS_BYTES:
        raise RazorError(
            f"{path}: expected at most {MAX_RECORDS_BYTES >> 30} GiB, found {size:,} B"
        )
    end = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                record = Record.from_json(json.loads(line))
            except (ValueError, RecursionError) as e:
                raise RazorError(
                    f"{path}: line {number}: damaged record ({str(e)[:120]}); delete the line, and "
                    "its sample is asked again"
                ) from None
            yield record, end


def _first_difference(old: Any, new: Any, place: str = "") -> str:
    """Where two settings differ, for a message."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(k for k in old if k not in new)]:
            here = f"{place}.{key}" if place else str(key)
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), here)
    if isinstance(old, list) and isinstance(new, list):
        for i, (a, b) in enumerate(zip(old, new, strict=False)):
            if a != b:
                return _first_difference(a, b, f"{place}[{i}]")
        return f"{place}: {len(old)} entries there, {len(new)} now"
    if old == new:
        return "a file that the settings name has changed"
    return f"{place}: {json.dumps(old)[:60]} there, {json.dumps(new)[:60]} now"
