"""Model classes of TensorRT-LLM with Razor attention: Qwen 1.5 - 3, Llama, Mistral, Baichuan.

For trtllm-build, too, which loads this file by its path (where it is: ``python -c "import
trt_razor.trtllm as t; print(t.__path__[0])"``):

    trtllm-build --checkpoint_dir CONVERTED --model_cls_file …/trt_razor/trtllm/models.py \\
        --model_cls_name RazorQWenForCausalLM --use_paged_context_fmha disable …

The checkpoint is one that trt-razor converted: its config.json has the ``razor`` section. Names of
weights are TensorRT-LLM's own. Needs TensorRT-LLM 1.0 - 1.2; docs/tensorrt-llm.md.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import tensorrt as trt
from tensorrt_llm._common import default_net
from tensorrt_llm.functional import Tensor
from tensorrt_llm.models import MODEL_MAP
from tensorrt_llm.models.baichuan.config import BaichuanConfig
from tensorrt_llm.models.baichuan.model import BaichuanForCausalLM
from tensorrt_llm.models.llama.config import LLaMAConfig
from tensorrt_llm.models.llama.model import LLaMAForCausalLM
from tensorrt_llm.models.qwen.config import QWenConfig
from tensorrt_llm.models.qwen.model import QWenForCausalLM

from trt_razor.errors import RazorError, UsageError, did_you_mean
from trt_razor.trtllm.attention import (
    RazorAttention,
    RazorInputs,
    adopt,
    load_plugin_library,
)
from trt_razor.trtllm.engine_config import (
    SECTION,
    RazorPlan,
    RazorSection,
    TrtLlmOptions,
    plan_engine,
)
from trt_razor.trtllm.engine_json import local_cache_of
from trt_razor.trtllm.model_config import spec_from_trtllm_config
from trt_razor.trtllm.options import WEIGHT_ALGORITHMS, check_quantization
from trt_razor.trtllm.release import installed_release

_PLAN = "_razor_plan"

# Arguments of prepare_inputs that ask for what Razor engines cannot do.
_REFUSED_INPUTS = {
    "prompt_embedding_table_size": "prompt tuning; build with --max_prompt_embedding_table_size 0",
    "position_encoding_2d": "two-dimensional positions",
    "max_draft_len": "speculative decoding; build without --max_draft_len",
    "speculative_decoding_draft_tokens_external": "speculative decoding; build without "
    "--speculative_decoding_mode",
    "spec_decoding_is_generation_length_variable": "speculative decoding; build without "
    "--speculative_decoding_mode",
    "lora_target_modules": "LoRA; merge the adapter into the checkpoint",
    "mrope_rotary_cos_sin_size": "multimodal RoPE",
    "num_hidden_layers": "another number of layers than the checkpoint's",
}
# Plugins and fusions that must be on, and that must be off.
_REQUIRED_PLUGINS = {
    "gpt_attention_plugin": "--gpt_attention_plugin auto",
    "remove_input_padding": "--remove_input_padding enable",
    "paged_kv_cache": "--kv_cache_type paged",
}
_REFUSED_PLUGINS = {
    "lora_plugin": "LoRA is not supported; merge the adapter into the checkpoint",
    "streamingllm": "Razor layers have sinks of their own; pass --streamingllm disable",
    "reduce_fusion": "it moves the residual into attention; pass --reduce_fusion disable",
    "norm_quant_fusion": "it quantises what attention reads; pass --norm_quant_fusion disable",
    "user_buffer": "it quantises what attention reads; pass --user_buffer disable",
    "fuse_fp4_quant": "the plugin writes no FP4; pass --fuse_fp4_quant disable",
}


class _RazorConfig:
    """A model's configuration that reports the engine's cache layers once they are planned.

    TensorRT-LLM writes ``config.to_dict()`` into the engine's config.json, where the runtime looks
    for cache layers, while everything that makes the network needs the model's own numbers.
    """

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = super().to_dict()  # type: ignore[misc]  # a mixin
        plan: RazorPlan | None = data.pop(_PLAN, None)
        return data if plan is None else plan.pretrained_config(data)


class RazorQWenConfig(_RazorConfig, QWenConfig):
    pass


class RazorLLaMAConfig(_RazorConfig, LLaMAConfig):
    pass


class RazorBaichuanConfig(_RazorConfig, BaichuanConfig):
    pass


_CONFIGS: dict[type, type] = {
    QWenConfig: RazorQWenConfig,
    LLaMAConfig: RazorLLaMAConfig,
    BaichuanConfig: RazorBaichuanConfig,
}


class RazorModel:
    """What the model classes have in common; stands before TensorRT-LLM's class among the bases.

    Attributes:
        razor_plan: caches of the engine; None until ``prepare_inputs`` knows its sizes.
    """

    def __init__(self, config: Any) -> None:
        """
        Raises:
            UsageError: the checkpoint is not converted for Razor, or has what Razor layers cannot do.
            RazorError: the plugin library is missing.
        """
        installed_release()
        reporting = _CONFIGS.get(type(config), type(config))
        if not issubclass(reporting, _RazorConfig):
            raise UsageError(
                f"config: expected {', '.join(c.__name__ for c in _CONFIGS)}, found "
                f"{type(config).__name__}"
            )
        config.__dict__.pop(_PLAN, None)  # of another engine made of it
        described = config.to_dict()
        section = RazorSection.from_json(described.get(SECTION))
        spec = spec_from_trtllm_config(described, config.architecture, "config.json")
        cache = local_cache_of(described)
        kv_dtype = _kv_dtype(config)
        load_plugin_library()
        super().__init__(config)  # type: ignore[call-arg]  # TensorRT-LLM's class
        for layer in self.transformer.layers:  # type: ignore[attr-defined]
            adopt(layer.attention, config.norm_epsilon)
        self._razor_checkpoint = spec, section, cache, kv_dtype
        self._razor_inputs: RazorInputs | None = None
        self.razor_plan: RazorPlan | None = None
        config.__class__ = reporting

    def __post_init__(self) -> None:
        """Quantises; some algorithms put attention layers of their own in the place of ours."""
        super().__post_init__()  # type: ignore[misc]
        for layer in self.transformer.layers:  # type: ignore[attr-defined]
            if not isinstance(layer.attention, RazorAttention):
                raise UsageError(
                    f"quantization.quant_algo: expected one that keeps attention layers, found "
                    f"{self.config.quant_algo}; "  # type: ignore[attr-defined]
                    f"use {', '.join(str(a) for a in WEIGHT_ALGORITHMS[2:])} or none"
                )

    def prepare_inputs(
        self,
        max_batch_size: int,
        max_input_len: int,
        max_seq_len: int,
        max_num_tokens: int,
        use_cache: bool,
        max_beam_width: int = 1,
        **options: Any,
    ) -> dict[str, Any]:
        """The inputs of the network, for the cache layers of the plan.

        Also sets what the engine's configuration says of its caches: ``config`` and the network's
        ``plugin_config`` are those that TensorRT-LLM's builder writes afterwards.

        Raises:
            UsageError: what TensorRT-LLM, its cache manager or our plugin cannot do; trtllm-build
                has not begun to compile then.
        """
        if max_beam_width != 1:
            raise UsageError(
                f"max_beam_width: expected 1 for a Razor engine, found {max_beam_width}"
            )
        if not use_cache:
            raise UsageError("use_cache: expected true for a Razor engine, found false")
        for name, what in _REFUSED_INPUTS.items():
            if options.get(name):
                raise UsageError(f"{name}: a Razor engine does not support {what}")
        plugins = default_net().plugin_config
        _check_plugins(plugins)
        plan = self._plan(max_seq_len, max_num_tokens, plugins)
        for name, value in plan.plugin_config({}).items():
            setattr(plugins, name, value)
        self.razor_plan = plan
        setattr(self.config, _PLAN, plan)  # type: ignore[attr-defined]
        inputs: dict[str, Any] = super().prepare_inputs(  # type: ignore[misc]
            max_batch_size=max_batch_size,
            max_input_len=max_input_len,
            max_seq_len=max_seq_len,
            max_num_tokens=max_num_tokens,
            use_cache=use_cache,
            max_beam_width=max_beam_width,
            **options,
        )
        if self._razor_inputs is None:
            raise RazorError(
                "prepare_inputs: TensorRT-LLM made no attention inputs; is it one of the releases that "
                "trt-razor supports?"
            )
        inputs["attention_params"].razor, self._razor_inputs = self._razor_inputs, None
        return inputs

    def prepare_attention_inputs(
        self,
        *,
        max_batch_size: int,
        num_layers: int,
        num_profiles: int = 1,
        streamingllm: bool = False,
        opt_batch_size: int | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """TensorRT-LLM's, for cache layers in the place of layers, and the state inputs beside them.

        Args:
            num_layers: of the model. The other arguments are TensorRT-LLM's.
        """
        plan = self.razor_plan
        if plan is None:
            raise RazorError("prepare_attention_inputs: expected to be called by prepare_inputs")
        mapping = self.config.mapping  # type: ignore[attr-defined]
        stage = _stage(plan, mapping, num_layers)
        inputs: dict[str, Any] = super().prepare_attention_inputs(  # type: ignore[misc]
            max_batch_size=max_batch_size,
            num_layers=plan.attention_layers,
            num_profiles=num_profiles,
            # Room in the tables of blocks for the bubble; has no other effect here.
            streamingllm=plan.bubble > 0,
            opt_batch_size=opt_batch_size,
            **options,
        )
        # Paged caches are no tensors, but the list's length is taken for the number of layers.
        inputs["past_key_value"] = [None] * len(stage)
        batch = self.default_range(max_batch_size)  # type: ignore[attr-defined]
        if opt_batch_size:
            batch[1] = opt_batch_size
        self._razor_inputs = _razor_inputs(plan, stage, [batch] * num_profiles)
        return inputs

    def _plan(self, max_seq_len: int, max_num_tokens: int, plugins: Any) -> RazorPlan:
        config: Any = self.config  # type: ignore[attr-defined]
        spec, section, cache, kv_dtype = self._razor_checkpoint
        release = installed_release()
        options = TrtLlmOptions(
            tp_size=config.mapping.tp_size,
            pp_size=config.mapping.pp_size,
            kv_dtype=kv_dtype,
            tokens_per_block=plugins.tokens_per_block,
            max_num_tokens=max_num_tokens,
            local_cache=cache,
        )
        # Nothing but this tells that prompts may come in chunks; that caches may be reused, too.
        chunk = max_num_tokens if plugins.use_paged_context_fmha else 0
        try:
            return plan_engine(
                spec, section, max_seq_len, config.dtype, options, release, prefill_chunk=chunk
            )
        except UsageError as e:
            if not str(e).startswith("prefill_chunk"):
                raise
            raise UsageError(
                f"use_paged_context_fmha: {e} (trtllm-build: --use_paged_context_fmha disable)"
            ) from None


class RazorQWenForCausalLM(RazorModel, QWenForCausalLM):
    """Qwen 1.5, 2, 2.5 and 3, dense ones."""


class RazorLLaMAForCausalLM(RazorModel, LLaMAForCausalLM):
    """Llama 1 - 3.1 and Mistral."""


class RazorBaichuanForCausalLM(RazorModel, BaichuanForCausalLM):
    """Baichuan 1 and 2: 7B with RoPE, 13B with ALiBi."""


RAZOR_CLASSES: dict[str, type] = {
    "Qwen2ForCausalLM": RazorQWenForCausalLM,
    "Qwen3ForCausalLM": RazorQWenForCausalLM,
    "LlamaForCausalLM": RazorLLaMAForCausalLM,
    "MistralForCausalLM": RazorLLaMAForCausalLM,
    "BaichuanForCausalLM": RazorBaichuanForCausalLM,
    "BaiChuanForCausalLM": RazorBaichuanForCausalLM,
}
"""By TensorRT-LLM's name of the architecture."""


