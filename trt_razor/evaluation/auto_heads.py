"""How many retrieval heads does a model need? As many as a target on calibration texts asks for.

The authors' recipe (arXiv 2407.15891): where quality falls short, add heads in steps of 3 %. Here
it is a loop: contexts are read once with full attention, then shares are tried from the smallest up
until the target holds. Texts and names are those of the part ``calibration``: nothing here is met
again in a reported test.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from trt_razor.errors import RazorError, UsageError, did_you_mean
from trt_razor.evaluation.asking import Asked, ask
from trt_razor.evaluation.methods.dense import Dense
from trt_razor.evaluation.methods.interface import Kept, Read
from trt_razor.evaluation.methods.razor import razor_caches
from trt_razor.evaluation.nearness import nearness
from trt_razor.evaluation.runners.interface import Context, Runner
from trt_razor.evaluation.samples import Sample
from trt_razor.evaluation.statistics import wilson
from trt_razor.evaluation.tasks.needle import HELD_OUT_WORDINGS, TUNING_WORDINGS, Needle
from trt_razor.evaluation.tasks.perplexity import Perplexity
from trt_razor.evaluation.text import load_text
from trt_razor.headmap import HeadMap
from trt_razor.heads.answers import AnswerProbe
from trt_razor.heads.greedy import GreedyOptions
from trt_razor.heads.measure import AnswerSource, EffectOptions
from trt_razor.heads.selection import (
    METHODS,
    Heads,
    SelectionOptions,
    check_share,
    select,
    with_share,
)
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.policy import RazorPolicy

TEXT = "python"
SEED = 70_001
"""Seed of the calibration contexts, far from those that heads are scored with."""

FOLLOW = 32
"""Tokens of natural text whose predictions are compared with the dense model's."""

