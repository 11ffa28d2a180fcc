"""What reference.hf refuses, and that it says why."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [hf]")
sys.path.insert(0, str(Path(__file__).parent))
import transformers
from hf_models import TOKENS, HfModel, hf_logits, make_hf_model, relative

from trt_razor.errors import RazorError, UsageError
from trt_razor.kernels import library
from trt_razor.policy import RazorPolicy
from trt_razor.reference import hf

POLICY = RazorPolicy(sink_tokens=2, min_window=8, compression=5, comp_tokens=1)
HEADS = ((0,), (1,))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> HfModel:
    return make_hf_model(tmp_path_factory.mktemp("hf") / "llama", "llama")


@pytest.mark.parametrize(
    "heads, words",
    [
        (((0,),), "expected 2 layers, found 1"),
        (((0,), (2,)), "layer 1: expected KV heads 0..1, found"),
        (((0,), (-1,)), "layer 1: expected KV heads 0..1, found"),
    ],
)
def test_heads_that_do_not_fit(llama: HfModel, heads: Any, words: str) -> None:
    model = llama.load()
    with pytest.raises(UsageError, match=words):
        hf.enable(model, heads, POLICY)
    hf.enable(model, HEADS, POLICY).disable()  # nothing was left behind


def test_a_head_map_of_another_model(llama: HfModel) -> None:
    heads = replace(llama.head_map(*HEADS), fingerprint="0" * 64, model="other")
    with pytest.raises(UsageError, match="this head map is of model 'other'"):
        hf.enable(llama.load(), heads, POLICY)


def test_a_model_that_model_spec_does_not_know(llama: HfModel) -> None:
    """Its head map is checked by its shape; everything else is as ever."""
    config = transformers.Olmo2Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    chunks = [40, *[1] * 20]
    plain = hf_logits(model, TOKENS[:60], chunks)
    with hf.enable(model, llama.head_map((0, 1), (0, 1)), POLICY):
        assert relative(hf_logits(model, TOKENS[:60], chunks), plain) <= 1e-5
    with hf.enable(model, llama.head_map(*HEADS), POLICY):
        assert relative(hf_logits(model, TOKENS[:60], chunks), plain) > 1e-4


def test_enable_twice(llama: HfModel) -> None:
    model = llama.load()
    with hf.enable(model, HEADS, POLICY), pytest.raises(UsageError, match="on already"):
        hf.enable(model, HEADS, POLICY)


def test_what_is_no_decoder() -> None:
    with pytest.raises(UsageError, match="expected a transformers model, found Linear"):
        hf.enable(torch.nn.Linear(2, 2), HEADS, POLICY)
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=20, **sizes))
    with pytest.raises(UsageError, match="encoder-decoder"):
        hf.enable(t5, HEADS, POLICY)


def test_attention_with_more_to_it_is_refused() -> None:
    """Gemma 2 caps its logits: an argument that this attention does not know."""
    config = transformers.Gemma2Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with hf.enable(model, HEADS, POLICY), pytest.raises(UsageError, match="'softcap'"):
        hf_logits(model, TOKENS[:10], [10])


@pytest.mark.parametrize(
    "mask, words",
    [
        ([1, 1, 1, 0, 0], "padding at the left only"),
        ([1, 0, 1, 1, 1], "padding at the left only"),
        ([1, 1, 1, 1], r"expected \[1, 5\]"),
        ([[[[True] * 5] * 5]], "found a mask of shape"),
    ],
)
def test_masks(llama: HfModel, mask: Any, words: str) -> None:
    model, given = llama.load(), torch.tensor(mask)
    given = given[None] if given.dim() == 1 else given
    with hf.enable(model, HEADS, POLICY), torch.no_grad(), pytest.raises(UsageError, match=words):
        model(TOKENS[None, :5], attention_mask=given)


@pytest.mark.parametrize(
    "mask, words",
    [
        ([0] + [1] * 11, "sequence 0: expected 10 cached and 2 new tokens, found 11"),
        ([1] * 10 + [0, 1], "padding behind its first 10 tokens"),
    ],
)
def test_masks_that_contradict_the_cache(llama: HfModel, mask: list[int], words: str) -> None:
    model = llama.load()
    with hf.enable(model, HEADS, POLICY) as razor, torch.no_grad():
        cache = razor.new_cache()
        model(TOKENS[None, :10], past_key_values=cache)
        with pytest.raises(UsageError, match=words):
            model(TOKENS[None, 10:12], attention_mask=torch.tensor([mask]), past_key_values=cache)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m(TOKENS[None, :5]), "no gradient"),
        (lambda m: m(TOKENS[None, :5], use_cache=False), "use_cache: expected True"),
        (lambda m: m(TOKENS[None, :5], output_attentions=True), "no maps"),
    ],
)
def test_calls(llama: HfModel, call: Callable[[Any], Any], words: str) -> None:
    model = llama.load()
    with hf.enable(model, HEADS, POLICY), pytest.raises(UsageError, match=words):
        call(model)


def test_dropout(llama: HfModel) -> None:
    model = llama.load().train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with hf.enable(model, HEADS, POLICY), pytest.raises(UsageError, match="dropout"):
        hf_logits(model, TOKENS[:5], [5])


def test_a_cache_of_another_policy(llama: HfModel) -> None:
    model = llama.load()
    with hf.enable(model, HEADS, POLICY) as razor:
        cache = razor.new_cache()
    other = hf.enable(model, HEADS, POLICY.with_(comp_tokens=0))
    with other, pytest.raises(UsageError, match="made for another model, head map or policy"):
        hf_logits(model, TOKENS[:5], [5], cache)
    with pytest.raises(UsageError, match="expected a RazorCache, found DynamicCache"):
        other.kv_bytes(transformers.DynamicCache())


def test_another_batch_size(llama: HfModel) -> None:
    model = llama.load()
    with hf.enable(model, HEADS, POLICY) as razor, torch.no_grad():
        cache = razor.new_cache()
        model(TOKENS[None, :5], past_key_values=cache)
        with pytest.raises(UsageError, match="holds 1 sequences, found a batch of 2"):
            model(TOKENS[None, :5].repeat(2, 1), past_key_values=cache)


def test_n_max_is_kept_and_nothing_is_half_done(llama: HfModel) -> None:
    model = llama.load()
    with hf.enable(model, HEADS, POLICY) as razor:
        want = hf_logits(model, TOKENS[:40], [39, 1])
        cache = razor.new_cache(n_max=40)
        hf_logits(model, TOKENS[:39], [39], cache)
        with pytest.raises(RazorError, match="41 tokens exceed its n_max = 40"):
            hf_logits(model, TOKENS[39:41], [2], cache)
        assert relative(hf_logits(model, TOKENS[39:40], [1], cache), want[39:]) <= 1e-6
        with pytest.raises(UsageError, match="n_max: expected >= 1 token, found 0"):
            razor.new_cache(n_max=0)


def test_another_attention_behind_razors_back(llama: HfModel) -> None:
    """The first chunk has no past and is right all the same; the second would not be."""
    model = llama.load()
    with hf.enable(model, HEADS, POLICY) as razor:
        cache = razor.new_cache()
        model.set_attn_implementation("sdpa")
        hf_logits(model, TOKENS[:20], [20], cache)
        with pytest.raises(RazorError, match="another attention implementation"):
            hf_logits(model, TOKENS[20:21], [1], cache)


def test_a_sliding_window_is_the_longest_sequence(tmp_path: Path) -> None:
    mistral = make_hf_model(tmp_path / "mistral", "mistral", window=50)
    model = mistral.load()
    plain = hf_logits(model, TOKENS[:50], [50])
    with hf.enable(model, None, POLICY) as razor:
        cache = razor.new_cache()
        got = hf_logits(model, TOKENS[:50], [30, *[1] * 20], cache)
        assert relative(got, plain) <= 1e-5
        with pytest.raises(RazorError, match="51 tokens exceed the model's sliding window of 50"):
            hf_logits(model, TOKENS[50:51], [1], cache)


def test_kernels_that_are_not_there(llama: HfModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "/nowhere/librazor.so")
    model = llama.load()
    with hf.enable(model, HEADS, POLICY, kernels=True), pytest.raises(RazorError, match="nowhere"):
        hf_logits(model, TOKENS[:5], [5])
    with hf.enable(model, HEADS, POLICY, kernels="auto"):
        hf_logits(model, TOKENS[:5], [5])
    with pytest.raises(UsageError, match="kernels: expected 'auto', True or False, found 'gpu'"):
        hf.enable(model, HEADS, POLICY, kernels="gpu")
