"""``BuildConfig``, ``build``, ``Engine``: from a model to recorded bytes and config.json.

Read: fields and defaults of BuildConfig (1.0 has ``auto_parallel_config`` too), ``build``'s order of
steps and its keyword call of prepare_inputs, ``update_kv_cache_type``, what is turned off for FP8
caches, that the engine's config IS the model's, ``Engine.save``. Inferred: which of 1.2.x has a
pydantic BuildConfig (the double takes keywords only, in all releases), how "speculative_decoding_mode",
``lora_config`` and ``auto_parallel_config`` look in config.json, and of ``update_kv_cache_type`` all but
its defaults and that paged_state ends False for other architectures. Left out: multiple profiles, timing
caches, weight streaming.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from tensorrt.errors import require

from . import _common
from ._release import RELEASE
from ._utils import trt_dtype_to_str
from .logger import logger
from .models.generation_mixin import KVCacheType
from .models.modeling_utils import optimize_model
from .network import Network
from .plugin import PluginConfig
from .version import __version__

_STATEFUL = ("MambaForCausalLM", "RecurrentGemmaForCausalLM")
_UNSAVED = ("dry_run", "visualize_network")


def _lora_config() -> dict[str, Any]:
    return {
        "lora_dir": [],
        "lora_ckpt_source": "hf",
        "max_lora_rank": 64,
        "lora_target_modules": [],
    }


@dataclasses.dataclass(kw_only=True)
class BuildConfig:
    max_input_len: int = 1024
    max_seq_len: int | None = None
    opt_batch_size: int = 8
    max_batch_size: int = 2048
    max_beam_width: int = 1
    max_num_tokens: int = 8192
    opt_num_tokens: int | None = None
    max_prompt_embedding_table_size: int = 0
    kv_cache_type: KVCacheType | None = None
    gather_context_logits: bool = False
    gather_generation_logits: bool = False
    strongly_typed: bool = True
    force_num_profiles: int | None = None
    profiling_verbosity: str = "layer_names_only"
    enable_debug_output: bool = False
    max_draft_len: int = 0
    speculative_decoding_mode: int = 1
    use_refit: bool = False
    input_timing_cache: str | None = None
    output_timing_cache: str = "model.cache"
    lora_config: dict[str, Any] = dataclasses.field(default_factory=_lora_config)
    weight_sparsity: bool = False
    weight_streaming: bool = False
    plugin_config: PluginConfig = dataclasses.field(default_factory=PluginConfig)
    use_strip_plan: bool = False
    max_encoder_input_len: int = 1024
    dry_run: bool = False
    visualize_network: str | None = None
    monitor_memory: bool = False
    use_mrope: bool = False

    def update_kv_cache_type(self, architecture: str) -> None:
        """Paged caches unless told otherwise; paged state for hybrid models only."""
        plugins = self.plugin_config
        switch = "paged_state" if architecture in _STATEFUL else "paged_kv_cache"
        paged = getattr(plugins, switch)
        if self.kv_cache_type is None:
            paged = True if paged is None else paged
            self.kv_cache_type = KVCacheType.PAGED if paged else KVCacheType.CONTINUOUS
        is_paged = self.kv_cache_type is KVCacheType.PAGED
        assert paged in (None, is_paged), f"{switch} = {paged} with {self.kv_cache_type}"
        setattr(plugins, switch, is_paged)
        if switch == "paged_kv_cache":
            plugins.paged_state = False
        else:
            plugins.paged_kv_cache = is_paged and architecture == "RecurrentGemmaForCausalLM"

    def to_dict(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["kv_cache_type"] = self.kv_cache_type.name if self.kv_cache_type else None
        out["plugin_config"] = self.plugin_config.stored()
        out["lora_config"] = dict(self.lora_config)
        if RELEASE < (1, 1):
            out["auto_parallel_config"] = {"enabled": False}
        return out


@dataclasses.dataclass
class EngineConfig:
    pretrained_config: Any
    build_config: BuildConfig
    version: str

    def to_dict(self) -> dict[str, Any]:
        build_config = self.build_config.to_dict()
        for name in _UNSAVED:
            build_config.pop(name)
        return {
            "version": self.version,
            "pretrained_config": self.pretrained_config.to_dict(),
            "build_config": build_config,
        }


class Engine:
    def __init__(
        self,
        config: EngineConfig,
        engine: bytes | None,
        managed_weights: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.engine = config, engine
        self.managed_weights = managed_weights or {}

    def save(self, engine_dir: str) -> None:
        """Every rank writes its engine, rank 0 config.json too."""
        folder = Path(engine_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rank = self.config.pretrained_config.mapping.rank
        if rank == 0:
            text = json.dumps(self.config.to_dict(), indent=4)
            (folder / "config.json").write_text(text)
        if self.engine is not None:
            (folder / f"rank{rank}.engine").write_bytes(self.engine)


def build(model: Any, build_config: BuildConfig) -> Engine:
    require(isinstance(build_config, BuildConfig), "build(model, build_config)")
    build_config = copy.deepcopy(build_config)
    config = model.config
    plugins = build_config.plugin_config
    plugins.dtype = config.dtype
    build_config.update_kv_cache_type(config.architecture)
    _init_max_seq_len(config, build_config)
    if plugins.streamingllm:
        plugins.use_paged_context_fmha = False
    mode = config.quant_mode
    if mode.has_fp8_kv_cache() and config.quant_algo not in ("FP8", "W4A8_AWQ", "NVFP4"):
        plugins.use_paged_context_fmha = False
        plugins.use_fp8_context_fmha = False
    fp8_fmha = config.quant_algo in ("FP8", "W4A8_AWQ", "NVFP4") and plugins.use_fp8_context_fmha
    model = optimize_model(model, use_fp8_context_fmha=fp8_fmha)
    if config.mapping.world_size > 1:
        plugins.nccl_plugin = config.dtype
    network = Network()
    network.plugin_config = plugins
    network.set_named_parameters(model.named_parameters())
    with _common.net_guard(network):
        inputs = model.prepare_inputs(
            max_batch_size=build_config.max_batch_size,
            max_input_len=build_config.max_input_len,
            max_seq_len=build_config.max_seq_len,
            use_cache=build_config.kv_cache_type is not KVCacheType.DISABLED,
            max_beam_width=build_config.max_beam_width,
            max_num_tokens=build_config.max_num_tokens,
            opt_num_tokens=build_config.opt_num_tokens,
            prompt_embedding_table_size=build_config.max_prompt_embedding_table_size,
            max_draft_len=build_config.max_draft_len,
            speculative_decoding_draft_tokens_external=False,
            gather_context_logits=build_config.gather_context_logits,
            lora_target_modules=build_config.lora_config["lora_target_modules"],
        )
        model(**inputs)
    engine_config = EngineConfig(config, build_config, __version__)
    if build_config.dry_run:
        return Engine(engine_config, None)
    return Engine(engine_config, _serialise(network))


def _init_max_seq_len(config: Any, build_config: BuildConfig) -> None:
    positions = config.max_position_embeddings or 0
    if build_config.max_seq_len is None:
        build_config.max_seq_len = positions
    elif positions and build_config.max_seq_len > positions:
        logger.warning(f"max_seq_len {build_config.max_seq_len} exceeds {positions} positions")
    build_config.max_input_len = min(build_config.max_input_len, build_config.max_seq_len)
    most = build_config.max_seq_len * build_config.max_batch_size
    build_config.max_num_tokens = min(build_config.max_num_tokens, most)
    if not build_config.plugin_config.context_fmha:
        require(build_config.max_num_tokens >= build_config.max_input_len, "max_num_tokens")


def _serialise(network: Network) -> bytes:
    """What was recorded, as JSON: see ``doubles.network``."""
    _validate_named_dimensions(network)
    graph = network.trt_network
    require(graph.outputs, "a network without outputs")
    inputs = {
        name: {
            "dtype": trt_dtype_to_str(tensor.dtype),
            "shape": list(tensor.shape),
            "dims": list(tensor.dim_range),
            "profiles": [
                [r if isinstance(r, list) else [r] * 3 for r in ranges]
                for ranges in zip(*tensor.dim_range.values(), strict=True)
            ],
        }
        for name, tensor in network.get_inputs().items()
    }
    plugins = [
        {
            "name": layer.name,
            "type": layer.plugin.plugin_type,
            "fields": layer.plugin.fields,
            "inputs": [_tensor(tensor) for tensor in layer.inputs],
            "outputs": [_tensor(tensor) for tensor in layer.outputs],
        }
        for layer in graph.layers
        if hasattr(layer.plugin, "plugin_type")
    ]
    recorded = {
        "inputs": inputs,
        "plugins": plugins,
        "layers": [
            str(getattr(layer.plugin, "plugin_type", layer.plugin)) for layer in graph.layers
        ],
        "outputs": [_tensor(tensor) | {"name": tensor.name} for tensor in graph.outputs],
    }
    return json.dumps(recorded, indent=1).encode()


def _tensor(tensor: Any) -> dict[str, Any]:
    """``name``: where the data comes from, see tensorrt/network.py."""
    out = {
        "name": tensor.origin,
        "dtype": trt_dtype_to_str(tensor.dtype),
        "shape": list(tensor.shape),
    }
    return out if tensor.values is None else out | {"values": tensor.values}


def _validate_named_dimensions(network: Network) -> None:
    """A name of a dimension means the same ranges in every input."""
    seen: dict[str, tuple[str, Any]] = {}
    for name, tensor in network.get_inputs().items():
        for dim, ranges in tensor.dim_range.items():
            other, expected = seen.setdefault(dim, (name, ranges))
            require(
                ranges == expected, f"dimension {dim}: {ranges} in {name}, {expected} in {other}"
            )
