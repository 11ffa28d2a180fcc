"""Position embeddings: enumerations, RoPE tables, ALiBi slopes; in functional.py of TensorRT-LLM.

Read (1.1 - 1.2 age): names and numbers, ``is_rope`` (neither yarn nor chatglm), shapes and layout of
the tables, slopes float32 [1, heads of the rank, 1, 1]. The formula of slopes where the number of heads
is no power of two is that of the ALiBi paper's code (inferred).
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np

from ._release import RELEASE


class _FromString(enum.IntEnum):
    @classmethod
    def from_string(cls, name: str) -> Any:
        try:
            return cls[name]
        except KeyError:
            raise ValueError(f"{name!r} is no {cls.__name__}") from None

    def __str__(self) -> str:
        return self.name


class RotaryScalingType(_FromString):
    none = 0
    linear = 1
    dynamic = 2
    longrope = 3
    llama3 = 4
    yarn = 5
    mrope = 6


class PositionEmbeddingType(_FromString):
    learned_absolute = 0
    rope_gptj = 1
    rope_gpt_neox = 2
    long_rope = 3
    alibi = 4
    alibi_with_scale = 5
    relative = 6
    chatglm = 7
    yarn = 8
    mrope = 9
    deferred = 10

    def is_rope(self) -> bool:
        return self.name in ("rope_gptj", "rope_gpt_neox", "long_rope", "mrope")

    def is_alibi(self) -> bool:
        return self.name in ("alibi", "alibi_with_scale")


class AttentionMaskType(enum.IntEnum):
    padding = 0
    causal = 1
    sliding_window_causal = 2
    bidirectional = 3
    bidirectionalglm = 4
    blocksparse = 5
    custom_mask = 6


def generate_alibi_slopes(
    num_heads: int,
    tp_size: int = 1,
    tp_rank: int = 0,
    alibi_scale: float = 1.0,
    alibi_bias_max: int = 8,
) -> np.ndarray:
    """Slopes of a rank's heads, float32 [1, heads, 1, 1]; ``num_heads`` is that of all ranks."""
    power = 1 << (num_heads.bit_length() - 1)
    base = 2.0 ** (-alibi_bias_max / power)
    slopes = [base ** (i + 1) for i in range(power)]
    half = 2.0 ** (-alibi_bias_max / (2 * power))
    slopes += [half ** (2 * i + 1) for i in range(num_heads - power)]
    mine = num_heads // tp_size
    part = np.asarray(slopes[tp_rank * mine : (tp_rank + 1) * mine], np.float32)
    return (part * np.float32(alibi_scale)).reshape(1, mine, 1, 1)


class RopeEmbeddingUtils:
    @staticmethod
    def create_sinusoidal_positions_for_attention_plugin(
        num_pos: int,
        dim: int,
        theta: float = 10000.0,
        scale: float = 1.0,
        scale_type: RotaryScalingType = RotaryScalingType.none,
        rope_scaling_config: dict[str, Any] | None = None,
        dtype: Any = np.float32,
    ) -> tuple[np.ndarray, np.ndarray]:
        """inv_freq [dim / 2] and pairs (cos, sin) [1, num_pos * dim]."""
        if scale_type == RotaryScalingType.dynamic and RELEASE >= (1, 1):
            assert rope_scaling_config is not None
            theta *= rope_scaling_config["alpha"] ** (dim / (dim - 2))
        inv = 1.0 / theta ** (np.arange(0, dim, 2) / dim)
        if scale_type == RotaryScalingType.linear:
            inv = inv / scale
        # The numbers of llama3's scaling are not worked out: nothing here is computed with them.
        inv = inv.astype(dtype)
        angles = np.outer(np.arange(num_pos, dtype=dtype), inv)
        pairs = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
        return inv, pairs.reshape(1, -1).astype(dtype)
