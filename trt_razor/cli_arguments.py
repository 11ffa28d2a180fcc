"""The arguments of every command: names, help and types; what they do is in ``cli``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from trt_razor.errors import UsageError
from trt_razor.policy import PRESETS, RazorPolicy
from trt_razor.trtllm.engine_config import KV_DTYPES, TrtLlmOptions
from trt_razor.trtllm.release import LocalCache

BUILD_EPILOG = """\
examples:
  %(prog)s --model smollm2-135m --razor
  %(prog)s --model smollm2-135m --razor --min-window 256 --max-batch-size 4
  %(prog)s --checkpoint ./Qwen2.5-7B-Instruct --razor --heads qwen.heads.json
  %(prog)s --model qwen-72b --razor --plan --tp-size 8
  %(prog)s --model qwen-72b --razor --backend tensorrt-llm --checkpoint DIR --tp-size 8
"""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and no abbreviations that a new option would break."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"error: {message}; see {self.prog} --help\n")


def model_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", metavar="NAME", help="a name of the zoo, such as qwen-72b")
    p.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="Hugging Face folder, or a .gguf file"
    )


def policy_arguments(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("what a local head keeps")
    g.add_argument("--preset", choices=sorted(PRESETS), help="default: paper")
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
        help="compensation tokens (paper: 1; tight: 16; 0 = drop without)",
    )
    g.add_argument(
        "--heavy-hitters",
        type=int,
        metavar="H",
        help="dropped tokens that keep a row: those with most attention (paper: 0; tight: 64)",
    )


_FIXED = object()


def _compression(text: str) -> object:
    if text.lower() in ("none", "inf"):
        return _FIXED
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer or 'none', found {text!r}") from None


def policy(args: argparse.Namespace) -> RazorPolicy:
    """The policy that a command's options say. Raises UsageError for a value out of range."""
    changes: dict[str, object] = {}
    for field, value in (
        ("sink_tokens", args.sinks),
        ("min_window", args.min_window),
        ("compression", args.compression),
        ("comp_tokens", args.comp_tokens),
        ("heavy_hitters", args.heavy_hitters),
    ):
        if value is not None:
            changes[field] = None if value is _FIXED else value
    return PRESETS[args.preset or "paper"].with_(**changes)


def policy_options(args: argparse.Namespace) -> list[str]:
    """Those policy options that were given."""
    names = ("preset", "sinks", "min_window", "compression", "comp_tokens", "heavy_hitters")
    return [f"--{n.replace('_', '-')}" for n in names if getattr(args, n) is not None]


def heads_arguments(p: argparse.ArgumentParser) -> None:
    model_arguments(p)
    p.add_argument("--output", type=Path, metavar="FILE", help="default: engines/MODEL.heads.json")
    p.add_argument("--plot", type=Path, metavar="PNG", help="default: beside the output")
    p.add_argument("--no-plot", action="store_true", help="no heat map")
    p.add_argument(
        "--method",
        choices=(
            *("paper", "combined", "echo", "induction", "effect", "gradient", "greedy"),
            "alibi-scope",
        ),
        help="default: paper (RoPE) or alibi-scope (ALiBi)",
    )
    for name, share, text in (
        ("induction", 0.14, "top share of all KV heads by induction"),
        ("echo", 0.01, "top share of all KV heads by echo"),
        ("combined", 0.15, "method combined: top share by the larger score"),
    ):
        p.add_argument(
            f"--{name}-share",
            type=float,
            default=share,
            metavar="X",
            help=f"{text} (default {share})",
        )
    p.add_argument(
        "--min-echo",
        type=int,
        default=4,
        metavar="N",
        help="at least so many echo heads, for small models (default 4)",
    )
    p.add_argument(
        "--probe-length", type=int, default=2500, metavar="K", help="random tokens (default 2500)"
    )
    p.add_argument(
        "--repeats",
        type=int,
        default=4,
        metavar="N",
        help="how often the probe says them (default 4)",
    )
    p.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="average N probes and report how stable the choice is (default 1)",
    )
    p.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the first probe (default 0)"
    )
    p.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="ALiBi: heads that see farther than N tokens retrieve (default 4000)",
    )
    p.add_argument(
        "--eps",
        type=float,
        default=1e-5,
        metavar="X",
        help="ALiBi: attention below X counts as none (default 1e-5)",
    )
    p.add_argument(
        "--scope-share",
        type=float,
        metavar="X",
        help="ALiBi: only this share of all KV heads, those that see farthest",
    )
    p.add_argument("--device", default="cpu", help="torch device (default cpu)")
    p.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="to compute in (default float32)",
    )


def plan_arguments(p: argparse.ArgumentParser) -> None:
    model_arguments(p)
    p.add_argument("--max-seq-len", type=int, metavar="N", help="default: the model's positions")
    p.add_argument("--gpu", metavar="NAME", help="such as h100-80gb; adds batch sizes")
    p.add_argument(
        "--tp-size", type=int, default=1, metavar="N", help="tensor-parallel GPUs (default 1)"
    )
    p.add_argument(
        "--pp-size", type=int, default=1, metavar="N", help="pipeline stages (default 1)"
    )
    p.add_argument("--batch", type=int, metavar="N", help="sequences at the same time")
    p.add_argument("--heads", type=Path, metavar="FILE", help="a head map, for exact figures")
    p.add_argument(
        "--retrieval-share",
        type=float,
        default=0.15,
        metavar="X",
        help="share of KV heads that retrieve, without --heads (default 0.15)",
    )
    dtypes = ("float32", "float16", "bfloat16")
    p.add_argument(
        "--dtype", choices=dtypes, default="float16", help="of weights and KV (default float16)"
    )
    p.add_argument("--json", action="store_true", help="print the plan as JSON")
    policy_arguments(p)


