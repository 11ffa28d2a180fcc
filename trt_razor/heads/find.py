"""Finding the retrieval heads of a checkpoint: probe, score layer by layer, choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trt_razor.errors import MissingExtra, RazorError, UsageError, did_you_mean
from trt_razor.headmap import HeadMap, Scores
from trt_razor.heads.alibi import alibi_scopes, select_by_scope
from trt_razor.heads.greedy import GreedyOptions, GreedyResult, greedy_heads
from trt_razor.heads.layer_memo import LayerMemo
from trt_razor.heads.measure import AnswerSource, EffectOptions, measured_scores, probes_of
from trt_razor.heads.probe import Probe, make_probe, position_warning
from trt_razor.heads.selection import (
    MEASURED,
    METHODS,
    SelectionOptions,
    check_share,
    combined_order,
    select,
    share_count,
)
from trt_razor.heads.stability import Stability, stability
from trt_razor.policy import RazorPolicy

if TYPE_CHECKING:
    import torch

    from trt_razor.models.checkpoint import Checkpoint

SCOPE_METHOD = "alibi-scope"
DTYPES = ("float32", "float64")
MAX_SEEDS = 64

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


@dataclass(frozen=True)
class FindOptions:
    """Settings of :func:`find_heads`.

    Attributes:
        probe_length: K, random tokens in a block (the paper: 2500).
        repeats: how often the block is repeated (the paper: 4).
        seeds: number of probes; heads are chosen from the mean of their scores.
        seed: the first probe's seed; the others follow it.
        method: ``paper``, ``combined``, ``echo``, ``induction``, ``effect``, ``gradient`` or
            ``greedy`` for RoPE models (see :class:`SelectionOptions`, where the shares and ``min_echo`` are
            explained), ``alibi-scope`` for ALiBi models; None takes ``paper`` or ``alibi-scope`` by
            model.
        dtype: of all arithmetic, whatever the checkpoint's own: ``float32`` or ``float64``.
        device: where layers run, as torch spells it.
        window: ALiBi: a head that can see farther than this many tokens retrieves; None takes the
            default policy's ``min_window``.
        eps: ALiBi: attention below which a token counts as unseen.
        scope_share: ALiBi: at most this share of the heads, farthest sight first; None: no bound.
        effect_share: share of the methods ``effect``, ``gradient`` and ``greedy``.
        effect: how the first two measure.
        greedy: how heads are chosen one after another.

    Raises:
        UsageError: naming the wrong field.
    """

    probe_length: int = 2500
    repeats: int = 4
    seeds: int = 1
    seed: int = 0
    method: str | None = None
    induction_share: float = 0.14
    echo_share: float = 0.01
    combined_share: float = 0.15
    min_echo: int = 4
    dtype: str = "float32"
    device: str = "cpu"
    window: int | None = None
    eps: float = 1e-5
    scope_share: float | None = None
    effect_share: float = 0.15
    effect: EffectOptions = field(default_factory=EffectOptions)
    greedy: GreedyOptions = field(default_factory=GreedyOptions)

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= MAX_SEEDS:
            raise UsageError(f"seeds: expected 1..{MAX_SEEDS}, found {self.seeds}")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype '{self.dtype}': {did_you_mean(self.dtype, DTYPES)}")
        if self.method is not None and self.method not in (*METHODS, SCOPE_METHOD):
            known = (*METHODS, SCOPE_METHOD)
            raise UsageError(f"method '{self.method}': {did_you_mean(self.method, known)}")
        if not 0 < self.eps < 1:
            raise UsageError(f"eps: expected a number between 0 and 1, found {self.eps!r}")
        if self.window is not None and self.window < 1:
            raise UsageError(f"window: expected at least 1 token, found {self.window}")
        if self.scope_share is not None:
            check_share("scope_share", self.scope_share)
        if self.method != SCOPE_METHOD:
            _ = self.selection

    @property
    def selection(self) -> SelectionOptions:
        return SelectionOptions(
            self.method or "paper",
            self.induction_share,
            self.echo_share,
            self.combined_share,
            self.min_echo,
            self.effect_share,
        )


@dataclass(frozen=True)
class FoundHeads:
    """What :func:`find_heads` returns.

    Attributes:
        head_map: scores, settings and choice, ready to be saved.
        stability: agreement over seeds, None for a single probe or an ALiBi scope.
        warnings: sentences for the user; also under ``head_map.options["warnings"]``.
    """

    head_map: HeadMap
    stability: Stability | None
    warnings: tuple[str, ...]


def find_heads(
    checkpoint: Checkpoint, options: FindOptions | None = None, progress: Progress | None = None
) -> HeadMap:
    """The retrieval heads of a checkpoint. Writes no file: save the result where it belongs.

    Layers are read one at a time and dropped, activations are [tokens, hidden] and attention needs
    memory linear in the probe length, so the model may be larger than memory.

    Args:
        checkpoint: weights to be scored.
        options: defaults to the paper's settings.
        progress: called before the first and after every step.

    Returns:
        a map with the mean scores (``echo`` and ``induction``, or ``scope`` in tokens), the
        settings and warnings under ``options``, and the stability there for more than one seed.

    Raises:
        UsageError: a setting that does not fit the model.
        RazorError: the scores are not finite.
        MissingExtra: torch is not installed.
    """
    return examine_heads(checkpoint, options, progress).head_map


def examine_heads(
    checkpoint: Checkpoint,
    options: FindOptions | None = None,
    progress: Progress | None = None,
    answers: AnswerSource | None = None,
) -> FoundHeads:
    """:func:`find_heads` with the stability table and the warnings as objects of their own.

    Args:
        answers: retrieval probes for the methods that measure an answer's loss; None = random
            tokens said again.
    """
    options = options or FindOptions()
    spec = checkpoint.spec
    if spec.position == "alibi":
        return _find_by_scope(checkpoint, options, progress)
    if options.method == SCOPE_METHOD:
        raise UsageError(
            f"method '{SCOPE_METHOD}' is for ALiBi models, {spec.name} uses {spec.position}; "
            f"choose one of {', '.join(METHODS)}"
        )
    if options.method == "greedy" and options.greedy.start_share > options.effect_share:
        raise UsageError(
            f"greedy start: expected at most the share that is wanted, {options.effect_share}, found "
            f"{options.greedy.start_share}; start with less"
        )
    seeds = tuple(range(options.seed, options.seed + options.seeds))
    probes = [make_probe(spec, options.probe_length, options.repeats, s) for s in seeds]
    echo, induction = probe_scores(checkpoint, probes, options.dtype, options.device, progress)
    selection = options.selection
    by_seed = {"echo": echo, "induction": induction}
    greedy = None
    if selection.method == "greedy":
        mean = {name: scores.mean(0) for name, scores in by_seed.items()}
        greedy = _greedy(checkpoint, mean, seeds, options, answers, progress)
    elif selection.method in MEASURED:
        by_seed[selection.method] = measured_scores(
            checkpoint,
            selection.method,
            seeds,
            options.effect,
            answers,
            options.dtype,
            options.device,
            progress,
        )
        finite = np.isfinite(by_seed[selection.method])
        if not finite.all():
            raise RazorError(
                f"{checkpoint.location}: the measured effect of {int((~finite).sum())} heads is not "
                f"finite; the weights overflow in {options.dtype}"
            )
    means = {name: _rows(scores.mean(0)) for name, scores in by_seed.items()}
    if greedy is not None:
        means["greedy"] = _rows(greedy.scores)
    choice = select({name: np.array(rows) for name, rows in means.items()}, selection)
    spread = None
    if len(seeds) > 1 and greedy is None:  # one choice over the contexts of all seeds
        single = [
            select({name: scores[i] for name, scores in by_seed.items()}, selection).heads
            for i in range(len(seeds))
        ]
        spread = stability(seeds, single)
    warning = position_warning(spec, probes[0])
    warnings = (warning,) if warning else ()
    settings: dict[str, Any] = {
        "probe_length": options.probe_length,
        "repeats": options.repeats,
        "bos": probes[0].offset == 1,
        "seeds": list(seeds),
        "dtype": options.dtype,
        **selection.to_json(),
        "warnings": list(warnings),
    }
    if selection.method in MEASURED:
        settings["answers"] = "random" if answers is None else answers.name
        if greedy is None:
            settings["effect"] = options.effect.to_json(selection.method)
        else:
            settings["greedy"] = {**options.greedy.to_json(), **greedy.to_json()}
    if spread is not None:
        settings["stability"] = spread.to_json()
    what = f"{options.probe_length} random tokens x {options.repeats}"
    head_map = HeadMap(
        model=spec.name,
        fingerprint=spec.fingerprint(),
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        retrieval_heads=choice.heads,
        method=selection.method,
        source=f"probe: {what}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
        checkpoint=checkpoint.identity(),
        scores=means,
        options=settings,
    )
    return FoundHeads(head_map, spread, warnings)


def probe_scores(
    checkpoint: Checkpoint,
    probes: list[Probe],
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Echo and induction scores, each float64 [probes, layers, KV heads].

    All probes go through a layer before the next layer is read.

    Raises:
        UsageError: the device is unknown or absent.
        MissingExtra: torch is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise MissingExtra("torch", "heads", "finding heads") from None
    from trt_razor.heads.scores import causal_attention, group_max, head_scores
    from trt_razor.reference.decoder import ReferenceDecoder

    spec = checkpoint.spec
    where = _device(device)
    scale = spec.head_dim**-0.5
    out = np.zeros((2, len(probes), spec.num_layers, spec.num_kv_heads))
    steps, what = spec.num_layers * len(probes), "scoring heads"
    if progress is not None:
        progress(what, 0, steps)
    with torch.inference_mode():
        weights = LayerMemo(checkpoint) if len(probes) > 1 else checkpoint
        decoder = ReferenceDecoder(weights, getattr(torch, dtype), where, keep_weights=False)
        tokens = [torch.from_numpy(p.tokens).to(where) for p in probes]
        states = [decoder.embed(t) for t in tokens]
        for layer in range(spec.num_layers):
            for i, probe in enumerate(probes):
                x = states[i]
                q, k, v = decoder.qkv(layer, x, torch.arange(len(x), device=where))
                attended, lse = causal_attention(q, k, v, scale)
                scored = head_scores(q, k, lse, scale, probe.length, probe.repeats, probe.offset)
                for kind, scores in enumerate(scored):
                    out[kind, i, layer] = group_max(scores, spec.num_kv_heads).cpu().numpy()
                del q, k, v, lse
                if layer + 1 < spec.num_layers:
                    states[i] = decoder.finish(layer, x, attended.to(x.dtype))
                if progress is not None:
                    progress(what, layer * len(probes) + i + 1, steps)
    return out[0], out[1]


def _greedy(
    checkpoint: Checkpoint,
    scores: Mapping[str, np.ndarray],
    seeds: Sequence[int],
    options: FindOptions,
    answers: AnswerSource | None,
    progress: Progress | None,
) -> GreedyResult:
    spec, how = checkpoint.spec, options.greedy
    total = spec.num_layers * spec.num_kv_heads
    start = combined_order(scores)[: share_count(how.start_share, total)]
    wanted = (how.length, how.policy.window(how.length), how.contexts)
    probes = [p for seed in seeds for p in probes_of(spec, seed, answers, *wanted)]
    count = share_count(options.effect_share, total)
    where = (options.dtype, options.device, progress)
    return greedy_heads(checkpoint, probes, start, count, how, *where)


def _find_by_scope(
    checkpoint: Checkpoint, options: FindOptions, progress: Progress | None
) -> FoundHeads:
    spec = checkpoint.spec
    if options.method not in (None, SCOPE_METHOD):
        raise UsageError(
            f"method '{options.method}' probes RoPE models; {spec.name} uses ALiBi, whose heads are "
            f"found by their scope: leave the method out or use '{SCOPE_METHOD}'"
        )
    if options.seeds > 1:
        raise UsageError(
            f"seeds: {spec.name} uses ALiBi, whose scopes come from the weights alone; leave it out"
        )
    window = options.window if options.window is not None else RazorPolicy().min_window
    what = "bounding scopes"
    if progress is not None:
        progress(what, 0, spec.num_layers)
    scopes = alibi_scopes(
        checkpoint, options.eps, None if progress is None else lambda i, n: progress(what, i, n)
    )
    if not np.isfinite(scopes).all():
        raise RazorError(
            f"{checkpoint.location}: the scopes are not finite; check the q, k and input norm weights"
        )
    heads = select_by_scope(scopes, window, options.scope_share)
    count = sum(map(len, heads))
    warnings: tuple[str, ...] = ()
    if count == scopes.size:
        warnings = (
            f"every head's scope exceeds the window of {window} tokens, so no cache is saved; "
            f"a larger window or a scope share keeps only those that see farthest",
        )
    head_map = HeadMap(
        model=spec.name,
        fingerprint=spec.fingerprint(),
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        retrieval_heads=heads,
        method=SCOPE_METHOD,
        source="attention scope of the weights (arXiv 2407.15891, Theorem 1)",
        checkpoint=checkpoint.identity(),
        scores={"scope": _rows(scopes)},
        options={
            "window": window,
            "eps": options.eps,
            "scope_share": options.scope_share,
            "warnings": list(warnings),
        },
    )
    return FoundHeads(head_map, None, warnings)


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        raise UsageError(f"device '{name}': expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device '{name}': expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device '{name}': this machine has {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return device


def _rows(table: np.ndarray) -> Scores:
    """Six significant digits, what a file keeps: the choice can be repeated from a saved map."""
    return tuple(tuple(float(f"{x:.6g}") for x in row) for row in table)
