"""generate() with Razor: the engines' tokens, batches, turns; and the real model's answer."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [hf]")
sys.path.insert(0, str(Path(__file__).parent))
import transformers
from hf_models import TOKENS, HfModel, make_hf_model
from packaging.version import Version
from tiny_models import TinyModel

from trt_razor.errors import RazorError, UsageError
from trt_razor.generate import Generator, SamplingParams
from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import open_checkpoint
from trt_razor.policy import RazorPolicy
from trt_razor.reference import ReferenceDecoder, hf
from trt_razor.reference.hf.load import checkpoint_model

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "engines" / "recipes" / "smollm2-135m.heads.json"
POLICY = RazorPolicy(sink_tokens=2, min_window=8, compression=5, comp_tokens=1)
HEADS = ((0,), ())
# transformers 4 counts a padded row's positions in another way there: dense models go wrong, too.
CHUNKS_OF_PADDED_ROWS = Version(transformers.__version__) >= Version("5")
# transformers takes the padding token for padding wherever it is: one that no prompt has.
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 263}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> HfModel:
    return make_hf_model(tmp_path_factory.mktemp("hf") / "llama", "llama", embedding=20.0)


def reference_tokens(
    decoder: ReferenceDecoder, heads: HeadMap, prompt: list[int], chunks: list[int], new: int
) -> list[int]:
    """Greedy tokens by the reference: the prompt in chunks, then one at a time."""
    cache, tokens = decoder.new_cache(POLICY, heads, 1024), list(prompt)
    for part in torch.tensor(prompt).split(chunks):
        logits = decoder.forward(part, cache, last_only=True)
    for _ in range(new):
        tokens.append(int(logits[0].argmax()))
        logits = decoder.forward(tokens[-1:], cache)
    return tokens


def generate(model: Any, prompt: list[int], new: int, **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=new, **{**GREEDY, **options})[0].tolist()


def test_greedy_tokens_equal_the_engines(llama: HfModel, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    heads = llama.head_map(*HEADS)
    heads.save(tmp_path / "heads.json")
    tiny = TinyModel(llama.folder, llama.spec, tmp_path / "heads.json")
    engine = tiny.build(
        tmp_path / "engine", policy=POLICY, max_seq_len=512, prefill_chunk=64, max_batch_size=2
    )
    generator = Generator(engine.open(), 0, (), None)
    prompts = [TOKENS[:50].tolist(), TOKENS[90:107].tolist()]
    done = generator.run(prompts, SamplingParams(max_new_tokens=300))
    model = llama.load()
    plain = generate(model, prompts[0], 300)
    with hf.enable(model, heads, POLICY):
        for prompt, completion in zip(prompts, done, strict=True):
            got = generate(model, prompt, 300)
            assert len(completion.tokens) == 300
            assert got == prompt + completion.tokens
            assert len(set(got[-100:])) > 5  # not one token over and over
    assert plain != prompts[0] + done[0].tokens


def test_prefill_in_chunks(llama: HfModel) -> None:
    heads, prompt, model = llama.head_map(*HEADS), TOKENS[:50].tolist(), llama.load()
    whole = reference_tokens(llama.decoder(), heads, prompt, [50], 30)
    want = reference_tokens(llama.decoder(), heads, prompt, [7] * 7 + [1], 30)
    with hf.enable(model, heads, POLICY):
        assert generate(model, prompt, 30, prefill_chunk_size=7) == want
        assert generate(model, prompt, 30) == whole
    assert want != whole


def test_a_left_padded_batch(llama: HfModel) -> None:
    heads, model, lengths = llama.head_map(*HEADS), llama.load(), (40, 33, 5)
    ids, mask = torch.zeros(3, 40, dtype=torch.int64), torch.zeros(3, 40, dtype=torch.int64)
    for b, n in enumerate(lengths):
        ids[b, 40 - n :], mask[b, 40 - n :] = TOKENS[b * 50 : b * 50 + n], 1
    with hf.enable(model, heads, POLICY):
        for chunk in (None, 9) if CHUNKS_OF_PADDED_ROWS else (None,):
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=20, prefill_chunk_size=chunk, **GREEDY
            )
            for b, n in enumerate(lengths):
                pieces, at = [], 0
                for end in [40] if chunk is None else [9, 18, 27, 36, 40]:
                    real = max(0, end - (40 - n)) - at
                    pieces += [real] if real else []
                    at += real
                prompt = ids[b, 40 - n :].tolist()
                want = reference_tokens(llama.decoder(), heads, prompt, pieces, 20)
                assert out[b, 40 - n :].tolist() == want


def test_turns_with_one_cache(llama: HfModel) -> None:
    """The last token of a turn is not in the cache yet: it begins the next turn's chunk."""
    heads, model = llama.head_map(*HEADS), llama.load()
    first, question = TOKENS[:30].tolist(), TOKENS[60:75].tolist()
    with hf.enable(model, heads, POLICY) as razor:
        cache = razor.new_cache()
        turn = generate(model, first, 20, past_key_values=cache)
        assert cache.get_seq_length() == 49
        both = generate(model, turn + question, 40, past_key_values=cache)
    assert turn == reference_tokens(llama.decoder(), heads, first, [30], 20)
    chunks = [30, *[1] * 19, 16]
    assert both == reference_tokens(llama.decoder(), heads, turn + question, chunks, 40)


