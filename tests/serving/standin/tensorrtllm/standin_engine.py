"""The engine that a stand-in is told to load: are its files and the server's settings one?

Reads config.json as TensorRT-LLM's runtime does, with the tests' own reader of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from standin_parameters import Refused

TESTS = Path(__file__).resolve().parents[3]
sys.path.append(str(TESTS / "trtllm"))
import runtime_config  # noqa: E402 (found through the line above)


@dataclass(frozen=True)
class StandInEngine:
    """What of an engine an answer depends on. ``windows``: of each attention layer, in tokens."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    vocab_size: int
    world_size: int
    tokens_per_block: int
    windows: tuple[int, ...]
    sinks: int


def read_engine(
    settings: Mapping[str, Any], rank: int, world_size: int, preloaded: str
) -> StandInEngine:
    """Check the engine folder of ``settings``, and its windows and sinks against the server's.

    Args:
        preloaded: LD_PRELOAD of the server: libraries by blanks or colons.

    Raises:
        Refused: the stock backend would fail, or run the engine with other caches than it has.
    """
    folder = Path(settings["gpt_model_path"])
    config = folder / "config.json"
    if not config.is_file():
        raise Refused(f"{config}: no such file")
    text = config.read_text()
    try:
        model = runtime_config.parse(text)
        model.check_in_flight()
        windows = tuple(model.windows(settings.get("max_attention_window_size")))
        own = tuple(model.windows())
    except (runtime_config.ParseError, runtime_config.LoadError) as e:
        raise Refused(f"{config}: {e}") from None
    if windows != own:
        raise Refused(f"max_attention_window_size: the engine has {own}, the server {windows}")
    world = model.tp_size * model.pp_size
    if world != world_size:
        raise Refused(f"the engine needs {world} ranks, MPI started {world_size}")
    if not (folder / f"rank{rank}.engine").is_file():
        raise Refused(f"{folder}: no rank{rank}.engine")
    sinks = settings.get("sink_token_length", model.default_sinks or 0)
    if sinks != (model.default_sinks or 0):
        raise Refused(
            f"sink_token_length: the engine has {model.default_sinks}, the server {sinks}"
        )
    razor = '"razor"' in text
    # What Razor keeps beside the pools is not in a block that somebody else may reuse.
    if settings["enable_kv_cache_reuse"] and (razor or min(own) < model.max_seq_len):
        raise Refused("enable_kv_cache_reuse: not with this engine (unset means true)")
    if settings["enable_chunked_context"] and not model.chunked_context():
        raise Refused("enable_chunked_context: the engine reads prompts in one go")
    if razor and not _plugin(preloaded):
        raise Refused(
            f"RazorGptAttention is not registered: LD_PRELOAD={preloaded!r} has no library of it"
        )
    return StandInEngine(
        model.max_batch_size,
        model.max_input_len,
        model.max_seq_len,
        model.vocab_size,
        world,
        model.tokens_per_block,
        own,
        sinks,
    )


def _plugin(preloaded: str) -> bool:
    files = [Path(part) for part in preloaded.replace(":", " ").split()]
    return any("trt_razor_preload" in f.name and f.is_file() for f in files)
