"""``trt-razor eval``: tasks × methods of one YAML file, and the report of a finished run."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_razor.console import Bars, out, say
from trt_razor.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from trt_razor.evaluation.config import RunConfig
    from trt_razor.evaluation.records import RecordFolder
    from trt_razor.evaluation.run import Summary

TEXT = "measure what a model loses with a smaller KV cache"
EPILOG = """\
examples:
  %(prog)s smoke                          a minute: does everything work here?
  %(prog)s quick --model ./my-checkpoint  a first look at a model
  %(prog)s my-run.yaml --output results   stopped? the same command goes on
  %(prog)s --report results               tables and pictures again, from the records
  %(prog)s --agreement engines/demo       an engine's tokens against the same model in transformers
  %(prog)s --list                         tasks, methods and their options
"""
OUTPUT = Path("evaluations")
"""Where results go without --output, in a folder of the run's name."""
MOST_JOBS = 64
RUNS = Path(__file__).parent / "evaluation" / "runs"


def add_command(commands: Any) -> None:
    """Put ``eval`` beside the other commands."""
    p = commands.add_parser(
        "eval",
        help=TEXT,
        description=f"{TEXT.capitalize()}.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "run_file", nargs="?", metavar="RUN.yaml", help="a run's file, or a bundled name"
    )
    p.add_argument("--model", metavar="NAME|DIR", help="instead of the file's model")
    p.add_argument("--device", metavar="NAME", help="instead of the file's device: cpu, cuda …")
    p.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"results (default: {OUTPUT}/NAME); resumed if there",
    )
    p.add_argument("--restart", action="store_true", help="forget the results that are there")
    p.add_argument("--retry", action="store_true", help="try again what failed, keep the rest")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N samples of each group")
    p.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="contexts at the same time, each in a process with its own copy of the model (default: 1)",
    )
    p.add_argument(
        "--report", type=Path, metavar="DIR", help="write the report of these results again"
    )
    p.add_argument(
        "--agreement",
        type=Path,
        metavar="ENGINE",
        help="greedy tokens of an engine against transformers with the same heads and policy "
        "(--model: its weights, if not the zoo's)",
    )
    p.add_argument("--list", action="store_true", help="show tasks, methods and bundled runs")
    p.set_defaults(run=run_eval)


def run_eval(args: argparse.Namespace) -> int:
    """The command; its exit code is 1 if a method failed on a sample."""
    asked = [args.run_file, args.report, args.agreement, args.list or None]
    if sum(a is not None for a in asked) != 1:
        raise UsageError("expected one of RUN.yaml, --report DIR, --agreement ENGINE, --list")
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit: expected at least 1, found {args.limit}")
    if args.jobs is not None and not 1 <= args.jobs <= MOST_JOBS:
        raise UsageError(f"--jobs: expected 1 to {MOST_JOBS}, found {args.jobs}")
    if args.restart and args.retry:
        raise UsageError("--restart forgets everything, --retry only what failed; give one of them")
    if args.list:
        if args.jobs is not None:
            raise UsageError("--jobs: --list computes nothing")
        return _list()
    if args.report is not None:
        return _report(args)
    if args.agreement is not None:
        return _agreement(args)
    return _run(args)


