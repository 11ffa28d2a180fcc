"""The methods ``effect`` and ``gradient`` for :mod:`trt_razor.heads.find`: settings and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.heads.answers import AnswerProbe, random_probes
from trt_razor.policy import RazorPolicy

if TYPE_CHECKING:
    from trt_razor.models.checkpoint import WeightSource
    from trt_razor.models.spec import ModelSpec

MAX_POINTS = 64


@dataclass(frozen=True)
class AnswerSource:
    """Where retrieval probes come from.

    Attributes:
        name: for the head map's settings.
        make: a seed → the probes of that seed.
    """

    name: str
    make: Callable[[int], Sequence[AnswerProbe]]


@dataclass(frozen=True)
class EffectOptions:
    """How the effect of a head on an answer is measured.

    Attributes:
        trials: contexts a seed.
        length: tokens of a context.
        window: recent tokens that a local head keeps, beside 4 sinks; nothing stands for the rest.
        points: method ``gradient``: gates between local and full at which the gradient is taken;
            1 = at full attention alone.

    Raises:
        UsageError: naming the wrong field.
    """

    trials: int = 12
    length: int = 2048
    window: int = 64
    points: int = 5

    def __post_init__(self) -> None:
        for name, least, most in (
            ("trials", 1, 10_000),
            ("length", 2, 1 << 24),
            ("window", 1, 1 << 24),
            ("points", 1, MAX_POINTS),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise UsageError(f"effect {name}: expected {least}..{most}, found {value!r}")

    @property
    def policy(self) -> RazorPolicy:
        return RazorPolicy(min_window=self.window, compression=None, comp_tokens=0)

    def to_json(self, method: str) -> dict[str, Any]:
        """The fields that this method uses."""
        used = ("trials", "length", "window", *(("points",) if method == "gradient" else ()))
        return {name: getattr(self, name) for name in used}


def probes_of(
    spec: ModelSpec, seed: int, source: AnswerSource | None, length: int, window: int, trials: int
) -> list[AnswerProbe]:
    """Probes of one seed; without a source random tokens said again, ``trials`` of them.

    Raises:
        UsageError: a length that leaves nothing outside of the window; no probes.
    """
    if source is None:
        # Far from the seeds of the echo probe and of each other.
        return random_probes(spec, length, window, trials, (seed + 1) * 100_003)
    probes = list(source.make(seed))
    if not probes:
        raise UsageError(f"effect probes: {source.name} has none")
    return probes


def measured_scores(
    checkpoint: WeightSource,
    method: str,
    seeds: Sequence[int],
    options: EffectOptions,
    source: AnswerSource | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> np.ndarray:
    """Mean effect over each seed's probes, float64 [seeds, layers, KV heads], nats a token.

    Args:
        method: ``effect`` (ablation) or ``gradient``.
        source: of the probes; None = random tokens said again, which needs no tokenizer.

    Raises:
        UsageError: a length that leaves nothing outside of the window; no probes.
    """
    import torch

    from trt_razor.heads.effect import ablation_effect, gradient_effect

    wanted = (options.length, options.window, options.trials)
    probes = [probes_of(checkpoint.spec, seed, source, *wanted) for seed in seeds]
    count = sum(map(len, probes))
    steps, done = count * checkpoint.spec.num_layers, 0
    what = f"measuring {method}"

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(what, done, steps)

    if progress is not None:
        progress(what, 0, steps)
    flat = [p for some in probes for p in some]
    policy, kind = options.policy, getattr(torch, dtype)
    if method == "effect":
        scores = ablation_effect(checkpoint, flat, policy, kind, device, step)
    else:
        scores = gradient_effect(checkpoint, flat, policy, options.points, kind, device, step)
    ends = np.cumsum([len(some) for some in probes])[:-1]
    return np.stack([part.mean(0) for part in np.split(scores, ends)])
