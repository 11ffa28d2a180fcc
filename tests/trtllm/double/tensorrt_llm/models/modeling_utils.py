"""``PretrainedModel``, ``DecoderLayerList``, ``DecoderModelForCausalLM``.

Read (mid 2025 and a 1.1 - 1.2 line, textually the same): prepare_inputs with ``num_hidden_layers``,
the order quantise-then-optimise after a subclass's WHOLE constructor, which tensors loading requires,
that layers get all rows of windows and pools unsliced, and that a ``past_key_value`` list shorter than
the layers silently drops layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .._common import default_net
from .._utils import str_dtype_to_trt
from ..functional import gather_last_token_logits
from ..layers.attention import Attention, AttentionParams, KeyValueCacheParams
from ..logger import logger
from ..module import Module, ModuleList
from ..parameter import Parameter
from ..plugin import init_all_reduce_helper
from ..quantization.quantize import quantize
from ..top_model_mixin import TopModelMixin
from .generation_mixin import GenerationMixin, KVCacheType
from .pretrained_config import PretrainedConfig as PretrainedConfig
from .pretrained_config import QuantConfig as QuantConfig
from .weights import preprocess_weights

_REQUEST_INPUTS = (
    "sequence_length",
    "context_lengths",
    "host_context_lengths",
    "host_request_types",
    "host_runtime_perf_knobs",
    "host_context_progress",
)
_CACHE_INPUTS = (
    "past_key_value",
    "host_past_key_value_lengths",
    "host_max_attention_window_sizes",
    "host_sink_token_length",
    "kv_cache_block_offsets",
    "host_kv_cache_block_offsets",
    "host_kv_cache_pool_pointers",
    "host_kv_cache_pool_mapping",
    "cache_indirection",
)


class _PostInit(type):
    """Calls ``__post_init__`` when the whole constructor, also of subclasses, has run."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().__call__(*args, **kwargs)
        model.__post_init__()
        return model


def optimize_model(model: Any, use_parallel_embedding: bool = False, **passes: bool) -> Any:
    """Of its passes only ``use_fp8_context_fmha`` is doubled: every Attention gets a Parameter that
    makes TensorRT-LLM's own plugin write FP8."""
    if passes.get("use_fp8_context_fmha"):
        for layer in model.modules():
            if isinstance(layer, Attention) and hasattr(layer.dense, "activation_scaling_factor"):
                scale = layer.dense.activation_scaling_factor
                value = np.asarray(scale.raw_value if scale.is_inited() else [1], np.float32)
                layer.attention_output_orig_quant_scale = Parameter(1 / value, dtype="float32")
    return model


def _cache_type(use_cache: bool, paged: bool | None) -> KVCacheType:
    kinds = (KVCacheType.CONTINUOUS, KVCacheType.PAGED)
    return kinds[bool(paged)] if use_cache else KVCacheType.DISABLED


class PretrainedModel(Module, GenerationMixin, TopModelMixin, metaclass=_PostInit):
    config_class: Any = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        init_all_reduce_helper()
        self.config = config

    def __post_init__(self) -> None:
        quantize(self, self.config.quantization)
        optimize_model(self, use_parallel_embedding=self.config.use_parallel_embedding)

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> Any:
        return cls(config)

    @classmethod
    def from_checkpoint(
        cls,
        ckpt_dir: str,
        rank: int | None = None,
        config: PretrainedConfig | None = None,
        *,
        preprocess_weights_hook: Any = None,
    ) -> Any:
        from safetensors.torch import load_file

        config = PretrainedConfig.from_checkpoint(ckpt_dir) if config is None else config
        if rank is not None:
            config.set_rank(rank)
        weights = load_file(str(Path(ckpt_dir) / f"rank{config.mapping.rank}.safetensors"))
        if preprocess_weights_hook is not None:
            weights = preprocess_weights_hook(weights)
        weights = preprocess_weights(weights, config)
        model = cls(config)
        model.load(weights)
        return model

    def load(self, weights: dict[str, Any], from_pruned: bool = False) -> None:
        parameters = dict(self.named_parameters())
        required = {name for name, p in parameters.items() if not p.is_inited()}
        if any(name.endswith("vocab_embedding.weight") for name in weights):
            required.discard("lm_head.weight")  # tied
        missing, unknown = required - set(weights), set(weights) - set(parameters)
        if missing:
            raise RuntimeError(f"no tensor in the file for {sorted(missing)}")
        if unknown:
            logger.warning(f"tensors in the file that the model has not: {sorted(unknown)}")
        for name in weights.keys() & parameters.keys():
            try:
                parameters[name].value = weights[name]
            except AssertionError as e:
                raise RuntimeError(f"{name}: {e}") from e

    def prepare_inputs(
        self,
        max_batch_size: int,
        max_input_len: int,
        max_seq_len: int,
        max_num_tokens: int,
        use_cache: bool,
        max_beam_width: int = 1,
        opt_num_tokens: int | None = None,
        prompt_embedding_table_size: int = 0,
        position_encoding_2d: bool = False,
        max_draft_len: int = 0,
        speculative_decoding_draft_tokens_external: bool = False,
        spec_decoding_is_generation_length_variable: bool = False,
        gather_context_logits: bool = False,
        lora_target_modules: Any = None,
        opt_batch_size: int = 0,
        num_hidden_layers: int | None = None,
        mrope_rotary_cos_sin_size: int | None = None,
    ) -> dict[str, Any]:
        config, plugins = self.config, default_net().plugin_config
        inputs = self.prepare_basic_inputs(
            max_batch_size=max_batch_size,
            max_beam_width=max_beam_width,
            max_input_len=max_input_len,
            max_seq_len=max_seq_len,
            max_num_tokens=max_num_tokens,
            hidden_size=config.hidden_size,
            num_kv_heads=config.num_key_value_heads,
            head_size=config.head_size,
            num_layers=num_hidden_layers or config.num_hidden_layers,
            kv_dtype=str_dtype_to_trt(config.kv_dtype),
            kv_cache_type=_cache_type(use_cache, plugins.paged_kv_cache),
            remove_input_padding=plugins.remove_input_padding,
            use_gpt_attention_plugin=bool(plugins.gpt_attention_plugin),
            use_gemm_plugin=bool(plugins.gemm_plugin),
            tokens_per_block=plugins.tokens_per_block,
            gather_context_logits=gather_context_logits,
            dtype=str_dtype_to_trt(config.dtype),
            num_heads=config.num_attention_heads,
            mapping=config.mapping,
            opt_num_tokens=opt_num_tokens,
            prompt_embedding_table_size=prompt_embedding_table_size,
            position_encoding_2d=position_encoding_2d,
            use_lora_plugin=plugins.lora_plugin,
            lora_target_modules=lora_target_modules,
            speculative_decoding_draft_tokens_external=speculative_decoding_draft_tokens_external,
            spec_decoding_is_generation_length_variable=spec_decoding_is_generation_length_variable,
            max_draft_len=max_draft_len,
            multiple_profiles=plugins.multiple_profiles,
            streamingllm=plugins.streamingllm,
            opt_batch_size=opt_batch_size,
            pp_reduce_scatter=plugins.pp_reduce_scatter,
            mrope_rotary_cos_sin_size=mrope_rotary_cos_sin_size,
        )
        requests = {name: inputs[name] for name in _REQUEST_INPUTS}
        caches = {name: inputs[name] for name in _CACHE_INPUTS}
        names = ("input_ids", "position_ids", "last_token_ids", "attention_mask")
        result = {name: inputs[name] for name in names} | {
            "use_cache": use_cache,
            "kv_cache_params": KeyValueCacheParams(**caches),
            "attention_params": AttentionParams(max_context_length=max_input_len, **requests),
        }
        if inputs["hidden_states_input"] is not None:
            result["hidden_states"] = inputs["hidden_states_input"]
        return result


