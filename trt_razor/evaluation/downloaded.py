"""What LongBench and InfiniteBench share: a folder of JSONL files, a document and a question a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trt_razor.errors import UsageError, did_you_mean
from trt_razor.evaluation.documents import Around, cut_middle, text_ids
from trt_razor.evaluation.jsonl import Row, count_rows, read_rows
from trt_razor.evaluation.samples import Sample, Turn
from trt_razor.models.tokenizer import Tokenizer

SHORTEST = 256
"""Tokens: less has no room for an instruction and a question."""


def check_numbers(max_length: object, limit: object) -> None:
    """Raises UsageError for a ``max_length`` or ``limit`` that is no sensible number."""
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < SHORTEST:
        raise UsageError(
            f"max_length: expected a number of tokens >= {SHORTEST}, found {max_length!r}"
        )
    if limit is None:
        return
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise UsageError(f"limit: expected a number of samples >= 1, found {limit!r}")


def check_names(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raises UsageError for a name that is not known, with the nearest one that is."""
    if isinstance(names, str):
        raise UsageError(f"{option}: expected a list of names, found '{names}'")
    for name in names:
        if name not in known:
            raise UsageError(f"{option}: '{name}': {did_you_mean(str(name), known)}")


def find_files(
    path: Path, option: str, names: Sequence[str], known: Sequence[str], default: Sequence[str]
) -> dict[str, Path]:
    """Name → its file ``NAME.jsonl``.

    Args:
        path: a folder, or one file.
        option: what ``names`` is called in a run's YAML.
        names: those that are wanted; empty = those of ``default`` that are there.
        known: all names.

    Raises:
        UsageError: none is there, or a file whose name says nothing.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        chosen = names or [n for n in default if (path / f"{n}.jsonl").exists()]
        if not chosen:
            raise UsageError(f"{path}: expected files like {default[0]}.jsonl, found none")
        return {n: path / f"{n}.jsonl" for n in chosen}
    chosen = names or [path.stem]
    if len(chosen) != 1 or chosen[0] not in known:
        raise UsageError(
            f"{path}: expected a folder, a file with a known name ({default[0]}.jsonl) or one name "
            f"in {option}, found {', '.join(chosen)}"
        )
    return {chosen[0]: path}


def count_samples(files: Mapping[str, Path], limit: int | None) -> int:
    return sum(count_rows(file, limit) for file in files.values())


def made_samples(
    files: Mapping[str, Path],
    limit: int | None,
    tokenizer: Tokenizer,
    max_length: int,
    make: Callable[[str, Row], tuple[str, Around, Turn, dict[str, Any]]],
) -> Iterator[Sample]:
    """A sample a line; neighbours with the same context share its ``context_id``.

    Args:
        max_length: tokens of context and prompt; longer contexts lose their middle.
        make: (name, row) → (group, what stands around the field ``context``, turn, meta).

    Raises:
        UsageError: as ``make``, and for a question that is longer than ``max_length``.
    """
    for name, file in files.items():
        before: Sample | None = None
        for row in read_rows(file, limit):
            group, frame, turn, meta = make(name, row)
            document = text_ids(tokenizer, row.text("context"))
            try:
                kept = cut_middle(frame, document, max_length)
            except UsageError as e:
                raise UsageError(f"{row.where}: {e}") from None
            context = (*frame.opening, *kept)
            sample_id = context_id = f"{name}/{row.line}"
            if before is not None and before.context == context:
                context_id = before.context_id
            cut = len(document) - len(kept)
            meta = {"dataset": name, "line": row.line, "cut": cut, **meta}
            before = Sample(sample_id, context_id, group, context, (turn,), meta=meta)
            yield before
