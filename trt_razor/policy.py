"""RazorPolicy: what a local (non-retrieval) KV head keeps. The only place these numbers live.

Symbols follow the paper (arXiv 2407.15891, Algorithm 1): N0 sink tokens, S0 smallest window,
C compression. See docs/semantics.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from trt_razor.errors import UsageError

MAX_COMP_TOKENS = 256
"""Upper bound on M: more rows than this cost more than the window they replace."""

MAX_HEAVY_HITTERS = 1024
"""Upper bound on H: beyond it a larger window costs the same and needs no choice."""

SELECT_QUERIES = 64
"""Queries at the end of a chunk that choose the heavy hitters; a shorter chunk has fewer."""


@dataclass(frozen=True)
class RazorPolicy:
    """The retention rule of local KV heads.

    Args:
        sink_tokens: N0, first tokens kept for ever (>= 0).
        min_window: S0, smallest recent window in tokens (>= 1).
        compression: C, the window is ceil(n / C) once that exceeds S0 (integer >= 1); ``None``
            means a fixed window of S0 tokens at any length.
        comp_tokens: M, compensation tokens (0..256); 0 drops tokens without compensation.
        heavy_hitters: H, dropped tokens that stay rows of their own: those that the queries at the
            end of a chunk attend most (0..1024). Not with ALiBi: such rows carry no position.

    Raises:
        UsageError: naming the wrong field.
    """

    sink_tokens: int = 4
    min_window: int = 4000
    compression: int | None = 5
    comp_tokens: int = 1
    heavy_hitters: int = 0

    def __post_init__(self) -> None:
        for name in ("sink_tokens", "min_window", "comp_tokens", "heavy_hitters"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise UsageError(f"policy.{name}: expected an integer, found {value!r}")
        if self.sink_tokens < 0:
            raise UsageError(f"policy.sink_tokens: expected >= 0, found {self.sink_tokens}")
        if self.min_window < 1:
            raise UsageError(f"policy.min_window: expected >= 1, found {self.min_window}")
        if not 0 <= self.comp_tokens <= MAX_COMP_TOKENS:
            raise UsageError(
                f"policy.comp_tokens: expected 0..{MAX_COMP_TOKENS}, found {self.comp_tokens}"
            )
        if not 0 <= self.heavy_hitters <= MAX_HEAVY_HITTERS:
            raise UsageError(
                f"policy.heavy_hitters: expected 0..{MAX_HEAVY_HITTERS}, found {self.heavy_hitters}"
            )
        c = self.compression
        if c is not None and (not isinstance(c, int) or isinstance(c, bool) or c < 1):
            raise UsageError(
                f"policy.compression: expected an integer >= 1, or none for a fixed window, "
                f"found {c!r}"
            )

    # The rule ---------------------------------------------------------------------------------
    def window(self, n: int) -> int:
        """L(n) = max(S0, ceil(n / C)): window length in tokens with ``n`` tokens cached."""
        if self.compression is None:
            return self.min_window
        return max(self.min_window, -(-n // self.compression))

    def dropped(self, n: int) -> int:
        """D(n) = max(0, n - N0 - L(n)): positions N0 .. N0 + D(n) - 1 are no longer kept."""
        return max(0, n - self.sink_tokens - self.window(n))

    def heavy(self, n: int) -> int:
        """h(n) = min(H, D(n)): heavy hitters in use with ``n`` tokens cached."""
        return min(self.heavy_hitters, self.dropped(n))

    # The layout -------------------------------------------------------------------------------
    @property
    def kept_rows(self) -> int:
        """Rows in front of the ring: sinks and heavy hitters."""
        return self.sink_tokens + self.heavy_hitters

    def ring_rows(self, n_max: int) -> int:
        """W_cap, rows of the ring for sequences of up to ``n_max`` tokens.

        L(n_max) + 1, so that a decode step may write before it folds; never more than the
        ``n_max - N0`` rows a sequence that drops nothing needs (and at least 1).
        """
        return max(1, min(self.window(n_max) + 1, n_max - self.sink_tokens))

    def local_rows(self, n_max: int) -> int:
        """Rows of a local head's cache, compensation apart: N0 + H + W_cap."""
        return self.kept_rows + self.ring_rows(n_max)

    def first_drop(self) -> int:
        """Smallest n with D(n) = 1; below it Razor equals dense attention.

        Raises:
            UsageError: if this policy never drops a token (compression = 1).
        """
        if self.compression == 1:
            raise UsageError("policy.compression = 1 keeps every token: nothing is ever dropped")
        n = self.sink_tokens + self.min_window + 1
        while self.dropped(n) == 0:
            n += max(1, self.window(n) + self.sink_tokens + 1 - n)
        return n

    # Presets and JSON -------------------------------------------------------------------------
    def with_(self, **changes: Any) -> RazorPolicy:
        """A copy with some fields changed (``None`` in ``compression`` means a fixed window)."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "policy") -> RazorPolicy:
        """Raises UsageError for an unknown or missing field or a wrong value."""
        names = {f.name for f in fields(cls)}
        for key in data:
            if key not in names:
                raise UsageError(f"{where}.{key}: unknown field; known: {', '.join(sorted(names))}")
        for name in sorted(names):
            if name not in data:
                raise UsageError(f"{where}.{name}: missing")
        return cls(**data)


PRESETS: dict[str, RazorPolicy] = {
    # The paper's settings.
    "paper": RazorPolicy(),
    # A small fixed window, heavy hitters, and cluster means for the rest: docs/fidelity.md.
    "tight": RazorPolicy(min_window=128, compression=None, comp_tokens=16, heavy_hitters=64),
}
