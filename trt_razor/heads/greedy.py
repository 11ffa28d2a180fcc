"""Retrieval heads chosen one after another, each for what it adds to those chosen before it.

Gates as in :mod:`trt_razor.heads.effect`, but 1 for the heads chosen so far and 0 for all others:
the slope of the loss says which head is missed most as things stand. A few join, the slopes are
taken again, and so on until the share is reached. Slopes at dense attention, where nothing is
missing yet, and effects of single heads do not see which heads need each other.

The loss is KL(dense ‖ compressed) over answers that must be found far back, and over natural text
that goes on: heads chosen for answers alone were found to cost the text something.

The order of choosing is the score, so that any smaller share is a beginning of the same order.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trt_razor.errors import RazorError, UsageError, did_you_mean
from trt_razor.heads.answers import AnswerProbe
from trt_razor.heads.selection import check_share
from trt_razor.policy import PRESETS, RazorPolicy

if TYPE_CHECKING:
    from torch import Tensor

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
        texts: contexts that only go on, for each seed; 0 = none.
        length: tokens of a context.
        policy: what a local head keeps. The default is the hardest preset.
        read_dtype: of the matrix products while a context is read; None = the dtype of the answers.

    Raises:
        UsageError: naming the wrong field.
    """

    start_share: float = 0.10
    step: int = 2
    contexts: int = 6
    texts: int = 18
    length: int = 2048
    policy: RazorPolicy = field(default_factory=lambda: PRESETS["tight"])
    read_dtype: str | None = None

    def __post_init__(self) -> None:
        check_share("greedy start", self.start_share)
        for name, least, most in (
            ("step", 1, 10_000),
            ("contexts", 1, 10_000),
            ("texts", 0, 10_000),
            ("length", 1, 1 << 24),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise UsageError(f"greedy {name}: expected {least}..{most}, found {value!r}")
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
            "texts": self.texts,
            "length": self.length,
            "policy": self.policy.to_json(),
            "read_dtype": self.read_dtype,
        }


@dataclass(frozen=True)
class Round:
    """One measurement.

    Attributes:
        heads: chosen when it was taken.
        loss: of each kind of probes: mean KL(dense ‖ these heads), nats a token.
        added: what then joined: (layer, KV head, -d sum of losses / d gate).
    """

    heads: int
    loss: Mapping[str, float]
    added: tuple[tuple[int, int, float], ...]

    def to_json(self) -> dict[str, Any]:
        added = [[layer, head, float(f"{gain:.4g}")] for layer, head, gain in self.added]
        loss = {kind: round(value, 6) for kind, value in self.loss.items()}
        return {"heads": self.heads, "loss": loss, "added": added}


@dataclass(frozen=True)
class GreedyResult:
    """What :func:`greedy_heads` returns.

    Attributes:
        order: the chosen heads, layer * KV heads + head, as they were chosen.
        scores: float64 [layers, KV heads]: N for the first of N chosen heads … 1 for the last; the
            others keep their last slope, scaled into -0.5 … 0.5.
        rounds: the last one has all N heads and adds none.
    """

    order: tuple[int, ...]
    scores: np.ndarray
    rounds: tuple[Round, ...]

    def to_json(self) -> dict[str, Any]:
        return {"rounds": [r.to_json() for r in self.rounds]}


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
    dense = []
    for i, probe in enumerate(probes):
        dense.append(contexts[i].predicted(probe))
        tell(what, i + 1, len(probes))
    order, rounds = list(start), []
    while True:
        gates = np.zeros(shape)
        gates.flat[order] = 1
        what = f"greedy, {len(order)} of {count} heads"
        loss, gain = _slopes(contexts, probes, dense, gates, functools.partial(tell, what))
        if not (np.isfinite(gain).all() and np.isfinite(list(loss.values())).all()):
            raise RazorError(
                f"greedy: with {len(order)} heads the loss or its slope is not finite; the weights "
                f"overflow in {dtype}"
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
    return GreedyResult(tuple(order), scores, tuple(rounds))


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
    dense: Sequence[Tensor],
    gates: np.ndarray,
    tell: Callable[[int, int], None],
) -> tuple[dict[str, float], np.ndarray]:
    """Mean loss of each kind, and the sum over kinds of the mean -d loss / d gate."""
    tell(0, len(probes))
    count = Counter(probe.kind for probe in probes)
    losses, total = dict.fromkeys(count, 0.0), np.zeros(gates.shape)
    for i, probe in enumerate(probes):
        loss, gain = contexts[i].slope(probe, gates, dense[i])
        losses[probe.kind] += loss / count[probe.kind]
        total += gain / count[probe.kind]
        tell(i + 1, len(probes))
    return losses, total
