"""From scores to a choice: which KV heads keep their whole cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trt_razor.errors import RazorError, UsageError, did_you_mean
from trt_razor.headmap import HeadMap
from trt_razor.models.spec import ModelSpec

MEASURED = ("effect", "gradient", "greedy")
"""Methods that rank by what happens to an answer's loss (heads/effect.py, heads/greedy.py)."""

METHODS = ("paper", "combined", "echo", "induction", *MEASURED)

Heads = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class SelectionOptions:
    """How heads are chosen from their scores. Shares are of all KV heads, rounded up.

    Attributes:
        method: ``paper``: top ``induction_share`` by induction ∪ top ``echo_share`` by echo;
            ``combined``: top ``combined_share`` by the larger of the two scores, each divided by
            its maximum over the model; ``echo`` or ``induction``: one half of ``paper`` alone;
            ``effect`` or ``gradient``: top ``effect_share`` by the measured effect; ``greedy``:
            the same share, heads in the order of their choosing.
        induction_share: 0.14 in the paper.
        echo_share: 0.01 in the paper.
        combined_share: share of the method ``combined``.
        min_echo: fewest heads an ``echo_share`` above 0 selects. 1 % of a small model is a
            single head, too few to rely on (docs/heads.md).
        effect_share: share of the methods ``effect``, ``gradient`` and ``greedy``.

    Raises:
        UsageError: unknown method, a share outside 0..1, a negative floor.
    """

    method: str = "paper"
    induction_share: float = 0.14
    echo_share: float = 0.01
    combined_share: float = 0.15
    min_echo: int = 4
    effect_share: float = 0.15

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method '{self.method}': {did_you_mean(self.method, METHODS)}")
        for name in ("induction_share", "echo_share", "combined_share", "effect_share"):
            check_share(name, getattr(self, name))
        if self.min_echo < 0:
            raise UsageError(f"min_echo: expected >= 0, found {self.min_echo}")

    def to_json(self) -> dict[str, Any]:
        """The fields that this method uses."""
        used = {
            "paper": ("induction_share", "echo_share", "min_echo"),
            "combined": ("combined_share",),
            "echo": ("echo_share", "min_echo"),
            "induction": ("induction_share",),
            "effect": ("effect_share",),
            "gradient": ("effect_share",),
            "greedy": ("effect_share",),
        }[self.method]
        return {name: getattr(self, name) for name in used}


@dataclass(frozen=True)
class Choice:
    """Chosen KV heads per layer, ascending, and which score each was chosen by.

    Heads chosen by a measured effect were chosen by neither echo nor induction.
    """

    heads: Heads
    by_echo: Heads
    by_induction: Heads


