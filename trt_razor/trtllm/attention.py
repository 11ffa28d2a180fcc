"""The attention layer of a Razor network: TensorRT-LLM's, with our plugin in the place of its own.

Only the forward pass differs. A layer that TensorRT-LLM has made is *adopted*: it becomes a
``RazorAttention`` and keeps its sub-modules, parameters and their names, so that checkpoints,
quantisation and every pass that looks for ``Attention`` treat it as before. Constructors, whose
keywords change from release to release, are never called.

Needs TensorRT-LLM 1.0 - 1.2. Inputs and fields: plugins/tensorrt/razor_gpt_attention/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorrt as trt
from tensorrt_llm._common import default_trtnet
from tensorrt_llm.functional import (
    AttentionMaskType,
    PositionEmbeddingType,
    RotaryScalingType,
    Tensor,
    _create_tensor,
    concat,
    shape,
    split,
)
from tensorrt_llm.layers.attention import Attention

from trt_razor.backends.tensorrt import find_plugin
from trt_razor.errors import RazorError, UsageError
from trt_razor.kernels.layer import POSITIONS
from trt_razor.trtllm.engine_config import RazorPlan
from trt_razor.trtllm.options import PLUGIN
from trt_razor.trtllm.release import LocalCache

_POSITIONS = {
    PositionEmbeddingType.rope_gpt_neox: POSITIONS["rope"],
    PositionEmbeddingType.rope_gptj: POSITIONS["rope_interleaved"],
    PositionEmbeddingType.alibi: POSITIONS["alibi"],
}
# Scalings whose tables are made once, for every length: the plugin reads them like any others.
_SCALINGS = (RotaryScalingType.none, RotaryScalingType.linear, RotaryScalingType.llama3)
# Attributes of an attention layer that would change what it computes.
_REFUSED = {
    "cross_attention": "cross attention",
    "relative_attention": "a relative attention bias",
    "use_logn_scaling": "log-n scaling of queries",
    "clip_qkv": "clipped queries, keys and values",
    "inner_layernorm": "a norm between attention and projection",
    "max_attn_value": "soft-capped logits",
}


@dataclass(frozen=True)
class RazorInputs:
    """What the attention layers of a network need beside TensorRT-LLM's own inputs.

    ``prepare_inputs`` of a Razor model hangs it on ``attention_params.razor``, which every layer is
    given.

    Attributes:
        first_layer: first layer of the model in this pipeline stage.
        slot_mapping: int32 [B], slot of each sequence; None unless local heads are in slots.
        states: by ``LayerPlan.state_layer``: ``conv_state_ptr_{n}`` and ``rnn_state_ptr_{n}``, each
            int64 [1] in host memory.
    """

    plan: RazorPlan
    first_layer: int = 0
    slot_mapping: Tensor | None = None
    states: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class RazorAttention(Attention):
    """An adopted attention layer, see the module."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        use_cache: bool = False,
        kv_cache_params: Any = None,
        attention_params: Any = None,
        all_reduce_params: Any = None,
        **others: Any,
    ) -> Any:
        """Attention and projection of packed tokens.

        Args:
            hidden_states: [tokens, hidden].
            others: TensorRT-LLM's further arguments: none of them may be set.

        Returns:
            [tokens, hidden]; with ``use_cache`` a pair of it and None, since paged caches are no
            outputs.

        Raises:
            UsageError: something is asked for that Razor layers cannot do.
        """
        for name, value in others.items():
            if value is not None and value is not False:
                raise self._refusal(f"{name}: not supported, found {type(value).__name__}")
        if isinstance(hidden_states, tuple) or hidden_states.ndim() != 2:
            raise self._refusal(
                "hidden_states: expected packed tokens [tokens, hidden] in one tensor; build with "
                "--remove_input_padding enable --norm_quant_fusion disable --user_buffer disable"
            )
        if self.qkv is None:
            raise self._refusal("qkv: expected one projection for queries, keys and values")
        if getattr(self, "qkv_lora", None) or getattr(self, "qkv_dora", None):
            raise self._refusal("LoRA is not supported; merge the adapter into the checkpoint")
        razor = getattr(attention_params, "razor", None)
        if razor is None or kv_cache_params is None:
            raise self._refusal("expected the inputs that prepare_inputs of a Razor model made")

        qkv = self._normed(self.qkv(hidden_states))
        inputs = self._inputs(qkv, kv_cache_params, attention_params, razor)
        layer = razor.first_layer + self.local_layer_idx
        fields = razor.plan.plugin_fields(layer, razor.first_layer, self._attention_fields())
        context = add_plugin(f"razor_attention_{layer}", inputs, fields)
        context = self.dense(context, lora_runtime_params=None, all_reduce_params=all_reduce_params)
        return (context, None) if use_cache else context

    def _normed(self, qkv: Tensor) -> Tensor:
        """QK-norm. [tokens, (Hq + 2 Hkv) D]: rows of q, then k, then v, whatever the head counts.

        (TensorRT-LLM's own layer reads them interleaved by head where a rank has Hq = Hkv.)
        """
        if not self.qk_layernorm:
            return qkv
        sections = [
            self.num_attention_heads,
            self.num_attention_kv_heads,
            self.num_attention_kv_heads,
        ]
        dim, tokens = self.attention_head_size, shape(qkv, 0)
        q, k, v = split(qkv.view(concat([tokens, sum(sections), dim])), sections, dim=1)
        heads = concat([self.q_layernorm(q), self.k_layernorm(k), v], dim=1)
        return heads.view(concat([tokens, sum(sections) * dim]))

    def _inputs(self, qkv: Tensor, kv: Any, attention: Any, razor: RazorInputs) -> dict[str, Any]:
        """Inputs of the plugin, in its order. Raises RazorError for one that is not there."""
        plan = razor.plan
        inputs = {
            "qkv": qkv,
            "sequence_length": attention.sequence_length,
            "host_past_key_value_lengths": kv.host_past_key_value_lengths,
            "host_max_attention_window_sizes": kv.host_max_attention_window_sizes,
            "host_sink_token_length": kv.host_sink_token_length,
            "context_lengths": attention.context_lengths,
            "cache_indirection": kv.cache_indirection,
            "host_request_types": attention.host_request_types,
            "kv_cache_block_offsets": kv.kv_cache_block_offsets,
            "host_kv_cache_block_offsets": kv.host_kv_cache_block_offsets,
            "host_kv_cache_pool_pointers": kv.host_kv_cache_pool_pointers,
            "host_kv_cache_pool_mapping": kv.host_kv_cache_pool_mapping,
        }
        if plan.fp8:
            inputs["kv_orig_quant_scale"] = _value(self, "kv_cache_rcp_scaling_factor")
            inputs["kv_quant_orig_scale"] = _value(self, "kv_cache_scaling_factor")
        if self.position_embedding_type.is_rope():
            inputs["rotary_inv_freq"] = attention.rotary_inv_freq
            inputs["rotary_cos_sin"] = attention.embed_positions_for_gpt_attention
        else:
            # Slopes are float32 [1, Hq, 1, 1]; TensorRT-LLM rounds them to the model's dtype, we do not.
            slopes = _value(self, "alibi_slopes")
            if slopes is not None:
                slopes = slopes.view([self.num_attention_heads])
            inputs["alibi_slopes"] = slopes
        inputs["host_context_lengths"] = attention.host_context_lengths
        inputs["host_runtime_perf_knobs"] = attention.host_runtime_perf_knobs
        inputs["host_context_progress"] = attention.host_context_progress
        if plan.local_cache is LocalCache.SLOTS:
            state = plan.layers[razor.first_layer + self.local_layer_idx].state_layer
            if state < 0:  # no local heads: the plugin has the inputs all the same, and reads none
                state = min(razor.states)
            inputs["slot_mapping"] = razor.slot_mapping
            inputs["conv_state_ptr"], inputs["rnn_state_ptr"] = razor.states[state]
        for name, tensor in inputs.items():
            if tensor is None:
                raise RazorError(
                    f"attention layer {self.local_layer_idx}: input {name}: expected a tensor, found "
                    "none; was the network made by trtllm-build or trt-razor build?"
                )
        return inputs

    def _attention_fields(self) -> dict[str, int | float]:
        """Fields that the layer itself knows; counts are those of this rank."""
        return {
            "num_heads": self.num_attention_heads,
            "num_kv_heads": self.num_attention_kv_heads,
            "head_dim": self.attention_head_size,
            "position": _POSITIONS[self.position_embedding_type],
            "rotary_dim": self.rotary_embedding_dim,
            "scale": 1.0 / (self.q_scaling * math.sqrt(self.attention_head_size)),
        }

    def _refusal(self, text: str) -> UsageError:
        return UsageError(f"attention layer {self.local_layer_idx}: {text}")


