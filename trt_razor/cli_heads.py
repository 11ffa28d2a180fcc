"""``trt-razor heads``: find, choose and compare retrieval heads."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from trt_razor import cli_arguments as arguments
from trt_razor import cli_heads_auto, cli_heads_greedy, cli_heads_import
from trt_razor.console import Bars, out, say
from trt_razor.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    from trt_razor.headmap import HeadMap
    from trt_razor.heads.find import FindOptions
    from trt_razor.models.checkpoint import Checkpoint


def add_command(parser: argparse.ArgumentParser) -> None:
    """The options of ``heads``, and ``import`` and ``compare`` behind them."""
    arguments.heads_arguments(parser)
    cli_heads_auto.add_arguments(parser)
    cli_heads_greedy.add_arguments(parser)
    parser.set_defaults(run=run)
    commands = parser.add_subparsers(
        dest="heads_command", metavar="import | compare", title="other sources", required=False
    )
    cli_heads_import.add_command(commands, parser)
    add_compare(commands)


def run(args: argparse.Namespace) -> int:
    from trt_razor.build_request import safe_name
    from trt_razor.heads.find import FindOptions
    from trt_razor.models.checkpoint import open_checkpoint

    options = FindOptions(
        probe_length=args.probe_length,
        repeats=args.repeats,
        seeds=args.seeds,
        seed=args.seed,
        method=args.method,
        induction_share=args.induction_share,
        echo_share=args.echo_share,
        combined_share=args.combined_share,
        min_echo=args.min_echo,
        dtype=args.dtype,
        device=args.device,
        window=args.window,
        eps=args.eps,
        scope_share=args.scope_share,
        effect_share=args.effect_share,
        effect=cli_heads_auto.effect_options(args),
        greedy=cli_heads_greedy.greedy_options(args),
    )
    auto = cli_heads_auto.auto_options(args)
    if importlib.util.find_spec("torch") is None:
        raise MissingExtra("torch", "heads", "finding heads")
    checkpoint = open_checkpoint(args.model, args.checkpoint)
    # Before the minutes of scoring, not after them.
    name = f"{safe_name(checkpoint.spec.name)}.heads.json"
    output, plot = cli_heads_import.outputs(args, name)
    if auto is not None:
        cli_heads_auto.check(checkpoint)
    with Bars() as bars:
        head_map = _scored(args, checkpoint, options, bars)
        if auto is not None:
            head_map, reached = cli_heads_auto.run_auto(args, checkpoint, head_map, auto, bars)
    head_map.save(output)
    if args.by_layer:
        from trt_razor.heads.compare import depth_bars

        out.print(depth_bars([head_map.retrieval_heads]), markup=False)
    out.print(
        f"{head_map.num_retrieval} of {head_map.num_layers * head_map.num_kv_heads} KV heads "
        f"retrieve ({head_map.share:.1%}, {head_map.method}): {output}",
        markup=False,
    )
    if plot is not None:
        from trt_razor.heads.heatmap import save_heatmap

        save_heatmap(head_map, plot)
        out.print(f"heat map: {plot}", markup=False)
    return 0 if auto is None or reached else 1


def _scored(
    args: argparse.Namespace, checkpoint: Checkpoint, options: FindOptions, bars: Bars
) -> HeadMap:
    """Scores measured now, or those of ``--from``."""
    from trt_razor.headmap import HeadMap
    from trt_razor.heads.find import SCOPE_METHOD, examine_heads
    from trt_razor.heads.selection import MEASURED, choose_again

    if args.from_map is not None:
        if args.method == SCOPE_METHOD:
            raise UsageError(f"--from: not for --method {SCOPE_METHOD}, whose scopes take seconds")
        cli_heads_auto.refuse_probe_options(args)
        cli_heads_greedy.refuse_options(args, "--from takes scores as they are")
        scored = HeadMap.load(args.from_map)
        spec = checkpoint.spec
        scored.check_model(spec.fingerprint(), spec.name, str(args.from_map))
        return choose_again(scored, options.selection)
    source = None
    if options.method == "greedy":
        source = cli_heads_greedy.answer_source(args, checkpoint, options)
    elif options.method in MEASURED:
        source = cli_heads_auto.answer_source(args, checkpoint, options)
    found = examine_heads(checkpoint, options, bars, source)
    for warning in found.warnings:
        say(f"note: {warning}")
    if found.stability is not None:
        out.print(found.stability.table(), markup=False)
    return found.head_map


# compare --------------------------------------------------------------------------------------
def add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "two head maps of one model side by side"
    p = commands.add_parser("compare", help=text, description=f"{text.capitalize()}.")
    p.add_argument("a", type=Path, metavar="A.json", help="a head map")
    p.add_argument("b", type=Path, metavar="B.json", help="another one of the same model")
    p.add_argument("--json", action="store_true", help="print the comparison as JSON")
    p.set_defaults(run=run_compare)


def run_compare(args: argparse.Namespace) -> int:
    import json

    from trt_razor.headmap import HeadMap
    from trt_razor.heads.compare import compare

    found = compare(HeadMap.load(args.a), HeadMap.load(args.b), (str(args.a), str(args.b)))
    if args.json:
        out.file.write(json.dumps(found.to_json(), indent=1) + "\n")
    else:
        out.print(found.table(), markup=False)
    return 0
