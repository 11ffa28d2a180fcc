"""A toy language model in NumPy that stands for a runner: what is kept decides what it says.

Its logits are a fixed random map of the mean embedding of the kept tokens and of the last ones, so that
dropping tokens moves them, equal tokens give equal logits, and everything takes microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.evaluation.config import MethodEntry, RunConfig, TaskEntry
from trt_razor.evaluation.run import Lane, lanes_of
from trt_razor.evaluation.samples import Sample, Turn

VOCAB = 50
EOS = 0
_RNG = np.random.default_rng(7)
EMBED = _RNG.standard_normal((VOCAB, 8))
HEAD = _RNG.standard_normal((8, VOCAB)) * 3


class ToyTokenizer:
    """Token i is written as "<i>"."""

    vocab_size = VOCAB
    eos_token_ids = (EOS,)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"<{i}>" for i in ids)


@dataclass
class ToySession:
    kept: list[int]
    length: int

    def feed(self, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        rows = []
        for token in tokens:
            self.kept.append(int(token))
            self.length += 1
            state = EMBED[self.kept].mean(0) + EMBED[self.kept[-2:]].sum(0) / 4
            rows.append(np.tanh(state) @ HEAD)
        return np.array(rows, np.float32)

    def fork(self) -> ToySession:
        return ToySession(list(self.kept), self.length)

    def kv_ratio(self) -> float:
        return len(self.kept) / self.length


@dataclass
class ToyContext:
    runner: ToyRunner
    tokens: list[int]

    def compress(self, method: Any) -> ToySession:
        return ToySession(method.keep(self.tokens), len(self.tokens))

    def extended(self, tokens: Sequence[int]) -> ToyContext:
        return ToyContext(self.runner, [*self.tokens, *tokens])


@dataclass
class ToyRunner:
    """Counts what it reads; ``stop_after``: raises KeyboardInterrupt at that read."""

    label: str = "toy"
    tokenizer: Any = field(default_factory=ToyTokenizer)
    reads: list[tuple[int, bool]] = field(default_factory=list)
    stop_after: int | None = None

    def read(self, tokens: Sequence[int], all_queries: bool = False) -> ToyContext:
        if self.stop_after is not None and len(self.reads) >= self.stop_after:
            raise KeyboardInterrupt
        self.reads.append((len(tokens), all_queries))
        return ToyContext(self, list(tokens))


@dataclass(frozen=True)
class Keep:
    """Keeps the last ``last`` tokens; None = all."""

    last: int | None = None
    queries: str = "recent"
    query_aware: bool = False
    refuses: int | None = None
    """Longest context it takes."""

    def keep(self, tokens: list[int]) -> list[int]:
        if self.refuses is not None and len(tokens) > self.refuses:
            raise UsageError(f"keep: {len(tokens)} tokens are too many")
        return list(tokens if self.last is None else tokens[-self.last :])


@dataclass(frozen=True)
class ToyTask:
    """``contexts`` contexts of each length with ``per`` questions each, or with a continuation."""

    lengths: tuple[int, ...] = (20, 40)
    contexts: int = 3
    per: int = 2
    turns: int = 1
    continuation: int = 0

    def count(self) -> int:
        return len(self.lengths) * self.contexts * self.per

    def samples(self, tokenizer: Any, seed: int) -> Iterator[Sample]:
        rng = np.random.default_rng(seed)

        def tokens(n: int) -> tuple[int, ...]:
            return tuple(int(t) for t in rng.integers(1, VOCAB, n))

        for length in self.lengths:
            for c in range(self.contexts):
                context = tokens(length)
                for q in range(self.per):
                    turns = tuple(Turn(tokens(3), ("7",), tokens(2), 4) for _ in range(self.turns))
                    meta = {"length": length, "depth": c / max(1, self.contexts - 1)}
                    if self.continuation:
                        turns, following = (), tokens(self.continuation)
                    else:
                        following = ()
                    name = f"{length}-{c}"
                    yield Sample(f"{name}-{q}", name, str(length), context, turns, following, meta)


def config(
    tasks: dict[str, Any],
    methods: dict[str, Any],
    trials: dict[str, int] | None = None,
    **more: Any,
) -> RunConfig:
    """A run of toy tasks and methods; ``dense`` is put in front."""
    entries = [MethodEntry("dense", "dense", Keep(), {})]
    entries += [MethodEntry(n, "keep", m, {}, (trials or {}).get(n)) for n, m in methods.items()]
    return RunConfig(
        "toy",
        tuple(TaskEntry(n, "toy", t, {}) for n, t in tasks.items()),
        tuple(entries),
        model="toy",
        **more,
    )


def lanes(made: RunConfig, runner: ToyRunner) -> list[Lane]:
    return lanes_of(made, runner, None)  # type: ignore[arg-type]
