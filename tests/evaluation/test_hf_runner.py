"""The runner over transformers: what it reads, how sessions go on, and the real model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs the extra [hf]")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reference"))
from hf_models import CONFIGS, TOKENS, HfModel, hf_logits, make_hf_model

from trt_razor.errors import UsageError
from trt_razor.evaluation.methods.interface import METHODS, RECENT_QUERIES
from trt_razor.evaluation.runners.hf import HfRunner
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.policy import RazorPolicy
from trt_razor.reference import hf
from trt_razor.reference.hf.load import load_model

TEXT = TOKENS[:220].tolist()
N = 150  # of them are the context
POLICY = {"sink_tokens": 2, "min_window": 20, "compression": None, "comp_tokens": 4}


def method(name: str, **options: Any) -> Any:
    return METHODS.make(name, options, "methods[0]")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> HfModel:
    return make_hf_model(tmp_path_factory.mktemp("runner") / "llama", "llama", embedding=20.0)


def make_runner(model: HfModel, **options: Any) -> HfRunner:
    tokenizer = Tokenizer.find(model.folder)
    assert tokenizer is not None
    return HfRunner(model.load(), tokenizer, "tiny", **options)


@pytest.fixture(scope="module")
def runner(llama: HfModel) -> HfRunner:
    return make_runner(llama)


@pytest.fixture
def heads(llama: HfModel, tmp_path: Path) -> str:
    llama.head_map((0,), ()).save(tmp_path / "heads.json")
    return str(tmp_path / "heads.json")


def plain(model: Any, tokens: list[int]) -> np.ndarray[Any, Any]:
    return hf_logits(model, torch.tensor(tokens), [len(tokens)]).numpy()


def kl(p: np.ndarray[Any, Any], q: np.ndarray[Any, Any]) -> float:
    a, b = (torch.tensor(x).double().log_softmax(-1) for x in (p, q))
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_read_and_feed_are_the_models_own_forward(architecture: str, tmp_path: Path) -> None:
    model = make_hf_model(tmp_path / architecture, architecture, embedding=20.0)
    want = plain(model.load(), TEXT)
    runner = make_runner(model)
    assert runner.fingerprint == model.spec.fingerprint()
    session = runner.read(TEXT[:N]).compress(method("dense"))
    got = [session.feed(TEXT[N : N + 30]), session.feed(TEXT[N + 30 : N + 31])]
    got.append(session.feed(TEXT[N + 31 :]))
    assert got[0].dtype == np.float32
    assert np.abs(np.concatenate(got) - want[N:]).max() <= 1e-4
    assert session.kv_ratio() == 1.0


def test_an_extended_context_is_the_context_read_at_once(runner: HfRunner) -> None:
    short, long = runner.read(TEXT[: N - 7]), runner.read(TEXT[:N])
    before = [x.k.clone() for x in short.read.layers]
    extended = short.extended(TEXT[N - 7 : N])
    for a, b in zip(extended.read.layers, long.read.layers, strict=True):
        for x, y in ((a.k, b.k), (a.v, b.v), (a.queries, b.queries)):
            assert x.shape == y.shape
            assert float((x - y).abs().max()) <= 1e-4
    assert short.read.layers[0].n == N - 7
    assert all(torch.equal(x.k, k) for x, k in zip(short.read.layers, before, strict=True))


def test_a_query_aware_method_sees_the_question(runner: HfRunner) -> None:
    """The question is part of what is compressed; its last token is fed for the first logits."""
    context, question = TEXT[: N - 7], TEXT[N - 7 : N]
    aware = method("snapkv", budget=0.4, window=8, query_aware=True)
    assert aware.query_aware
    session = runner.read(context).extended(question[:-1]).compress(aware)
    assert session.kept[0].n == N - 1
    got = session.feed(question[-1:])
    at_once = runner.read(TEXT[: N - 1]).compress(aware).feed(TEXT[N - 1 : N])
    assert np.abs(got - at_once).max() <= 1e-4
    unaware = runner.read(context).compress(method("snapkv", budget=0.4, window=8))
    assert np.abs(unaware.feed(question)[-1:] - got).max() > 1e-3


def test_recorded_queries_and_keys_are_the_references(runner: HfRunner, llama: HfModel) -> None:
    decoder = llama.decoder()
    q, k, v = decoder.qkv(0, decoder.embed(TEXT[:N]), torch.arange(N))
    recent = runner.read(TEXT[:N]).read.layers[0]
    every = runner.read(TEXT[:N], all_queries=True).read.layers[0]
    assert recent.queries.shape[1] == RECENT_QUERIES
    for got, want in ((recent.k, k), (recent.v, v), (every.queries, q)):
        assert float((got - want).abs().max()) <= 1e-4
    assert torch.equal(recent.queries, every.queries[:, -RECENT_QUERIES:])
    assert recent.scale == pytest.approx(llama.spec.head_dim**-0.5)


@pytest.mark.parametrize("comp_tokens", [0, 1, 4])
def test_razor_is_reference_hf_after_a_prompt_in_one_chunk(
    runner: HfRunner, llama: HfModel, heads: str, comp_tokens: int
) -> None:
    policy = {**POLICY, "comp_tokens": comp_tokens}
    session = runner.read(TEXT[:N]).compress(method("razor", heads=heads, policy=policy))
    got = np.concatenate([session.feed(TEXT[N : N + 40]), session.feed(TEXT[N + 40 :])])
    model = llama.load()
    with hf.enable(model, llama.head_map((0,), ()), RazorPolicy(**policy)) as razor:
        cache = razor.new_cache()
        want = hf_logits(model, torch.tensor(TEXT), [N, 40, 30], cache).numpy()
        bits = cache.kv_bytes().needed * 8 / 2  # float32 there, but for compensation rows
    assert np.abs(got - want[N:]).max() <= 1e-4
    comp = 3 * comp_tokens * (2 * llama.spec.head_dim + 2) * 32
    dense = 2 * 2 * 220 * 2 * llama.spec.head_dim * 16
    assert session.kv_ratio() == pytest.approx((bits + comp / 2) / dense)
    assert np.abs(got - plain(llama.load(), TEXT)[N:]).max() > 1e-3  # it did drop something


@pytest.mark.parametrize("name", ["dense", "razor", "inside"])
def test_forks_and_contexts_are_independent(runner: HfRunner, heads: str, name: str) -> None:
    options: dict[str, Any] = {"heads": heads, "policy": POLICY} if name != "dense" else {}
    if name == "inside":
        options |= {"retrieval_budget": 0.5, "score": {"snapkv": {"window": 8}}}
    context, wanted = runner.read(TEXT[:N]), method(name, **options)
    first = context.compress(wanted)
    first.feed(TEXT[N : N + 5])
    fork = first.fork()
    one = first.feed(TEXT[N + 5 : N + 25])
    again = fork.feed(TEXT[N + 5 : N + 25])
    assert np.array_equal(one, again)
    other = fork.fork()
    fork.feed(TEXT[:9])
    assert np.array_equal(other.feed(TEXT[30:40]), first.feed(TEXT[30:40]))
    fresh = context.compress(wanted)
    fresh.feed(TEXT[N : N + 5])
    assert np.array_equal(fresh.feed(TEXT[N + 5 : N + 25]), one)


def test_contexts_can_be_read_in_another_precision(llama: HfModel) -> None:
    runner = make_runner(llama, read_dtype=torch.bfloat16)
    assert runner.label == "tiny, transformers, float32 (contexts read in bfloat16)"
    layer = runner.read(TEXT[:N]).read.layers[0]
    assert (layer.k.dtype, layer.queries.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(layer.k, layer.k.bfloat16().float())
    got = runner.read(TEXT[:N]).compress(method("dense")).feed(TEXT[N:])
    assert 0 < kl(plain(llama.load(), TEXT)[N:], got) < 0.05


def test_the_reader_shares_the_models_weights(runner: HfRunner) -> None:
    for a, b in zip(runner.model.parameters(), runner._reader.parameters(), strict=True):
        assert a is b


def test_what_cannot_be_done_is_refused(runner: HfRunner, llama: HfModel) -> None:
    context = runner.read(TEXT[:N])
    with pytest.raises(UsageError, match="all_queries=True"):
        context.compress(method("h2o", budget=0.5))
    with pytest.raises(UsageError, match="tokens: expected at least 1"):
        runner.read([])
    with pytest.raises(UsageError, match=r"tokens: expected ids 0\.\.263"):
        context.compress(method("dense")).feed([264])
    with pytest.raises(UsageError, match="Razor is on already"):
        HfRunner(runner.model, runner.tokenizer)
    cache = runner.razor.cache_of(context.compress(method("dense")).kept)
    with pytest.raises(UsageError, match="counting the bytes"):
        runner.razor.kv_bytes(cache)
    with pytest.raises(UsageError, match="rows: expected 2, one a layer, found 1"):
        runner.razor.cache_of(context.compress(method("dense")).kept[:1])


def test_a_closed_runner_gives_the_model_back(llama: HfModel) -> None:
    runner = make_runner(llama)
    runner.read(TEXT[:20]).compress(method("dense")).feed(TEXT[20:30])
    runner.close()
    want = plain(llama.load(), TEXT)
    assert np.array_equal(plain(runner.model, TEXT), want)


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[HfRunner, list[int], Tensor]]:
    """SmolLM2, 660 tokens of a text, and transformers' own logits of the last 60."""
    pytest.importorskip("gguf")
    model, tokenizer, name, _ = load_model("smollm2-135m")
    text = (Path(__file__).resolve().parents[2] / "docs" / "semantics.md").read_text()
    tokens = tokenizer.encode(text)[:660]
    with torch.no_grad():
        want = model(torch.tensor([tokens]), logits_to_keep=60).logits[0]
    runner = HfRunner(model, tokenizer, name)
    yield runner, tokens, want
    runner.close()


@pytest.mark.real
def test_smollm2_loses_what_a_method_drops(real: tuple[HfRunner, list[int], Tensor]) -> None:
    runner, tokens, want = real
    context = runner.read(tokens[:600])
    dense = context.compress(method("dense")).feed(tokens[600:])
    assert np.abs(dense - want.numpy()).max() <= 1e-3
    razor = {"policy": {"min_window": 32, "compression": None, "comp_tokens": 4}}
    lost = {}
    for label, name, options, ratio in (
        ("int8", "quantised", {"inner": {"dense": {}}}, 0.532),
        ("razor", "razor", razor, 0.22),
        ("random", "razor", {**razor, "ranking": "random", "share": 0.15}, 0.22),
        ("sinks lost", "streaming", {"budget": 0.22, "sink_tokens": 0}, 0.22),
    ):
        session = context.compress(method(name, **options))
        assert session.kv_ratio() == pytest.approx(ratio, abs=0.005), label
        lost[label] = kl(dense, session.feed(tokens[600:]))
    assert lost["int8"] < 1e-3
    # Measured: 0.00003, 0.12, 0.48 and 1.0.
    assert 10 * lost["int8"] < lost["razor"] < lost["random"] / 2
    assert lost["random"] < lost["sinks lost"]
