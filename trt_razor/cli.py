"""``trt-razor``: find heads, plan, build, generate, inspect. Thin: every command calls the package."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from trt_razor import __version__
from trt_razor.console import Bars, err, guarded, out, say
from trt_razor.errors import MissingExtra, UsageError
from trt_razor.policy import PRESETS, RazorPolicy


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``trt-razor``; returns the exit code (0, 1 failed, 2 usage, 130 interrupted)."""
    parser = _parser()
    args = parser.parse_args(argv)
    return guarded(lambda: int(args.run(args)))


def build_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``build_scripts/build_engine.py``: ``trt-razor build`` under its own name."""
    parser = argparse.ArgumentParser(
        prog="build_engine.py",
        description="Build an engine.",
        epilog=BUILD_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _build_arguments(parser)
    args = parser.parse_args(argv)
    return guarded(lambda: _build(args))


BUILD_EPILOG = """\
examples:
  %(prog)s --model smollm2-135m --razor
  %(prog)s --model smollm2-135m --razor --min-window 256 --max-batch-size 4
  %(prog)s --checkpoint ./Qwen2.5-7B-Instruct --razor --heads qwen.heads.json
  %(prog)s --model qwen-72b --razor --plan --tp-size 8
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trt-razor",
        description="Long-context inference with a third of the KV cache (RazorAttention).",
    )
    parser.add_argument("--version", action="version", version=f"trt-razor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = commands.add_parser("heads", help="find the retrieval heads of a checkpoint")
    _heads_arguments(p)
    p.set_defaults(run=_heads)
    p = commands.add_parser("plan", help="memory and batch sizes, from the config alone")
    _plan_arguments(p)
    p.set_defaults(run=_plan)
    p = commands.add_parser(
        "build",
        help="build an engine",
        epilog=BUILD_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _build_arguments(p)
    p.set_defaults(run=_build)
    p = commands.add_parser("generate", help="generate text with an engine")
    _generate_arguments(p)
    p.set_defaults(run=_generate)
    p = commands.add_parser("inspect", help="print an engine's manifest and verify it")
    p.add_argument("engine", type=Path)
    p.add_argument("--json", action="store_true", help="print the manifest as JSON")
    p.set_defaults(run=_inspect)
    return parser


# Shared arguments -----------------------------------------------------------------------------
def _model_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", metavar="NAME", help="a name of the zoo, such as qwen-72b")
    p.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="Hugging Face folder, or a .gguf file"
    )


def _policy_arguments(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("what a local head keeps")
    g.add_argument("--preset", choices=sorted(PRESETS), default="paper", help="default: paper")
    g.add_argument("--sinks", type=int, metavar="N", help="sink tokens (paper: 4)")
    g.add_argument("--min-window", type=int, metavar="N", help="smallest window (paper: 4000)")
    g.add_argument(
        "--compression",
        type=_compression,
        metavar="C",
        help="window = n / C once that is larger (paper: 5); 'none' = a fixed window",
    )
    g.add_argument(
        "--comp-tokens",
        type=int,
        metavar="M",
        help="compensation tokens (paper: 1; tight: 32; 0 = drop without)",
    )


_FIXED = object()


def _compression(text: str) -> object:
    if text.lower() in ("none", "inf"):
        return _FIXED
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer or 'none', found {text!r}") from None


def _policy(args: argparse.Namespace) -> RazorPolicy:
    changes: dict[str, object] = {}
    for field, value in (
        ("sink_tokens", args.sinks),
        ("min_window", args.min_window),
        ("compression", args.compression),
        ("comp_tokens", args.comp_tokens),
    ):
        if value is not None:
            changes[field] = None if value is _FIXED else value
    return PRESETS[args.preset].with_(**changes)


# heads ----------------------------------------------------------------------------------------
def _heads_arguments(p: argparse.ArgumentParser) -> None:
    _model_arguments(p)
    p.add_argument("--output", type=Path, metavar="FILE", help="default: engines/MODEL.heads.json")
    p.add_argument("--plot", type=Path, metavar="PNG", help="default: beside the output")
    p.add_argument("--no-plot", action="store_true")
    p.add_argument(
        "--method",
        choices=("paper", "combined", "echo", "induction", "alibi-scope"),
        help="default: paper (RoPE) or alibi-scope (ALiBi)",
    )
    p.add_argument("--induction-share", type=float, default=0.14, metavar="X", help="default 0.14")
    p.add_argument("--echo-share", type=float, default=0.01, metavar="X", help="default 0.01")
    p.add_argument("--combined-share", type=float, default=0.15, metavar="X", help="default 0.15")
    p.add_argument(
        "--min-echo",
        type=int,
        default=4,
        metavar="N",
        help="at least so many echo heads, for small models (default 4)",
    )
    p.add_argument("--probe-length", type=int, default=2500, metavar="K", help="default 2500")
    p.add_argument("--repeats", type=int, default=4, metavar="N", help="default 4")
    p.add_argument("--seeds", type=int, default=1, metavar="N", help="probes; reports stability")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--window", type=int, metavar="N", help="ALiBi: tokens a local head can see")
    p.add_argument("--device", default="cpu", help="torch device (default cpu)")
    p.add_argument("--dtype", choices=("float32", "float64"), default="float32")


def _heads(args: argparse.Namespace) -> int:
    from trt_razor.heads.find import FindOptions, examine_heads
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
    )
    checkpoint = open_checkpoint(args.model, args.checkpoint)
    output = args.output or Path("engines") / f"{checkpoint.spec.name}.heads.json"
    plot = None if args.no_plot else args.plot or output.with_suffix(".png")
    if plot is not None:
        # Before the minutes of scoring, not after them.
        if importlib.util.find_spec("matplotlib") is None:
            raise MissingExtra("matplotlib", "heads", "drawing the heat map (or --no-plot)")
    with Bars() as bars:
        found = examine_heads(checkpoint, options, bars)
    head_map = found.head_map
    head_map.save(output)
    for warning in found.warnings:
        say(f"note: {warning}")
    if found.stability is not None:
        out.print(found.stability.table(), markup=False)
    out.print(
        f"{head_map.num_retrieval} of {head_map.num_layers * head_map.num_kv_heads} KV heads "
        f"retrieve ({head_map.share:.1%}, {head_map.method}): {output}",
        markup=False,
    )
    if plot is not None:
        from trt_razor.heads.heatmap import save_heatmap

        save_heatmap(head_map, plot)
        out.print(f"heat map: {plot}", markup=False)
    return 0


# plan -----------------------------------------------------------------------------------------
def _plan_arguments(p: argparse.ArgumentParser) -> None:
    _model_arguments(p)
    p.add_argument("--max-seq-len", type=int, metavar="N", help="default: the model's positions")
    p.add_argument("--gpu", metavar="NAME", help="such as h100-80gb; adds batch sizes")
    p.add_argument("--tp-size", type=int, default=1, metavar="N")
    p.add_argument("--pp-size", type=int, default=1, metavar="N")
    p.add_argument("--batch", type=int, metavar="N", help="sequences at the same time")
    p.add_argument("--heads", type=Path, metavar="FILE", help="a head map, for exact figures")
    p.add_argument(
        "--retrieval-share",
        type=float,
        default=0.15,
        metavar="X",
        help="assumed without --heads (default 0.15)",
    )
    dtypes = ("float32", "float16", "bfloat16")
    p.add_argument("--dtype", choices=dtypes, default="float16", help="of weights and KV")
    p.add_argument("--json", action="store_true", help="print the plan as JSON")
    _policy_arguments(p)


def _plan(args: argparse.Namespace) -> int:
    from trt_razor.build import BuildRequest, model_spec
    from trt_razor.headmap import HeadMap
    from trt_razor.planner import plan, plan_to_json, render

    _need_model(args)
    spec = model_spec(BuildRequest(model=args.model, checkpoint=args.checkpoint))
    head_map = None
    if args.heads is not None:
        head_map = HeadMap.load(args.heads)
        head_map.check_model(spec.fingerprint(), spec.name, str(args.heads))
    result = plan(
        spec,
        _policy(args),
        args.max_seq_len or spec.max_positions,
        gpu=args.gpu,
        tp_size=args.tp_size,
        pp_size=args.pp_size,
        head_map=head_map,
        retrieval_share=args.retrieval_share,
        kv_dtype=args.dtype,
        weight_dtype=args.dtype,
        batch=args.batch,
    )
    if args.json:
        print(json.dumps(plan_to_json(result), indent=1))
    else:
        out.print(render(result))
    return 0


def _need_model(args: argparse.Namespace) -> None:
    if args.model is None and args.checkpoint is None:
        from trt_razor.models.zoo import zoo_names

        raise UsageError(
            f"name a model: --model NAME (known: {', '.join(zoo_names())}) or --checkpoint PATH"
        )


# build ----------------------------------------------------------------------------------------
def _build_arguments(p: argparse.ArgumentParser) -> None:
    _model_arguments(p)
    p.add_argument("--razor", action="store_true", help="compress; without it attention is dense")
    p.add_argument(
        "--heads",
        default="auto",
        metavar="FILE|auto",
        help="head map; auto = the shipped recipe, else find them (default)",
    )
    p.add_argument(
        "--backend",
        default="auto",
        metavar="NAME",
        help="auto, onnxruntime, tensorrt-rtx (default auto: the best this machine can run)",
    )
    p.add_argument("--output", type=Path, metavar="DIR", help="default: engines/MODEL-…")
    p.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="default: float32 for onnxruntime, else float16",
    )
    p.add_argument("--max-seq-len", type=int, metavar="N", help="capacity of a slot (default 8192)")
    p.add_argument("--max-batch-size", type=int, default=1, metavar="N", help="slots (default 1)")
    p.add_argument(
        "--prefill-chunk",
        type=int,
        default=2048,
        metavar="N",
        help="prompt tokens read at once; 0 = whole prompts, the paper's way (default 2048)",
    )
    p.add_argument("--tp-size", type=int, default=1, metavar="N")
    p.add_argument("--pp-size", type=int, default=1, metavar="N")
    p.add_argument(
        "--random-weights", action="store_true", help="any zoo model without a checkpoint"
    )
    p.add_argument("--plan", action="store_true", help="print the plan and stop")
    p.add_argument("--force", action="store_true", help="replace an existing engine")
    _policy_arguments(p)