def adopt(attention: Attention, eps: float) -> None:
    """Make an attention layer of a model a ``RazorAttention``.

    Args:
        eps: of the norms of queries and keys: TensorRT-LLM's models leave it at the layer's default
            instead of the checkpoint's.

    Raises:
        UsageError: the layer computes something that our plugin does not.
    """
    where = f"attention layer {attention.local_layer_idx}"
    if type(attention) is not Attention:
        raise UsageError(f"{where}: expected Attention, found {type(attention).__name__}")
    for name, what in _REFUSED.items():
        value = getattr(attention, name, None)
        if value is not None and value is not False and not _is_zero(value):
            raise UsageError(f"{where}: {name}: {what} is not supported by Razor layers")
    if attention.attention_mask_type != AttentionMaskType.causal:
        raise UsageError(
            f"{where}: attention_mask_type: expected causal, found "
            f"{_name(attention.attention_mask_type)}"
        )
    position = attention.position_embedding_type
    if position not in _POSITIONS:
        raise UsageError(
            f"{where}: position_embedding_type: expected "
            f"{', '.join(map(_name, _POSITIONS))}, found {_name(position)}"
        )
    if position.is_rope() and attention.rotary_embedding_scale_type not in _SCALINGS:
        raise UsageError(
            f"{where}: rotary scaling: expected {', '.join(map(_name, _SCALINGS))}, found "
            f"{_name(attention.rotary_embedding_scale_type)}: its angles depend on the length"
        )
    if attention.cp_size != 1:
        raise UsageError(f"{where}: cp_size: expected 1, found {attention.cp_size}")
    if attention.qk_layernorm:
        if not attention.layernorm_share:
            raise UsageError(f"{where}: expected one QK-norm weight for all heads")
        attention.q_layernorm.eps = attention.k_layernorm.eps = eps
    attention.__class__ = RazorAttention


