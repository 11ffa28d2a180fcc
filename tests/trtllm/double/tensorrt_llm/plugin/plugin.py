"""``PluginConfig`` and the workspace of the custom all-reduce.

Read: names and defaults (the same in all releases), but for those marked inferred. 1.0: a class with
slots whose constructor takes nothing, ``to_dict``, ``from_dict``, ``update_from_dict`` ("enable"/"disable" there only), booleans
asserted, unknown attributes AttributeErrors. 1.1 and 1.2: a pydantic model, unknown keywords ignored,
unknown attributes ValueErrors, "enable"/"disable" anywhere, ``model_dump``, ``model_copy``.
'auto' reads as ``dtype``; what is written to config.json is the stored value (inferred for pydantic).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import tensorrt as trt
from tensorrt.errors import require

from .._release import RELEASE

TRT_LLM_PLUGIN_NAMESPACE = "tensorrt_llm"

_TYPES = (None, "auto", "float16", "float32", "bfloat16", "int32", "fp8", "nvfp4")
DEFAULTS: dict[str, Any] = {
    "dtype": "float16",
    "bert_attention_plugin": "auto",
    "gpt_attention_plugin": "auto",
    "gemm_plugin": None,
    "nccl_plugin": "auto",
    "lora_plugin": None,
    "smooth_quant_plugins": True,
    "moe_plugin": "auto",
    "mamba_conv1d_plugin": "auto",
    "context_fmha": True,
    "paged_kv_cache": None,
    "remove_input_padding": True,
    "norm_quant_fusion": False,
    "reduce_fusion": False,
    "user_buffer": False,
    "tokens_per_block": 32,
    "use_paged_context_fmha": True,
    "use_fp8_context_fmha": True,
    "fuse_fp4_quant": False,
    "multiple_profiles": False,
    "paged_state": True,
    "streamingllm": False,
    "manage_weights": False,
    "use_fused_mlp": True,
    "pp_reduce_scatter": False,
    # Inferred:
    "explicitly_disable_gemm_plugin": False,
    "gemm_swiglu_plugin": None,
    "fp8_rowwise_gemm_plugin": None,
    "qserve_gemm_plugin": None,
    "identity_plugin": None,
    "dora_plugin": False,
    "weight_only_groupwise_quant_matmul_plugin": None,
    "weight_only_quant_matmul_plugin": None,
    "smooth_quant_gemm_plugin": None,
    "layernorm_quantization_plugin": None,
    "rmsnorm_quantization_plugin": None,
    "quantize_per_token_plugin": False,
    "quantize_tensor_plugin": False,
    "low_latency_gemm_plugin": None,
    "low_latency_gemm_swiglu_plugin": None,
    "gemm_allreduce_plugin": None,
    "bert_context_fmha_fp32_acc": False,
}
_SWITCH = {"enable": True, "disable": False}


class PluginConfig:
    def __init__(self, **kwargs: Any) -> None:
        if RELEASE < (1, 1) and kwargs:
            raise TypeError(f"PluginConfig.__init__() got an unexpected keyword argument {kwargs}")
        object.__setattr__(self, "_stored", dict(DEFAULTS))
        for name, value in kwargs.items():
            if name in DEFAULTS:
                setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        stored = object.__getattribute__(self, "__dict__").get("_stored", {})
        if name not in stored:
            raise AttributeError(f"'PluginConfig' object has no attribute '{name}'")
        return stored["dtype"] if stored[name] == "auto" else stored[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in DEFAULTS:
            error = AttributeError if RELEASE < (1, 1) else ValueError
            raise error(f"'PluginConfig' object has no field '{name}'")
        default = DEFAULTS[name]
        if isinstance(default, bool) or name == "paged_kv_cache":
            if RELEASE >= (1, 1):
                value = _SWITCH.get(value, value) if isinstance(value, str) else value
            assert isinstance(value, bool) or (value is None and default is None), (
                f"{name}={value!r}"
            )
        elif name == "tokens_per_block":
            assert type(value) is int, f"{name}={value!r}"
        else:
            if RELEASE >= (1, 1) and value in _SWITCH:
                value = "auto" if _SWITCH[value] else None
            assert value in _TYPES, f"{name}={value!r}"
        self._stored[name] = value

    def __deepcopy__(self, memo: dict[int, Any]) -> PluginConfig:
        other = PluginConfig()
        other._stored.update(self._stored)
        return other

    def validate(self) -> None:
        require(not self.streamingllm or self.context_fmha, "streamingllm needs context_fmha")

    def update(self, values: dict[str, Any]) -> None:
        """Double only: sets what is known, from a dict or the command line."""
        for name, value in values.items():
            if name in DEFAULTS:
                is_switch = isinstance(DEFAULTS[name], bool) or name == "paged_kv_cache"
                if value in _SWITCH and isinstance(value, str):
                    value = _SWITCH[value] if is_switch else "auto" if _SWITCH[value] else None
                setattr(self, name, value)

    @classmethod
    def from_arguments(cls, args: Any) -> PluginConfig:
        config = cls()
        config.update({k: v for k, v in vars(args).items() if v is not None})
        return config

    if RELEASE < (1, 1):

        @classmethod
        def from_dict(cls, config: dict[str, Any]) -> PluginConfig:
            out = cls()
            out.update_from_dict(config)
            return out

        def update_from_dict(self, config: dict[str, Any]) -> None:
            self.update(config)

        def to_dict(self) -> dict[str, Any]:
            return dict(self._stored)

    else:

        def model_dump(self) -> dict[str, Any]:
            return dict(self._stored)

        def model_copy(self, *, update: dict[str, Any] | None = None) -> PluginConfig:
            out = copy.deepcopy(self)
            out.update(update or {})
            return out

    def stored(self) -> dict[str, Any]:
        """Double only: what config.json shows, whatever the release calls the method."""
        return dict(self._stored)


class _AllReduceHelper:
    def set_workspace_tensor(self, mapping: Any, num_profiles: int | None = None) -> None:
        """Adds the engine input ``all_reduce_workspace``: int64 [7 tp + 3]."""
        from ..functional import Tensor  # which imports this module

        size = 7 * mapping.tp_size + 3
        self.workspace = Tensor(
            name="all_reduce_workspace",
            dtype=trt.int64,
            shape=[size],
            dim_range=OrderedDict([("all_reduce_size", [size] * (num_profiles or 1))]),
        )


_helper: _AllReduceHelper | None = None


def init_all_reduce_helper() -> None:
    global _helper
    _helper = _AllReduceHelper()


def current_all_reduce_helper() -> _AllReduceHelper:
    assert _helper is not None, "all-reduce: no helper, since no model was made"
    return _helper