def _build(args: argparse.Namespace) -> int:
    from trt_razor.backends.base import EngineOptions
    from trt_razor.build import BuildRequest, build_engine
    from trt_razor.models.spec import ModelSpec
    from trt_razor.planner import plan, render

    _need_model(args)
    if args.plan:
        args.gpu, args.batch, args.json, args.retrieval_share = (
            None,
            args.max_batch_size,
            False,
            0.15,
        )
        args.heads = None if args.heads == "auto" else Path(args.heads)
        args.dtype = args.dtype or "float16"
        return _plan(args)
    if args.tp_size != 1 or args.pp_size != 1:
        raise UsageError(
            f"tp_size {args.tp_size}, pp_size {args.pp_size}: the backends of this version build for "
            f"one GPU; add --plan to see what the split would need"
        )
    request = BuildRequest(
        model=args.model,
        checkpoint=args.checkpoint,
        razor=args.razor,
        heads=args.heads,
        backend=args.backend,
        output=args.output,
        policy=_policy(args),
        dtype=args.dtype,
        max_seq_len=args.max_seq_len,
        max_batch_size=args.max_batch_size,
        prefill_chunk=args.prefill_chunk,
        random_weights=args.random_weights,
        force=args.force,
    )

    def summary(spec: ModelSpec, options: EngineOptions) -> None:
        graph = options.graph
        if graph.head_map is None:
            return
        err.print(
            render(
                plan(
                    spec,
                    graph.policy,
                    graph.max_seq_len,
                    head_map=graph.head_map,
                    kv_dtype=graph.dtype,
                    weight_dtype=graph.dtype,
                    batch=options.max_batch_size,
                )
            )
        )

    start = time.monotonic()
    with Bars() as bars:
        engine = build_engine(request, say, bars, summary)
    m = engine.manifest
    size = sum(f.size for f in m.files)
    out.print(
        f"built in {time.monotonic() - start:.1f} s: {engine.directory} ({size / 1e6:,.0f} MB)\n"
        f"KV per slot: {m.kv_bytes_per_slot:,} bytes"
        + (
            f", {m.kv_bytes_per_slot / m.dense_kv_bytes_per_slot:.1%} of dense attention's "
            f"{m.dense_kv_bytes_per_slot:,}"
            if m.razor
            else " (dense)"
        ),
        markup=False,
    )
    return 0