def load_plugin_library() -> None:
    """Register our plugin in this process, if it is not there yet.

    Raises:
        RazorError: the library is missing or cannot be loaded.
    """
    registry = trt.get_plugin_registry()
    # A second registration of the same creators is an error: one load a process.
    if any(c.plugin_namespace == PLUGIN[2] for c in registry.all_creators):
        return
    library = find_plugin(trt)
    if registry.load_library(str(library)) is None:
        raise RazorError(
            f"{library}: cannot be loaded; TensorRT's message is above. Expected the plugin for "
            f"TensorRT {trt.__version__}"
        )


def add_plugin(
    name: str, inputs: Mapping[str, Tensor], fields: Mapping[str, int | float]
) -> Tensor:
    """Add RazorGptAttention to the network that is being made.

    Args:
        inputs: in the plugin's order; the keys are for the reader.
        fields: by name, all of them.

    Returns:
        [tokens, Hq · D] in the dtype of ``qkv``.

    Raises:
        RazorError: the plugin is not registered, or refuses its fields.
    """
    creator = trt.get_plugin_registry().get_creator(*PLUGIN)
    if creator is None:
        raise RazorError(f"{PLUGIN[0]}: not registered with TensorRT; load_plugin_library() first")
    # TensorRT reads the arrays while it makes the plugin: they must live until then.
    arrays = {key: _field_data(key, value) for key, value in fields.items()}
    collection = trt.PluginFieldCollection(
        [trt.PluginField(key, array, kind) for key, (array, kind) in arrays.items()]
    )
    plugin = creator.create_plugin(name, collection, trt.TensorRTPhase.BUILD)
    if plugin is None:
        raise RazorError(f"{PLUGIN[0]} refused the fields of {name}; its message is above")
    layer = default_trtnet().add_plugin_v3([t.trt_tensor for t in inputs.values()], [], plugin)
    if layer is None:
        raise RazorError(f"TensorRT refused {PLUGIN[0]} of {name}; its message is above")
    return _create_tensor(layer.get_output(0), layer)


def _field_data(name: str, value: int | float) -> tuple[np.ndarray, Any]:
    if isinstance(value, float):
        return np.array([value], np.float32), trt.PluginFieldType.FLOAT32
    if name.endswith("_bytes"):
        return np.array([value], np.int64), trt.PluginFieldType.INT64
    return np.array([value], np.int32), trt.PluginFieldType.INT32


def _value(module: Attention, name: str) -> Tensor | None:
    """The tensor of a parameter, if the layer has it."""
    parameter = getattr(module, name, None)
    return None if parameter is None else parameter.value


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def _name(member: Any) -> str:
    return getattr(member, "name", str(member))
