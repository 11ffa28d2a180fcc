"""The real SmolLM2: weights, logits and tokens against transformers and llama.cpp."""

from __future__ import annotations

import json
import random
import urllib.request
from typing import Any

import numpy as np
import pytest

from trt_razor.models.checkpoint import Checkpoint, open_checkpoint
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.models.zoo import zoo_spec

pytestmark = pytest.mark.real

IDENTITY = "4d3b4ca3754145c6d2ffa16922b73733fc62f9c2f68a207a618bf164cb6e720c"

# Ids as llama.cpp's tokenizer gives them for the same file.
LLAMA_CPP_IDS = [
    ("Hello, world!", [19556, 28, 905, 17]),
    ("The magic number is 4728.", [504, 9019, 1230, 314, 216, 36, 39, 34, 40, 30]),
    ("  two spaces\n\n\ttab", [216, 827, 5600, 1116, 197, 15999]),
    ("3.14159 and 1e-05", [35, 30, 33, 36, 33, 37, 41, 284, 216, 33, 85, 29, 32, 37]),
    ("don't we'll I'VE", [12420, 982, 392, 3060, 339, 23, 18525]),
    ("naïve café — “quotes”", [3546, 46494, 37366, 1841, 619, 385, 2346, 573]),
    ("🎉 emoji", [10813, 232, 227, 649, 33777]),
    ("٣٤٥ ²³ Ⅷ", [164, 113, 164, 114, 164, 115, 216, 19133, 39050, 216, 173, 223, 117]),
    ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198]),
    ("\r\n\r\n \n", [18682, 3717]),
    ("Привет, мир", [155, 249, 46879, 16464, 32547, 28, 41337, 7872, 9175]),
    ("\xa0nbsp 5%", [15442, 94, 32093, 216, 37, 21]),
]


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    pytest.importorskip("gguf")
    return open_checkpoint("SmolLM2-135M", None)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Checkpoint) -> Tokenizer:
    found = smollm2.tokenizer()
    assert found is not None
    return found


class LlamaCpp:
    """llama.cpp on the same file, through its HTTP interface."""

    def __init__(self, path: str) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel, params.warmup, params.port = 512, 1, False, 0
        params.cpuparams.n_threads = 1
        self.server = xllamacpp.Server(params)

    def post(self, where: str, data: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.server.listening_address + where,
            json.dumps(data).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def llama_cpp(smollm2: Checkpoint) -> LlamaCpp:
    return LlamaCpp(smollm2.location)


def test_spec_is_the_zoo_model(smollm2: Checkpoint) -> None:
    assert smollm2.spec.fingerprint() == zoo_spec("smollm2-135m").fingerprint()
    assert smollm2.spec.name == "smollm2-135m"
    assert smollm2.spec.max_positions == 8192
    assert smollm2.nbytes() == 4 * 134_515_008
    assert smollm2.identity() == IDENTITY


def hf_model(smollm2: Checkpoint) -> Any:
    """A transformers model of that shape, without weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    s = smollm2.spec
    config = transformers.LlamaConfig(
        vocab_size=s.vocab_size,
        hidden_size=s.hidden_size,
        intermediate_size=s.intermediate_size,
        num_hidden_layers=s.num_layers,
        num_attention_heads=s.num_heads,
        num_key_value_heads=s.num_kv_heads,
        max_position_embeddings=s.max_positions,
        rms_norm_eps=s.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": s.rope.theta},
        tie_word_embeddings=s.tie_embeddings,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


@pytest.mark.slow
def test_weights_are_those_transformers_reads(smollm2: Checkpoint) -> None:
    """A second reader of the format, of the names and of the row order of q and k."""
    model = hf_model(smollm2)
    utils = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    read = utils.load_gguf_checkpoint(smollm2.location, return_tensors=True, model_to_load=model)
    state = read["tensors"]
    assert set(state) == set(smollm2.spec.tensors())
    for name, expected in state.items():
        np.testing.assert_array_equal(smollm2.tensor(name), expected.numpy(), err_msg=name)


def test_logits_are_those_of_llama_cpp(
    smollm2: Checkpoint, tokenizer: Tokenizer, llama_cpp: LlamaCpp
) -> None:
    """The whole model through transformers with our weights: next-token probabilities agree.

    llama.cpp multiplies with activations rounded to 8 bits, hence the tolerance.
    """
    import torch

    model = hf_model(smollm2)
    config, s = model.config, smollm2.spec
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    state = {n: torch.from_numpy(smollm2.tensor(n)) for n in s.tensors()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    ids = tokenizer.encode(
        "The capital of France is Paris. Its river is the Seine, and its best known tower is"
    )
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    answer = llama_cpp.post("/completion", {"prompt": ids, "n_predict": 1, "n_probs": 50})
    theirs = answer["completion_probabilities"][0]["top_logprobs"]
    found = np.array([float(ours[t["id"]]) for t in theirs])
    expected = np.array([t["logprob"] for t in theirs])
    assert len(theirs) == 50
    assert int(ours.argmax()) == theirs[0]["id"]
    # Measured: mean 0.08, correlation 0.9985. With q and k in GGUF's row order even the most
    # likely token differs.
    assert np.abs(found - expected).mean() < 0.15
    assert np.corrcoef(found, expected)[0, 1] > 0.98


@pytest.mark.parametrize("text, ids", LLAMA_CPP_IDS)
def test_token_ids(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids, skip_special=False) == text


def test_random_texts_tokenize_as_in_llama_cpp(tokenizer: Tokenizer, llama_cpp: LlamaCpp) -> None:
    rng = random.Random(0)
    pool = "ab Z9 07\n\t.,'’é日🎉٣²<|>_-"
    texts = ["".join(rng.choice(pool) for _ in range(rng.randint(1, 40))) for _ in range(60)]
    for text in [*texts, "x<|im_end|>y"]:
        for parse in (True, False):
            data = {"content": text, "parse_special": parse}
            expected = llama_cpp.post("/tokenize", data)["tokens"]
            assert tokenizer.encode(text, parse_special=parse) == expected, text


def test_special_tokens_and_chat(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == (2, 0)
    text = tokenizer.chat([{"role": "user", "content": "hi"}])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert ids.count(2) == 2


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Any) -> None:
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.eos_token_ids == (2, 0)
    assert again.bos_token_id == 1
    assert again.vocab_size == 49152
    for text, ids in LLAMA_CPP_IDS:
        assert again.encode(text) == ids
    talk = [{"role": "user", "content": "hi"}]
    assert again.chat(talk) == tokenizer.chat(talk)