FEW = 10
"""Right answers of the dense model below which their share says little."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class AutoOptions:
    """When to stop, and what is tried.

    Attributes:
        kept: target: share of the dense model's right needle answers that stay right; None: no such
            target.
        kl: target: largest mean KL(dense ‖ Razor) over natural text, nats a token; None: no target.
        length: tokens of a context. trials: contexts.
        step: shares tried are step, 2·step, … of all KV heads, up to ``max_share``.
        policy: what local heads keep.
        seed: of the contexts.

    Raises:
        UsageError: no target, or a value out of range.
    """

    kept: float | None = 1.0
    kl: float | None = None
    length: int = 2048
    trials: int = 24
    step: float = 0.03
    max_share: float = 0.5
    policy: RazorPolicy = dataclasses.field(default_factory=lambda: RazorPolicy(min_window=64))
    seed: int = SEED

    def __post_init__(self) -> None:
        if self.kept is None and self.kl is None:
            raise UsageError("target: expected kept=SHARE or kl=NATS, found none")
        if self.kept is not None:
            check_share("target kept", self.kept)
        if self.kl is not None and not (math.isfinite(self.kl) and self.kl > 0):
            raise UsageError(f"target kl: expected a number above 0, found {self.kl!r}")
        check_share("auto step", self.step)
        check_share("auto max share", self.max_share)
        if not 0 < self.step <= self.max_share:
            raise UsageError(
                f"auto step: expected a share above 0 and up to the max share {self.max_share}, "
                f"found {self.step}"
            )
        if self.trials < 1:
            raise UsageError(f"auto trials: expected at least 1, found {self.trials}")
        if not self.policy.dropped(self.length):
            raise UsageError(
                f"auto length: local heads drop nothing of {self.length} tokens with a window of "
                f"{self.policy.window(self.length)}, so every share would do; use a longer length or "
                f"a smaller window"
            )

    @property
    def shares(self) -> list[float]:
        """The shares to try, ascending."""
        count = int(self.max_share / self.step + 1e-9)
        return [round((i + 1) * self.step, 6) for i in range(count)]

    def target(self) -> dict[str, float]:
        return {k: v for k, v in (("kept", self.kept), ("kl", self.kl)) if v is not None}


@dataclass(frozen=True)
class Tried:
    """One share and what came of it.

    Attributes:
        share: that was asked for. heads: KV heads that were chosen.
        kept: right answers that stayed right, of ``right`` of the dense model's.
        low, high: Wilson's 95 % interval of their share.
        kl: mean over natural text, nats a token. kv: share of the dense cache's bits kept.
        holds: the target is met.
    """

    share: float
    heads: int
    kept: int
    right: int
    low: float
    high: float
    kl: float
    kv: float
    holds: bool

    def to_json(self) -> dict[str, Any]:
        return {
            k: round(v, 6) if isinstance(v, float) else v
            for k, v in dataclasses.asdict(self).items()
        }


@dataclass(frozen=True)
class AutoResult:
    """What :func:`auto_heads` returns.

    Attributes:
        head_map: with the first choice that meets the target, else the last one tried.
        reached: the target is met.
        tried: in the order of trying.
        warnings: sentences for the user.
    """

    head_map: HeadMap
    reached: bool
    tried: tuple[Tried, ...]
    warnings: tuple[str, ...]

    def table(self) -> str:
        """Some lines for a terminal."""
        lines = ["share   heads  kept     interval (95 %)      KL   KV kept"]
        for t in self.tried:
            kept = f"{t.kept}/{t.right}"
            lines.append(
                f"{t.share:6.1%} {t.heads:>6}  {kept:<8} {t.low:.2f} … {t.high:.2f}   "
                f"{t.kl:>9.4f}   {t.kv:>7.3f}{'   target met' if t.holds else ''}"
            )
        return "\n".join(lines)


def auto_heads(
    head_map: HeadMap, runner: Runner, options: AutoOptions, progress: Progress | None = None
) -> AutoResult:
    """Raise the share of a map's own ranking until the target holds.

    Contexts are held in memory as the runner read them: trials × a dense cache.

    Args:
        head_map: with the scores of its method; its choice is made anew.
        runner: computes; the model the map belongs to.

    Raises:
        UsageError: a map whose method is not one of ``selection.METHODS`` or has no scores.
        RazorError: the dense model answers nothing right and ``kept`` is a target.
    """
    selection = selection_of(head_map)
    scores = {name: np.array(table) for name, table in head_map.scores.items()}
    select(scores, selection)  # before minutes of reading
    report = progress or (lambda what, done, total: None)
    cases = _read_all(runner, options, report)
    right = sum(case.right for case in cases)
    if options.kept is not None and not right:
        raise RazorError(
            f"the dense model itself answers none of {options.trials} needle questions at "
            f"{options.length} tokens, so none can be kept; use a shorter --auto-length, or "
            f"--target kl=…"
        )
    warnings = []
    if options.kept is not None and right < FEW:
        warnings.append(
            f"the dense model answers only {right} of {options.trials} needle questions; with so few "
            f"the target says little: more --auto-trials or a shorter --auto-length"
        )
    tried: list[Tried] = []
    heads: Heads = head_map.retrieval_heads
    chosen = selection
    for share in options.shares:
        chosen = with_share(selection, share)
        heads = select(scores, chosen).heads
        what = f"share {share:.0%}"
        tried.append(_try(share, heads, cases, runner.tokenizer, options, what, report))
        if tried[-1].holds:
            break
    settings = {k: v for k, v in head_map.options.items() if k != "auto"}
    settings |= chosen.to_json()
    settings["auto"] = {
        "target": options.target(),
        "reached": tried[-1].holds,
        "length": options.length,
        "trials": options.trials,
        "seed": options.seed,
        "policy": options.policy.to_json(),
        "runner": runner.label,
        **load_text(TEXT, "calibration").describe(),
        "tried": [t.to_json() for t in tried],
    }
    made = dataclasses.replace(head_map, retrieval_heads=heads, options=settings)
    return AutoResult(made, tried[-1].holds, tuple(tried), tuple(warnings))


def selection_of(head_map: HeadMap) -> SelectionOptions:
    """The settings a map was chosen with. Raises UsageError if it was not chosen from scores."""
    if head_map.method not in METHODS:
        raise UsageError(
            f"method '{head_map.method}': expected a map ranked by scores ({', '.join(METHODS)})"
        )
    known = {k: v for k, v in head_map.options.items() if k in SelectionOptions.__annotations__}
    return SelectionOptions(**{**known, "method": head_map.method})


def needle_answers(tokenizer: Tokenizer, options: EffectOptions) -> AnswerSource:
    """Needle documents of the calibration part as probes for ``effect`` and ``gradient``."""

    def make(seed: int) -> list[AnswerProbe]:
        return _probes(_needle(options.length, options.trials), tokenizer, seed)

    return AnswerSource("needle, calibration text", make)


def greedy_answers(
    tokenizer: Tokenizer, options: GreedyOptions, wordings: Sequence[str] = TUNING_WORDINGS
) -> AnswerSource:
    """Documents of the calibration part for ``greedy``.

    Needles in several wordings, three in each document, two of them asked for; and text that goes on.

    Raises:
        UsageError: no wording, one that is unknown, or one that is held out for tests.
    """
    for wording in wordings:
        if wording in HELD_OUT_WORDINGS:
            raise UsageError(
                f"wording '{wording}': held out for tests, heads must not be chosen with it; use "
                f"some of {', '.join(TUNING_WORDINGS)}"
            )
        if wording not in TUNING_WORDINGS:
            raise UsageError(f"wording '{wording}': {did_you_mean(wording, TUNING_WORDINGS)}")
    if not wordings:
        raise UsageError(f"wordings: expected some of {', '.join(TUNING_WORDINGS)}, found none")

    def make(seed: int) -> list[AnswerProbe]:
        probes = []
        for wording in wordings:
            task = _needle(options.length, 2 * options.contexts)
            asked = dataclasses.replace(task, needles=3, questions=2, wording=wording)
            probes += _probes(asked, tokenizer, seed)
        if options.texts:
            going_on = Perplexity((options.length,), options.texts, part="calibration")
            probes += [_going_on(s) for s in going_on.samples(tokenizer, seed)]
        return probes

    name = f"needle ({', '.join(wordings)})" + ", text going on" * bool(options.texts)
    return AnswerSource(f"{name}, calibration text", make)


# Pieces ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Case:
    """A context that was read, and what the dense model makes of it."""

    context: Context
    question: Sample
    follow: Sample
    right: bool
    dense: Asked


@dataclass(frozen=True)
class _Chosen:
    """Razor with heads that are in no file yet."""

    heads: Heads
    policy: RazorPolicy

    name: ClassVar[str] = "razor"
    queries: ClassVar[str] = "recent"
    query_aware: ClassVar[bool] = False

    def compress(self, read: Read) -> list[Kept]:
        return razor_caches(read, self.heads, self.policy, None)


def _probes(task: Needle, tokenizer: Tokenizer, seed: int) -> list[AnswerProbe]:
    return [
        AnswerProbe(
            np.array(s.context, dtype=np.int64),
            np.array(s.turns[0].prompt + s.turns[0].answer, dtype=np.int64),
            len(s.turns[0].prompt),
        )
        for s in task.samples(tokenizer, seed)
    ]


def _going_on(sample: Sample) -> AnswerProbe:
    ids = np.array(sample.context + sample.continuation, dtype=np.int64)
    end = len(sample.context)
    return AnswerProbe(ids[: end - 1], ids[end - 1 :], 1, "text")


def _needle(length: int, trials: int) -> Needle:
    # Never in the last quarter: there a small model finds it in its window.
    return Needle((length,), trials, depth_range=(0.05, 0.75), text=TEXT, part="calibration")


def _read_all(runner: Runner, options: AutoOptions, report: Progress) -> list[_Case]:
    tokenizer = runner.tokenizer
    text = load_text(TEXT, "calibration")
    what, cases = "reading contexts", []
    report(what, 0, options.trials)
    task = _needle(options.length, options.trials)
    for i, question in enumerate(task.samples(tokenizer, options.seed)):
        start = random.Random(f"follow {options.seed} {i}").randrange(len(text.sentences))
        words = (text.sentences * 2)[start : start + FOLLOW]
        ids = tokenizer.encode(" " + " ".join(words), parse_special=False)
        follow = dataclasses.replace(question, turns=(), continuation=tuple(ids[:FOLLOW]))
        context = runner.read(question.context[:-1])
        answered, dense = _ask(context, Dense(), question, follow, tokenizer)
        cases.append(_Case(context, question, follow, answered.scores[0] == 1.0, dense))
        report(what, i + 1, options.trials)
    return cases


def _ask(
    context: Context,
    method: Dense | _Chosen,
    question: Sample,
    follow: Sample,
    tokenizer: Tokenizer,
) -> tuple[Asked, Asked]:
    session, last = context.compress(method), question.context[-1:]
    answered = ask(session, last, question, "forced", tokenizer)
    return answered, ask(session, last, follow, "forced", tokenizer)


def _try(
    share: float,
    heads: Heads,
    cases: Sequence[_Case],
    tokenizer: Tokenizer,
    options: AutoOptions,
    what: str,
    report: Progress,
) -> Tried:
    method = _Chosen(heads, options.policy)
    kept, kls, ratio = 0, [], 0.0
    report(what, 0, len(cases))
    for i, case in enumerate(cases):
        answered, followed = _ask(case.context, method, case.question, case.follow, tokenizer)
        kept += case.right and answered.scores[0] == 1.0
        near = nearness(followed.logits, followed.targets, case.dense.logits)
        assert near.kl is not None
        kls.append(near.kl)
        ratio = max(ratio, answered.kv_ratio)
        report(what, i + 1, len(cases))
    right = sum(case.right for case in cases)
    kl = float(np.mean(kls))
    low, high = wilson(kept / right if right else 0.0, right)
    enough = options.kept is None or kept >= options.kept * right - 1e-9
    near_enough = options.kl is None or kl <= options.kl
    count = sum(len(row) for row in heads)
    holds = enough and near_enough
    return Tried(share, count, kept, right, low, high, kl, ratio, holds)