def model_class(architecture: str, razor: bool) -> type:
    """The class that makes the network of a checkpoint: ours, or TensorRT-LLM's for a dense engine.

    Raises:
        UsageError: an architecture that is not supported.
    """
    if architecture not in RAZOR_CLASSES:
        raise UsageError(
            f"architecture: {architecture!r:.60} is not supported; "
            f"{did_you_mean(str(architecture), RAZOR_CLASSES)}"
        )
    if razor:
        return RAZOR_CLASSES[architecture]
    stock: type = MODEL_MAP[architecture]
    return stock


# Parts of prepare_inputs ------------------------------------------------------------------------
def _check_plugins(plugins: Any) -> None:
    for name, way_out in _REQUIRED_PLUGINS.items():
        if not getattr(plugins, name, None):
            raise UsageError(f"plugin_config.{name}: a Razor engine needs it; pass {way_out}")
    for name, why in _REFUSED_PLUGINS.items():
        if getattr(plugins, name, None):
            raise UsageError(f"plugin_config.{name}: expected it off in a Razor engine: {why}")


def _kv_dtype(config: Any) -> str:
    """``auto`` or ``fp8``; refuses quantisation that Razor layers are not made for."""
    quantization = config.quantization
    return check_quantization(
        getattr(quantization, "quant_algo", None),
        getattr(quantization, "kv_cache_quant_algo", None),
    )


