from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from heads_helpers import TinyCheckpoint, tiny_spec

from trt_razor.errors import UsageError
from trt_razor.heads.alibi import alibi_scopes, head_scope, product_norm, select_by_scope

SPEC = tiny_spec(architecture="baichuan", position="alibi", num_kv_heads=4)


@pytest.mark.parametrize("shape", [(8, 32), (4, 4), (16, 40)])
def test_product_norm_against_the_svd_of_the_whole_product(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(shape), rng.standard_normal(shape)
    want = np.linalg.svd(a.T @ b, compute_uv=False)[0]
    assert product_norm(a, b) == pytest.approx(want, rel=1e-12)
    a[1:] = 0  # rank 1: a Gram matrix of d x d that is singular
    want = np.linalg.svd(a.T @ b, compute_uv=False)[0]
    assert product_norm(a, b) == pytest.approx(want, rel=1e-12)


def test_head_scope_is_theorem_1() -> None:
    gamma, beta = np.array([1.0, 2.0]), np.array([3.0, 0.0])
    assert head_scope(0.5, gamma, None, 0.25, 0.1) == pytest.approx((5 - math.log(0.1)) / 0.25)
    assert head_scope(0.5, gamma, beta, 0.25, 0.1) == pytest.approx((14 - math.log(0.1)) / 0.25)


@pytest.mark.parametrize("kv", [4, 2])
def test_scopes_of_a_model_against_explicit_svd(kv: int) -> None:
    spec = tiny_spec(architecture="baichuan", position="alibi", num_kv_heads=kv)
    checkpoint = TinyCheckpoint(spec)
    steps: list[tuple[int, int]] = []
    scopes = alibi_scopes(checkpoint, 1e-3, lambda i, n: steps.append((i, n)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    slopes = [2.0 ** (-2 * (h + 1)) for h in range(4)]  # ALiBi's for 4 heads
    for layer in range(3):
        p = f"model.layers.{layer}."
        gamma = checkpoint.tensor(p + "input_layernorm.weight").astype(float)
        wq = checkpoint.tensor(p + "self_attn.q_proj.weight").astype(float)
        wk = checkpoint.tensor(p + "self_attn.k_proj.weight").astype(float)
        want = np.zeros(kv)
        for h in range(4):
            j = h // (4 // kv)
            product = wq[8 * h : 8 * h + 8].T @ wk[8 * j : 8 * j + 8]
            norm = np.linalg.svd(product, compute_uv=False)[0]
            scope = (2 * norm * (gamma @ gamma) - math.log(1e-3)) / slopes[h]
            want[j] = max(want[j], scope)
        np.testing.assert_allclose(scopes[layer], want, rtol=1e-6)


def test_a_smaller_eps_sees_farther() -> None:
    checkpoint = TinyCheckpoint(SPEC)
    near, far = alibi_scopes(checkpoint, 1e-1), alibi_scopes(checkpoint, 1e-6)
    slopes = 2.0 ** (-2 * np.arange(1, 5))
    np.testing.assert_allclose(far - near, np.log(1e5) / np.tile(slopes, (3, 1)), rtol=1e-9)


def test_selection_by_scope() -> None:
    scopes = np.array([[10.0, 200.0], [100.0, 300.0]])
    assert select_by_scope(scopes, 100) == ((1,), (1,))  # exceeds, not reaches
    assert select_by_scope(scopes, 1000) == ((), ())
    assert select_by_scope(scopes, 1) == ((0, 1), (0, 1))
    assert select_by_scope(scopes, 1, scope_share=0.25) == ((), (1,))
    assert select_by_scope(scopes, 1, scope_share=0.0) == ((), ())


def test_misuse_is_named() -> None:
    with pytest.raises(UsageError, match="ALiBi models, this one uses rope"):
        alibi_scopes(TinyCheckpoint(tiny_spec()), 1e-5)
    for eps in (0.0, 1.0, -1.0):
        with pytest.raises(UsageError, match="eps: expected"):
            alibi_scopes(TinyCheckpoint(SPEC), eps)
    with pytest.raises(UsageError, match="window: expected at least 1"):
        select_by_scope(np.ones((1, 1)), 0)
    with pytest.raises(UsageError, match="scope_share"):
        select_by_scope(np.ones((1, 1)), 1, 2.0)
