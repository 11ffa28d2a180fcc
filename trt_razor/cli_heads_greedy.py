"""Options of ``trt-razor heads --method greedy``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from trt_razor.cli_arguments import policy, policy_options
from trt_razor.console import say
from trt_razor.errors import UsageError
from trt_razor.heads.greedy import READ_DTYPES, GreedyOptions

if TYPE_CHECKING:
    from trt_razor.heads.find import FindOptions
    from trt_razor.heads.measure import AnswerSource
    from trt_razor.models.checkpoint import Checkpoint

_DEFAULTS = GreedyOptions()
_NUMBERS = {
    "step": "heads that join between two measurements",
    "contexts": "contexts of every wording, for each seed",
    "texts": "contexts of natural text that only go on, for each seed",
    "length": "tokens of a context",
}
_ALL = ("start", *_NUMBERS, "wordings", "read_dtype")


def add_arguments(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group(
        "one head after another (--method greedy; --effect-share and --effect-answers as above)"
    )
    g.add_argument(
        "--greedy-start",
        type=float,
        metavar="X",
        help=f"begin with the top share by 'combined' (default {_DEFAULTS.start_share})",
    )
    for name, text in _NUMBERS.items():
        default = getattr(_DEFAULTS, name)
        flag = f"--greedy-{name}"
        g.add_argument(flag, type=int, metavar="N", help=f"{text} (default {default})")
    g.add_argument(
        "--greedy-wordings",
        metavar="A,B",
        help="of the needles (default number,code,printer)",
    )
    g.add_argument(
        "--greedy-read-dtype",
        choices=READ_DTYPES,
        help="to read contexts in; bfloat16 is faster where the hardware has it (default: --dtype)",
    )


def greedy_options(args: argparse.Namespace) -> GreedyOptions:
    """The settings; what local heads keep is the preset ``tight`` unless policy options say else.

    Raises:
        UsageError: the group's options with another method, or a value out of range.
    """
    if args.method != "greedy":
        refuse_options(args, "only with --method greedy")
        return _DEFAULTS
    given = {n: getattr(args, f"greedy_{n}") for n in (*_NUMBERS, "read_dtype")}
    given["start_share"] = args.greedy_start
    changes = {name: value for name, value in given.items() if value is not None}
    if policy_options(args):
        changes["policy"] = policy(args)
    return GreedyOptions(**changes)


def refuse_options(args: argparse.Namespace, why: str) -> None:
    """Raises UsageError if any option of the group was given."""
    for name in _ALL:
        if getattr(args, f"greedy_{name}") is not None:
            raise UsageError(f"--greedy-{name.replace('_', '-')}: {why}")


def answer_source(
    args: argparse.Namespace, checkpoint: Checkpoint, options: FindOptions
) -> AnswerSource | None:
    """Where probes come from; None = random tokens.

    Raises:
        UsageError: needles were asked for and the checkpoint has no tokenizer; a wrong wording.
    """
    wordings = None if args.greedy_wordings is None else args.greedy_wordings.split(",")
    tokenizer = checkpoint.tokenizer()
    if args.effect_answers == "random" or (tokenizer is None and args.effect_answers is None):
        for name in ("wordings", "texts"):
            if getattr(args, f"greedy_{name}") is not None:
                raise UsageError(f"--greedy-{name}: only with needles, found random tokens")
        if args.effect_answers is None:
            say("greedy: this checkpoint has no tokenizer; measured on random tokens said again")
        return None
    if tokenizer is None:
        raise UsageError(
            f"--effect-answers needle: {checkpoint.location} has no tokenizer; use random"
        )
    from trt_razor.evaluation.auto_heads import greedy_answers
    from trt_razor.evaluation.tasks.needle import TUNING_WORDINGS

    return greedy_answers(tokenizer, options.greedy, wordings or TUNING_WORDINGS)
