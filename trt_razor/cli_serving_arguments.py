"""The options of ``trt-razor triton`` and ``trt-razor serve``."""

from __future__ import annotations

import argparse
from pathlib import Path

PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
TRITON_TEXT = "Write a Triton model repository for an engine, ready to start; or check one, offline, with --check."
SERVE_TEXT = (
    "Serve an engine, or a repository that trt-razor triton wrote, until Ctrl-C. Needs a Triton server: "
    "in a virtual environment of its own pip install 'trt-razor[serve]', or an NGC image."
)


def triton_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("engine", type=Path, nargs="?", help="engine directory")
    p.add_argument("--output", type=Path, metavar="DIR", help="the repository")
    p.add_argument("--check", type=Path, metavar="DIR", help="check this repository, write none")
    p.add_argument("--copy", action="store_true", help="copy the engine into the repository")
    p.add_argument(
        "--mounted-at",
        metavar="PATH",
        help="where the server will see the engine (with --copy: the repository), for containers",
    )
    p.add_argument("--force", action="store_true", help="replace a repository of ours")
    _repository_arguments(p)
    g = p.add_argument_group("TensorRT-LLM engines")
    g.add_argument(
        "--no-decoupled",
        dest="decoupled",
        action="store_false",
        help="one response a request, no streaming",
    )
    g.add_argument("--kv-cache-free-gpu-mem-fraction", type=float, metavar="X")
    g.add_argument("--max-tokens-in-paged-kv-cache", type=int, metavar="N")
    g.add_argument("--batch-scheduler-policy", metavar="NAME")
    g.add_argument("--gpu-device-ids", metavar="IDS", help="such as 0,1")


def _repository_arguments(p: argparse.ArgumentParser) -> None:
    """What both commands can say about a repository. None = as the engine has it."""
    g = p.add_argument_group("what is served")
    g.add_argument("--slots", type=int, metavar="N", help="sequences at a time (own engines)")
    g.add_argument(
        "--queue", type=int, metavar="N", help="requests that may wait for a slot (default 64)"
    )
    g.add_argument("--max-input-tokens", type=int, metavar="N", help="of a prompt (own engines)")
    g.add_argument("--max-output-tokens", type=int, metavar="N", help="of an answer (own engines)")
    g.add_argument("--max-batch-size", type=int, metavar="N", help="rows of one request")
    g.add_argument(
        "--prompt-format",
        choices=("raw", "chat", "messages"),
        help="of text_input unless a request says: as it is, one user message, or a JSON list of messages",
    )
    g.add_argument(
        "--echo",
        dest="exclude_input_in_output",
        action="store_false",
        help="answers begin with the prompt unless a request says otherwise",
    )
    g.add_argument("--no-special-tokens", dest="add_special_tokens", action="store_false",
                   help="prompts do not get the tokenizer's begin token")  # fmt: skip
    g.add_argument("--keep-special-tokens", dest="skip_special_tokens", action="store_false",
                   help="special tokens stay in the text")  # fmt: skip
    g.add_argument(
        "--accumulate-tokens", action="store_true", help="tensorrt_llm_bls streams all text so far"
    )
    for name, count, what in (
        ("preprocessing", 1, "preprocessing"),
        ("postprocessing", 1, "postprocessing"),
        ("bls", 4, "tensorrt_llm_bls, one request each"),
    ):
        g.add_argument(f"--{name}-instances", type=int, default=count, metavar="N",
                       help=f"processes of {what} (default {count})")  # fmt: skip
    g.add_argument("--no-verify", action="store_true", help="skip the checksums of the engine")


def serve_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("engine", type=Path, help="engine directory, or a repository of ours")
    for name, port in PORTS.items():
        p.add_argument(
            f"--{name}-port",
            type=int,
            default=port,
            metavar="N",
            help=f"default {port}; 0 = a free one",
        )
    p.add_argument(
        "--address", default="127.0.0.1", metavar="IP", help="to listen on (default 127.0.0.1)"
    )
    p.add_argument(
        "--repository",
        type=Path,
        metavar="DIR",
        help="keep the repository here (default: temporary)",
    )
    p.add_argument("--force", action="store_true", help="with --repository: replace one of ours")
    p.add_argument(
        "--log", type=Path, metavar="FILE", help="what the server says (default: nowhere)"
    )
    p.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="until it is ready (default 600)"
    )
    _repository_arguments(p)