def build_arguments(p: argparse.ArgumentParser) -> None:
    model_arguments(p)
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
        help="auto, onnxruntime, tensorrt-rtx, tensorrt, tensorrt-llm (default auto: the best of the first "
        "three that this machine can run)",
    )
    p.add_argument("--output", type=Path, metavar="DIR", help="default: engines/MODEL-…")
    p.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="default: float32 for onnxruntime, else float16",
    )
    p.add_argument("--max-seq-len", type=int, metavar="N", help="capacity of a slot (default 8192)")
    p.add_argument(
        "--max-batch-size", type=int, metavar="N", help="slots (default 1; tensorrt-llm: 16)"
    )
    p.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="prompt tokens read at once; 0 = whole prompts, the paper's way (default 2048; "
        "tensorrt-llm: 0)",
    )
    p.add_argument("--random-weights", action="store_true", help="any zoo model, for latency work")
    p.add_argument(
        "--plan", action="store_true", help="print the plan (see trt-razor plan) and stop"
    )
    p.add_argument("--force", action="store_true", help="replace an existing engine")
    trtllm_arguments(p)
    policy_arguments(p)


def trtllm_arguments(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("TensorRT-LLM (--backend tensorrt-llm)")
    g.add_argument(
        "--tp-size", type=int, default=1, metavar="N", help="tensor-parallel GPUs (default 1)"
    )
    g.add_argument(
        "--pp-size", type=int, default=1, metavar="N", help="pipeline stages (default 1)"
    )
    g.add_argument(
        "--kv-dtype", choices=KV_DTYPES, default="auto", help="of the KV cache (default: --dtype)"
    )
    g.add_argument(
        "--tokens-per-block", type=int, default=32, metavar="N", help="of the pools (default 32)"
    )
    g.add_argument(
        "--max-num-tokens",
        type=int,
        metavar="N",
        help="tokens of a step, all requests together (default: the longest prompt or chunk, and one for "
        "each other sequence)",
    )
    g.add_argument(
        "--local-cache",
        choices=[c.name.lower() for c in LocalCache],
        help="where local heads live (default: cyclic for TensorRT-LLM 1.0, slots from 1.1 on)",
    )
    g.add_argument("--gather-logits", action="store_true", help="keep the logits of prompts")
    g.add_argument(
        "--convert-only",
        action="store_true",
        help="write the checkpoint with its heads in order, for trtllm-build; no engine",
    )
    g.add_argument(
        "--trtllm-version", metavar="X", help="with --convert-only, where none is installed"
    )


def trtllm_options(args: argparse.Namespace) -> TrtLlmOptions:
    """The group's options."""
    return TrtLlmOptions(
        tp_size=args.tp_size,
        pp_size=args.pp_size,
        kv_dtype=args.kv_dtype,
        tokens_per_block=args.tokens_per_block,
        max_num_tokens=args.max_num_tokens,
        local_cache=LocalCache[args.local_cache.upper()] if args.local_cache else None,
        gather_logits=args.gather_logits,
    )


def generate_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("engine", type=Path, help="engine directory")
    p.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated: one answer for each"
    )
    p.add_argument("--prompt-file", type=Path, metavar="FILE", help="a prompt; - = standard input")
    p.add_argument("--token-ids", metavar="IDS", help="a prompt as comma-separated token ids")
    p.add_argument("--raw", action="store_true", help="continue the text; no chat template")
    p.add_argument("--system", metavar="TEXT", help="system message of the chat")
    p.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="for each prompt (default 128)"
    )
    p.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 = greedy (default)"
    )
    p.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="sample from the K likeliest; 0 = all (default)",
    )
    p.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest that make up P (default 1)",
    )
    p.add_argument("--seed", type=int, metavar="N", help="of sampling (default: random)")
    p.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before this text; may be repeated",
    )
    p.add_argument(
        "--min-tokens", type=int, default=0, metavar="N", help="no end before so many (default 0)"
    )
    p.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: tokens of prompt and answer become less likely (default 1 = none)",
    )
    for name, text in (
        ("presence", "off the logits of tokens that the answer has"),
        ("frequency", "off them as often as it has them"),
    ):
        p.add_argument(
            f"--{name}-penalty", type=float, default=0.0, metavar="X", help=f"{text} (default 0)"
        )
    p.add_argument("--ignore-eos", action="store_true", help="go on after the end token")
    p.add_argument("--slots", type=int, metavar="N", help="sequences at once (default: as needed)")
    p.add_argument("--no-verify", action="store_true", help="skip the checksums of the files")
    p.add_argument("--quiet", action="store_true", help="the answer only, no figures")


def inspect_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("engine", type=Path, help="engine directory")
    p.add_argument("--json", action="store_true", help="print the manifest as JSON")