def find_run(name: str) -> Path:
    """The file of a run: a path, or the name of a bundled one.

    Raises:
        UsageError: neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    bundled = {p.stem: p for p in sorted(RUNS.glob("*.yaml"))}
    if path.name == name and name.removesuffix(".yaml") in bundled:
        return bundled[name.removesuffix(".yaml")]
    raise UsageError(
        f"{name}: no such file, and no bundled run; {did_you_mean(path.stem, bundled)}"
    )


# Run ----------------------------------------------------------------------------------------------
def _run(args: argparse.Namespace) -> int:
    from trt_razor.evaluation.config import load_config
    from trt_razor.evaluation.records import RecordFolder
    from trt_razor.evaluation.report import remove_report, write_report

    override = {k: getattr(args, k) for k in ("model", "device") if getattr(args, k) is not None}
    config = load_config(find_run(args.run_file), override)
    folder = args.output or OUTPUT / _folder_name(config, args.model)
    with RecordFolder(folder, config.hash(), config.to_json(), args.restart) as output:
        if args.restart:
            remove_report(folder)
        if args.retry:
            say(f"{output.drop_errors()} failed results are tried again")
        try:
            summary = _compute(config, output, args.limit, args.jobs or 1)
        except KeyboardInterrupt:
            say(f"{len(output.records)} results are kept in {folder}; the same command goes on")
            raise
    with Bars() as bars:
        bars("report", 0, 1)
        report = write_report(folder)
        bars("report", 1, 1)
    out.print(f"{summary.known + summary.computed} results: {report}", markup=False)
    return _name_errors(summary)


def _compute(config: RunConfig, output: RecordFolder, limit: int | None, jobs: int) -> Summary:
    from trt_razor.evaluation.run import lanes_of, open_runners, run
    from trt_razor.evaluation.workers import Workers

    with Bars() as bars, ExitStack() as stack:
        workers = stack.enter_context(Workers(config, jobs)) if jobs > 1 else None
        lanes = lanes_of(config, *(workers.runners if workers else open_runners(config)))
        say(", ".join(dict.fromkeys(lane.runner.label for lane in lanes)))
        compute = workers.records if workers else None
        return run(config, lanes, output, bars, say, limit, compute)


def _name_errors(summary: Summary) -> int:
    from trt_razor.evaluation.report import errors_of

    failed = errors_of(summary.errors)
    for e in failed:
        say(
            f"failed: {e['method']} on {e['task']}, {e['samples']} "
            f"sample{'s' * (e['samples'] > 1)}: {e['reason']}"
        )
    return int(bool(failed))


def _folder_name(config: RunConfig, model: str | None) -> str:
    """A run on another model than its file's has a folder of its own."""
    from trt_razor.build import safe_name

    return config.name if model is None else f"{config.name}-{safe_name(Path(model).name)}"


# Report -------------------------------------------------------------------------------------------
def _report(args: argparse.Namespace) -> int:
    from trt_razor.evaluation.report import write_report

    for name in ("output", "restart", "retry", "limit", "jobs", "model", "device"):
        if getattr(args, name):
            raise UsageError(f"--{name}: --report takes a results folder alone")
    out.print(str(write_report(args.report)), markup=False)
    return 0


# Agreement ----------------------------------------------------------------------------------------
AGREE = 0.99
"""Share of equal greedy steps below which an engine does not reproduce the model."""


def _agreement(args: argparse.Namespace) -> int:
    from trt_razor.evaluation.agreement import AgreementOptions, measure

    for name in ("output", "restart", "retry", "limit", "jobs", "device"):
        if getattr(args, name):
            raise UsageError(f"--{name}: --agreement takes an engine and --model")
    folder = args.model is not None and Path(args.model).exists()
    options = AgreementOptions(
        engine=args.agreement,
        model=None if folder else args.model,
        checkpoint=Path(args.model) if folder else None,
    )
    with Bars() as bars:
        found = measure(options, functools.partial(bars, "agreement"))
    out.print(found.markdown(), markup=False)
    if found.share >= AGREE:
        return 0
    say(f"expected {AGREE:.0%} of greedy steps equal, found {found.share:.1%}")
    return 1


# List ---------------------------------------------------------------------------------------------
def _list() -> int:
    from trt_razor.evaluation.methods.interface import METHODS
    from trt_razor.evaluation.tasks.interface import TASKS

    for registry in (TASKS, METHODS):
        out.print(f"{registry.kind}s", style="bold")
        for name in registry.names():
            cls = registry.get(name)
            out.print(f"  {name}: {_first_line(cls)}", markup=False)
            for f in dataclasses.fields(cls):
                out.print(f"      {f.name}{_default(f)}", markup=False)
    out.print("runs", style="bold")
    for path in sorted(RUNS.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        out.print(f"  {path.stem}: {first.lstrip('# ')}", markup=False)
    return 0


def _first_line(cls: Any) -> str:
    return (inspect.getdoc(cls) or "").split("\n")[0]


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default is not dataclasses.MISSING:
        return f" = {_spelled(f.default)}"
    if f.default_factory is not dataclasses.MISSING:
        return f" = {_spelled(f.default_factory())}"
    return " (required)"


def _spelled(value: Any) -> str:
    """As a YAML file spells it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_spelled(v) for v in value)}]"
    return str(value)