# generate -------------------------------------------------------------------------------------
def _generate_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("engine", type=Path, help="engine directory")
    p.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated: one answer for each"
    )
    p.add_argument("--prompt-file", type=Path, metavar="FILE", help="a prompt; - = standard input")
    p.add_argument("--token-ids", metavar="IDS", help="a prompt as comma-separated token ids")
    p.add_argument("--raw", action="store_true", help="continue the text; no chat template")
    p.add_argument("--system", metavar="TEXT", help="system message of the chat")
    p.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    p.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 = greedy")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="0 = all")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P")
    p.add_argument("--seed", type=int)
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be repeated")
    p.add_argument("--ignore-eos", action="store_true", help="go on after the end token")
    p.add_argument("--slots", type=int, metavar="N", help="sequences at once (default: as needed)")
    p.add_argument("--no-verify", action="store_true", help="skip the checksums of the files")
    p.add_argument("--quiet", action="store_true", help="the answer only, no figures")


def _generate(args: argparse.Namespace) -> int:
    from trt_razor.engine import Engine
    from trt_razor.generate import Event, Generator, SamplingParams

    params = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
    )
    with Bars() as bars:
        engine = Engine.load(
            args.engine, not args.no_verify, lambda done, total: bars("checking", done, total)
        )
    m, tokenizer = engine.manifest, engine.tokenizer()
    prompts = _prompts(args, engine)
    slots = args.slots or min(len(prompts), m.max_batch_size)
    session = engine.open(slots)
    eos = {*m.spec.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())}
    generator = Generator(session, m.prefill_chunk, eos, tokenizer)

    start = time.monotonic()
    times: list[float] = []
    single = len(prompts) == 1

    def show(index: int, event: Event) -> None:
        if event.token is not None:
            times.append(time.monotonic())
        if single:
            text = event.text if tokenizer else f"{event.token} " if event.token is not None else ""
            sys.stdout.write(text)
            sys.stdout.flush()

    results = generator.run(prompts, params, show)
    if single:
        sys.stdout.write("\n")
    else:
        for i, r in enumerate(results):
            body = r.text if tokenizer else " ".join(map(str, r.tokens))
            out.print(f"[{i + 1}] {body}", markup=False)
    if not args.quiet:
        new = sum(len(r.tokens) for r in results)
        line = f"{sum(r.prompt_tokens for r in results):,} prompt tokens, {new:,} new"
        if times:
            line += f"; first token after {times[0] - start:.2f} s"
        if len(times) > 1 and single:
            line += f", then {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s"
        line += f"; ended by {', '.join(r.finished for r in results)}"
        say(line)
        saved = slots * m.dense_kv_bytes_per_slot - session.kv_bytes
        line = (
            f"KV cache allocated: {session.kv_bytes:,} bytes for {slots} × {m.max_seq_len:,} tokens"
        )
        if m.razor:
            line += f"; {saved:,} bytes saved of dense attention's {slots * m.dense_kv_bytes_per_slot:,}"
        say(line)
    return 0


