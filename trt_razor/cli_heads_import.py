"""``trt-razor heads import``: a head map from another project's published list or scores."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from trt_razor.console import out, say
from trt_razor.errors import MissingExtra, UsageError

_SHARED = ("model", "checkpoint", "output", "plot", "no_plot")
"""Options that ``heads`` and ``heads import`` both have; they may stand before ``import`` too."""

EPILOG = """\
formats (found by content; docs/heads.md says what each one is):
  duoattention  full_attention_heads.tsv of DuoAttention, or the folder with it
  freekv        razor_patterns/*.tsv of FreeKV
  msmodelslim   win.pt or head.pt of Huawei's msmodelslim
  kvzip         utils/head_score/*.pt of KVzip
  headkv        Important_Head/head_score/*.json of HeadKV, or of Retrieval Head
  razor         a head map of trt-razor, made for a sibling model

examples:
  %(prog)s full_attention_heads.tsv --model llama3.1-8b --share 0.25 --output llama.heads.json
  %(prog)s win.pt --checkpoint ./Qwen2-72B-Instruct
"""


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    parser: argparse.ArgumentParser,
) -> None:
    """Put ``import`` beside the options of ``parser``, that of ``heads``."""
    text = "take the heads from another project's published list or scores"
    p = commands.add_parser(
        "import",
        help=f"{text} (import --help)",
        description=f"{text.capitalize()}.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # SUPPRESS: a default would overwrite what was given before the word "import".
    quiet = argparse.SUPPRESS
    p.add_argument("file", type=Path, metavar="FILE", help="the list or the scores")
    p.add_argument("--format", default="auto", metavar="NAME", help="default: found by content")
    p.add_argument("--model", default=quiet, metavar="NAME", help="a name of the zoo")
    p.add_argument(
        "--checkpoint",
        type=Path,
        default=quiet,
        metavar="PATH",
        help="Hugging Face folder (its config.json is enough), or a .gguf file",
    )
    p.add_argument(
        "--share",
        type=float,
        metavar="X",
        help="top share of all KV heads by score (default: 0.5 for duoattention, else 0.15)",
    )
    p.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="instead: heads with a score of at least X (default: 0.5 for freekv's tables of fractions, "
        "4000 tokens for msmodelslim's ALiBi windows)",
    )
    p.add_argument(
        "--output",
        type=Path,
        default=quiet,
        metavar="FILE",
        help="default: engines/MODEL.FORMAT.heads.json",
    )
    p.add_argument(
        "--plot", type=Path, default=quiet, metavar="PNG", help="default: beside the output"
    )
    p.add_argument("--no-plot", action="store_true", default=quiet, help="no heat map")
    p.set_defaults(run=lambda args: run(args, parser))


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """The command; ``parser`` is that of ``heads``, whose other options do not go with it."""
    from trt_razor.build_request import BuildRequest, model_spec, safe_name
    from trt_razor.heads.importers import Cut, import_heads

    _refuse_options_of_the_search(args, parser)
    cut = Cut(args.share, args.threshold)
    spec = model_spec(BuildRequest(model=args.model, checkpoint=args.checkpoint))
    found = import_heads(args.file.expanduser(), spec, args.format, cut)
    name = f"{safe_name(spec.name)}.{found.format}.heads.json"
    output, plot = outputs(args, name)
    head_map = found.head_map
    head_map.save(output)
    say(f"format: {found.format}")
    for note in found.notes:
        say(f"note: {note}")
    out.print(
        f"{head_map.num_retrieval} of {head_map.num_layers * head_map.num_kv_heads} KV heads retrieve "
        f"({head_map.share:.1%}, imported from {found.format}): {output}",
        markup=False,
    )
    if plot is not None:
        from trt_razor.heads.heatmap import save_heatmap

        save_heatmap(head_map, plot)
        out.print(f"heat map: {plot}", markup=False)
    return 0


def outputs(args: argparse.Namespace, name: str) -> tuple[Path, Path | None]:
    """Where the map and its heat map go. Checked before any work is done for them.

    Args:
        args: with output, plot and no_plot.
        name: of the map, where none is given.

    Raises:
        UsageError: a folder, or a heat map that is no PNG. MissingExtra: matplotlib is not installed.
    """
    output = args.output or Path("engines") / name
    plot = None if args.no_plot else args.plot or output.with_suffix(".png")
    for path in (output, plot):
        if path is not None and path.is_dir():
            raise UsageError(f"{path}: is a folder; expected the name of a file")
    if plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise MissingExtra("matplotlib", "heads", "drawing the heat map (or --no-plot)")
        from trt_razor.heads.heatmap import check_name

        check_name(plot)
    return output, plot


def _refuse_options_of_the_search(
    args: argparse.Namespace, parser: argparse.ArgumentParser
) -> None:
    for action in parser._actions:
        if not action.option_strings or action.dest in (*_SHARED, "help"):
            continue
        if getattr(args, action.dest) != action.default:
            raise UsageError(
                f"{action.option_strings[0]}: for finding heads, not for importing them; leave it out"
            )
