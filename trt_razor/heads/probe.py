"""The probe: random tokens repeated, so that only copying heads have something to look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.models.spec import ModelSpec

MAX_POSITION_FACTOR = 8
"""Longest probe, as a multiple of the positions the model was made for; beyond it is a mistake."""

MIN_POOL = 8
"""Fewest ordinary token ids a probe can be drawn from."""


@dataclass(frozen=True)
class Probe:
    """``[BOS] + block * repeats``.

    Attributes:
        tokens: int64 [n], n = offset + length * repeats.
        length: K, tokens of one block.
        repeats: how often the block occurs (>= 2).
        offset: position of the first block: 1 with a BOS token, 0 for models without one.
        seed: what the block was drawn with.
    """

    tokens: np.ndarray
    length: int
    repeats: int
    offset: int
    seed: int


def token_pool(spec: ModelSpec) -> np.ndarray:
    """Ids the probe may use: the middle half of the vocabulary, int64.

    Special, byte and padding ids sit at either end of a vocabulary, and the rarest merges at the
    end; the middle half holds ordinary tokens in every supported family. BOS and EOS are left out
    wherever they are.
    """
    ids = np.arange(spec.vocab_size // 4, spec.vocab_size - spec.vocab_size // 4, dtype=np.int64)
    special = {*spec.eos_token_ids} | (
        {spec.bos_token_id} if spec.bos_token_id is not None else set()
    )
    return ids[~np.isin(ids, sorted(special))]


def make_probe(spec: ModelSpec, length: int = 2500, repeats: int = 4, seed: int = 0) -> Probe:
    """Draw a probe; the same arguments give the same tokens on every machine and NumPy version.

    Ids are drawn without replacement, so that "an earlier occurrence" is a whole number of blocks
    back and nothing else. A vocabulary with fewer ordinary ids than ``length`` is used several
    times over, each pass in a new order.

    Raises:
        UsageError: length < 2, repeats < 2, a negative seed, a vocabulary too small to draw from,
            or a probe absurdly longer than the model's positions.
    """
    if length < 2:
        raise UsageError(f"probe length: expected at least 2 tokens, found {length}")
    if repeats < 2:
        raise UsageError(f"probe repeats: expected at least 2, found {repeats}")
    if seed < 0:
        raise UsageError(f"seed: expected >= 0, found {seed}")
    offset = 0 if spec.bos_token_id is None else 1
    limit = MAX_POSITION_FACTOR * spec.max_positions
    if offset + length * repeats > limit:
        raise UsageError(
            f"probe length: {length} x {repeats} tokens are more than {MAX_POSITION_FACTOR} times "
            f"the {spec.max_positions} positions of {spec.name}; the largest probe length with "
            f"{repeats} repeats is {(limit - offset) // repeats}"
        )
    pool = token_pool(spec)
    if len(pool) < MIN_POOL:
        raise UsageError(
            f"{spec.name}: vocab_size {spec.vocab_size} leaves {len(pool)} ordinary token ids, "
            f"expected at least {MIN_POOL} to draw a probe from"
        )
    # Sorting raw 64-bit draws is a permutation that no NumPy release can change;
    # Generator.permutation and choice carry no such promise.
    bits = np.random.PCG64(seed)
    passes = -(-length // len(pool))
    block = np.concatenate(
        [pool[np.argsort(bits.random_raw(len(pool)), kind="stable")] for _ in range(passes)]
    )[:length]
    head = [] if spec.bos_token_id is None else [spec.bos_token_id]
    tokens = np.concatenate([np.array(head, dtype=np.int64), np.tile(block, repeats)])
    return Probe(tokens, length, repeats, offset, seed)


def position_warning(spec: ModelSpec, probe: Probe) -> str | None:
    """A sentence if the probe runs past the model's positions (RoPE extrapolates), else None."""
    n = len(probe.tokens)
    if n <= spec.max_positions:
        return None
    fits = (spec.max_positions - probe.offset) // probe.repeats
    return (
        f"the probe has {n} tokens, {spec.name} was made for {spec.max_positions} positions: its last "
        f"{n - spec.max_positions} tokens are scored by extrapolation; a probe length of {fits} fits"
    )