class DecoderLayerList(ModuleList):
    def __init__(self, cls: Any, config: PretrainedConfig) -> None:
        layer_list = config.mapping.pp_layers(config.num_hidden_layers)
        super().__init__([cls(config, idx) for idx in layer_list])
        self.num_hidden_layers = config.num_hidden_layers
        self.layer_list = layer_list
        self.quant_mode = config.quant_mode

    def forward(
        self,
        hidden_states: Any,
        use_cache: bool = False,
        attention_mask: Any = None,
        kv_cache_params: Any = None,
        attention_params: Any = None,
        mrope_params: Any = None,
        position_ids: Any = None,
        lora_params: Any = None,
        spec_decoding_params: Any = None,
        vision_token_mask: Any = None,
    ) -> Any:
        kv_cache_params.fill_none_tensor_list(len(self.layer_list))
        shared = dict(vars(kv_cache_params))
        caches = shared.pop("past_key_value")
        optional = _given(
            position_ids=position_ids,
            vision_token_mask=vision_token_mask,
            spec_decoding_params=spec_decoding_params,
            mrope_params=mrope_params,
        )
        presents = []
        # Not strict: a short list of past caches drops layers without a word.
        for layer, cache in zip(self, caches, strict=False):
            hidden_states = layer(
                hidden_states,
                use_cache=use_cache,
                attention_mask=attention_mask,
                kv_cache_params=KeyValueCacheParams(past_key_value=[cache], **shared),
                attention_params=attention_params,
                **optional,
            )
            if use_cache:
                hidden_states, present = hidden_states
                presents.append(present)
        return (hidden_states, presents) if use_cache else hidden_states


def _given(**arguments: Any) -> dict[str, Any]:
    """Those that are not None: not every family's layers take all of them."""
    return {name: value for name, value in arguments.items() if value is not None}


class DecoderModelForCausalLM(PretrainedModel):
    def __init__(self, config: PretrainedConfig, transformer: Any, lm_head: Any) -> None:
        super().__init__(config)
        self.transformer = transformer
        self.lm_head = lm_head
        Attention.create_attention_const_params(self, config)
        self.position_embedding_type = config.position_embedding_type

    def forward(
        self,
        input_ids: Any,
        position_ids: Any = None,
        use_cache: bool = False,
        last_token_ids: Any = None,
        attention_mask: Any = None,
        kv_cache_params: Any = None,
        attention_params: Any = None,
        mrope_params: Any = None,
        hidden_states: Any = None,
        prompt_embedding_table: Any = None,
        prompt_tasks: Any = None,
        prompt_vocab_size: Any = None,
        lora_params: Any = None,
        spec_decoding_params: Any = None,
    ) -> Any:
        out = self.transformer(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=use_cache,
            attention_mask=attention_mask,
            kv_cache_params=kv_cache_params,
            attention_params=Attention.fill_attention_params(self, attention_params),
            **_given(
                hidden_states=hidden_states,
                mrope_params=mrope_params,
                spec_decoding_params=spec_decoding_params,
            ),
        )
        out, presents = out if use_cache else (out, None)
        if self.config.mapping.is_last_pp_rank():
            if last_token_ids is not None:
                packed = default_net().plugin_config.remove_input_padding
                out = gather_last_token_logits(out, last_token_ids, packed)
            out = self.lm_head(out)
            out.mark_output("logits", self.config.logits_dtype)
        else:
            out.mark_output("hidden_states_output", self.config.dtype)
        return (out, presents) if use_cache else out
