"""Options of ``trt-razor heads`` that measure: ``--method effect``, ``--auto --target``."""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_razor.cli_arguments import policy, policy_arguments, policy_options
from trt_razor.console import Bars, out, say
from trt_razor.errors import MissingExtra, UsageError, did_you_mean

if TYPE_CHECKING:
    from trt_razor.evaluation.auto_heads import AutoOptions
    from trt_razor.headmap import HeadMap
    from trt_razor.heads.find import FindOptions
    from trt_razor.heads.measure import AnswerSource, EffectOptions
    from trt_razor.models.checkpoint import Checkpoint

TARGETS = ("kept", "kl")
AUTO_WINDOW = 64
"""Smallest window of ``--auto`` without policy options: so that window = n / C, as at long texts."""

_AUTO = {"auto_length": 2048, "auto_trials": 24, "auto_step": 0.03, "auto_max_share": 0.5}
_PROBE = ("probe_length", "repeats", "seeds", "seed")
_EFFECT = ("effect_answers", "effect_trials", "effect_length", "effect_window", "gradient_points")


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--from",
        dest="from_map",
        type=Path,
        metavar="FILE",
        help="choose anew from the scores of this head map, measure nothing",
    )
    p.add_argument("--by-layer", action="store_true", help="print how many heads each layer has")
    g = p.add_argument_group("measured effect (--method effect, gradient or greedy)")
    g.add_argument(
        "--effect-share",
        type=float,
        default=0.15,
        metavar="X",
        help="top share of all KV heads by effect, or greedily (default 0.15)",
    )
    g.add_argument(
        "--effect-answers",
        choices=("needle", "random"),
        help="what must be found: a number in a text (default, needs a tokenizer), or random tokens "
        "said again",
    )
    for name, default, text in (
        ("trials", 12, "contexts a seed"),
        ("length", 2048, "tokens of a context"),
        ("window", 64, "recent tokens that a local head keeps"),
    ):
        g.add_argument(
            f"--effect-{name}",
            type=int,
            default=default,
            metavar="N",
            help=f"{text} (default {default})",
        )
    g.add_argument(
        "--gradient-points",
        type=int,
        default=5,
        metavar="N",
        help="gates between local and full where the gradient is taken (default 5; 1 = at full)",
    )
    g = p.add_argument_group("as many heads as a target needs")
    g.add_argument("--auto", action="store_true", help="raise the share until the target holds")
    g.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="kept=X|kl=X",
        help="share of right needle answers that stay right, or largest KL to dense attention; both may be "
        "given (default kept=1.0)",
    )
    for name, default, text in (
        ("length", 2048, "tokens of a calibration context"),
        ("trials", 24, "calibration contexts"),
    ):
        g.add_argument(
            f"--auto-{name}",
            type=int,
            default=default,
            metavar="N",
            help=f"{text} (default {default})",
        )
    for name, share, text in (
        ("step", 0.03, "share added at a time"),
        ("max-share", 0.5, "give up above this share"),
    ):
        g.add_argument(
            f"--auto-{name}",
            type=float,
            default=share,
            metavar="X",
            help=f"{text} (default {share})",
        )
    g.add_argument(
        "--auto-read-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="to read contexts in; bfloat16 is faster where the hardware has it (default: --dtype)",
    )
    policy_arguments(p)


# Measured effect ------------------------------------------------------------------------------
def effect_options(args: argparse.Namespace) -> EffectOptions:
    from trt_razor.heads.measure import EffectOptions

    return EffectOptions(
        args.effect_trials, args.effect_length, args.effect_window, args.gradient_points
    )


def answer_source(
    args: argparse.Namespace, checkpoint: Checkpoint, options: FindOptions
) -> AnswerSource | None:
    """Where probes come from; None = random tokens.

    Raises:
        UsageError: needles were asked for and the checkpoint has no tokenizer.
    """
    if args.effect_answers == "random":
        return None
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        if args.effect_answers == "needle":
            raise UsageError(
                f"--effect-answers needle: {checkpoint.location} has no tokenizer; use random"
            )
        say("effect: this checkpoint has no tokenizer; measured on random tokens said again")
        return None
    from trt_razor.evaluation.auto_heads import needle_answers

    return needle_answers(tokenizer, options.effect)


