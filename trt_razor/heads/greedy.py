"""Retrieval heads chosen one after another, each for what it adds to those chosen before it.

Gates as in :mod:`trt_razor.heads.effect`, but 1 for the heads chosen so far and 0 for all others:
the slope of the answer's loss says which head is missed most as things stand. A few join, the
slopes are taken again, and so on until the share is reached. Slopes at dense attention, where
nothing is missing yet, and effects of single heads do not see which heads need each other.

The order of choosing is the score, so that any smaller share is a beginning of the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trt_razor.errors import RazorError, UsageError, did_you_mean
from trt_razor.heads.answers import AnswerProbe
from trt_razor.heads.selection import check_share
from trt_razor.policy import PRESETS, RazorPolicy

if TYPE_CHECKING:
    from trt_razor.heads.effect import GatedContext
    from trt_razor.models.checkpoint import WeightSource

READ_DTYPES = ("float32", "bfloat16", "float16")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class GreedyOptions:
    """How heads are chosen one after another.

    Attributes:
        start_share: of all KV heads, the best by ``combined``, with which the choice begins.
        step: heads that join between two measurements.
        contexts: of every wording, for each seed.
        length: tokens of a context.
        policy: what a local head keeps. The default is the hardest preset: what holds there was
            found to hold with more room as well (docs/heads.md).
        read_dtype: of the matrix products while a context is read; None = the dtype of the answers.

    Raises:
        UsageError: naming the wrong field.
    """

    start_share: float = 0.10
    step: int = 2
    contexts: int = 6
    length: int = 2048
    policy: RazorPolicy = field(default_factory=lambda: PRESETS["tight"])
    read_dtype: str | None = None

    def __post_init__(self) -> None:
        check_share("greedy start", self.start_share)
        for name, most in (("step", 10_000), ("contexts", 10_000), ("length", 1 << 24)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise UsageError(f"greedy {name}: expected 1..{most}, found {value!r}")
        if not self.policy.dropped(self.length):
            raise UsageError(
                f"greedy length: local heads drop nothing of {self.length} tokens with a window of "
                f"{self.policy.window(self.length)}; use a longer length or a smaller window"
            )
        if self.read_dtype is not None and self.read_dtype not in READ_DTYPES:
            raise UsageError(
                f"greedy read dtype '{self.read_dtype}': "
                f"{did_you_mean(self.read_dtype, READ_DTYPES)}"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "start_share": self.start_share,
            "step": self.step,
            "contexts": self.contexts,
            "length": self.length,
            "policy": self.policy.to_json(),
            "read_dtype": self.read_dtype,
        }


@dataclass(frozen=True)
class Round:
    """One measurement.

    Attributes:
        heads: chosen when it was taken. loss: mean of the answers' tokens, nats.
        added: what then joined: (layer, KV head, -d loss / d gate).
    """

    heads: int
    loss: float
    added: tuple[tuple[int, int, float], ...]

    def to_json(self) -> dict[str, Any]:
        added = [[layer, head, float(f"{gain:.4g}")] for layer, head, gain in self.added]
        return {"heads": self.heads, "loss": round(self.loss, 6), "added": added}


@dataclass(frozen=True)
class GreedyResult:
    """What :func:`greedy_heads` returns.

    Attributes:
        order: the chosen heads, layer * KV heads + head, as they were chosen.
        scores: float64 [layers, KV heads]: N for the first of N chosen heads … 1 for the last; the
            others keep their last slope, scaled into -0.5 … 0.5.
        rounds: the last one has all N heads and adds none.
        dense: the loss with every head full.
    """

    order: tuple[int, ...]
    scores: np.ndarray
    rounds: tuple[Round, ...]
    dense: float

    def to_json(self) -> dict[str, Any]:
        return {"dense_loss": round(self.dense, 6), "rounds": [r.to_json() for r in self.rounds]}


def greedy_heads(
    checkpoint: WeightSource,
    probes: Sequence[AnswerProbe],
    start: Sequence[int],
    count: int,
    options: GreedyOptions,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress | None = None,
) -> GreedyResult:
    """Choose ``count`` heads. The weights and every context's keys and values are held.

    Args:
        probes: of one context side by side, so that it is read once.
        start: heads that are chosen already, best first, at most ``count``.

    Raises:
        RazorError: a loss or a slope is not finite.
    """
    contexts = _read(checkpoint, probes, options, dtype, device, progress)
    spec = checkpoint.spec
    shape = (spec.num_layers, spec.num_kv_heads)
    tell = progress or (lambda what, done, steps: None)

    what = "dense answers"
    tell(what, 0, len(probes))
    losses = []
    for i, probe in enumerate(probes):
        losses.append(contexts[i].loss(probe, np.ones(shape)))
        tell(what, i + 1, len(probes))
    order, rounds = list(start), []
    while True:
        gates = np.zeros(shape)
        gates.flat[order] = 1
        what = f"greedy, {len(order)} of {count} heads"
        loss, gain = _slopes(contexts, probes, gates, functools.partial(tell, what))
        if not (np.isfinite(gain).all() and np.isfinite(loss)):
            raise RazorError(
                f"greedy: with {len(order)} heads the answers' loss or its slope is not finite; the "
                f"weights overflow in {dtype}"
            )
        free = np.where(gates.ravel() == 1, -np.inf, gain.ravel())
        best = np.argsort(-free, kind="stable")[: min(options.step, count - len(order))]
        added = tuple((int(h) // shape[1], int(h) % shape[1], float(free[h])) for h in best)
        rounds.append(Round(len(order), loss, added))
        if not added:
            break
        order += [int(h) for h in best]
    scores = 0.5 * gain / max(float(np.abs(gain).max()), 1e-30)
    scores.flat[order] = np.arange(len(order), 0, -1)
    return GreedyResult(tuple(order), scores, tuple(rounds), float(np.mean(losses)))


def _read(
    checkpoint: WeightSource,
    probes: Sequence[AnswerProbe],
    options: GreedyOptions,
    dtype: str,
    device: str,
    progress: Progress | None,
) -> list[GatedContext]:
    """The context of every probe; probes side by side with the same one share it."""
    import torch

    from trt_razor.heads.effect import GatedContext
    from trt_razor.reference.decoder import ReferenceDecoder

    decoder = ReferenceDecoder(checkpoint, getattr(torch, dtype), device)
    narrow = None if options.read_dtype is None else getattr(torch, options.read_dtype)
    what, contexts = "reading contexts", list[GatedContext]()
    for i, probe in enumerate(probes):
        if progress is not None:
            progress(what, i, len(probes))
        if i and np.array_equal(probe.context, probes[i - 1].context):
            contexts.append(contexts[-1])
        else:
            contexts.append(GatedContext(decoder, probe.context, options.policy, narrow))
    if progress is not None:
        progress(what, len(probes), len(probes))
    return contexts


def _slopes(
    contexts: Sequence[GatedContext],
    probes: Sequence[AnswerProbe],
    gates: np.ndarray,
    tell: Callable[[int, int], None],
) -> tuple[float, np.ndarray]:
    """Mean loss and mean -d loss / d gate over all probes."""
    tell(0, len(probes))
    losses, total = [], np.zeros(gates.shape)
    for i, (context, probe) in enumerate(zip(contexts, probes, strict=True)):
        loss, gain = context.slope(probe, gates)
        losses.append(loss)
        total += gain / len(probes)
        tell(i + 1, len(probes))
    return float(np.mean(losses)), total
