"""The production cache against the definition: outputs, state, ring rows; borders and errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trt_razor.errors import RazorError, UsageError
from trt_razor.headmap import HeadMap
from trt_razor.models.positions import alibi_slopes
from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy
from trt_razor.reference import (
    LayerCache,
    LocalHeadsCache,
    new_layer_caches,
    razor_attention_by_definition,
)

TOLERANCE = 1e-9  # float64, against another order of the same sums


def tokens(num_heads: int, num_kv: int, n: int, dim: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(h, n, dim, generator=generator, dtype=torch.float64)
        for h in (num_heads, num_kv, num_kv)
    )


def run(cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, chunks: list[int]) -> Tensor:
    outputs, start = [], 0
    for length in chunks:
        part = slice(start, start + length)
        outputs.append(cache.attend(q[:, part], k[:, part], v[:, part]))
        start += length
    return torch.cat(outputs, dim=1)


def check(
    policy: RazorPolicy,
    chunks: list[int],
    n_max: int,
    num_kv: int,
    group: int,
    dim: int,
    retrieval: list[int],
    seed: int = 0,
    alibi: bool = False,
) -> LayerCache:
    """Run a LayerCache and compare everything with the definition, head by head."""
    n, num_heads = sum(chunks), num_kv * group
    q, k, v = tokens(num_heads, num_kv, n, dim, seed)
    slopes = torch.from_numpy(alibi_slopes(num_heads)) if alibi else None
    cache = LayerCache(
        policy, retrieval, num_heads, num_kv, dim, n_max, torch.float64, slopes=slopes
    )
    out = run(cache, q, k, v, chunks)
    assert cache.n == n
    for head in range(num_kv):
        mine = slice(head * group, (head + 1) * group)
        is_full = head in retrieval
        expected = razor_attention_by_definition(
            q[mine],
            k[head],
            v[head],
            chunks,
            None if is_full else policy,
            slopes=None if slopes is None else slopes[mine].tolist(),
        )
        torch.testing.assert_close(out[mine], expected.out, rtol=0, atol=TOLERANCE)
        if is_full:
            row = cache.retrieval_heads.index(head)
            assert cache.full is not None
            assert torch.equal(cache.full.full_k[row, :n], k[head])
            assert torch.equal(cache.full.full_v[row, :n], v[head])
            continue
        row, local = cache.local_heads.index(head), cache.local
        assert local is not None
        assert local.kept_positions().tolist() == expected.kept
        w_cap = policy.ring_rows(n_max)
        for p in expected.kept:  # the row rule, spelled out once more
            at = (
                p
                if p < policy.sink_tokens
                else (policy.sink_tokens + policy.heavy_hitters + (p - policy.sink_tokens) % w_cap)
            )
            assert torch.equal(local.local_k[row, at], k[head, p]), f"position {p}"
            assert torch.equal(local.local_v[row, at], v[head, p]), f"position {p}"
        rows = [policy.sink_tokens + i for i in range(len(expected.heavy))]
        assert local.heavy_rows().tolist() == rows
        assert torch.equal(local.local_k[row, rows], k[head, expected.heavy])
        assert torch.equal(local.local_v[row, rows], v[head, expected.heavy])
        torch.testing.assert_close(local.comp[row], expected.comp, rtol=0, atol=TOLERANCE)
        assert local.comp_count[row].tolist() == expected.count
        torch.testing.assert_close(
            local.comp_log_weight[row],
            torch.tensor(expected.log_weight, dtype=torch.float64),
            rtol=0,
            atol=1e-14,
        )
        if policy.comp_tokens:
            assert sum(expected.count) == policy.dropped(n) - policy.heavy(n)
    return cache


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    alibi = draw(st.booleans())
    policy = RazorPolicy(
        sink_tokens=draw(st.integers(0, 5)),
        min_window=draw(st.integers(1, 9)),
        compression=draw(st.sampled_from([None, 1, 2, 3, 5])),
        comp_tokens=draw(st.integers(0, 1 if alibi else 6)),
        heavy_hitters=0 if alibi else draw(st.sampled_from([0, 0, 1, 3, 8])),
    )
    sizes = st.one_of(st.just(1), st.integers(1, 4), st.integers(1, 30), st.integers(15, 80))
    chunks = draw(st.lists(sizes, min_size=1, max_size=14))
    num_kv = draw(st.integers(1, 3))
    return {
        "policy": policy,
        "chunks": chunks,
        "n_max": sum(chunks) + draw(st.sampled_from([0, 1, 7])),
        "num_kv": num_kv,
        "group": draw(st.integers(1, 3)),
        "dim": draw(st.sampled_from([1, 2, 8])),
        "retrieval": draw(st.lists(st.integers(0, num_kv - 1), unique=True)),
        "seed": draw(st.integers(0, 2**20)),
        "alibi": alibi,
    }


@settings(max_examples=100, deadline=None)
@given(cases())
def test_cache_equals_definition(case: dict[str, object]) -> None:
    check(**case)  # type: ignore[arg-type]


@pytest.mark.parametrize("comp_tokens", [0, 1, 2, 5])
@pytest.mark.parametrize("chunks", [[60], [59, 1], [1] * 60, [7] * 8 + [4], [20, 1, 1, 38]])
def test_ring_wraps_many_times(chunks: list[int], comp_tokens: int) -> None:
    policy = RazorPolicy(3, 6, None, comp_tokens)
    cache = check(policy, chunks, 64, 2, 2, 4, [1])
    assert cache.local is not None
    assert cache.local.local_k.shape == (1, 3 + 7, 4)  # 51 dropped: the ring turned 7 times


@pytest.mark.parametrize("heavy_hitters", [1, 3, 8])
@pytest.mark.parametrize("comp_tokens", [0, 1, 4])
@pytest.mark.parametrize(
    "chunks",
    [
        [90],  # one chunk, more queries than are asked
        [30, 15, 16, 17],  # either side of the shortest chunk that chooses
        [12, 16, *[1] * 30],  # a few dropped, then a step at a time
        [1] * 60,
        [20, 1, 1, 1, 64, 65, 1],
    ],
)
def test_heavy_hitters(chunks: list[int], comp_tokens: int, heavy_hitters: int) -> None:
    policy = RazorPolicy(2, 9, None, comp_tokens, heavy_hitters)
    check(policy, chunks, sum(chunks), num_kv=2, group=3, dim=8, retrieval=[0])


@pytest.mark.parametrize("chunk", [20, 5, 1])
def test_every_chunk_chooses_heavy_hitters(chunk: int) -> None:
    """A token that all queries look at is kept, though others had filled the rows before it."""
    policy = RazorPolicy(0, 4, None, 0, 2)
    k, v = torch.zeros(1, 20, 2), torch.ones(1, 20, 2)
    k[0, 10] = 5  # neither among the first to be dropped nor in the window
    cache = LayerCache(policy, [], 1, 1, 2, 20)
    run(cache, torch.ones(1, 20, 2), k, v, [chunk] * (20 // chunk))
    assert cache.local is not None
    rows = cache.local.local_k[0, cache.local.heavy_rows()]
    assert (rows == 5).all(-1).sum() == 1


def test_a_decode_step_drops_what_its_query_needs_least() -> None:
    """The rows of candidates, their scores and who of equals goes (docs/semantics.md)."""
    policy = RazorPolicy(0, 1, None, 1, 2)
    cache = LayerCache(policy, [], 1, 1, 2, 9, scale=1.0)
    q = torch.zeros(1, 5, 2)
    k = torch.tensor([[[3.0, 0], [0, 3], [2, 2], [1, 1], [0, 0]]])
    v = torch.ones(1, 5, 2)
    run(cache, q[:, :3], k[:, :3], v[:, :3], [1, 1, 1])  # 0 and 1 are heavy, 2 is the window
    local = cache.local
    assert local is not None
    held = local.heavy_rows()
    assert torch.equal(local.local_k[0, held], k[0, :2])
    cache.attend(torch.tensor([[[1.0, 0.0]]]), k[:, 3:4], v[:, 3:4])  # 2 leaves: scores 3, 0, 2
    assert torch.equal(local.local_k[0, held], k[0, [0, 2]])
    assert torch.equal(local.comp[0, 0, 0], k[0, 1])
    cache.attend(torch.zeros(1, 1, 2), k[:, 4:5], v[:, 4:5])  # 3 leaves: equal scores, so it goes
    assert torch.equal(local.local_k[0, held], k[0, [0, 2]])
    assert torch.equal(local.comp[0, 0, 0], (k[0, 1] + k[0, 3]) / 2)


def test_missing_queries_are_refused_where_they_decide() -> None:
    local = LocalHeadsCache(RazorPolicy(0, 4, None, 1, 2), 1, 2, 60)
    x = torch.ones(1, 40, 2)
    with pytest.raises(UsageError, match=r"last 40 tokens,.* found none"):
        local.update(x, x)
    with pytest.raises(UsageError, match="found 39"):
        local.update(x, x, torch.ones(1, 3, 39, 2))
    local.update(x[:, :6], x[:, :6])  # two are dropped, and there are rows for two
    with pytest.raises(UsageError, match=r"last 1 tokens,.* found none"):
        local.update(x[:, :1], x[:, :1])
    assert local.n == 6


def test_heavy_hitters_survive_growth() -> None:
    q, k, v = tokens(2, 1, 70, 4, 3)
    policy = RazorPolicy(1, 5, 3, 2, 4)
    small, large = (LayerCache(policy, [], 2, 1, 4, size, torch.float64) for size in (50, 70))
    run(small, q[:, :50], k[:, :50], v[:, :50], [40, 10])
    small.grow(70)
    out = small.attend(q[:, 50:], k[:, 50:], v[:, 50:])
    expected = run(large, q, k, v, [40, 10, 20])[:, 50:]
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("comp_tokens", [0, 1])
@pytest.mark.parametrize("chunks", [[40], [30, 10], [9] * 4 + [1] * 4, [1] * 40])
def test_alibi_puts_the_compensation_token_in_the_middle(
    chunks: list[int], comp_tokens: int
) -> None:
    """3 KV heads x 2: six slopes, not a power of two; each query head has its own."""
    check(RazorPolicy(2, 5, 4, comp_tokens), chunks, 40, 3, 2, 8, [1], alibi=True)


@pytest.mark.parametrize("extra, dropped", [(-1, 0), (0, 1), (1, 2)])
@pytest.mark.parametrize("step", [1, 4, 100])
def test_around_the_first_drop(extra: int, dropped: int, step: int) -> None:
    policy = RazorPolicy(4, 8, 5, 1)
    n = policy.first_drop() + extra
    assert policy.dropped(n) == dropped
    chunks = [min(step, n - start) for start in range(0, n, step)]
    # A further token attends over what the fold left.
    cache = check(policy, [*chunks, 1, 1], n + 2, 2, 1, 4, [])
    assert cache.full is None


@pytest.mark.parametrize("comp_tokens", [0, 1, 4])
def test_fewer_tokens_than_sinks_and_sinks_beyond_n_max(comp_tokens: int) -> None:
    policy = RazorPolicy(5, 3, 2, comp_tokens)
    check(policy, [2, 1], 3, 2, 2, 4, [0])
    check(policy, [4, 1, 3], 8, 2, 2, 4, [0])


@pytest.mark.parametrize("chunks", [[9], [9, 1, 1, 1, 1], [5, 6, 3]])
def test_equal_keys_fill_one_cluster_and_open_the_rest_later(chunks: list[int]) -> None:
    """Exact ties: the lower index wins, an empty cluster has no row until a later key opens it."""
    policy = RazorPolicy(1, 2, None, 3)
    n = sum(chunks)
    q, k, v = tokens(2, 1, n, 4)
    k = torch.ones_like(k)
    cache = LayerCache(policy, [], 2, 1, 4, n, torch.float64)
    out = run(cache, q, k, v, chunks)
    expected = razor_attention_by_definition(q, k[0], v[0], chunks, policy)
    torch.testing.assert_close(out, expected.out, rtol=0, atol=TOLERANCE)
    assert cache.local is not None
    assert cache.local.comp_count[0].tolist() == expected.count
    torch.testing.assert_close(cache.local.comp[0], expected.comp, rtol=0, atol=TOLERANCE)
    first = policy.dropped(chunks[0])
    assert expected.count == [
        n - 3 - min(2, n - 3 - first),
        *[int(n - 3 - first > i) for i in (0, 1)],
    ]


def test_one_comp_token_is_the_running_mean_whatever_the_chunks() -> None:
    policy = RazorPolicy(2, 4, 3, 1)
    _, k, v = tokens(1, 1, 50, 4)
    dropped = policy.dropped(50)
    mean = torch.stack([k[0, 2 : 2 + dropped].mean(0), v[0, 2 : 2 + dropped].mean(0)])
    for step in (50, 13, 1):
        cache = LocalHeadsCache(policy, 1, 4, 50, torch.float64)
        for start in range(0, 50, step):
            cache.update(k[:, start : start + step], v[:, start : start + step])
        torch.testing.assert_close(cache.comp[0, 0], mean, rtol=0, atol=1e-14)
        assert cache.comp_count.tolist() == [[dropped]]


def test_nbytes_counts_every_state_tensor() -> None:
    policy = RazorPolicy(1, 2, None, 3)
    cache = LayerCache(policy, [0], 4, 2, 8, 100, torch.float16)
    rows = 1 + 3
    full, local = 2 * 100 * 8 * 2, 2 * rows * 8 * 2
    comp = 3 * (2 * 8 + 1 + 1) * 4
    assert cache.nbytes == full + local + comp


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("policy", [RazorPolicy(2, 40, 5, 1), RazorPolicy(0, 1, 1, 1)])
def test_window_that_holds_everything_equals_dense(policy: RazorPolicy, alibi: bool) -> None:
    q, k, v = tokens(4, 2, 40, 8)
    slopes = torch.from_numpy(alibi_slopes(4)) if alibi else None
    chunks = [17, 1, 1, 21]
    results = []
    for heads in (None, [], [1]):
        cache = LayerCache(policy, heads, 4, 2, 8, 40, torch.float64, slopes=slopes)
        results.append(run(cache, q, k, v, chunks))
    # Dense from scratch, as one masked map.
    logits = (q @ k.repeat_interleave(2, 0).transpose(1, 2)) / math.sqrt(8)
    distance = torch.arange(40)[:, None] - torch.arange(40)
    if slopes is not None:
        logits = logits - slopes.double()[:, None, None] * distance
    probs = logits.masked_fill(distance < 0, -math.inf).softmax(-1)
    dense = probs @ v.repeat_interleave(2, 0)
    for result in results:
        torch.testing.assert_close(result, dense, rtol=0, atol=1e-13)


def test_whole_prompt_prefill_is_dense_and_chunks_are_not() -> None:
    policy = RazorPolicy(1, 3, None, 1)
    q, k, v = tokens(2, 1, 30, 4)
    local = LayerCache(policy, [], 2, 1, 4, 30, torch.float64)
    dense = LayerCache(policy, None, 2, 1, 4, 30, torch.float64)
    expected = dense.attend(q, k, v)
    torch.testing.assert_close(local.attend(q, k, v), expected, rtol=0, atol=1e-13)
    chunked = run(LayerCache(policy, [], 2, 1, 4, 30, torch.float64), q, k, v, [15, 15])
    assert torch.allclose(chunked[:, :15], expected[:, :15], atol=1e-13)
    assert (chunked[:, 15:] - expected[:, 15:]).abs().max() > 1e-3


def test_float16_cache_keeps_float32_means_and_rounds_new_keys_first() -> None:
    policy = RazorPolicy(1, 4, None, 2)
    q, k, v = (x.float() for x in tokens(4, 2, 40, 8))
    half = LayerCache(policy, [0], 4, 2, 8, 40, torch.float16)
    exact = LayerCache(policy, [0], 4, 2, 8, 40, torch.float64)
    chunks = [20, 3, 1, 16]
    out = run(half, q, k, v, chunks)
    assert out.dtype == torch.float32
    assert half.local is not None
    assert exact.local is not None
    assert half.local.local_k.dtype == torch.float16
    assert half.local.comp.dtype == torch.float32
    rounded = run(exact, q.double(), k.half().double(), v.half().double(), chunks)
    torch.testing.assert_close(out.double(), rounded, rtol=0, atol=2e-6)
    torch.testing.assert_close(half.local.comp.double(), exact.local.comp, rtol=0, atol=1e-6)


def test_float32_is_within_rounding_of_float64() -> None:
    policy = RazorPolicy(4, 16, 5, 1)
    q, k, v = (x.float() for x in tokens(6, 2, 400, 32))
    chunks = [300, *[1] * 100]
    single = LayerCache(policy, [0], 6, 2, 32, 400)
    double = LayerCache(policy, [0], 6, 2, 32, 400, torch.float64)
    out = run(single, q, k, v, chunks)
    expected = run(double, q.double(), k.double(), v.double(), chunks)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


def test_past_n_max_is_refused_and_changes_nothing() -> None:
    q, k, v = tokens(2, 2, 12, 4)
    cache = LayerCache(RazorPolicy(1, 2, None, 1), [0], 2, 2, 4, 10, torch.float64)
    run(cache, q, k, v, [8])
    before = copy.deepcopy(cache)
    with pytest.raises(RazorError, match=r"8 tokens cached and 3 new ones exceed its n_max = 10"):
        cache.attend(q[:, 8:11], k[:, 8:11], v[:, 8:11])
    args = q[:, 8:10], k[:, 8:10], v[:, 8:10]
    torch.testing.assert_close(cache.attend(*args), before.attend(*args), rtol=0, atol=0)
    assert cache.n == 10


def test_an_empty_chunk_changes_nothing() -> None:
    q, k, v = tokens(2, 2, 12, 4)
    cache = LayerCache(RazorPolicy(1, 2, None, 2), [0], 2, 2, 4, 12, torch.float64)
    run(cache, q, k, v, [11])
    again = copy.deepcopy(cache)
    assert cache.attend(q[:, :0], k[:, :0], v[:, :0]).shape == (2, 0, 4)
    args = q[:, 11:], k[:, 11:], v[:, 11:]
    assert torch.equal(cache.attend(*args), again.attend(*args))


def test_wrong_arguments_are_named() -> None:
    policy = RazorPolicy(1, 2, None, 1)
    q, k, v = tokens(4, 2, 3, 4)
    cache = LayerCache(policy, [0], 4, 2, 4, 10, torch.float64)
    with pytest.raises(UsageError, match=r"k: expected \[2, 3, 4\], found \[2, 2, 4\]"):
        cache.attend(q, k[:, :2], v)
    with pytest.raises(UsageError, match=r"q: expected \[4, S, 4\], found \[4, 4\]"):
        cache.attend(q[:, 0], k, v)
    with pytest.raises(UsageError, match=r"retrieval_heads: expected KV heads 0\.\.1"):
        LayerCache(policy, [2], 4, 2, 4, 10)
    with pytest.raises(UsageError, match="num_heads: expected a multiple of 2"):
        LayerCache(policy, None, 3, 2, 4, 10)
    with pytest.raises(UsageError, match="n_max: expected >= 1 token, found 0"):
        LayerCache(policy, None, 4, 2, 4, 0)
    with pytest.raises(UsageError, match=r"slopes: expected \[4\], found \[2\]"):
        LayerCache(policy, None, 4, 2, 4, 10, slopes=torch.ones(2))


def test_alibi_with_clusters_is_refused_where_it_would_matter() -> None:
    slopes = torch.from_numpy(alibi_slopes(2))
    clusters = RazorPolicy(1, 2, None, 2)
    with pytest.raises(UsageError, match="comp_tokens: expected 0 or 1 for a model with ALiBi"):
        LayerCache(clusters, [0], 2, 2, 4, 10, slopes=slopes)
    assert LayerCache(clusters, None, 2, 2, 4, 10, slopes=slopes).local is None


def test_layer_caches_of_a_model() -> None:
    spec = ModelSpec("tiny", "llama", 3, 16, 8, 4, 2, 4, 16, 64, 1e-5)
    heads = HeadMap("tiny", spec.fingerprint(), 3, 2, ((0,), (), (0, 1)), "test", "test")
    caches = new_layer_caches(spec, RazorPolicy(1, 2, None, 1), heads, 20)
    assert [c.retrieval_heads for c in caches] == [(0,), (), (0, 1)]
    assert [c.local_heads for c in caches] == [(1,), (0, 1), ()]
    assert all(c.full is None for c in new_layer_caches(spec, RazorPolicy(), heads, 20)[1:2])
    assert all(c.local is None for c in new_layer_caches(spec, RazorPolicy(), None, 20))
    other = HeadMap("other", "0" * 64, 3, 2, ((0,), (), (0, 1)), "test", "test")
    with pytest.raises(UsageError, match="this head map is of model 'other'"):
        new_layer_caches(spec, RazorPolicy(), other, 20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_tensors_give_the_same_numbers() -> None:
    policy = RazorPolicy(2, 4, None, 3)
    q, k, v = tokens(4, 2, 40, 8)
    results = []
    for device in ("cpu", "cuda"):
        cache = LayerCache(policy, [1], 4, 2, 8, 40, torch.float64, device)
        out = run(cache, q.to(device), k.to(device), v.to(device), [20, 1, 19])
        assert cache.local is not None
        results.append((out.cpu(), cache.local.comp.cpu()))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)
