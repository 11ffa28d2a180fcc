"""What methods keep: chosen rows, bits, budgets, forks; on random layers, without a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trt_razor.errors import UsageError
from trt_razor.evaluation.methods.formats import FP8_MAX, Fp8, Integers
from trt_razor.evaluation.methods.interface import METHODS, Kept, Method, Read, ReadLayer
from trt_razor.evaluation.methods.kept import SplitKept
from trt_razor.evaluation.methods.scores import (
    _column_sums,
    accumulated_attention,
    window_attention,
)
from trt_razor.headmap import HeadMap
from trt_razor.policy import RazorPolicy
from trt_razor.reference import LayerCache, chunk_attention
from trt_razor.reference.attention import CachedRows, group_queries

LAYERS, HQ, HKV, DIM, N = 2, 4, 2, 16, 101
ROW = 2 * DIM * 16  # bits of a head's token
SCALE = 0.3
HEADS = ((0,), ())


def make_read(dtype: torch.dtype = torch.float32, n: int = N, seed: int = 0) -> Read:
    g = torch.Generator().manual_seed(seed)

    def normal(heads: int, rows: int) -> Tensor:
        return torch.randn(heads, rows, DIM, generator=g).to(dtype)

    layers = [
        ReadLayer(normal(HKV, n), normal(HKV, n), normal(HQ, n), SCALE) for _ in range(LAYERS)
    ]
    return Read("random", None, layers)


@pytest.fixture(scope="module")
def read() -> Read:
    return make_read()


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("heads") / "map.json"
    scores = {"echo": ((0.9, 0.1), (0.2, 0.3)), "induction": ((0.1, 0.2), (0.8, 0.3))}
    HeadMap("random", "f" * 64, LAYERS, HKV, HEADS, "test", "test", scores=scores).save(path)
    return str(path)


def make(name: str, **options: Any) -> Method:
    return METHODS.make(name, options, "methods[0]")


def whole(heads: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Methods that keep everything with these options."""
    head = {"heads": heads}
    return {
        "dense": ("dense", {}),
        "streaming": ("streaming", {"budget": 1.0}),
        "h2o": ("h2o", {"budget": 1}),
        "snapkv": ("snapkv", {"budget": 1.0}),
        "duo": ("duo", {"budget": 1.0, **head}),
        "razor, budget": ("razor", {"budget": 1.0, "policy": {"comp_tokens": 8}, **head}),
        "razor, window": ("razor", {"policy": {"min_window": 1000}, **head}),
        "inside, budget": ("inside", {"budget": 1.0, **head}),
        "inside, h2o": ("inside", {"retrieval_budget": 1.0, "score": {"h2o": {}}, **head}),
    }


def chunks(
    seed: int, sizes: tuple[int, ...] = (5, 1, 1, 40)
) -> list[tuple[Tensor, Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(h, size, DIM, generator=g) for h in (HQ, HKV, HKV))  # type: ignore[misc]
        for size in sizes
    ]


