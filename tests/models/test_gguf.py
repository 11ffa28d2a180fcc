"""Reading GGUF files: names, row order, block formats, RoPE scaling, and damaged files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from model_files import tensors_for, write_gguf

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.checkpoint import open_checkpoint
from trt_razor.models.gguf_reader import GgufFile, gguf_name
from trt_razor.models.spec import ModelSpec, RopeSpec, spec_from_hf_config

gguf = pytest.importorskip("gguf")

HF: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "torch_dtype": "float32",
}


def make(arch: str, **changes: Any) -> tuple[ModelSpec, dict[str, Any], dict[str, Any]]:
    """Spec, weights by Hugging Face names, and the same as GGUF stores them."""
    spec = spec_from_hf_config({"model_type": arch, **HF, **changes}, "tiny")
    weights = tensors_for(spec.tensors())
    stored = {}
    for name, array in weights.items():
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            # llama.cpp's converter, in words: rows (h, half, i) go to (h, i, half).
            heads = 4 if ".q_proj." in name else 2
            array = array.reshape(heads, 2, 4, -1).swapaxes(1, 2).reshape(array.shape)
        stored[gguf_name(name)] = array
    return spec, weights, stored


@pytest.mark.parametrize(
    "arch, changes",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_spec_and_weights(tmp_path: Path, arch: str, changes: dict[str, Any]) -> None:
    spec, weights, stored = make(arch, **changes)
    c = open_checkpoint(None, write_gguf(tmp_path / "tiny.gguf", arch, stored))
    assert c.spec == spec
    for name, expected in weights.items():
        found = c.tensor(name)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, expected)
    assert c.nbytes() == 4 * spec.num_parameters()


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "F16", "BF16"])
def test_block_formats(tmp_path: Path, quant: str) -> None:
    kind = gguf.GGMLQuantizationType[quant]
    _, weights, stored = make("qwen2")
    c = open_checkpoint(None, write_gguf(tmp_path / "q.gguf", "qwen2", stored, quant=kind))
    step = {"Q4_0": 0.6, "Q4_1": 0.4, "Q5_0": 0.3, "Q8_0": 0.03, "F16": 2e-3, "BF16": 0.02}[quant]
    for name, expected in weights.items():
        np.testing.assert_allclose(c.tensor(name), expected, atol=step)
    name = "model.layers.1.mlp.down_proj.weight"
    exact = gguf.dequantize(gguf.quantize(weights[name], kind), kind)
    np.testing.assert_array_equal(c.tensor(name), exact)


def test_large_tensors_are_dequantised_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trt_razor.models.gguf_reader as reader

    _, _, stored = make("qwen2")
    kind = gguf.GGMLQuantizationType.Q8_0
    c = open_checkpoint(None, write_gguf(tmp_path / "q.gguf", "qwen2", stored, quant=kind))
    whole = c.tensor("model.embed_tokens.weight")
    monkeypatch.setattr(reader, "_CHUNK_ELEMENTS", 32 * 5)
    np.testing.assert_array_equal(c.tensor("model.embed_tokens.weight"), whole)


def test_the_folder_of_a_single_gguf(tmp_path: Path) -> None:
    _, _, stored = make("llama")
    write_gguf(tmp_path / "tiny.gguf", "llama", stored)
    assert open_checkpoint(None, tmp_path).spec.name == "tiny"
    write_gguf(tmp_path / "other.gguf", "llama", stored)
    with pytest.raises(UsageError, match=r"several GGUF files \(other.gguf, tiny.gguf\)"):
        open_checkpoint(None, tmp_path)


def rope_freqs(factor: float) -> Any:
    """Divisors as llama.cpp's converter computes them for head_dim 8, theta 5e5."""
    out = []
    for i in range(4):
        wavelength = 2 * np.pi * 5e5 ** (2 * i / 8)
        if wavelength < 8192 / 4.0:
            out.append(1.0)
        elif wavelength > 8192 / 1.0:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / 3.0
            out.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def test_llama3_scaling_is_recognised(tmp_path: Path) -> None:
    _, _, stored = make("llama")
    for factor in (8.0, 32.0):
        tensors = stored | {"rope_freqs.weight": rope_freqs(factor)}
        c = open_checkpoint(None, write_gguf(tmp_path / "s.gguf", "llama", tensors))
        assert c.spec.rope == RopeSpec(5e5, "llama3", factor, 8192, 1.0, 4.0)
    plain = stored | {"rope_freqs.weight": np.ones(4, np.float32)}
    c = open_checkpoint(None, write_gguf(tmp_path / "s.gguf", "llama", plain))
    assert c.spec.rope == RopeSpec(5e5)
    for odd in ([1, 2, 3, 4], [0, 0, 0, 0], [np.nan] * 4):
        tensors = stored | {"rope_freqs.weight": np.array(odd, np.float32)}
        path = write_gguf(tmp_path / "s.gguf", "llama", tensors)
        with pytest.raises(UsageError, match=r"not the scaling of Llama 3\.1"):
            open_checkpoint(None, path)


