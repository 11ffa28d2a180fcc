"""Reading Hugging Face folders: values, laziness, layouts, and everything that can be wrong."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from model_files import config, tensors_for, write_folder

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.checkpoint import Checkpoint, open_checkpoint
from trt_razor.models.spec import spec_from_hf_config

INDEX = "model.safetensors.index.json"


def tiny(dtype: Any = np.float32, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    data = config("llama", **changes)
    return data, tensors_for(spec_from_hf_config(data, "t").tensors(), dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path, dtype: Any, shards: int) -> None:
    data, tensors = tiny(dtype)
    c = open_checkpoint(None, write_folder(tmp_path / "my-model", data, tensors, shards))
    assert c.spec.name == "my-model"
    for name, expected in tensors.items():
        found = c.tensor(name)
        assert found.dtype == expected.dtype
        assert found.flags.c_contiguous
        assert found.tobytes() == expected.tobytes()
    assert c.nbytes() == sum(t.nbytes for t in tensors.values())
    assert c.tokenizer() is None


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_folder_written_by_transformers(tmp_path: Path, model_type: str) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf = transformers.AutoConfig.for_model(**config(model_type))
    model = transformers.AutoModelForCausalLM.from_config(hf)
    model.save_pretrained(tmp_path)
    c = open_checkpoint(None, tmp_path)
    state = model.state_dict()
    assert set(c.spec.tensors()) == set(state)
    for name, expected in state.items():
        np.testing.assert_array_equal(c.tensor(name).astype(np.float32), expected.float().numpy())


def test_writing_to_a_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    c = open_checkpoint(None, write_folder(tmp_path, *tiny()))
    before = (tmp_path / "model.safetensors").read_bytes()
    c.tensor("model.norm.weight")[:] = 0
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert np.any(c.tensor("model.norm.weight") != 0)


def test_symlinked_files_as_in_a_hub_cache(tmp_path: Path) -> None:
    write_folder(tmp_path / "blobs", *tiny(), shards=2)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (tmp_path / "blobs").iterdir():
        os.symlink(Path("..") / "blobs" / file.name, snapshot / file.name)
    assert open_checkpoint(None, snapshot).tensor("model.norm.weight").shape == (32,)


def test_tied_models_tolerate_lm_head_and_rotary_buffers(tmp_path: Path) -> None:
    data, tensors = tiny(tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    c = open_checkpoint(None, write_folder(tmp_path / "both", data, tensors))
    assert "lm_head.weight" not in c.spec.tensors()
    # Some tools keep only the other name of the shared matrix.
    embed = tensors.pop("model.embed_tokens.weight")
    c = open_checkpoint(None, write_folder(tmp_path / "head", data, tensors))
    np.testing.assert_array_equal(c.tensor("model.embed_tokens.weight"), embed)


@pytest.mark.parametrize("vocab, norm_head", [(64000, False), (125696, True)])
def test_baichuan_is_unpacked_and_its_head_normalised(
    tmp_path: Path, vocab: int, norm_head: bool
) -> None:
    data = config(
        "baichuan",
        vocab_size=vocab,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=...,
        intermediate_size=8,
        num_hidden_layers=1,
    )
    shapes = spec_from_hf_config(data, "b").tensors()
    p = "model.layers.0.self_attn."
    for proj in "qkv":
        del shapes[f"{p}{proj}_proj.weight"]
    tensors = tensors_for(shapes | {p + "W_pack.weight": (48, 16)}, ml_dtypes.bfloat16)
    c = open_checkpoint(None, write_folder(tmp_path, data, tensors))
    packed = tensors[p + "W_pack.weight"]
    for i, proj in enumerate("qkv"):
        found = c.tensor(f"{p}{proj}_proj.weight")
        np.testing.assert_array_equal(found, packed[16 * i : 16 * (i + 1)])
        assert found.flags.c_contiguous
    head, stored = c.tensor("lm_head.weight"), tensors["lm_head.weight"]
    assert head.dtype == stored.dtype
    if not norm_head:
        np.testing.assert_array_equal(head, stored)
        return
    length = np.linalg.norm(head.astype(np.float64), axis=1)
    np.testing.assert_allclose(length, 1.0, atol=4e-3)  # bfloat16 has 8 bits
    exact = stored.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    np.testing.assert_allclose(head.astype(np.float64), exact, rtol=4e-3)


def test_misfits_are_counted_and_named(tmp_path: Path) -> None:
    data, tensors = tiny()
    for i in range(2):
        for proj in ("q", "k"):
            del tensors[f"model.layers.{i}.self_attn.{proj}_proj.weight"]
    tensors["model.norm.weight"] = np.zeros(31, np.float32)
    tensors["adapter.\nweight"] = np.zeros(1, np.float32)
    with pytest.raises(UsageError) as e:
        open_checkpoint(None, write_folder(tmp_path, data, tensors))
    message = str(e.value)
    assert "4 missing: model.layers.0.self_attn.q_proj.weight" in message
    assert "…" in message
    assert "1 mis-shaped: model.norm.weight (expected [32], found [31])" in message
    assert "1 unexpected: adapter.\\nweight" in message
    assert "\n" not in message


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: Any) -> None:
    data, tensors = tiny()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(dtype)
    with pytest.raises(UsageError, match=r"model\.norm\.weight: dtype: expected F32, F16 or BF16"):
        open_checkpoint(None, write_folder(tmp_path, data, tensors))


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.bin", "", 3, None],
)
def test_an_index_cannot_point_elsewhere(tmp_path: Path, file: Any) -> None:
    folder = write_folder(tmp_path / "m", *tiny(), shards=2)
    write_folder(tmp_path, *tiny())
    (tmp_path / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(RazorError, match=r"weight_map\['model\.norm\.weight'\]: expected the name"):
        open_checkpoint(None, folder)


@pytest.mark.parametrize(
    "text, words", [("{", "not valid JSON"), ("[]", "not a JSON object"), ("{}", "weight_map")]
)
def test_damaged_index(tmp_path: Path, text: str, words: str) -> None:
    folder = write_folder(tmp_path, *tiny(), shards=2)
    (folder / INDEX).write_text(text)
    with pytest.raises(RazorError, match=words):
        open_checkpoint(None, folder)


def test_shards_that_are_missing_or_lack_their_tensor(tmp_path: Path) -> None:
    data, tensors = tiny()
    folder = write_folder(tmp_path, data, tensors, shards=2)
    index = json.loads((folder / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))
    moved = {n: (second if f == first else f) for n, f in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(RazorError, match="is missing, but"):
        open_checkpoint(None, folder)
    (folder / INDEX).write_text(json.dumps(index))
    (folder / second).unlink()
    with pytest.raises(UsageError, match="incomplete, fetch it again"):
        open_checkpoint(None, folder)


def test_pickles_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config()))
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        open_checkpoint(None, tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"pytorch_model.*pickle.*safe_serialization"):
        open_checkpoint(None, tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_give_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = write_folder(tmp_path_factory.mktemp("m"), *tiny())
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole) - 1))])
    for i in data.draw(st.lists(st.integers(0, header - 1), max_size=3)):
        if i < len(damaged):
            damaged[i] ^= data.draw(st.integers(1, 255))
    file.write_bytes(damaged)
    with pytest.raises(RazorError) as e:
        open_checkpoint(None, folder)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 900


def test_identity(tmp_path: Path) -> None:
    data, tensors = tiny()

    def identity(name: str, tensors: dict[str, Any], shards: int = 1) -> str:
        return open_checkpoint(
            None, write_folder(tmp_path / name, data, tensors, shards)
        ).identity()

    one = identity("a", tensors)
    assert one == identity("b", tensors)
    assert len(one) == 64
    changed = {n: t.copy() for n, t in tensors.items()}
    changed["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    assert identity("c", changed) != one
    halves = {n: t.astype(np.float16) for n, t in tensors.items()}
    assert identity("d", halves) != one


def test_a_file_that_shrinks_later(tmp_path: Path) -> None:
    c = open_checkpoint(None, write_folder(tmp_path, *tiny()))
    os.truncate(tmp_path / "model.safetensors", 4000)
    last = max(c.spec.tensors())  # the writer sorts by dtype, then name
    with pytest.raises(RazorError, match="became shorter"):
        c.tensor(last)


def test_only_the_tensor_asked_for_is_read(tmp_path: Path) -> None:
    """A 3 TB sparse file opens and reads like a small one."""
    data = config(vocab_size=1 << 24, hidden_size=1 << 16, num_attention_heads=64, head_dim=8)
    spec = spec_from_hf_config(data, "huge")
    header, at = {}, 0
    for name, shape in spec.tensors().items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text(json.dumps(data))
    with open(tmp_path / "model.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        try:
            f.truncate(8 + len(text) + at)
        except OSError:
            pytest.skip("the file system has no files this large")
    c: Checkpoint = open_checkpoint(None, tmp_path)
    assert c.nbytes() == at
    assert c.tensor("model.norm.weight").shape == (1 << 16,)
    assert len(c.identity()) == 64
