"""Heavy hitters: dropped tokens that stay rows of their own (docs/semantics.md, "Heavy hitters").

Which they are is decided when a chunk is folded, from the queries at its end: a token that these
give much attention, and whose value is long, changes the output most if it is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trt_razor.policy import SELECT_QUERIES


def scores(queries: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """ln ‖v_c‖ + ln Σ exp(s·q·k_c) over the chunk's last queries and the query heads of a group.

    Args:
        queries: [H, g, W, D]; the last ``SELECT_QUERIES`` of them count.
        k, v: [H, C, D] candidates, float32 or float64.

    Returns:
        [H, C]; -inf for a value of zeros.
    """
    q = queries[:, :, -SELECT_QUERIES:].to(k.dtype).flatten(1, 2)
    attention = torch.logsumexp(scale * (q @ k.transpose(-1, -2)), dim=1)
    return attention + v.norm(dim=-1).log()


def choose(score: Tensor, keep: int) -> Tensor:
    """The ``keep`` highest of each row, ties to the lower index: bool, shape of ``score`` [H, C]."""
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def selects(candidates: int, heavy_hitters: int) -> bool:
    """Whether a chunk with so many candidates chooses; as long as there is room nobody has to go."""
    return candidates > heavy_hitters


def first_come(held: int, dropped: int, heavy_hitters: int, device: torch.device) -> Tensor:
    """Winners of a fold that does not choose: who is there, and the first ones while there is room.

    Returns:
        bool [held + dropped].
    """
    return torch.arange(held + dropped, device=device) < max(held, heavy_hitters)


def rows_of_winners(wins: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """Where the winners of one head live.

    Args:
        wins: bool [C]: candidates 0 .. held - 1 are in rows of these numbers already.

    Returns:
        dropped tokens that win (their candidate index), and the row (from 0) that each takes:
        rows of losers and unused rows, ascending.
    """
    entering = held + wins[held:].nonzero().flatten()
    free = torch.ones(held + len(entering), dtype=torch.bool, device=wins.device)
    free[:held] = ~wins[:held]
    return entering, free.nonzero().flatten()[: len(entering)]