def dense_outputs(layer: ReadLayer, later: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    k, v, out = layer.k, layer.v, []
    for q, new_k, new_v in later:
        n = k.shape[1]
        past = CachedRows(k, v, torch.zeros(HKV, n), torch.arange(n).double())
        grouped = group_queries(q, HKV)
        out.append(chunk_attention(grouped, past, new_k, new_v, n, SCALE).flatten(0, 1))
        k, v = torch.cat([k, new_k], 1), torch.cat([v, new_v], 1)
    return out


def feed(kept: Kept, later: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    return [kept.attend(*chunk) for chunk in later]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        assert float((a - b).abs().max()) <= tolerance


# Everything kept is dense ------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(whole("")))
def test_a_method_that_keeps_everything_is_dense(read: Read, heads: str, name: str) -> None:
    method, options = whole(heads)[name]
    # A window solved for the context is full: the next chunk sees all of it, and then it drops.
    drops_later = name in ("duo", "razor, budget")
    later = chunks(1, (9,)) if drops_later else chunks(1)
    for layer, kept in zip(read.layers, make(method, **options).compress(read), strict=True):
        assert kept.n == N
        assert kept.bits() == N * HKV * ROW
        assert_close(feed(kept, later), dense_outputs(layer, later))
        assert kept.n == N + sum(len(k[0]) for _, k, _ in later)
        if not drops_later:
            assert kept.bits() == (N + 47) * HKV * ROW


def test_other_precisions_take_the_unfused_way(heads: str) -> None:
    read = make_read(torch.float64)
    later = [tuple(t.double() for t in chunk) for chunk in chunks(1, (300, 1))]
    kept = make("h2o", budget=1).compress(read)[0]
    assert_close(feed(kept, later), dense_outputs(read.layers[0], later), 1e-12)  # type: ignore[arg-type]


def test_methods_leave_the_context_alone(heads: str) -> None:
    read, untouched = make_read(), make_read()
    for method, options in whole(heads).values():
        options = {k: (0.5 if "budget" in k else v) for k, v in options.items()}
        if method in ("razor", "inside"):
            options["policy"] = {"min_window": 10, "compression": None, "comp_tokens": 2}
        for inner in ((method, options), ("quantised", {"inner": {method: options}})):
            for kept in make(inner[0], **inner[1]).compress(read):
                feed(kept, chunks(2))
    for layer, before in zip(read.layers, untouched.layers, strict=True):
        assert torch.equal(layer.k, before.k)
        assert torch.equal(layer.v, before.v)
        assert torch.equal(layer.queries, before.queries)


# What is kept ------------------------------------------------------------------------------------
def only(layer: ReadLayer, positions: Tensor) -> ReadLayer:
    """The layer of these positions [HKV, P]."""
    index = positions[..., None].expand(-1, -1, DIM)
    return ReadLayer(layer.k.gather(1, index), layer.v.gather(1, index), layer.queries, SCALE)


def attention_map(layer: ReadLayer) -> Tensor:
    """[HKV, g, n, n] causal."""
    logits = group_queries(layer.queries, HKV) @ layer.k[:, None].mT * SCALE
    n = layer.n
    return logits.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf).softmax(-1)


def test_streaming_keeps_sinks_and_window(read: Read) -> None:
    later = chunks(3)
    kept = make("streaming", budget=0.25, sink_tokens=3).compress(read)[0]
    positions = torch.tensor([0, 1, 2, *range(N - 22, N)]).expand(HKV, -1)  # floor(101 / 4) = 25
    assert_close(feed(kept, later), dense_outputs(only(read.layers[0], positions), later))


def test_h2o_keeps_heavy_hitters_of_the_whole_map(read: Read) -> None:
    later, layer = chunks(4), read.layers[1]
    kept = make("h2o", budget=0.3).compress(read)[1]
    score = attention_map(layer).sum((1, 2))[:, : N - 15]
    best = score.topk(15, dim=1).indices.sort(1).values
    positions = torch.cat([best, torch.arange(N - 15, N).expand(HKV, -1)], 1)
    assert not torch.equal(best[0], best[1])
    assert_close(feed(kept, later), dense_outputs(only(layer, positions), later))


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_snapkv_keeps_what_the_last_queries_see(read: Read, pooling: str) -> None:
    later, layer, window = chunks(5), read.layers[0], 8
    method = make("snapkv", budget=0.3, window=window, kernel=5, pooling=pooling)
    kept = method.compress(read)[0]
    score = attention_map(layer)[:, :, -window:].sum((1, 2))[:, : N - window]
    padded = torch.nn.functional.pad(score, (2, 2), value=-math.inf if pooling == "max" else 0.0)
    near = padded.unfold(1, 5, 1)
    score = near.amax(-1) if pooling == "max" else near.mean(-1)
    best = score.topk(30 - window, dim=1).indices.sort(1).values
    positions = torch.cat([best, torch.arange(N - window, N).expand(HKV, -1)], 1)
    assert_close(feed(kept, later), dense_outputs(only(layer, positions), later))


def test_scores_by_the_fused_kernel_are_the_map(read: Read) -> None:
    layer = read.layers[0]
    want = attention_map(layer)
    sums = accumulated_attention(layer, [0, 1])
    assert_close([sums], [want.sum((1, 2))], 1e-4)
    assert_close([_column_sums(group_queries(layer.queries, HKV), layer.k, SCALE)], [sums], 1e-4)
    assert_close([window_attention(layer, 8, [1])], [want[1:, :, -8:].sum((1, 2))])
    rounded = ReadLayer(
        layer.k.bfloat16().float(), layer.v, layer.queries.bfloat16().float(), SCALE
    )
    half = ReadLayer(rounded.k, layer.v, layer.queries.bfloat16(), SCALE)
    rough, want = accumulated_attention(half, [0, 1]), attention_map(rounded).sum((1, 2))
    assert float(((rough - want) / want).abs().max()) < 2e-3
    again = accumulated_attention(half, [1])
    assert torch.equal(again[0], rough[1])


@pytest.mark.parametrize("comp_tokens", [0, 1, 8])
def test_razor_is_the_reference_cache_fed_with_the_context(
    read: Read, heads: str, comp_tokens: int
) -> None:
    policy = {"min_window": 20, "compression": None, "comp_tokens": comp_tokens}
    kept = make("razor", heads=heads, policy=policy).compress(read)
    later = chunks(6)
    for layer, mine, retrieval in zip(read.layers, kept, HEADS, strict=True):
        cache = LayerCache(
            RazorPolicy(4, 20, None, comp_tokens), retrieval, HQ, HKV, DIM, 1000, scale=SCALE
        )
        cache.attend(layer.queries, layer.k, layer.v)
        assert_close(feed(mine, later), [cache.attend(*chunk) for chunk in later], 0.0)


def test_inside_is_snapkv_in_retrieval_heads_and_razor_in_the_others(
    read: Read, heads: str
) -> None:
    options = {"window": 8, "kernel": 3}
    policy = {"min_window": 20, "compression": None, "comp_tokens": 4}
    both = make(
        "inside", heads=heads, retrieval_budget=0.4, score={"snapkv": options}, policy=policy
    )
    snap = make("snapkv", budget=0.4, **options)
    razor = make("razor", heads=heads, policy=policy)
    later = chunks(7)
    got, dropped, folded = (
        [feed(kept, later) for kept in m.compress(read)] for m in (both, snap, razor)
    )
    for chunk in range(len(later)):
        group = HQ // HKV
        assert torch.allclose(got[0][chunk][:group], dropped[0][chunk][:group], atol=1e-6)
        assert torch.allclose(got[0][chunk][group:], folded[0][chunk][group:], atol=1e-6)
        assert torch.allclose(got[1][chunk], folded[1][chunk], atol=1e-6)
    assert make("inside", heads=heads, budget=0.5, score={"h2o": {}}).queries == "all"
    assert both.queries == "recent"


# Bits and budgets --------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [0.2, 1 / 3, 0.5, 0.77])
@pytest.mark.parametrize("name", ["streaming", "h2o", "snapkv", "duo", "razor", "inside"])
def test_a_budget_is_filled_and_never_exceeded(
    read: Read, heads: str, name: str, budget: float
) -> None:
    options: dict[str, Any] = {"budget": budget}
    rows = LAYERS * HKV  # one row more of every head that has a budget
    if name == "snapkv":
        options["window"] = 8
    if name in ("duo", "razor", "inside"):
        options["heads"] = heads
        rows = 3  # local heads
    if name == "razor":
        options["policy"] = {"comp_tokens": 2}
    if name == "inside":
        options |= {
            "policy": {"min_window": 5, "compression": None},
            "score": {"snapkv": {"window": 8}},
        }
        rows = 1  # retrieval heads
    if name in ("duo", "razor") and budget == 0.2:  # the retrieval head alone is a quarter
        with pytest.raises(UsageError, match=r"budget: 0\.2 of 101 tokens is less than"):
            make(name, **options).compress(read)
        return
    used = sum(kept.bits() for kept in make(name, **options).compress(read))
    allowed = budget * LAYERS * HKV * N * ROW
    if name == "inside" and budget > 0.3:  # local heads have 5 rows: the retrieval head is whole
        local = 3 * (9 * ROW + (2 * DIM + 2) * 32)
        assert used == N * ROW + local <= allowed
        return
    assert used <= allowed < used + rows * ROW


def test_bits_of_razor_by_hand(read: Read, heads: str) -> None:
    policy = {"min_window": 20, "compression": None, "comp_tokens": 3}
    kept = make("razor", heads=heads, policy=policy).compress(read)
    comp = 3 * (2 * DIM + 2) * 32  # means, count and log-weight in float32
    local = (4 + 20) * ROW + comp
    assert [x.bits() for x in kept] == [N * ROW + local, 2 * local]
    feed(kept[0], chunks(8))
    assert kept[0].bits() == (N + 47) * ROW + local


@pytest.mark.parametrize(
    "format, key_bits, value_bits, layer_bits",
    [
        ("fp8", 50 * DIM * 8, 50 * DIM * 8, 64),
        # 50 rows in groups of 16: 4 groups a channel; 16 channels: 1 group a token.
        ("int8", 50 * DIM * 8 + 4 * DIM * 32, 50 * DIM * 8 + 50 * 32, 0),
        ("int4", 50 * DIM * 4 + 4 * DIM * 32, 50 * DIM * 4 + 50 * 32, 0),
    ],
)
def test_bits_of_formats_by_hand(
    read: Read, format: str, key_bits: int, value_bits: int, layer_bits: int
) -> None:
    inner = {"streaming": {"budget": 0.5}}
    kept = make("quantised", inner=inner, format=format, group=16).compress(read)[0]
    assert kept.bits() == layer_bits + HKV * (key_bits + value_bits)
    feed(kept, chunks(9))
    later = 47 * HKV * (ROW // 2 if format == "fp8" else ROW)
    assert kept.bits() == layer_bits + HKV * (key_bits + value_bits) + later


def test_bits_of_quantised_razor_by_hand(read: Read, heads: str) -> None:
    razor = {"heads": heads, "policy": {"min_window": 20, "compression": None, "comp_tokens": 3}}
    local = 24 * 2 * DIM * 8
    for means, width in (("float32", 32), ("float16", 16)):
        kept = make("quantised", inner={"razor": razor}, format="fp8", means=means).compress(read)
        comp = 3 * (2 * DIM * width + 2 * 32)
        assert [x.bits() for x in kept] == [
            64 + N * 2 * DIM * 8 + local + comp,
            64 + 2 * (local + comp),
        ]
    inner = {"inside": {**razor, "retrieval_budget": 0.5, "score": {"snapkv": {"window": 8}}}}
    kept = make("quantised", inner=inner, format="fp8").compress(read)
    assert kept[0].bits() == 64 + 50 * 2 * DIM * 8 + local + 3 * (2 * DIM + 2) * 32
    # 24 rows of the context, then 5 later ones in their place: 19 old in int8, 5 in 16 bits.
    kept = make("quantised", inner={"razor": razor}, format="int8", group=8).compress(read)
    feed(kept[1], chunks(10, (5,)))
    row = 2 * DIM * 8 + 2 * 32  # values: two groups a token
    old = 19 * row + 3 * DIM * 32  # keys: three groups of up to 8 rows
    assert kept[1].bits() == 2 * (old + 5 * ROW + 3 * (2 * DIM + 2) * 32)
    # Of 8 later tokens 6 are in the window, and 2 of the 4 heavy hitters can be of the others.
    policy = {"min_window": 6, "compression": None, "comp_tokens": 0, "heavy_hitters": 4}
    razor = {"heads": heads, "policy": policy}
    kept = make("quantised", inner={"razor": razor}, format="int8", group=8).compress(read)
    feed(kept[1], chunks(10, (8,)))
    assert kept[1].bits() == 2 * (6 * row + DIM * 32 + 8 * ROW)


# Formats -----------------------------------------------------------------------------------------
def test_integers_are_within_half_a_step_and_few(read: Read) -> None:
    layer = read.layers[0]
    for width in (8, 4):
        k, v = Integers(width, 16).rows(layer.k, layer.v)
        for x, y, axis in ((layer.k, k, 1), (layer.v, v, 2)):
            for a, b in zip(x.split(16, axis), y.split(16, axis), strict=True):
                step = (a.amax(axis, keepdim=True) - a.amin(axis, keepdim=True)) / (2**width - 1)
                # scale and smallest value are float16 themselves
                assert bool(((a - b).abs() <= 0.6 * step + 2e-3).all())
        assert not torch.equal(k, layer.k)
        ramp = torch.linspace(0, 1, 1024)[None, :, None]
        assert len(Integers(width, 1024).rows(ramp, ramp)[0].unique()) == 2**width
    flat = torch.full((1, 20, DIM), 3.0)
    k, v = Integers(4, 16).rows(flat, flat)
    assert torch.equal(k, flat)


def test_fp8_has_the_scale_of_the_context_and_clamps(read: Read) -> None:
    layer = read.layers[0]
    how = Fp8.of(layer)
    assert how.key_scale == pytest.approx(float(layer.k.abs().max()) / FP8_MAX)
    k, _ = how.rows(layer.k, layer.v)
    large = layer.k.abs() > 0.01
    assert float(((k - layer.k) / layer.k).abs()[large].max()) <= 2**-4 + 1e-6
    assert float(((k - layer.k) / layer.k).abs()[large].max()) > 2**-6
    later, _ = how.later(layer.k * 10, layer.v)
    assert float(later.abs().max()) == pytest.approx(float(layer.k.abs().max()))


def test_quantised_rounds_rows_once_and_means_always(read: Read, heads: str) -> None:
    razor = {"heads": heads, "policy": {"min_window": 20, "compression": None, "comp_tokens": 3}}
    later = chunks(11)
    exact = make("razor", **razor).compress(read)[1]
    mild, rough = (
        make("quantised", inner={"razor": razor}, format=f, means="float16").compress(read)[1]
        for f in ("int8", "int4")
    )
    want = feed(exact, later)
    errors = []
    for kept in (mild, rough):
        got = feed(kept, later)
        errors.append(max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True)))
        comp = kept.kept.cache.local.comp  # type: ignore[attr-defined]
        assert torch.equal(comp, comp.half().float())
    assert 0 < errors[0] < errors[1] < 0.5
    assert errors[0] < 0.05


