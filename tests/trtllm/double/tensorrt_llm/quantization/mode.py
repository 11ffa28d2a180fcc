"""``QuantAlgo`` and ``QuantMode``. Read: names and what they mean. Bits are inferred, and matter not."""

from __future__ import annotations

import enum


class QuantAlgo(str, enum.Enum):
    W8A16 = "W8A16"
    W4A16 = "W4A16"
    W4A16_AWQ = "W4A16_AWQ"
    W4A8_AWQ = "W4A8_AWQ"
    W8A16_GPTQ = "W8A16_GPTQ"
    W4A16_GPTQ = "W4A16_GPTQ"
    W8A8_SQ_PER_CHANNEL = "W8A8_SQ_PER_CHANNEL"
    W8A8_SQ_PER_TENSOR_PLUGIN = "W8A8_SQ_PER_TENSOR_PLUGIN"
    FP8 = "FP8"
    FP8_PER_CHANNEL_PER_TOKEN = "FP8_PER_CHANNEL_PER_TOKEN"
    FP8_BLOCK_SCALES = "FP8_BLOCK_SCALES"
    INT8 = "INT8"
    MIXED_PRECISION = "MIXED_PRECISION"
    NVFP4 = "NVFP4"
    NO_QUANT = "NO_QUANT"


KV_CACHE_QUANT_ALGO_LIST = [QuantAlgo.FP8, QuantAlgo.INT8, QuantAlgo.NVFP4]


class QuantMode(enum.IntFlag):
    INT4_WEIGHTS = enum.auto()
    INT8_WEIGHTS = enum.auto()
    PER_GROUP = enum.auto()
    INT8_KV_CACHE = enum.auto()
    FP8_KV_CACHE = enum.auto()
    FP8_QDQ = enum.auto()
    FP8_ROWWISE = enum.auto()
    OTHER = enum.auto()
    NVFP4_KV_CACHE = enum.auto()

    @classmethod
    def from_quant_algo(
        cls, quant_algo: str | None = None, kv_cache_quant_algo: str | None = None
    ) -> QuantMode:
        weights = {
            None: cls(0),
            "NO_QUANT": cls(0),
            "FP8": cls.FP8_QDQ,
            "FP8_PER_CHANNEL_PER_TOKEN": cls.FP8_ROWWISE,
            "W8A16": cls.INT8_WEIGHTS,
            "W4A16": cls.INT4_WEIGHTS,
            "W4A16_AWQ": cls.INT4_WEIGHTS | cls.PER_GROUP,
        }
        caches = {None: cls(0), "FP8": cls.FP8_KV_CACHE, "INT8": cls.INT8_KV_CACHE}
        caches["NVFP4"] = cls.NVFP4_KV_CACHE
        return weights.get(quant_algo, cls.OTHER) | caches[kv_cache_quant_algo]

    def has_int8_kv_cache(self) -> bool:
        return bool(self & QuantMode.INT8_KV_CACHE)

    def has_fp8_kv_cache(self) -> bool:
        return bool(self & QuantMode.FP8_KV_CACHE)

    def has_fp4_kv_cache(self) -> bool:
        return bool(self & QuantMode.NVFP4_KV_CACHE)

    def has_kv_cache_quant(self) -> bool:
        return self.has_int8_kv_cache() or self.has_fp8_kv_cache() or self.has_fp4_kv_cache()
