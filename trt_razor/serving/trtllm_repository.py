"""What Triton's stock ``tensorrtllm`` backend must be told about an engine of ours.

Read from the engine's config.json, which its runtime reads too, and checked against the facts of its
manifest. An engine refuses to run with other windows than its own, so nothing here is left to the
server's defaults. docs/tensorrt-llm.md says what the settings do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trt_razor.engine import Engine
from trt_razor.errors import RazorError, UsageError
from trt_razor.models.stored import read_json
from trt_razor.serving.parameters import Value
from trt_razor.serving.start_script import RankFacts
from trt_razor.trtllm.backend import PRELOAD
from trt_razor.trtllm.cache_settings import CacheSettings, read_settings
from trt_razor.trtllm.options import CONFIG

PLUGINS = "libtrt_razor_plugins_trt{major}.so"
FRACTION = 0.9
"""``kv_cache_free_gpu_mem_fraction`` unless told otherwise."""
_LOGITS = {"float32": "FP32", "float16": "FP16"}


@dataclass(frozen=True)
class TrtLlmFacts:
    """An engine as its server must see it.

    Attributes:
        settings: of its caches. ranks: what its server processes need.
        logits: data type of its logits in Triton's words.
    """

    settings: CacheSettings
    ranks: RankFacts
    logits: str

    @property
    def windows(self) -> str:
        """``max_attention_window_size``: the list that the server repeats; "" = leave unset."""
        return ",".join(map(str, self.settings.window_list))

    @property
    def sinks(self) -> str:
        """``sink_token_length``; "" with state slots and in dense engines: no release takes a 0."""
        return str(self.settings.sink_tokens) if self.settings.sink_tokens else ""

    @property
    def state_slots(self) -> bool:
        """Whether local heads live in state slots, which are reserved for every sequence."""
        return self.settings.slot_bytes > 0


def trtllm_facts(engine: Engine) -> TrtLlmFacts:
    """Read them from an engine directory of the backend ``tensorrt-llm``.

    Raises:
        RazorError: config.json is damaged, or says something else than the manifest.
    """
    folder, facts = engine.directory, engine.manifest.facts
    try:
        settings = read_settings(folder)
    except UsageError as e:
        raise RazorError(f"{e}; the engine is damaged, rebuild it") from None
    found = TrtLlmFacts(settings, _ranks(settings, facts), _logits(folder))
    for rank in range(settings.world_size):
        path = folder / f"rank{rank}.engine"
        if not path.is_file():
            raise RazorError(f"{path}: missing; the engine is damaged, rebuild it")
    m = engine.manifest
    told = {
        "razor": (str(m.razor), str(settings.razor)),
        "max_seq_len": (str(m.max_seq_len), str(settings.max_seq_len)),
        "max_batch_size": (str(m.max_batch_size), str(settings.max_batch_size)),
    }
    for name, ours in (
        ("max_attention_window_size", found.windows),
        ("sink_token_length", found.sinks or "0"),
        ("tp_size", str(settings.tp_size)),
        ("pp_size", str(settings.pp_size)),
    ):
        if name in facts:
            told[f"facts.{name}"] = (facts[name], ours)
    for name, (manifest, config) in told.items():
        if manifest != config:
            raise RazorError(
                f"{folder / CONFIG}: {name}: expected {manifest} as manifest.json has it, found {config}; "
                "the engine is damaged, rebuild it"
            )
    return found


def _ranks(settings: CacheSettings, facts: Mapping[str, str]) -> RankFacts:
    if not settings.razor:
        return RankFacts(settings.world_size)
    major = facts.get("tensorrt", "10").split(".")[0]
    return RankFacts(
        settings.world_size,
        facts.get("preload", PRELOAD.format(major=major)),
        facts.get("plugin", PLUGINS.format(major=major)),
        facts.get("plugin_sha256", ""),
    )


def _logits(folder: Path) -> str:
    """Data type of the logits; TensorRT-LLM computes float32 unless it was told otherwise."""
    config = read_json(folder / CONFIG, "the engine's config.json")
    pretrained = config.get("pretrained_config")
    found = pretrained.get("logits_dtype") if isinstance(pretrained, dict) else None
    if found is None:
        return "FP32"
    if found not in _LOGITS:
        raise RazorError(
            f"{folder / CONFIG}: pretrained_config.logits_dtype: expected {' or '.join(_LOGITS)}, found "
            f"{found!r:.40}"
        )
    return _LOGITS[found]


def check_max_tokens(value: int, facts: TrtLlmFacts) -> None:
    """Raises UsageError: pools that TensorRT-LLM would shorten the windows for."""
    longest = facts.settings.max_seq_len
    if value < longest:
        raise UsageError(
            f"max_tokens_in_paged_kv_cache: expected at least {longest}, one sequence of this engine, found "
            f"{value}"
        )


def check_gpu_ids(value: str, world_size: int) -> None:
    """Raises UsageError: not one GPU for each rank (of each instance, which ``;`` parts)."""
    for instance in value.split(";"):
        ids = instance.split(",")
        if len(ids) != world_size or len(set(ids)) != len(ids):
            raise UsageError(
                f"gpu_device_ids: expected {world_size} different GPUs, one for each rank, found {instance!r:.80}"
            )


def trtllm_parameters(
    facts: TrtLlmFacts,
    kv_cache_free_gpu_mem_fraction: float = FRACTION,
    max_tokens_in_paged_kv_cache: int | None = None,
    batch_scheduler_policy: str = "guaranteed_no_evict",
    gpu_device_ids: str = "",
) -> dict[str, Value]:
    """Parameters of the model ``tensorrt_llm`` that depend on the engine or were chosen.

    Raises:
        UsageError: a value that is wrong for this engine; ``parameters.py`` checks their form.
    """
    if gpu_device_ids:
        check_gpu_ids(gpu_device_ids, facts.settings.world_size)
    if max_tokens_in_paged_kv_cache is not None:
        check_max_tokens(max_tokens_in_paged_kv_cache, facts)
    return {
        "max_beam_width": 1,
        "max_attention_window_size": facts.windows,
        "sink_token_length": facts.sinks,
        # A cached prefix would bring its full rows and not its compressed ones; Triton's default is true.
        "enable_kv_cache_reuse": False,
        "enable_chunked_context": facts.settings.chunked,
        "kv_cache_free_gpu_mem_fraction": kv_cache_free_gpu_mem_fraction,
        "max_tokens_in_paged_kv_cache": max_tokens_in_paged_kv_cache,
        "batch_scheduler_policy": batch_scheduler_policy,
        "gpu_device_ids": gpu_device_ids,
        # Not tried with our plugin.
        "cuda_graph_mode": False,
    }
