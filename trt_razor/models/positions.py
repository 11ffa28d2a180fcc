"""Positions of a model as numbers: the rotary table and the ALiBi slopes.

Computed in float64 and rounded to float32 once, so that the reference, the ONNX graph and the
CUDA kernels all read the very same table. NumPy only.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from trt_razor.errors import UsageError, did_you_mean
from trt_razor.models.spec import ModelSpec

ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")


def rope_frequencies(spec: ModelSpec) -> tuple[npt.NDArray[np.float64], float]:
    """Angle per position of each rotated pair, and the factor on cos and sin.

    Scalings: ``linear`` (position interpolation, arXiv 2306.15595), ``llama3`` (Llama 3.1) and
    ``yarn`` (arXiv 2309.00071, NTK-by-parts). ``original_max_positions = 0`` stands for the
    model's ``max_positions``.

    Returns:
        float64 [head_dim / 2] radians per position, falling; and YaRN's attention factor
        (0.1 ln(factor) + 1 unless the model gives one), 1.0 for the other scalings.

    Raises:
        UsageError: the model has no RoPE, its head_dim is odd, or the scaling is unknown.
    """
    rope, dim = spec.rope, spec.head_dim
    if spec.position != "rope":
        raise UsageError(f"{spec.name}: positions are '{spec.position}', expected 'rope'")
    if dim % 2:
        raise UsageError(f"{spec.name}: head_dim: expected an even number for RoPE, found {dim}")
    base = rope.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    original = rope.original_max_positions or spec.max_positions
    if rope.scaling == "none":
        return base, 1.0
    if rope.scaling == "linear":
        return base / rope.factor, 1.0
    if rope.scaling == "llama3":
        turns = original * base / (2 * math.pi)  # rotations within the original context
        low, high = rope.low_freq_factor, rope.high_freq_factor
        # 1 keeps a frequency (many turns), 0 divides it by the factor (few turns).
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return base * (keep + (1.0 - keep) / rope.factor), 1.0
    if rope.scaling == "yarn":
        pairs = np.arange(dim // 2, dtype=np.float64)
        first = max(math.floor(_yarn_pair(rope.beta_fast, spec, original)), 0)
        last = min(math.ceil(_yarn_pair(rope.beta_slow, spec, original)), dim - 1)
        # The ramp needs a length; a step within one pair index is what an empty range means.
        ramp = np.clip((pairs - first) / max(last - first, 1e-3), 0.0, 1.0)
        attention = rope.attention_factor
        if attention is None:
            attention = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
        return base * ((1.0 - ramp) + ramp / rope.factor), float(attention)
    raise UsageError(
        f"{spec.name}: rope.scaling: unknown '{rope.scaling}'; {did_you_mean(rope.scaling, ROPE_SCALINGS)}"
    )


def _yarn_pair(turns: float, spec: ModelSpec, original: int) -> float:
    """Index (a real number) of the pair that makes ``turns`` rotations in the original context."""
    return (
        spec.head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(spec.rope.theta))
    )


def rope_table(spec: ModelSpec, max_positions: int) -> npt.NDArray[np.float32]:
    """cos and sin of every position: float32 [max_positions, head_dim] = [cos | sin].

    Row ``p`` holds head_dim/2 cosines, then head_dim/2 sines, for the half rotation: element ``i``
    turns with element ``i + head_dim/2``. YaRN's attention factor is multiplied into both.

    Raises:
        UsageError: see :func:`rope_frequencies`.
    """
    frequencies, factor = rope_frequencies(spec)
    table = np.empty((max_positions, spec.head_dim), np.float32)
    half = spec.head_dim // 2
    # In blocks: float64 angles of a 1M-position table would need several times its own memory.
    for start in range(0, max_positions, 1 << 14):
        positions = np.arange(start, min(start + (1 << 14), max_positions), dtype=np.float64)
        angles = positions[:, None] * frequencies
        table[start : start + len(positions), :half] = np.cos(angles) * factor
        table[start : start + len(positions), half:] = np.sin(angles) * factor
    return table


def alibi_slopes(num_heads: int) -> npt.NDArray[np.float32]:
    """ALiBi slope of every query head (arXiv 2108.12409), float32 [num_heads], all > 0.

    For a power of two: 2^(-8/n), 2^(-16/n), … 2^-8. Otherwise the slopes of the largest power of
    two below, then every second slope of twice that number, from the first (as in Baichuan).

    Raises:
        UsageError: ``num_heads`` < 1.
    """
    if num_heads < 1:
        raise UsageError(f"alibi_slopes: num_heads: expected >= 1, found {num_heads}")
    whole = 1 << (num_heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 * np.arange(1, whole + 1, dtype=np.float64) / whole)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * whole, 2, dtype=np.float64) / whole)
    return np.concatenate([slopes, between[: num_heads - whole]]).astype(np.float32)