def refuse_probe_options(args: argparse.Namespace) -> None:
    """``--from`` measures nothing. Raises UsageError for options of a measurement."""
    defaults = {"probe_length": 2500, "repeats": 4, "seeds": 1, "seed": 0}
    defaults |= {"effect_trials": 12, "effect_length": 2048, "effect_window": 64}
    defaults |= {"gradient_points": 5}
    for name in (*_PROBE, *_EFFECT):
        if getattr(args, name) != defaults.get(name):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag}: --from takes scores as they are; leave one of them out")


# Auto -----------------------------------------------------------------------------------------
def auto_options(args: argparse.Namespace) -> AutoOptions | None:
    """Settings of ``--auto``, None without it. Raises UsageError for its options alone."""
    if not args.auto:
        given = [f"--{n.replace('_', '-')}" for n, v in _AUTO.items() if getattr(args, n) != v]
        given += ["--target"] * bool(args.target)
        given += ["--auto-read-dtype"] * bool(args.auto_read_dtype)
        if args.method != "greedy" or args.from_map is not None:
            given += policy_options(args)
        if given:
            raise UsageError(f"{given[0]}: only with --auto")
        return None
    if args.method == "alibi-scope":
        raise UsageError("--auto: raises the share of a ranking; alibi-scope has a window instead")
    for package, extra in (("torch", "heads"), ("transformers", "hf")):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, extra, "measuring a target (--auto)")
    from trt_razor.evaluation.auto_heads import AutoOptions

    wanted = policy(args)
    if not policy_options(args):
        wanted = wanted.with_(min_window=AUTO_WINDOW)
    targets = read_targets(args.target or ["kept=1.0"])
    return AutoOptions(
        targets.get("kept"),
        targets.get("kl"),
        args.auto_length,
        args.auto_trials,
        args.auto_step,
        args.auto_max_share,
        wanted,
    )


def read_targets(texts: list[str]) -> dict[str, float]:
    """``kept=1.0`` and ``kl=0.02`` by name. Raises UsageError for anything else."""
    targets: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in TARGETS:
            raise UsageError(f"--target '{text}': {did_you_mean(name, TARGETS)}, e.g. kept=1.0")
        try:
            targets[name] = float(number)
        except ValueError:
            targets[name] = math.nan
        if not math.isfinite(targets[name]):
            raise UsageError(f"--target {name}: expected a number, found '{number}'")
    return targets


def check(checkpoint: Checkpoint) -> None:
    """Raises UsageError for a model that ``--auto`` cannot measure, before it is scored."""
    spec = checkpoint.spec
    if spec.position != "rope":
        raise UsageError(
            f"--auto: {spec.name} uses {spec.position}; its heads are found by their scope, without a "
            f"share that could be raised"
        )
    if checkpoint.tokenizer() is None:
        raise UsageError(f"--auto: {checkpoint.location} has no tokenizer; needles are texts")


def run_auto(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    head_map: HeadMap,
    options: AutoOptions,
    bars: Bars,
) -> tuple[HeadMap, bool]:
    """The map with as many heads as the target needs, and whether it was reached."""
    import torch

    from trt_razor.evaluation.auto_heads import auto_heads
    from trt_razor.evaluation.runners.hf import HfRunner
    from trt_razor.reference.hf.load import checkpoint_model

    kept = ", ".join(f"{k} {v:g}" for k, v in options.target().items())
    say(
        f"target: {kept}, {options.trials} calibration contexts of {options.length} tokens, "
        f"window {options.policy.window(options.length)}, M = {options.policy.comp_tokens}"
    )
    dtype: Any = getattr(torch, args.dtype)
    read_dtype = getattr(torch, args.auto_read_dtype) if args.auto_read_dtype else None
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    model = checkpoint_model(checkpoint, dtype, args.device)
    runner = HfRunner(model, tokenizer, checkpoint.spec.name, read_dtype)
    try:
        result = auto_heads(head_map, runner, options, bars)
    finally:
        runner.close()
    for warning in result.warnings:
        say(f"note: {warning}")
    out.print(result.table(), markup=False)
    if not result.reached:
        say(
            f"target NOT reached: {kept} does not hold with {options.shares[-1]:.0%} of the heads; the "
            f"map has the last choice tried; raise --auto-max-share, use another --method, or a larger "
            f"window"
        )
    return result.head_map, result.reached