# Forks -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(whole("")))
@pytest.mark.parametrize("quantised", [False, True])
def test_forks_do_not_tell_each_other(read: Read, heads: str, name: str, quantised: bool) -> None:
    method, options = whole(heads)[name]
    options = {k: (0.6 if k.endswith("budget") else v) for k, v in options.items()}
    if "policy" in options or method == "inside":
        options["policy"] = {"min_window": 10, "compression": None, "comp_tokens": 2}
    wanted = make("quantised", inner={method: options}) if quantised else make(method, **options)
    first, alone, other_alone = (wanted.compress(read)[0] for _ in range(3))
    start, one, other = chunks(12, (3,)), chunks(13), chunks(14)
    for kept in (first, alone, other_alone):
        feed(kept, start)
    fork = first.fork()
    for mine, theirs in zip(one, other, strict=True):  # by turns: neither may write to the other's
        assert_close(feed(first, [mine]), feed(alone, [mine]), 0.0)
        assert_close(feed(fork, [theirs]), feed(other_alone, [theirs]), 0.0)
    assert first.bits() == fork.bits() == alone.bits()


def test_a_fork_shares_the_rows_of_the_context(read: Read) -> None:
    kept = make("dense").compress(read)[0]
    assert kept.groups[0].k.data_ptr() == read.layers[0].k.data_ptr()  # type: ignore[attr-defined]
    feed(kept, chunks(15))
    fork = kept.fork()
    assert fork.groups[0].k is kept.groups[0].k  # type: ignore[attr-defined]


