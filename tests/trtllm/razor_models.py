"""Networks of every supported architecture, built on the double: Razor and dense."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import doubles

from trt_razor.models.spec import ModelSpec, RopeSpec
from trt_razor.policy import RazorPolicy
from trt_razor.trtllm.arguments import build_arguments
from trt_razor.trtllm.engine_config import RazorPlan, plan_engine
from trt_razor.trtllm.model_config import trtllm_config
from trt_razor.trtllm.options import SECTION, RazorSection, TrtLlmOptions
from trt_razor.trtllm.release import LocalCache, release_of

MAX_SEQ_LEN, MAX_BATCH, LAYERS, DIM, HIDDEN = 1024, 6, 4, 64, 256
POLICY = RazorPolicy(sink_tokens=4, min_window=64, compression=5, comp_tokens=2)


def _spec(name: str, architecture: str, heads: int, kv_heads: int, **changes: Any) -> ModelSpec:
    hidden = heads * DIM if architecture == "baichuan" else HIDDEN
    spec = ModelSpec(name, architecture, LAYERS, hidden, 256, heads, kv_heads, DIM, 250, 4096, 1e-6)
    return replace(spec, **changes)


LLAMA3 = RopeSpec(500000.0, "llama3", 8.0, 512, low_freq_factor=1.0, high_freq_factor=4.0)
SPECS = {
    "qwen2": _spec("qwen2", "qwen2", 8, 4, qkv_bias=True, rope=RopeSpec(1e6)),
    "qwen3": _spec("qwen3", "qwen3", 8, 4, qk_norm=True, rope=RopeSpec(1e6)),
    "llama": _spec("llama", "llama", 8, 4, rope=LLAMA3),
    "mistral": _spec("mistral", "mistral", 12, 4, rope=RopeSpec(1e4, "linear", 2.0)),
    "baichuan-7b": _spec("baichuan-7b", "baichuan", 4, 4, norm_head=True),
    # Slopes of 12 heads are no geometric row.
    "baichuan-13b": _spec("baichuan-13b", "baichuan", 12, 12, position="alibi", norm_head=True),
}
CLASSES = {
    "qwen2": "RazorQWenForCausalLM",
    "qwen3": "RazorQWenForCausalLM",
    "llama": "RazorLLaMAForCausalLM",
    "mistral": "RazorLLaMAForCausalLM",
    "baichuan-7b": "RazorBaichuanForCausalLM",
    "baichuan-13b": "RazorBaichuanForCausalLM",
}
POSITIONS = {name: 3 if spec.position == "alibi" else 1 for name, spec in SPECS.items()}


def uneven(spec: ModelSpec, tp_size: int) -> tuple[int, ...]:
    """R of a rank per layer: some, all, none, another number; layers with one class among them."""
    heads = spec.num_kv_heads // tp_size
    return (1, heads, 0, max(1, heads - 1))


@dataclass(frozen=True)
class Case:
    """One engine.

    Attributes:
        kind: key of ``SPECS``. counts: R of a rank per layer; None = ``uneven``.
        cache: None = leave it to the release. quant: entries of the quantisation.
        change: replaces top-level entries of the checkpoint's config.json.
    """

    kind: str
    options: TrtLlmOptions = field(default_factory=TrtLlmOptions)
    counts: tuple[int, ...] | None = None
    quant: Mapping[str, Any] = field(default_factory=dict)
    change: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float16"

    @property
    def spec(self) -> ModelSpec:
        return SPECS[self.kind]

    @property
    def section(self) -> RazorSection:
        tp = self.options.tp_size
        counts = self.counts or uneven(self.spec, tp)
        policy = POLICY
        if self.spec.position == "alibi":  # one compensation token at the most
            policy = POLICY.with_(comp_tokens=1)
        return RazorSection(self.spec.fingerprint(), "digest", tp, counts, policy)

    def plan(self, release: str, max_seq_len: int = MAX_SEQ_LEN) -> RazorPlan:
        return plan_engine(
            self.spec, self.section, max_seq_len, self.dtype, self.options, release_of(release)
        )

    def config_json(self, razor: bool = True) -> dict[str, Any]:
        section = self.section if razor else None
        config = trtllm_config(self.spec, self.dtype, self.options, section)
        if razor and self.options.local_cache is not None:
            config[SECTION]["local_cache"] = self.options.local_cache.name.lower()
        config["quantization"].update(self.quant)
        return config | dict(self.change)

    def config(
        self, trtllm: doubles.Double, folder: Path, rank: int = 0, razor: bool = True
    ) -> Any:
        """A ``PretrainedConfig``, as trtllm-build makes it of a checkpoint's config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.json"
        path.write_text(json.dumps(self.config_json(razor)))
        modeling = trtllm.load("tensorrt_llm.models.modeling_utils")
        config = modeling.PretrainedConfig.from_json_file(str(path))
        config.set_rank(rank)
        return config

    def model(self, trtllm: doubles.Double, folder: Path, rank: int = 0, razor: bool = True) -> Any:
        """With weights that TensorRT-LLM makes up."""
        config = self.config(trtllm, folder, rank, razor)
        models = trtllm.load("trt_razor.trtllm.models")
        return models.model_class(config.architecture, razor)(config)


def build(
    trtllm: doubles.Double,
    model: Any,
    options: TrtLlmOptions,
    max_seq_len: int = MAX_SEQ_LEN,
    chunk: int = 0,
    plugins: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """``Engine`` of a model, with what our builder tells TensorRT-LLM's; ``changes`` of BuildConfig."""
    builder = trtllm.load("tensorrt_llm.builder")
    plugin = trtllm.load("tensorrt_llm.plugin")
    arguments = build_arguments(max_seq_len, MAX_BATCH, options, chunk)
    plugin_config = plugin.PluginConfig()
    for name, value in {**arguments.plugin_config(), **(plugins or {})}.items():
        setattr(plugin_config, name, value)
    fields = {**arguments.build_config(), **changes, "plugin_config": plugin_config}
    return builder.build(model, builder.BuildConfig(**fields))


def caches(release: str) -> list[LocalCache]:
    return list(release_of(release).local_caches)


def network(trtllm: doubles.Double, case: Case, folder: Path, rank: int = 0) -> dict[str, Any]:
    """The recorded Razor network of a rank."""
    return doubles.network(build(trtllm, case.model(trtllm, folder, rank), case.options))
