"""Retrieval heads of ALiBi models: how far a head can see at all (arXiv 2407.15891, Theorem 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.heads.selection import Heads, check_share, share_count
from trt_razor.models.positions import alibi_slopes
from trt_razor.models.spec import ModelSpec


class Weights(Protocol):
    """The part of a checkpoint that is read here."""

    spec: ModelSpec

    def tensor(self, name: str) -> np.ndarray: ...


def product_norm(a: np.ndarray, b: np.ndarray) -> float:
    """Spectral norm ‖AᵀB‖₂ of two [d, hidden] matrices, without the hidden × hidden product.

    With A ᵀ= Q_a R_a and Bᵀ = Q_b R_b, the orthogonal factors change no norm:
    ‖AᵀB‖₂ = ‖R_a R_bᵀ‖₂, a d × d matrix.
    """
    r_a, r_b = (np.asarray(np.linalg.qr(m.T.astype(np.float64), mode="r")) for m in (a, b))
    return float(np.linalg.norm(r_a @ r_b.T, 2))


def head_scope(
    norm: float, gamma: np.ndarray, beta: np.ndarray | None, slope: float, eps: float
) -> float:
    """L_h = (2·‖W_Q W_Kᵀ‖₂·(‖γ‖² + ‖b‖²) - ln ε) / slope, in tokens.

    Beyond this distance no token can get more than ε of the head's attention. ``beta`` is the bias
    of the input norm; None for RMSNorm, which has none.
    """
    power = float(np.sum(np.square(gamma, dtype=np.float64)))
    if beta is not None:
        power += float(np.sum(np.square(beta, dtype=np.float64)))
    return (2.0 * norm * power - math.log(eps)) / slope


def alibi_scopes(
    checkpoint: Weights, eps: float, progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """Scope of every KV head in tokens, float64 [layers, KV heads]: the largest in its group.

    One layer's q and k projections are in memory at a time.

    Raises:
        UsageError: the model has no ALiBi slopes, or eps is not in 0..1.
    """
    spec = checkpoint.spec
    if spec.position != "alibi":
        raise UsageError(
            f"{spec.name}: scopes are defined for ALiBi models, this one uses {spec.position}; "
            f"use a method that probes: paper, combined, echo or induction"
        )
    if not 0 < eps < 1:
        raise UsageError(f"eps: expected a number between 0 and 1, found {eps!r}")
    slopes = alibi_slopes(spec.num_heads)
    dim, hidden = spec.head_dim, spec.hidden_size
    scopes = np.zeros((spec.num_layers, spec.num_kv_heads))
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        gamma = checkpoint.tensor(prefix + "input_layernorm.weight").astype(np.float64)
        wq = checkpoint.tensor(prefix + "self_attn.q_proj.weight").reshape(-1, dim, hidden)
        wk = checkpoint.tensor(prefix + "self_attn.k_proj.weight").reshape(-1, dim, hidden)
        for h in range(spec.num_heads):
            kv = h // spec.group
            scope = head_scope(product_norm(wq[h], wk[kv]), gamma, None, float(slopes[h]), eps)
            scopes[layer, kv] = max(scopes[layer, kv], scope)
        if progress is not None:
            progress(layer + 1, spec.num_layers)
    return scopes


def select_by_scope(scopes: np.ndarray, window: int, scope_share: float | None = None) -> Heads:
    """KV heads whose scope exceeds ``window`` tokens; of those at most ``scope_share`` of all heads.

    The bound is loose (it takes the worst token at every step), so it may let every head retrieve;
    the share then keeps those that see farthest.

    Raises:
        UsageError: window < 1 or a share outside 0..1.
    """
    if window < 1:
        raise UsageError(f"window: expected at least 1 token, found {window}")
    layers, kv = scopes.shape
    order = [int(i) for i in np.argsort(-scopes.ravel(), kind="stable")]
    chosen = [i for i in order if scopes.ravel()[i] > window]
    if scope_share is not None:
        check_share("scope_share", scope_share)
        chosen = chosen[: share_count(scope_share, scopes.size)]
    keep = set(chosen)
    return tuple(tuple(h for h in range(kv) if i * kv + h in keep) for i in range(layers))
