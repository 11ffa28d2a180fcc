"""Budgets: a share of the bits of a dense 16-bit cache, solved for the most rows that fit."""

from __future__ import annotations

import math
from fractions import Fraction

from trt_razor.errors import UsageError
from trt_razor.evaluation.methods.kept import row_bits


def check_budget(budget: float) -> None:
    """Raises UsageError unless it is a number in (0, 1]."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise UsageError(f"budget: expected a share of the dense cache in (0, 1], found {budget!r}")


def allowed_bits(budget: float, heads: int, n: int, head_dim: int) -> Fraction:
    """Bits of a budget, ``heads`` KV heads of all layers together."""
    # Fraction(str): 0.2 means a fifth, not the binary number next to it.
    return Fraction(str(budget)) * heads * n * row_bits(head_dim)


def rows_within(budget: float, n: int, full_heads: int, other_heads: int, least: int) -> int:
    """The most rows a head may keep, if ``full_heads`` keep all n and the others this many each.

    Largest P with full·n + other·P <= budget·(full + other)·n, and P <= n.

    Args:
        budget: share of the dense cache's bits, all rows stored alike.
        least: fewest rows that make sense for the method.

    Raises:
        UsageError: not even ``least`` rows fit; says which budget would do.
    """
    heads = full_heads + other_heads
    if not other_heads:
        if budget < 1:
            raise UsageError(f"budget: every head is kept whole, expected 1, found {budget}")
        return n
    allowed = Fraction(str(budget)) * heads * n - full_heads * n
    rows = min(n, math.floor(allowed / other_heads))
    if rows < min(least, n):
        needed = (full_heads * n + other_heads * min(least, n)) / (heads * n)
        raise UsageError(
            f"budget: {budget} of {n} tokens leaves {max(rows, 0)} rows a head where {least} are the "
            f"least; expected {math.ceil(needed * 1000) / 1000} or more"
        )
    return rows