def check_share(name: str, value: float) -> None:
    """Raises UsageError unless ``value`` is a number in 0..1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UsageError(f"{name}: expected a share between 0 and 1, found {value!r}")


def with_share(options: SelectionOptions, share: float) -> SelectionOptions:
    """The same method choosing ``share`` of all heads.

    ``paper`` gives echo its own share and adds induction heads, as its authors advise; as the two
    sets may overlap it can choose fewer.

    Raises:
        UsageError: a share outside 0..1.
    """
    check_share("share", share)
    if options.method == "paper":
        return replace(options, induction_share=max(0.0, share - options.echo_share))
    if options.method in MEASURED:
        return replace(options, effect_share=share)
    if options.method == "combined":
        return replace(options, combined_share=share)
    if options.method == "echo":
        return replace(options, echo_share=share)
    return replace(options, induction_share=share)


def choose_again(head_map: HeadMap, options: SelectionOptions) -> HeadMap:
    """A map's choice made anew from its scores; what was said about its old choice is dropped.

    Raises:
        RazorError: the map has not the scores that the method needs.
    """
    scores = {name: np.array(table) for name, table in head_map.scores.items()}
    old = {*SelectionOptions.__annotations__, "stability", "auto"}
    settings = {k: v for k, v in head_map.options.items() if k not in old}
    return replace(
        head_map,
        retrieval_heads=select(scores, options).heads,
        method=options.method,
        options={**settings, **options.to_json()},
    )


def share_count(share: float, total: int) -> int:
    """``ceil(share * total)``, unharmed by binary fractions (0.14 * 50 is 7, not 8)."""
    return min(total, math.ceil(share * total - 1e-9))


def select(scores: Mapping[str, np.ndarray], options: SelectionOptions) -> Choice:
    """Choose retrieval heads over the whole model; ties go to the lower layer, then lower head.

    Args:
        scores: ``echo`` and ``induction``, or that of the measured method; [layers, KV heads].

    Raises:
        RazorError: a score is missing, not finite, or of another shape than its fellow.
    """
    if options.method in MEASURED:
        effect = _table(scores, options.method)
        best = _top(effect, share_count(options.effect_share, effect.size))
        nothing = _by_layer(set(), effect.shape)
        return Choice(_by_layer(set(best), effect.shape), nothing, nothing)
    echo, induction = _both(scores)
    total = echo.size
    top_echo: set[int] = set()
    top_induction: set[int] = set()
    if options.method == "combined":
        e, i = _relative(echo).ravel(), _relative(induction).ravel()
        for head in _top(np.maximum(e, i), share_count(options.combined_share, total)):
            (top_echo if e[head] > i[head] else top_induction).add(head)
    if options.method in ("paper", "echo") and options.echo_share > 0:
        count = max(share_count(options.echo_share, total), min(options.min_echo, total))
        top_echo.update(_top(echo, count))
    if options.method in ("paper", "induction"):
        top_induction.update(_top(induction, share_count(options.induction_share, total)))
    shape = echo.shape
    return Choice(
        _by_layer(top_echo | top_induction, shape),
        _by_layer(top_echo, shape),
        _by_layer(top_induction, shape),
    )


def combined_order(scores: Mapping[str, np.ndarray]) -> list[int]:
    """All heads, layer * KV heads + head, best first by the method ``combined``.

    Raises:
        RazorError: see :func:`select`.
    """
    echo, induction = _both(scores)
    return _top(np.maximum(_relative(echo), _relative(induction)), echo.size)


def uniform_share(spec: ModelSpec, share: float) -> HeadMap:
    """A map with ``share`` of the KV heads, spread evenly over layers and over head indices.

    For latency and memory work, where it matters how many heads retrieve and not which: nothing was
    measured, so text from such an engine is not to be judged.

    Raises:
        UsageError: share outside 0..1.
    """
    check_share("share", share)
    layers, kv = spec.num_layers, spec.num_kv_heads
    count = share_count(share, layers * kv)
    bounds = [layer * count // layers for layer in range(layers + 1)]
    # Round robin over head indices, so that tensor-parallel ranks get alike loads.
    heads = tuple(
        tuple(sorted(i % kv for i in range(bounds[layer], bounds[layer + 1])))
        for layer in range(layers)
    )
    return HeadMap(
        model=spec.name,
        fingerprint=spec.fingerprint(),
        num_layers=layers,
        num_kv_heads=kv,
        retrieval_heads=heads,
        method="spread",
        source="spread evenly over layers and heads; no scores were measured",
        options={"share": share},
    )


def _table(scores: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in scores:
        raise RazorError(f"scores.{name}: missing; found {', '.join(sorted(scores)) or 'none'}")
    table = np.asarray(scores[name], dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise RazorError(f"scores.{name}: expected [layers, KV heads], found shape {table.shape}")
    bad = np.argwhere(~np.isfinite(table))
    if len(bad):
        layer, head = (int(x) for x in bad[0])
        raise RazorError(
            f"scores.{name}[{layer}][{head}]: not a finite number (nor are {len(bad) - 1} others); the "
            f"checkpoint's weights or the dtype it was run in overflow; try --dtype float32"
        )
    return table


def _both(scores: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    echo, induction = (_table(scores, name) for name in ("echo", "induction"))
    if echo.shape != induction.shape:
        raise RazorError(f"scores: echo is {echo.shape}, induction is {induction.shape}")
    return echo, induction


def _relative(table: np.ndarray) -> np.ndarray:
    top = table.max()
    return table / top if top > 0 else np.zeros_like(table)


def _top(table: np.ndarray, count: int) -> list[int]:
    """Flat indices of the ``count`` largest entries; a stable sort breaks ties by index."""
    return [int(i) for i in np.argsort(-table.ravel(), kind="stable")[:count]]


def _by_layer(flat: set[int], shape: tuple[int, ...]) -> Heads:
    layers, kv = shape
    return tuple(tuple(h for h in range(kv) if layer * kv + h in flat) for layer in range(layers))