# Heads and refusals ------------------------------------------------------------------------------
def test_heads_are_the_maps_or_chosen_anew(read: Read, heads: str) -> None:
    def chosen(**options: Any) -> tuple[tuple[int, ...], ...]:
        return make("razor", **options).retrieval_heads(read)  # type: ignore[attr-defined,no-any-return]

    assert chosen(heads=heads) == HEADS
    assert chosen(heads=heads, ranking="echo", share=0.25) == ((0,), ())
    assert chosen(heads=heads, ranking="induction", share=0.5) == ((), (0, 1))
    assert chosen(heads=heads, ranking="combined", share=0.5) == ((0,), (0,))
    assert chosen(heads=heads, ranking="paper", share=0.25, echo_share=0.1, min_echo=1) == (
        (0,),
        (0,),
    )
    seeds = {chosen(ranking="random", share=0.5, seed=s) for s in range(20)}
    assert all(sum(map(len, layers)) == 2 for layers in seeds)
    assert len(seeds) > 3
    assert chosen(ranking="random", share=0.5, seed=3) == chosen(
        ranking="random", share=0.5, seed=3
    )


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("streaming", {}, "budget: missing"),
        ("streaming", {"budget": 0}, "budget: expected a share"),
        ("streaming", {"budget": 0.02}, "leaves 2 rows a head where 5 are the least"),
        ("snapkv", {"budget": 0.1}, "leaves 10 rows a head where 33 are the least"),
        ("snapkv", {"budget": 0.5, "kernel": 4}, "kernel: expected an odd number"),
        ("snapkv", {"budget": 0.5, "pooling": "mean"}, "pooling 'mean'"),
        ("snapkv", {"budget": 0.5, "window": 65}, r"window: expected 1\.\.64"),
        ("h2o", {"budget": 0.5, "window": 3}, r"methods\[0\]\.window"),
        ("razor", {"ranking": "ecko"}, "ranking 'ecko': did you mean echo"),
        ("razor", {"share": 0.2}, "needs a ranking"),
        ("razor", {"ranking": "random"}, "random heads need one"),
        ("razor", {"policy": "pape"}, "policy 'pape': did you mean paper"),
        ("razor", {"policy": {"window": 3}}, r"policy\.window: unknown field"),
        ("razor", {}, "no head map is shipped for 'random'"),
        ("razor", {"heads": "/nowhere.json"}, "no such head map file"),
        ("inside", {}, "either retrieval_budget or budget"),
        ("inside", {"budget": 0.5, "score": {"h3o": {}}}, "score 'h3o': did you mean h2o"),
        ("quantised", {"inner": {"dense": {}}, "format": "int5"}, "format 'int5'"),
        ("quantised", {"inner": {"dense": {}, "h2o": {}}}, "inner: expected one"),
        ("quantised", {"inner": {"quantised": {}}}, "another method"),
        ("quantised", {"inner": {"streaming": {"budget": 2}}}, r"inner\.streaming: budget"),
    ],
)
def test_wrong_options_are_refused_with_a_reason(
    read: Read, name: str, options: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make(name, **options).compress(read)


def test_a_map_of_another_model_is_refused(read: Read, heads: str, tmp_path: Path) -> None:
    other = Read("other", "0" * 64, read.layers)
    with pytest.raises(UsageError, match="this head map is of model 'random'"):
        make("duo", heads=heads, budget=0.5).compress(other)
    data = json.loads(Path(heads).read_text())
    (tmp_path / "bare.json").write_text(json.dumps({**data, "scores": {}}))
    with pytest.raises(UsageError, match="needs the scores echo and induction, found none"):
        make("razor", heads=str(tmp_path / "bare.json"), ranking="combined").compress(read)


def test_every_head_is_in_one_part_of_a_split(read: Read, heads: str) -> None:
    for kept in make("inside", heads=heads, retrieval_budget=0.5).compress(read):
        assert isinstance(kept, SplitKept)
        assert sorted(h for part, _ in kept.parts for h in part) == [0, 1]