def _prompts(args: argparse.Namespace, engine: object) -> list[list[int]]:
    from trt_razor.engine import Engine

    assert isinstance(engine, Engine)
    texts = list(args.prompt or [])
    if args.prompt_file is not None:
        try:
            if str(args.prompt_file) == "-":
                texts.append(sys.stdin.read())
            else:
                texts.append(args.prompt_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError(f"{args.prompt_file}: cannot read the prompt: {e}") from None
    ids: list[list[int]] = []
    if args.token_ids is not None:
        try:
            ids.append([int(x) for x in args.token_ids.split(",")])
        except ValueError:
            raise UsageError(
                f"--token-ids: expected numbers with commas between, found {args.token_ids!r:.60}"
            ) from None
    if not texts and not ids:
        raise UsageError("no prompt: give --prompt TEXT, --prompt-file FILE or --token-ids IDS")
    tokenizer = engine.tokenizer()
    if texts and tokenizer is None:
        raise UsageError(
            f"{engine.directory}: this engine has no tokenizer (its checkpoint had none); give "
            f"--token-ids"
        )
    for text in texts:
        assert tokenizer is not None
        if args.raw or tokenizer.chat_template is None:
            ids.append(tokenizer.encode(text, add_special=True, parse_special=False))
        else:
            messages = [{"role": "user", "content": text}]
            if args.system is not None:
                messages.insert(0, {"role": "system", "content": args.system})
            ids.append(tokenizer.encode(tokenizer.chat(messages)))
    return ids


# inspect --------------------------------------------------------------------------------------
def _inspect(args: argparse.Namespace) -> int:
    from rich.table import Table

    from trt_razor.engine import Engine

    with Bars() as bars:
        engine = Engine.load(args.engine, True, lambda done, total: bars("checking", done, total))
    m = engine.manifest
    if args.json:
        print(json.dumps(m.to_json(), indent=1))
        return 0
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    s = m.spec
    rows = [
        ("engine", str(engine.directory)),
        ("built", f"{m.created} by trt_razor {m.trt_razor}"),
        ("backend", f"{m.backend} ({', '.join(f'{k} {v}' for k, v in m.facts.items())})"),
        (
            "model",
            f"{s.name}: {s.num_layers} layers, {s.num_heads} heads, {s.num_kv_heads} KV heads",
        ),
        ("fingerprint", s.fingerprint()[:16]),
        ("checkpoint", m.checkpoint[:16]),
        ("limits", f"{m.max_batch_size} slots × {m.max_seq_len:,} tokens, {m.dtype}"),
        (
            "prefill",
            f"chunks of {m.prefill_chunk:,} tokens" if m.prefill_chunk else "whole prompts",
        ),
        ("KV per slot", f"{m.kv_bytes_per_slot:,} bytes (dense: {m.dense_kv_bytes_per_slot:,})"),
    ]
    if m.policy is not None and m.heads is not None:
        p = m.policy
        c = f"n / {p.compression}, at least {p.min_window}" if p.compression else str(p.min_window)
        rows += [
            (
                "heads",
                f"{m.heads['retrieval_heads']} retrieve ({m.heads['share']:.1%}), {m.heads['method']}",
            ),
            (
                "local heads",
                f"{p.sink_tokens} sinks, window {c}, {p.comp_tokens} compensation tokens",
            ),
        ]
    else:
        rows.append(("attention", "dense"))
    for name, value in rows:
        table.add_row(name, value)
    for f in m.files:
        table.add_row("file", f"{f.path}  {f.size:,} bytes  sha256 {f.sha256[:12]}… ok")
    out.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
