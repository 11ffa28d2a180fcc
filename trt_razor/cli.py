"""``trt-razor``: find heads, plan, build, generate, inspect, serve. Thin: every command calls the package."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trt_razor import __version__, cli_eval, cli_heads, cli_serving
from trt_razor import cli_arguments as arguments
from trt_razor.cli_arguments import BUILD_EPILOG, Parser, policy, policy_options
from trt_razor.console import Bars, err, fail, guarded, out, say
from trt_razor.errors import UsageError

if TYPE_CHECKING:
    from trt_razor.backends.base import EngineOptions
    from trt_razor.build import BuildRequest
    from trt_razor.engine import Engine
    from trt_razor.generate import Completion, Event
    from trt_razor.manifest import Manifest
    from trt_razor.models.spec import ModelSpec


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``trt-razor``; returns the exit code (0, 1 failed, 2 usage, 130 interrupted)."""
    args = _parser().parse_args(argv)
    return guarded(lambda: int(args.run(args)))


def build_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``build_scripts/build_engine.py``: ``trt-razor build`` under its own name."""
    parser = Parser(
        prog="build_engine.py",
        description="Build an engine.",
        epilog=BUILD_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.build_arguments(parser)
    args = parser.parse_args(argv)
    return guarded(lambda: _build(args))


def heads_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``build_scripts/find_heads.py``: ``trt-razor heads`` under its own name."""
    parser = Parser(prog="find_heads.py", description="Find the retrieval heads of a checkpoint.")
    cli_heads.add_command(parser)
    args = parser.parse_args(argv)
    return guarded(lambda: int(args.run(args)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trt-razor",
        description="Long-context inference with a third of the KV cache (RazorAttention).",
    )
    parser.add_argument("--version", action="version", version=f"trt-razor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "find the retrieval heads of a checkpoint"
    p = commands.add_parser("heads", help=text, description=f"{text.capitalize()}.")
    cli_heads.add_command(p)
    text = "memory and batch sizes, from the config alone"
    p = commands.add_parser("plan", help=text, description=f"{text.capitalize()}.")
    arguments.plan_arguments(p)
    p.set_defaults(run=_plan)
    p = commands.add_parser(
        "build",
        help="build an engine",
        description="Build an engine.",
        epilog=BUILD_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.build_arguments(p)
    p.set_defaults(run=_build)
    text = "generate text with an engine"
    p = commands.add_parser("generate", help=text, description=f"{text.capitalize()}.")
    arguments.generate_arguments(p)
    p.set_defaults(run=_generate)
    text = "print an engine's manifest and verify it"
    p = commands.add_parser("inspect", help=text, description=f"{text.capitalize()}.")
    arguments.inspect_arguments(p)
    p.set_defaults(run=_inspect)
    cli_serving.add_commands(commands)
    cli_eval.add_command(commands)
    return parser


# plan -----------------------------------------------------------------------------------------
def _plan(args: argparse.Namespace) -> int:
    from trt_razor.build import BuildRequest

    return _print_plan(
        args,
        BuildRequest(model=args.model, checkpoint=args.checkpoint),
        heads=args.heads,
        dtype=args.dtype,
        batch=args.batch,
        gpu=args.gpu,
        retrieval_share=args.retrieval_share,
        as_json=args.json,
    )


def _print_plan(
    args: argparse.Namespace,
    request: BuildRequest,
    heads: Path | None,
    dtype: str,
    batch: int | None,
    gpu: str | None = None,
    retrieval_share: float = 0.15,
    as_json: bool = False,
) -> int:
    """``args`` gives what plan and build have in common: policy, max_seq_len and the split."""
    from trt_razor.build import model_spec
    from trt_razor.headmap import HeadMap
    from trt_razor.planner import plan, plan_to_json, render

    spec = model_spec(request)
    head_map = None
    if heads is not None:
        head_map = HeadMap.load(heads)
        head_map.check_model(spec.fingerprint(), spec.name, str(heads))
    result = plan(
        spec,
        policy(args),
        spec.max_positions if args.max_seq_len is None else args.max_seq_len,
        gpu=gpu,
        tp_size=args.tp_size,
        pp_size=args.pp_size,
        head_map=head_map,
        retrieval_share=retrieval_share,
        kv_dtype=dtype,
        weight_dtype=dtype,
        batch=batch,
    )
    if as_json:
        out.file.write(json.dumps(plan_to_json(result), indent=1) + "\n")
    else:
        out.print(render(result), soft_wrap=False)
    return 0


# build ----------------------------------------------------------------------------------------
def _build(args: argparse.Namespace) -> int:
    from trt_razor.build import BuildRequest, build_engine
    from trt_razor.convert import convert_only
    from trt_razor.trtllm.options import TrtLlmOptions

    extra = arguments.trtllm_options(args)
    if args.backend != "tensorrt-llm" and not args.plan and extra.world_size != 1:
        raise UsageError(
            f"tp_size {args.tp_size}, pp_size {args.pp_size}: --backend {args.backend} builds for one "
            "GPU; use --backend tensorrt-llm, or add --plan to see what the split would need"
        )
    request = BuildRequest(
        model=args.model,
        checkpoint=args.checkpoint,
        razor=args.razor,
        heads=args.heads,
        backend=args.backend,
        output=args.output,
        policy=policy(args),
        dtype=args.dtype,
        max_seq_len=args.max_seq_len,
        max_batch_size=args.max_batch_size,
        prefill_chunk=args.prefill_chunk,
        random_weights=args.random_weights,
        force=args.force,
        trtllm=None if args.plan else extra,
        trtllm_version=args.trtllm_version,
        convert_only=args.convert_only,
    )
    request.validate()
    if args.plan:
        if replace(extra, tp_size=1, pp_size=1) != TrtLlmOptions() or args.convert_only:
            raise UsageError(
                "--plan: of the TensorRT-LLM options it takes --tp-size and --pp-size only; leave the "
                "others out"
            )
        heads = None if args.heads == "auto" else Path(args.heads)
        dtype, batch = args.dtype or "float16", args.max_batch_size or 1
        return _print_plan(args, request, heads, dtype, batch)
    if policy_options(args) and not args.razor:
        raise UsageError(f"{policy_options(args)[0]}: a dense engine keeps everything; add --razor")

    start = time.monotonic()
    if request.convert_only:
        with Bars() as bars:
            folder = convert_only(request, say, bars)
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        seconds = time.monotonic() - start
        out.print(f"converted in {seconds:.1f} s: {folder} ({size / 1e6:,.0f} MB)", markup=False)
        return 0
    with Bars() as bars:
        engine = build_engine(request, say, bars, partial(_print_summary, extra.tp_size))
    m = engine.manifest
    size = sum(f.size for f in m.files)
    out.print(
        f"built in {time.monotonic() - start:.1f} s: {engine.directory} ({size / 1e6:,.0f} MB)\n"
        f"{_kv_line(m)}",
        markup=False,
    )
    return 0


def _kv_line(m: Manifest) -> str:
    """What the cache of a finished engine takes."""
    what, kv, dense = "slot", m.kv_bytes_per_slot, m.dense_kv_bytes_per_slot
    if m.razor and "kv_bytes_per_sequence_per_rank" in m.facts:  # in whole blocks of TensorRT-LLM
        what = f"sequence of {m.max_seq_len:,} tokens and GPU"
        kv = int(m.facts["kv_bytes_per_sequence_per_rank"])
        dense = int(m.facts["dense_kv_bytes_per_sequence_per_rank"])
    line = f"KV per {what}: {kv:,} bytes"
    return (
        f"{line}, {kv / dense:.1%} of dense attention's {dense:,}" if m.razor else f"{line} (dense)"
    )


def _print_summary(tp_size: int, spec: ModelSpec, options: EngineOptions) -> None:
    """The plan of a Razor build, before its long part."""
    from trt_razor.planner import plan, render

    graph = options.graph
    if graph.head_map is None:
        return
    result = plan(
        spec,
        graph.policy,
        graph.max_seq_len,
        tp_size=tp_size,
        head_map=graph.head_map,
        kv_dtype=graph.dtype,
        weight_dtype=graph.dtype,
        batch=options.max_batch_size,
    )
    err.print(render(result), soft_wrap=False)


# generate -------------------------------------------------------------------------------------
def _generate(args: argparse.Namespace) -> int:
    from trt_razor.engine import Engine
    from trt_razor.generate import Generator, SamplingParams

    params = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
        min_tokens=args.min_tokens,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        ignore_eos=args.ignore_eos,
    )
    texts, ids = _given_prompts(args)
    with Bars() as bars:
        engine = Engine.load(
            args.engine, not args.no_verify, lambda done, total: bars("checking", done, total)
        )
    m, tokenizer = engine.manifest, engine.tokenizer()
    prompts = [*_encode(texts, args, engine), *ids]
    slots = min(len(prompts), m.max_batch_size) if args.slots is None else args.slots
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
            out.file.write(text)
            out.file.flush()

    results = generator.run(prompts, params, show)
    if single:
        out.file.write("\n")
    else:
        for i, r in enumerate(results):
            body = r.text if tokenizer else " ".join(map(str, r.tokens))
            out.file.write(f"[{i + 1}] {body}\n")
    if not args.quiet:
        _say_figures(results, [t - start for t in times], m, slots, session.kv_bytes)
    for i, r in enumerate(results):
        if r.error:
            fail(r.error if single else f"prompt {i + 1}: {r.error}")
    return int(any(r.error for r in results))


def _say_figures(
    results: Sequence[Completion], times: Sequence[float], m: Manifest, slots: int, kv_bytes: int
) -> None:
    """``times``: seconds from the start to every new token."""
    new = sum(len(r.tokens) for r in results)
    line = f"{sum(r.prompt_tokens for r in results):,} prompt tokens, {new:,} new"
    if times:
        line += f"; first token after {times[0]:.2f} s"
    if len(times) > 1 and len(results) == 1:
        line += f", then {(len(times) - 1) / max(times[-1] - times[0], 1e-9):.1f} tokens/s"
    say(f"{line}; ended by {', '.join(r.finished for r in results)}")
    line = f"KV cache allocated: {kv_bytes:,} bytes for {slots} × {m.max_seq_len:,} tokens"
    if m.razor:
        dense = slots * m.dense_kv_bytes_per_slot
        line += f"; {dense - kv_bytes:,} bytes saved of dense attention's {dense:,}"
    say(line)


def _given_prompts(args: argparse.Namespace) -> tuple[list[str], list[list[int]]]:
    """Prompts as texts and as token ids."""
    texts = list(args.prompt or [])
    if args.prompt_file is not None:
        try:
            if str(args.prompt_file) == "-":
                texts.append(sys.stdin.read() if sys.stdin is not None else "")
            else:
                texts.append(args.prompt_file.read_text(encoding="utf-8"))
        except OSError as e:
            raise UsageError(
                f"{args.prompt_file}: cannot read the prompt: {e.strerror or e}"
            ) from None
        except UnicodeDecodeError as e:
            raise UsageError(
                f"{args.prompt_file}: the prompt is not UTF-8 text (byte {e.start})"
            ) from None
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
    return texts, ids


def _encode(texts: Sequence[str], args: argparse.Namespace, engine: Engine) -> list[list[int]]:
    """Token ids of texts: by the chat template unless ``--raw``."""
    tokenizer = engine.tokenizer()
    if not texts:
        return []
    if tokenizer is None:
        raise UsageError(
            f"{engine.directory}: this engine has no tokenizer (its checkpoint had none); give "
            f"--token-ids"
        )
    chat = tokenizer.chat_template is not None and not args.raw
    if args.system is not None and not chat:
        why = "--raw leaves it out" if args.raw else "this engine has none"
        raise UsageError(f"--system: needs the chat template, and {why}; put it into the prompt")
    ids = []
    for text in texts:
        if chat:
            messages = [{"role": "user", "content": text}]
            if args.system is not None:
                messages.insert(0, {"role": "system", "content": args.system})
            ids.append(tokenizer.encode_chat(messages))
        else:
            ids.append(tokenizer.encode(text, add_special=True, parse_special=False))
    return ids


# inspect --------------------------------------------------------------------------------------
def _inspect(args: argparse.Namespace) -> int:
    from trt_razor.engine import Engine
    from trt_razor.engine_table import render

    with Bars() as bars:
        engine = Engine.load(args.engine, True, lambda done, total: bars("checking", done, total))
    if args.json:
        out.file.write(json.dumps(engine.manifest.to_json(), indent=1) + "\n")
        return 0
    out.print(render(engine))
    return 0


if __name__ == "__main__":
    sys.exit(main())