def test_metadata_that_changes_the_model(tmp_path: Path) -> None:
    _, _, stored = make("qwen2")

    def spec(**more: Any) -> ModelSpec:
        return open_checkpoint(None, write_gguf(tmp_path / "m.gguf", "qwen2", stored, **more)).spec

    yarn = {
        "qwen2__rope__scaling__type": "yarn",
        "qwen2__rope__scaling__factor": 4.0,
        "qwen2__rope__scaling__original_context_length": 32,
    }
    assert spec(**yarn).rope == RopeSpec(5e5, "yarn", 4.0, 32)
    assert spec(**yarn).max_positions == 128
    assert spec(qwen2__attention__sliding_window=16).max_positions == 16
    with pytest.raises(UsageError, match="num_experts: expected a dense model"):
        spec(qwen2__expert_count=8)
    with pytest.raises(UsageError, match=r"rope\.dimension_count: expected 8 .* found 4"):
        spec(qwen2__rope__dimension_count=4)
    with pytest.raises(UsageError, match=r"split GGUF"):
        spec(split__count=2)
    with pytest.raises(UsageError, match=r"rope_scaling\.rope_type.*longrope"):
        spec(qwen2__rope__scaling__type="longrope")
    with pytest.raises(UsageError, match=r"attn_factor: expected 1"):
        spec(**yarn, qwen2__rope__scaling__attn_factor=2.0)


def test_other_architectures_and_misfits(tmp_path: Path) -> None:
    _, _, stored = make("qwen2")
    path = write_gguf(tmp_path / "m.gguf", "gemma2", stored)
    with pytest.raises(UsageError, match=r"general\.architecture: expected llama, qwen2, qwen3"):
        open_checkpoint(None, path)
    del stored["blk.1.attn_q.bias"]
    stored["blk.0.odd.weight"] = np.zeros(3, np.float32)
    path = write_gguf(tmp_path / "m.gguf", "qwen2", stored)
    with pytest.raises(
        UsageError, match=r"1 missing: blk\.1\.attn_q\.bias; 1 unexpected: blk\.0\.odd"
    ):
        open_checkpoint(None, path)


def test_unreadable_block_format(tmp_path: Path) -> None:
    _, _, stored = make("qwen2")
    stored["blk.0.odd"] = np.zeros(4, np.int32)
    path = write_gguf(tmp_path / "m.gguf", "qwen2", stored)
    with pytest.raises(UsageError, match=r"tensor 'blk\.0\.odd': block format I32 cannot"):
        open_checkpoint(None, path)


def test_same_header_as_the_gguf_package(tmp_path: Path) -> None:
    _, _, stored = make("llama")
    more = {"general__tags": ["a", "é"], "x__numbers": [1, 2, 3], "x__flag": True, "x__f": 0.5}
    path = write_gguf(
        tmp_path / "m.gguf", "llama", stored, quant=gguf.GGMLQuantizationType.Q4_1, **more
    )
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            found = ours.metadata[key]
            found = found.tolist() if isinstance(found, np.ndarray) else found
            assert found == field.contents(), key
    assert len(ours.tensors) == len(theirs.tensors)
    for t in theirs.tensors:
        mine = ours.tensors[t.name]
        assert mine.shape == tuple(reversed(t.shape.tolist()))
        assert (mine.offset, mine.nbytes) == (t.data_offset, t.n_bytes)
        assert mine.dtype == t.tensor_type.name
        np.testing.assert_array_equal(
            ours.dequantise(t.name), gguf.dequantize(t.data, t.tensor_type)
        )


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"PK\x03\x04" * 9, b"GGUF", b"GGUF" + b"\xff" * 99]
)
def test_not_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(RazorError, match=r"x\.gguf") as e:
        GgufFile(path)
    assert "\n" not in str(e.value)


def test_big_endian_and_old_versions(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(16))
    with pytest.raises(UsageError, match="big-endian"):
        GgufFile(path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(16))
    with pytest.raises(UsageError, match="expected 2 or 3, found 1"):
        GgufFile(path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("gguf")
    _, _, stored = make("llama")
    path = write_gguf(folder / "m.gguf", "llama", stored, general__tags=["a", "b"], x__n=[1, 2])
    return path.with_name("damaged.gguf"), path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_truncated_files_give_one_line(small_file: tuple[Path, bytes], data: st.DataObject) -> None:
    path, whole = small_file
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 33))])  # the end may be padding
    with pytest.raises(RazorError) as e:
        open_checkpoint(None, path)
    assert "\n" not in str(e.value)


@settings(max_examples=300, deadline=5000)
@given(at=st.integers(0, 2500), value=st.binary(min_size=1, max_size=8))
@example(at=8, value=b"\xff" * 8)  # tensors
@example(at=16, value=b"\xff" * 8)  # keys
def test_damaged_headers_give_one_line_or_another_model(
    small_file: tuple[Path, bytes], at: int, value: bytes
) -> None:
    """No length in the header is believed: no hang, no huge allocation, no other exception."""
    path, whole = small_file
    path.write_bytes(whole[:at] + value + whole[at + len(value) :])
    message = "opened"
    try:
        open_checkpoint(None, path).tensor("model.norm.weight")
    except RazorError as e:
        message = str(e)
    assert message
    assert "\n" not in message
