"""reference.hf against the reference's own decoder: same weights, same logits, same bytes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [hf]")
sys.path.insert(0, str(Path(__file__).parent))
from hf_models import (
    CONFIGS,
    LAYERS,
    TOKENS,
    HfModel,
    hf_logits,
    make_exact,
    make_hf_model,
    reference_logits,
    relative,
    storages,
)

from trt_razor.cache_layout import cache_bytes, kv_at
from trt_razor.errors import RazorError
from trt_razor.policy import RazorPolicy
from trt_razor.reference import hf
from trt_razor.reference.hf import cache as hf_cache

POLICY = RazorPolicy(sink_tokens=2, min_window=8, compression=5, comp_tokens=1)
HEADS = ((0,), (1,))
ONES = [1] * 400
# Rounding: the logits here are of order 1, Razor and dense differ by more than 0.1.
CLOSE, FAR = 1e-5, 0.1

HEAD_CHOICES: dict[str, tuple[tuple[tuple[int, ...], ...], int]] = {  # heads and M
    "mixed, M = 0": (HEADS, 0),
    "mixed, M = 1": (HEADS, 1),
    "mixed, M = 8": (HEADS, 8),
    "unequal, M = 8": (((), (0, 1)), 8),
    "no retrieval, M = 1": (((), ()), 1),
}
SCHEDULES: dict[str, tuple[RazorPolicy, list[int]]] = {
    # D(n) becomes 1 at n = 11: one token at a time over it, and chunks that end before, at, after.
    "first drop": (POLICY, ONES[:14]),
    "chunk ends before the first drop": (POLICY, [10, 1, 1, 1]),
    "chunk ends at the first drop": (POLICY, [11, 1, 1, 1]),
    "chunk ends behind the first drop": (POLICY, [12, 1, 1, 1]),
    "ring wraps": (POLICY.with_(compression=None), [3, *ONES[:60]]),
    "growing window": (POLICY, [60, *ONES[:60]]),
    "chunks longer than the window": (POLICY, [30, 30, 1, 1, 30, 1]),
    "chunk edges": (POLICY, [1, 7, 8, 9, 10, 1, 2, 3, 11]),
    "no sinks": (POLICY.with_(sink_tokens=0), [20, *ONES[:20]]),
    "nothing dropped": (POLICY.with_(min_window=500), [30, *ONES[:10]]),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HfModel:
    return make_hf_model(tmp_path_factory.mktemp("hf") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> HfModel:
    return make_hf_model(tmp_path_factory.mktemp("hf") / "llama", "llama")


@pytest.fixture
def small_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches grow every 16 tokens, so that these short sequences see it."""
    monkeypatch.setattr(hf_cache, "GROWTH", 16)


@pytest.mark.parametrize("comp_tokens", [0, 1, 8])
def test_every_architecture_equals_the_reference(any_model: HfModel, comp_tokens: int) -> None:
    policy, heads = POLICY.with_(comp_tokens=comp_tokens), any_model.head_map(*HEADS)
    chunks = [60, *ONES[:40], 9, *ONES[:20]]
    tokens = TOKENS[: sum(chunks)]
    model = any_model.load()
    dense = hf_logits(model, tokens, [len(tokens)])
    want = reference_logits(any_model.decoder(), tokens, chunks, policy, heads)
    with hf.enable(model, heads, policy):
        got = hf_logits(model, tokens, chunks)
    assert relative(got, want) <= CLOSE
    assert relative(got[:60], dense[:60]) <= CLOSE  # the prompt is dense
    assert relative(got[60:], dense[60:]) > FAR


