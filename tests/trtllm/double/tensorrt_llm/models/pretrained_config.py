"""``PretrainedConfig`` and ``QuantConfig``; in models/modeling_utils.py of TensorRT-LLM.

Read: names and defaults, that unknown keys are kept (with a warning) and written again, derived
defaults, ``from_dict`` by MODEL_MAP (KeyError for an unknown architecture), ``to_dict`` (a deep copy of
``__dict__`` without the rank). QuantConfig refuses unknown keys; that 1.0 lacks
``mamba_ssm_cache_dtype`` is inferred.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from .._common import keep
from .._release import RELEASE
from ..functional import PositionEmbeddingType
from ..logger import logger
from ..mapping import Mapping
from ..quantization.mode import KV_CACHE_QUANT_ALGO_LIST, QuantAlgo, QuantMode

_QUANT_DEFAULTS: dict[str, Any] = {
    "quant_algo": None,
    "kv_cache_quant_algo": None,
    "group_size": 128,
    "smoothquant_val": 0.5,
    "clamp_val": None,
    "use_meta_recipe": False,
    "has_zero_point": False,
    "pre_quant_scale": False,
    "exclude_modules": None,
}
if RELEASE >= (1, 1):
    _QUANT_DEFAULTS["mamba_ssm_cache_dtype"] = None


class QuantConfig:
    def __init__(self, **values: Any) -> None:
        unknown = set(values) - set(_QUANT_DEFAULTS)
        if unknown:
            raise TypeError(f"QuantConfig.__init__() got an unexpected keyword argument {unknown}")
        for name, default in _QUANT_DEFAULTS.items():
            setattr(self, name, values.get(name, default))
        if self.quant_algo is not None:
            self.quant_algo = QuantAlgo(self.quant_algo).value
        if self.kv_cache_quant_algo is not None:
            assert QuantAlgo(self.kv_cache_quant_algo) in KV_CACHE_QUANT_ALGO_LIST
            self.kv_cache_quant_algo = QuantAlgo(self.kv_cache_quant_algo).value

    @property
    def quant_mode(self) -> QuantMode:
        return QuantMode.from_quant_algo(self.quant_algo, self.kv_cache_quant_algo)

    def stored(self) -> dict[str, Any]:
        return dict(vars(self))

    # to_dict in 1.0 - 1.1, model_dump later (read); which one 1.2 has is not known: both.
    to_dict = model_dump = stored


class PretrainedConfig:
    def __init__(
        self,
        *,
        architecture: str,
        dtype: str,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        vocab_size: int | None = None,
        hidden_act: str = "gelu",
        logits_dtype: str = "float32",
        norm_epsilon: float = 1e-5,
        position_embedding_type: Any = PositionEmbeddingType.learned_absolute,
        max_position_embeddings: int | None = None,
        rotary_embedding_dim: int | None = None,
        num_key_value_heads: int | None = None,
        intermediate_size: int | None = None,
        mapping: Any = None,
        quantization: Any = None,
        use_parallel_embedding: bool = False,
        embedding_sharding_dim: int = 0,
        head_size: int | None = None,
        qk_layernorm: bool = False,
        runtime_defaults: Any = None,
        **kwargs: Any,
    ) -> None:
        keep(self, locals())
        if isinstance(position_embedding_type, str):
            self.position_embedding_type = PositionEmbeddingType.from_string(
                position_embedding_type
            )
        if not isinstance(mapping, Mapping):
            self.mapping = Mapping.from_dict(mapping or {})
        if not isinstance(quantization, QuantConfig):
            self.quantization = QuantConfig(**(quantization or {}))
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.head_size = head_size or hidden_size // num_attention_heads
        keep(self, kwargs)
        if kwargs:
            logger.warning(f"{type(self).__name__}: fields it does not know: {sorted(kwargs)}")
        if rotary_embedding_dim is None:
            rotated = int(self.head_size * getattr(self, "rotary_pct", 1.0))
            self.rotary_embedding_dim = getattr(self, "rotary_dim", rotated)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Any:
        from . import MODEL_MAP

        config_cls = MODEL_MAP[config["architecture"]].config_class
        return config_cls(**config)

    @classmethod
    def from_json_file(cls, config_file: str) -> Any:
        return cls.from_dict(json.loads(Path(config_file).read_text()))

    @classmethod
    def from_checkpoint(cls, ckpt_dir: str) -> Any:
        return cls.from_json_file(str(Path(ckpt_dir) / "config.json"))

    def to_dict(self) -> dict[str, Any]:
        out = copy.deepcopy(self.__dict__)
        out["position_embedding_type"] = str(self.position_embedding_type)
        out["mapping"] = self.mapping.to_dict()
        out["mapping"].pop("rank")
        out["quantization"] = self.quantization.stored()
        return out

    def to_json_file(self, config_file: str) -> None:
        Path(config_file).write_text(json.dumps(self.to_dict(), indent=4))

    @property
    def kv_dtype(self) -> str:
        names = {"INT8": "int8", "FP8": "fp8", "NVFP4": "fp4"}
        return names.get(self.quantization.kv_cache_quant_algo, self.dtype)

    @property
    def quant_mode(self) -> QuantMode:
        return self.quantization.quant_mode

    @property
    def quant_algo(self) -> Any:
        return self.quantization.quant_algo

    def set_rank(self, rank: int) -> None:
        self.mapping.rank = rank
