"""Samples × methods: every context is read once, compressed by each method, asked.

What is known already is not computed again, so a run that was stopped goes on where it was. Only the
dense model's answers to a context are repeated if another method still has to be compared with them.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trt_razor.errors import MissingExtra, RazorError, UsageError
from trt_razor.evaluation import environment
from trt_razor.evaluation.asking import Asked, ask
from trt_razor.evaluation.config import DENSE, ENGINE, RunConfig
from trt_razor.evaluation.nearness import Logits, Meter, Nearness, nearness
from trt_razor.evaluation.plan import check_groups, contexts, groups_of, plan
from trt_razor.evaluation.records import Record, RecordFolder
from trt_razor.evaluation.runners.interface import Context, Runner, Session
from trt_razor.evaluation.samples import Sample

Progress = Callable[[str, int, int], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Lane:
    """A method and who computes it; ``method`` None: an engine, as it is."""

    label: str
    runner: Runner
    method: Any = None

    @property
    def all_queries(self) -> bool:
        return getattr(self.method, "queries", "recent") == "all"

    @property
    def query_aware(self) -> bool:
        return bool(getattr(self.method, "query_aware", False))


@dataclass(frozen=True)
class Unit:
    """What is computed in one piece: a context, and the records of it that are missing.

    Attributes:
        task: label.
        samples: all of the context that the run asks.
        pending: sample id → labels of the methods that miss it.
    """

    task: str
    samples: Sequence[Sample]
    pending: Mapping[str, Sequence[str]]


Compute = Callable[[Iterator[Unit]], Iterator[Record]]
"""Records of units, those of one unit in order; units are taken as they are needed."""


@dataclass
class Summary:
    """What a run did.

    Attributes:
        computed, known: records of this call, and those that were there before.
        errors: records of methods that failed.
    """

    computed: int = 0
    known: int = 0
    errors: list[Record] = field(default_factory=list)


def open_runners(config: RunConfig) -> tuple[Runner | None, Runner | None]:
    """The model's runner and the engine's, as far as the run names them.

    Raises:
        UsageError: what they cannot open. MissingExtra: torch or transformers are missing.
    """
    model: Runner | None = None
    engine: Runner | None = None
    if config.model is not None:
        model = _hf_runner(config, config.model)
    if config.engine is not None:
        from trt_razor.evaluation.runners.engine import EngineRunner

        engine = EngineRunner(Path(config.engine))
    return model, engine


def _hf_runner(config: RunConfig, name: str) -> Runner:
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "eval", "a model's evaluation")
    import torch

    from trt_razor.evaluation.runners.hf import HfRunner
    from trt_razor.reference.hf.load import load_model

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dtype = getattr(torch, config.dtype)
    read_dtype = None if config.read_dtype is None else getattr(torch, config.read_dtype)
    try:
        device = torch.device(config.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).split("\n")[0][:160]
        raise UsageError(f"device: {config.device}: not usable here: {reason}") from None
    loaded = load_model(name, dtype, device)
    return HfRunner(loaded.model, loaded.tokenizer, loaded.name, read_dtype)


def lanes_of(config: RunConfig, model: Runner | None, engine: Runner | None) -> list[Lane]:
    """The methods of a run, dense first.

    Raises:
        UsageError: model and engine with different tokenizers.
    """
    lanes: list[Lane] = []
    if model is not None:
        lanes += [Lane(m.label, model, m.method) for m in config.methods]
    if engine is not None:
        if model is not None and engine.tokenizer.vocab_size != model.tokenizer.vocab_size:
            raise UsageError(
                f"engine: expected the tokenizer of the model ({model.tokenizer.vocab_size} tokens), "
                f"found one of {engine.tokenizer.vocab_size}"
            )
        lanes.append(Lane(ENGINE, engine))
    return lanes


def run(
    config: RunConfig,
    lanes: Sequence[Lane],
    output: RecordFolder,
    progress: Progress,
    say: Say,
    limit: int | None = None,
    compute: Compute | None = None,
) -> Summary:
    """Compute what ``output`` lacks.

    Args:
        lanes: of ``lanes_of``; the first is the dense model, unless there is only an engine.
        limit: only the first so many samples of each group.
        compute: who makes the records (``workers.Workers.records``); None: ``lanes``, here.

    Raises:
        UsageError: a task cannot make its samples. RazorError: the dense model failed, or the results
            cannot be written. A *method* that refuses a context is recorded as an error instead.
    """
    tokenizer = lanes[0].runner.tokenizer
    wanted = plan(config, tokenizer, limit, progress)
    check_groups(wanted, config.methods)
    labels = [lane.label for lane in lanes]
    keys = {k for w in wanted for k in w.keys(labels, config.methods)}
    output.describe(
        environment.describe([lane.runner.label for lane in lanes]),
        len(keys),
        [lane.label for lane in lanes if lane.query_aware],
        groups_of(wanted),
    )
    summary = Summary(known=len(keys & output.records.keys()))
    if summary.known:
        say(f"{summary.known} of {len(keys)} results are there already")

    missing = {
        (w.task, w.sample): [
            k[2] for k in w.keys(labels, config.methods) if k not in output.records
        ]
        for w in wanted
    }
    cost = {(w.task, w.sample): w.cost for w in wanted}
    stages = {entry.label: _Stage(entry.label, progress) for entry in config.tasks}
    for (task, sample), absent in missing.items():
        stages[task].add(cost[task, sample], len(absent))

    def units() -> Iterator[Unit]:
        for entry in config.tasks:
            if not stages[entry.label].left:
                continue
            stages[entry.label].show()
            for together in contexts(entry, tokenizer, config.seed, limit):
                pending = {w.sample: missing[w.task, w.sample] for _, w in together}
                if any(pending.values()):
                    yield Unit(entry.label, [s for s, _ in together], pending)

    for record in (compute or _here(config, lanes))(units()):
        output.add(record)
        summary.computed += 1
        stages[record.task].one_done(cost[record.task, record.sample])
    summary.errors = [r for key, r in output.records.items() if key in keys and r.error is not None]
    return summary


class _Stage:
    """How far one task is, in tokens. Several can be under way at the same time.

    Attributes:
        left: records that are still to come.
    """

    def __init__(self, label: str, progress: Progress) -> None:
        self.label, self.progress = label, progress
        self.left, self.total, self.done = 0, 0.0, 0.0

    def add(self, cost: float, records: int) -> None:
        self.total += cost * records
        self.left += records

    def one_done(self, cost: float) -> None:
        self.done += cost
        self.left -= 1
        self.show()

    def show(self) -> None:
        total = max(1, round(self.total))
        done = min(round(self.done), total) if self.left else total
        self.progress(self.label, done, total)


def _here(config: RunConfig, lanes: Sequence[Lane]) -> Compute:
    def compute(units: Iterator[Unit]) -> Iterator[Record]:
        for unit in units:
            yield from records_of(config, lanes, unit)

    return compute


def records_of(config: RunConfig, lanes: Sequence[Lane], unit: Unit) -> Iterator[Record]:
    """The missing records of a context, one by one.

    Raises:
        RazorError: the dense model failed.
    """
    yield from _OneContext(config, lanes, unit).records()


class _OneContext:
    """The samples of one context under all lanes that miss one of them."""

    def __init__(
        self,
        config: RunConfig,
        lanes: Sequence[Lane],
        unit: Unit,
    ) -> None:
        self.config, self.task = config, unit.task
        self.samples, self.pending = unit.samples, unit.pending
        busy = {label for missing in unit.pending.values() for label in missing}
        self.reference_lane = lanes[0] if lanes[0].label == DENSE else None
        # Dense comes first, and also where only another method is missing.
        self.lanes = [lane for lane in lanes if lane.label in busy or lane is self.reference_lane]
        self.reference: dict[str, list[Logits]] = {}
        self.tokens = list(unit.samples[0].context)
        self._read: dict[int, Context] = {}
        self._read_seconds: dict[int, float] = {}

    def records(self) -> Iterator[Record]:
        for lane in self.lanes:
            samples = self._samples(lane)
            if lane.query_aware:
                # A context of its own for each first question: read with it, then compressed.
                for sample in samples:
                    yield from self._asked(lane, [sample], _told(sample))
            else:
                yield from self._asked(lane, samples, None)

    def _samples(self, lane: Lane) -> list[Sample]:
        if lane is self.reference_lane:  # whatever another method is still to be compared with
            return [s for s in self.samples if self.pending[s.id]]
        return [s for s in self.samples if lane.label in self.pending[s.id]]

    def _asked(
        self, lane: Lane, samples: list[Sample], question: Sample | None
    ) -> Iterator[Record]:
        """Records of these samples; a UsageError of a method becomes theirs.

        Args:
            question: the only sample, without its first prompt, which is read before compression.
        """
        try:
            context = self._context(lane)
            read = self._read_seconds[id(lane.runner)]
            last = self.tokens[-1:]
            if question is not None and samples[0].turns:
                *more, end = self.tokens[-1], *samples[0].turns[0].prompt
                start = time.perf_counter()
                context = context.extended(more) if more else context
                read += time.perf_counter() - start
                last = [end]
            start = time.perf_counter()
            session = context.compress(lane.method)
        except UsageError as e:
            self._check(lane, e)
            yield from (self._failed(lane, s, e) for s in samples)
            return
        shared = (time.perf_counter() - start) / len(samples)
        for sample in samples:
            start = time.perf_counter()
            try:
                asking = sample if question is None else question
                asked, near = self._measured(lane, session, last, asking)
                seconds = shared + time.perf_counter() - start
                record = self._record(lane, sample, asked, near, seconds, read / len(samples))
            except UsageError as e:
                self._check(lane, e)
                record = self._failed(lane, sample, e)
            if lane.label in self.pending[sample.id]:
                yield record

    def _measured(
        self, lane: Lane, session: Session, last: list[int], sample: Sample
    ) -> tuple[Asked, Nearness]:
        """Ask and compare. Only the dense model's logits are kept, until the context is done."""
        dense = lane is self.reference_lane
        # Generated answers differ from the dense model's; only equal tokens can be compared.
        meter = Meter(self.reference.get(sample.id))
        asked = ask(
            session,
            last,
            sample,
            self.config.scoring,
            lane.runner.tokenizer,
            self.config.chunk,
            None if dense else meter.add,
        )
        following = len(sample.continuation)
        if not dense:
            return asked, meter.result(following)
        self.reference[sample.id] = asked.logits
        return asked, nearness(asked.logits, asked.targets, asked.logits, following)

    def _context(self, lane: Lane) -> Context:
        """The context, read once for all lanes of a runner."""
        known = id(lane.runner)
        if known not in self._read:
            same = [x for x in self.lanes if x.runner is lane.runner]
            start = time.perf_counter()
            context = lane.runner.read(self.tokens[:-1], any(x.all_queries for x in same))
            self._read_seconds[known] = time.perf_counter() - start
            self._read[known] = context
        return self._read[known]

    def _check(self, lane: Lane, e: UsageError) -> None:
        """Without the dense model there is nothing to compare with: the run ends."""
        if lane is self.reference_lane:
            raise RazorError(f"task {self.task}: the dense model: {e}") from None

    def _record(
        self,
        lane: Lane,
        sample: Sample,
        asked: Asked,
        near: Nearness,
        seconds: float,
        read_seconds: float,
    ) -> Record:
        scores = asked.scores
        return Record(
            **self._about(lane, sample),
            kv_ratio=asked.kv_ratio,
            kv_most=asked.kv_most,
            score=sum(scores) / len(scores) if scores else None,
            scores=scores,
            texts=[t[:2000] for t in asked.texts],
            tokens=near.tokens,
            nll=near.nll,
            kl=near.kl,
            agree=near.agree,
            nll_curve=list(near.nll_curve),
            kl_curve=list(near.kl_curve),
            seconds=round(seconds, 6),
            read_seconds=round(read_seconds, 6),
        )

    def _failed(self, lane: Lane, sample: Sample, e: UsageError) -> Record:
        return Record(**self._about(lane, sample), error=" ".join(str(e).split())[:500])

    def _about(self, lane: Lane, sample: Sample) -> dict[str, Any]:
        return {
            "task": self.task,
            "method": lane.label,
            "sample": sample.id,
            "context": sample.context_id,
            "group": sample.group,
            "context_tokens": len(sample.context),
            "meta": dict(sample.meta),
        }


def _told(sample: Sample) -> Sample:
    """A sample whose first question was asked already."""
    if not sample.turns:
        return sample
    first, *others = sample.turns
    return replace(sample, turns=(replace(first, prompt=()), *others))