def _stage(plan: RazorPlan, mapping: Any, num_layers: int) -> list[int]:
    """Layers of this pipeline stage; refuses a split that tears the cache layers of a layer apart."""
    layers: list[int] = list(mapping.pp_layers(num_layers))
    rows: list[int] = []
    for layer in layers:
        mine = plan.layers[layer]
        rows += [row for row in (mine.full_row, mine.local_row) if row >= 0]
    try:
        found = list(mapping.pp_layers(plan.attention_layers))
    except ValueError:  # a partition by hand: it sums up to the layers, not to the cache layers
        found = []
    if found != rows:
        raise UsageError(
            f"pp_size: stage {mapping.pp_rank} has layers {layers[0]}..{layers[-1]}, whose cache layers "
            "TensorRT-LLM's runtime would look for in other stages; use equal stages (no pp_partition)"
        )
    return layers


def _razor_inputs(plan: RazorPlan, stage: list[int], batch: list[list[int]]) -> RazorInputs:
    """The state inputs: one of each kind for every layer with local heads in slots.

    Args:
        stage: layers of this pipeline stage. batch: [min, opt, max] sequences, for each profile.
    """
    numbers = [n for n in (plan.layers[i].state_layer for i in stage) if n >= 0]
    if not numbers:
        return RazorInputs(plan, stage[0])
    slots = Tensor(
        name="slot_mapping",
        dtype=trt.int32,
        shape=[-1],
        dim_range=OrderedDict([("batch_size_beam_width", batch)]),
    )
    states: Mapping[int, tuple[Tensor, Tensor]] = {
        n: (_address(f"conv_state_ptr_{n}", batch), _address(f"rnn_state_ptr_{n}", batch))
        for n in numbers
    }
    return RazorInputs(plan, stage[0], slots, states)


def _address(name: str, profiles: list[list[int]]) -> Tensor:
    """An address in host memory, one number."""
    return Tensor(
        name=name,
        dtype=trt.int64,
        shape=[1],
        dim_range=OrderedDict([("buffer_count", [1] * len(profiles))]),
    )