@pytest.mark.usefixtures("small_growth")
@pytest.mark.parametrize("choice", HEAD_CHOICES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_boundaries(llama: HfModel, schedule: str, choice: str) -> None:
    policy, chunks = SCHEDULES[schedule]
    heads, comp_tokens = HEAD_CHOICES[choice]
    policy, head_map = policy.with_(comp_tokens=comp_tokens), llama.head_map(*heads)
    tokens = TOKENS[: sum(chunks)]
    want = reference_logits(llama.decoder(), tokens, chunks, policy, head_map)
    model = llama.load()
    with hf.enable(model, head_map, policy) as razor:
        assert relative(hf_logits(model, tokens, chunks), want) <= CLOSE
        fixed = razor.new_cache(n_max=len(tokens))
        assert relative(hf_logits(model, tokens, chunks, fixed), want) <= CLOSE


@pytest.mark.usefixtures("small_growth")
@pytest.mark.parametrize("comp_tokens", [0, 1, 8])
def test_float64_differs_by_rounding_only(any_model: HfModel, comp_tokens: int) -> None:
    policy, heads = POLICY.with_(comp_tokens=comp_tokens), any_model.head_map(*HEADS)
    chunks = [25, *ONES[:30], 20, 1]
    tokens = TOKENS[: sum(chunks)]
    want = reference_logits(any_model.decoder(torch.float64), tokens, chunks, policy, heads)
    model = make_exact(any_model.load(torch.float64), any_model.spec)
    with hf.enable(model, heads, policy):
        assert relative(hf_logits(model, tokens, chunks), want) <= 1e-12


@pytest.mark.parametrize("chunks", [[80], [50, *ONES[:30]]])
def test_all_heads_retrieve_is_plain_transformers(any_model: HfModel, chunks: list[int]) -> None:
    tokens, model = TOKENS[: sum(chunks)], any_model.load(torch.float64)
    plain = hf_logits(model, tokens, chunks)
    every = any_model.head_map((0, 1), (0, 1))
    for heads in (every, None, [[1, 0], [0, 1]]):
        with hf.enable(model, heads, POLICY):
            assert relative(hf_logits(model, tokens, chunks), plain) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_caches_are_half_precision(llama: HfModel, dtype: torch.dtype) -> None:
    """Compared with float32 arithmetic, so the tolerance is that of the weights and activations."""
    model, chunks = llama.load(dtype), [40, *ONES[:30]]
    want = reference_logits(llama.decoder(), TOKENS[:70], chunks, POLICY, llama.head_map(*HEADS))
    with hf.enable(model, HEADS, POLICY) as razor:
        cache = razor.new_cache()
        assert relative(hf_logits(model, TOKENS[:70], chunks, cache), want) <= 0.06
    local = cache.layers[0].rows[0].local
    assert (local.local_k.dtype, local.comp.dtype) == (dtype, torch.float32)


# Memory -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("comp_tokens", [0, 1, 8])
@pytest.mark.parametrize("compression", [None, 5])
def test_memory_is_what_the_layout_says(
    llama: HfModel, comp_tokens: int, compression: int | None
) -> None:
    policy = POLICY.with_(comp_tokens=comp_tokens, compression=compression)
    heads, model = llama.head_map(*HEADS), llama.load()
    with hf.enable(model, heads, policy) as razor:
        grown, fixed = razor.new_cache(), razor.new_cache(n_max=330)
        for cache in (grown, fixed):
            hf_logits(model, TOKENS[:330], [300, *ONES[:30]], cache)
        need = kv_at(llama.spec, heads, policy, 330, "float32")
        for cache, n_max in ((grown, 512), (fixed, 330)):
            bytes_ = razor.kv_bytes(cache)
            assert storages(cache) == bytes_.allocated
            assert (
                bytes_.allocated
                == cache_bytes(llama.spec, heads, policy, n_max, 1, "float32").total
            )
            assert (bytes_.needed, bytes_.dense) == (need.razor_bytes, need.full_bytes)
        # With n_max nothing is in reserve but the one row that a ring writes before it folds.
        row = 2 * 4 * llama.spec.head_dim
        assert razor.kv_bytes(fixed).allocated - need.razor_bytes == LAYERS * row
        assert need.razor_bytes < 0.65 * need.full_bytes
        grown.reset()
        assert storages(grown) == 0


def test_memory_of_a_batch(llama: HfModel) -> None:
    model, mask = llama.load(), torch.ones(2, 60, dtype=torch.int64)
    mask[1, :21] = 0
    with hf.enable(model, HEADS, POLICY) as razor, torch.no_grad():
        cache = razor.new_cache(n_max=60)
        model(TOKENS[:60].repeat(2, 1), attention_mask=mask, past_key_values=cache)
        bytes_ = razor.kv_bytes(cache)
    heads = llama.head_map(*HEADS)
    needs = [kv_at(llama.spec, heads, POLICY, n, "float32") for n in (60, 39)]
    assert bytes_.needed == sum(n.razor_bytes for n in needs)
    assert bytes_.dense == sum(n.full_bytes for n in needs)
    assert bytes_.allocated == cache_bytes(llama.spec, heads, POLICY, 60, 2, "float32").total
    assert storages(cache) == bytes_.allocated


# Batches, turns, prefixes -----------------------------------------------------------------------
@pytest.mark.parametrize("chunks", [[40], [10, 10, 20], [1] * 40])
def test_left_padded_rows_equal_the_rows_alone(llama: HfModel, chunks: list[int]) -> None:
    """Padding of 0, 5 and 25 places: of the last row a whole chunk and half of the next is padding."""
    lengths, steps, model = (40, 35, 15), 30, llama.load()
    ids = torch.zeros(3, 40 + steps, dtype=torch.int64)
    mask = torch.ones_like(ids)
    for b, n in enumerate(lengths):
        ids[b, 40 - n :] = TOKENS[b * 70 : b * 70 + n + steps]
        mask[b, : 40 - n] = 0
    decoder, got, at = llama.decoder(), [], 0
    with hf.enable(model, HEADS, POLICY) as razor, torch.no_grad():
        cache = razor.new_cache()
        for size in [*chunks, *ONES[:steps]]:
            end = at + size
            out = model(
                ids[:, at:end],
                attention_mask=mask[:, :end],
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, at:end],
                past_key_values=cache,
            )
            got.append(out.logits)
            at = end
    logits = torch.cat(got, 1)
    for b, n in enumerate(lengths):
        real, first = ids[b, 40 - n :], 0
        alone = decoder.new_cache(POLICY, llama.head_map(*HEADS), 100)
        parts, at = [], 0
        for size in [*chunks, *ONES[:steps]]:
            at += size
            count = min(size, max(0, at - (40 - n)))
            if count:
                parts.append(decoder.forward(real[first : first + count], alone))
                first += count
        assert relative(logits[b, 40 - n :], torch.cat(parts)) <= CLOSE


