"""Which samples a run asks under which methods: known before the first context is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from trt_razor.errors import UsageError, did_you_mean
from trt_razor.evaluation.config import MethodEntry, RunConfig, TaskEntry
from trt_razor.evaluation.samples import Sample
from trt_razor.models.tokenizer import Tokenizer

Key = tuple[str, str, str]
"""(task label, sample id, method label)."""


@dataclass(frozen=True)
class Wanted:
    """A sample and its number in its ``group``, from 0; ``cost``: tokens, for the time left."""

    task: str
    sample: str
    context: str
    number: int
    cost: float
    group: str

    def keys(self, labels: Sequence[str], methods: Sequence[MethodEntry]) -> list[Key]:
        """Under which methods it is asked; a label without an entry is an engine's, asked all."""
        out = {m.label for m in methods if not m.asks(self.group, self.number)}
        return [(self.task, self.sample, label) for label in labels if label not in out]


def check_groups(wanted: Sequence[Wanted], methods: Sequence[MethodEntry]) -> None:
    """Raises UsageError if a method names a group that no task has."""
    known = list(dict.fromkeys(w.group for w in wanted))
    for m in methods:
        for group in m.groups or ():
            if group not in known:
                raise UsageError(f"method {m.label}: groups: {did_you_mean(group, known)}")


def groups_of(wanted: Sequence[Wanted]) -> dict[str, list[str]]:
    """Task label → its groups as they come."""
    found: dict[str, dict[str, None]] = {}
    for w in wanted:
        found.setdefault(w.task, {})[w.group] = None
    return {task: list(groups) for task, groups in found.items()}


def contexts(
    entry: TaskEntry, tokenizer: Tokenizer, seed: int, limit: int | None
) -> Iterator[list[tuple[Sample, Wanted]]]:
    """The samples of a task, those of one context together.

    Args:
        limit: only the first so many samples of each group; None = all.

    Raises:
        UsageError: a task that breaks its promises: an id twice, samples of one context apart, an
            empty context.
    """
    ids: set[str] = set()
    seen: set[str] = set()
    numbers: Counter[str] = Counter()
    made = entry.task.samples(tokenizer, seed)
    for context_id, group in groupby(made, key=lambda s: s.context_id):
        if context_id in seen:
            raise UsageError(
                f"task {entry.label}: samples of context {context_id} are not together"
            )
        seen.add(context_id)
        samples = list(group)
        chosen: list[tuple[Sample, Wanted]] = []
        for sample in samples:
            if sample.id in ids:
                raise UsageError(f"task {entry.label}: sample {sample.id} is there twice")
            ids.add(sample.id)
            if len(sample.context) < 2:
                raise UsageError(
                    f"task {entry.label}: sample {sample.id}: expected a context of at least 2 "
                    f"tokens, found {len(sample.context)}"
                )
            number = numbers[sample.group]
            numbers[sample.group] += 1
            if limit is None or number < limit:
                cost = len(sample.context) / len(samples) + _following(sample)
                wanted = Wanted(entry.label, sample.id, context_id, number, cost, sample.group)
                chosen.append((sample, wanted))
        if chosen:
            yield chosen


def plan(
    config: RunConfig,
    tokenizer: Tokenizer,
    limit: int | None,
    progress: Callable[[str, int, int], None],
) -> list[Wanted]:
    """All samples of a run, without their tokens. The samples are made for it, and made again later:
    a wrong data file shows before the first minute of work, and the time left is known.

    Raises:
        UsageError: what the tasks raise, or a run without samples.
    """
    wanted: list[Wanted] = []
    total = sum(entry.task.count() for entry in config.tasks)
    for entry in config.tasks:
        before = len(wanted)
        for together in contexts(entry, tokenizer, config.seed, limit):
            wanted += [w for _, w in together]
            progress("samples", min(len(wanted), total), total)
        if len(wanted) == before:
            raise UsageError(f"task {entry.label}: has no samples with these options")
    progress("samples", total, total)
    return wanted


def _following(sample: Sample) -> int:
    turns = sum(len(t.prompt) + max(len(t.answer), t.max_new_tokens // 4) for t in sample.turns)
    return turns + len(sample.continuation)