def test_generate_gives_the_cache_out(llama: HfModel) -> None:
    model = llama.load()
    with hf.enable(model, HEADS, POLICY) as razor:
        out = model.generate(
            TOKENS[None, :90], max_new_tokens=11, return_dict_in_generate=True, **GREEDY
        )
        assert isinstance(out.past_key_values, hf.RazorCache)
        assert out.past_key_values.get_seq_length() == 100
        needs = razor.kv_bytes(out.past_key_values)
    # 1 of 4 heads keeps 100 rows, 3 keep 2 + 20 and one mean with its weight and count.
    row = 2 * 8 * 4
    assert needs.needed == (100 + 3 * 22) * row + 3 * (row + 8)
    assert needs.dense == 4 * 100 * row


def test_sampling(llama: HfModel) -> None:
    """Two samples a prompt; the same seed gives the same tokens, dense or not with all heads."""
    model, options = llama.load(), {"do_sample": True, "num_return_sequences": 2, "top_k": 20}

    def sampled() -> torch.Tensor:
        torch.manual_seed(3)
        return model.generate(TOKENS[None, :30], max_new_tokens=30, **{**GREEDY, **options})

    plain = sampled()
    with hf.enable(model, None, POLICY):
        assert torch.equal(sampled(), plain)
    with hf.enable(model, HEADS, POLICY):
        compressed = sampled()
        assert torch.equal(sampled(), compressed)
    assert not torch.equal(compressed, plain)
    assert not torch.equal(compressed[0], compressed[1])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_beams": 2}, "beam search is not supported"),
        ({"use_cache": False}, "use_cache: expected True"),
        ({"cache_implementation": "static"}, "expected"),
        ({"prompt_lookup_num_tokens": 3, "eos_token_id": 263}, "assisted generation"),
    ],
)
def test_what_generate_cannot_do(llama: HfModel, options: dict[str, Any], words: str) -> None:
    model = llama.load()
    with hf.enable(model, HEADS, POLICY), pytest.raises(RazorError, match=words):
        generate(model, TOKENS[:30].tolist() * 2, 30, **options)


def test_a_cache_of_plain_transformers_is_refused(llama: HfModel) -> None:
    from transformers import DynamicCache

    model, cache = llama.load(), DynamicCache()
    generate(model, TOKENS[:20].tolist(), 5, past_key_values=cache)
    with hf.enable(model, HEADS, POLICY), pytest.raises(UsageError, match="found DynamicCache"):
        generate(model, TOKENS[:40].tolist(), 5, past_key_values=cache)


# The real model ---------------------------------------------------------------------------------
@pytest.mark.real
@pytest.mark.slow
def test_smollm2_finds_the_number_of_the_demo() -> None:
    checkpoint = open_checkpoint("smollm2-135m", None)
    spec = checkpoint.spec
    model = checkpoint_model(checkpoint)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    question = (ROOT / "docs" / "demo-prompt.txt").read_text()
    prompt = tokenizer.encode(tokenizer.chat([{"role": "user", "content": question}]))
    policy, recipe = RazorPolicy(min_window=256), HeadMap.load(RECIPE)
    end = list(tokenizer.eos_token_ids)

    def answer(heads: HeadMap) -> str:
        with hf.enable(model, heads, policy):
            tokens = generate(model, prompt, 24, eos_token_id=end, pad_token_id=end[0])
        return tokenizer.decode(tokens[len(prompt) :])

    assert "48213" in answer(recipe)
    nothing = replace(recipe, retrieval_heads=((),) * spec.num_layers, method="none")
    assert "48213" not in answer(nothing)