def test_a_cache_goes_on_where_it_was(llama: HfModel) -> None:
    """Three turns with one cache, and two continuations of copies of its beginning."""
    model, decoder, heads = llama.load(), llama.decoder(), llama.head_map(*HEADS)
    with hf.enable(model, heads, POLICY) as razor:
        cache = razor.new_cache()
        first = hf_logits(model, TOKENS[:50], [50], cache)
        prefix = copy.deepcopy(cache)
        rest = hf_logits(model, TOKENS[50:90], [20, 1, 19], cache)
        want = reference_logits(decoder, TOKENS[:90], [50, 20, 1, 19], POLICY, heads)
        assert relative(torch.cat([first, rest]), want) <= CLOSE
        other = torch.cat([TOKENS[:50], TOKENS[200:230]])
        want = reference_logits(decoder, other, [50, 30], POLICY, heads)
        assert relative(hf_logits(model, other[50:], [30], prefix), want[50:]) <= CLOSE
    assert cache.get_seq_length() == 90
    assert storages(prefix) == storages(cache)
    assert (
        prefix.layers[0].rows[0].full.full_k.data_ptr()
        != cache.layers[0].rows[0].full.full_k.data_ptr()
    )


def test_crop_before_the_first_drop(llama: HfModel) -> None:
    model, policy = llama.load(), POLICY.with_(min_window=30)
    chunks = [20, *ONES[:30]]
    with hf.enable(model, HEADS, policy) as razor:
        want = hf_logits(model, TOKENS[:50], chunks)
        cache = razor.new_cache()
        hf_logits(model, TOKENS[:20], [20], cache)
        hf_logits(model, TOKENS[100:109], [9], cache)
        cache.crop(-9)
        assert cache.get_seq_length() == 20
        assert relative(hf_logits(model, TOKENS[20:50], ONES[:30], cache), want[20:]) <= 1e-6


@pytest.mark.parametrize("crop", [-1, 40])
def test_crop_after_a_drop_is_refused_and_changes_nothing(llama: HfModel, crop: int) -> None:
    model = llama.load()
    with hf.enable(model, ((0, 1), (0,)), POLICY) as razor:
        want = hf_logits(model, TOKENS[:61], [60, 1])
        cache = razor.new_cache()
        hf_logits(model, TOKENS[:60], [60], cache)
        with pytest.raises(RazorError, match="46 tokens were dropped"):
            cache.crop(crop)
        cache.crop(0)
        assert relative(hf_logits(model, TOKENS[60:61], [1], cache), want[60:]) <= 1e-6


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_cache_made_in_inference_mode_serves_outside(
    llama: HfModel, mode: Callable[[], Any]
) -> None:
    model = llama.load()
    with hf.enable(model, HEADS, POLICY) as razor:
        want = hf_logits(model, TOKENS[:60], [40, *ONES[:20]])
        cache = razor.new_cache()
        with mode():
            model(TOKENS[None, :40], past_key_values=cache)
        assert relative(hf_logits(model, TOKENS[40:60], ONES[:20], cache), want[40:]) <= 1e-6


def test_disable_gives_the_model_back(llama: HfModel) -> None:
    model = llama.load()
    before = model.config._attn_implementation
    plain = hf_logits(model, TOKENS[:60], [60])
    razor = hf.enable(model, HEADS, POLICY)
    razor.disable()
    razor.disable()  # again does no harm
    assert model.config._attn_implementation == before
    assert torch.equal(hf_logits(model, TOKENS[:60], [60]), plain)
    assert relative(hf_logits(model, TOKENS[:60], [30, *ONES[:30]]), plain) <= CLOSE
    with hf.enable(model, HEADS, POLICY):
        assert relative(hf_logits(model, TOKENS[:60], [30, *ONES[:30]]), plain) > FAR
