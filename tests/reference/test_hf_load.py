"""Models of transformers from checkpoints: the same model, or a refusal."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [hf]")
sys.path.insert(0, str(Path(__file__).parent))
from hf_models import CONFIGS, TOKENS, HfModel, hf_logits, make_hf_model

from trt_razor.errors import UsageError
from trt_razor.models.checkpoint import open_checkpoint, random_checkpoint
from trt_razor.models.zoo import zoo_names, zoo_spec
from trt_razor.reference.hf.load import checkpoint_model, fingerprint_of, hf_config, load_model


@pytest.fixture(scope="module", params=list(CONFIGS))
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HfModel:
    return make_hf_model(tmp_path_factory.mktemp("load") / request.param, request.param)


def test_a_checkpoint_computes_what_transformers_reads_from_its_folder(any_model: HfModel) -> None:
    ours = checkpoint_model(open_checkpoint(None, any_model.folder))
    want = hf_logits(any_model.load(), TOKENS[:80], [80])
    assert torch.equal(hf_logits(ours, TOKENS[:80], [80]), want)
    assert not ours.training


def test_a_folder_is_loaded_with_its_tokenizer(any_model: HfModel) -> None:
    model, tokenizer, name, fingerprint = load_model(any_model.folder, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
    assert (name, fingerprint) == (any_model.folder.name, any_model.spec.fingerprint())


@pytest.mark.parametrize("name", zoo_names())
def test_every_zoo_model_has_a_configuration_that_means_it(name: str) -> None:
    spec = zoo_spec(name)
    if spec.architecture == "baichuan":
        with pytest.raises(UsageError, match="no class for baichuan"):
            hf_config(spec)
    else:
        assert fingerprint_of(hf_config(spec), name) == spec.fingerprint()


def test_embeddings_are_tied_where_the_spec_says_so(any_model: HfModel) -> None:
    spec = replace(any_model.spec, tie_embeddings=True)
    model = checkpoint_model(random_checkpoint(spec))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = checkpoint_model(open_checkpoint(None, any_model.folder))
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight


def test_pickled_weights_and_unknown_names_are_refused(tmp_path: Path) -> None:
    model = make_hf_model(tmp_path / "m", "llama")
    (model.folder / "model.safetensors").rename(model.folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="can carry code"):
        load_model(model.folder)
    with pytest.raises(UsageError, match="did you mean"):
        load_model("smollm2-135")
    with pytest.raises(UsageError, match="no weights at hand"):
        load_model("qwen2.5-72b")
    with pytest.raises(UsageError, match="dtype: expected a floating type"):
        load_model(model.folder, torch.int8)
