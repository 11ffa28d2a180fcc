"""TensorRT-LLM checkpoints that cannot be permuted, that are damaged, or that lie."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantised_cases import (
    SPECS,
    change_config,
    change_tensors,
    convert,
    open_model,
    permute,
)
from rank_folders import (
    Stored,
    make_model,
    read_safetensors,
    write_folder,
)

from trt_razor.errors import RazorError, UsageError
from trt_razor.trtllm.options import TrtLlmOptions
from trt_razor.trtllm.quantized import (
    is_trtllm_checkpoint,
    open_trtllm_checkpoint,
    permute_checkpoint,
)
from trt_razor.trtllm.ranks import dense_layout


@pytest.fixture(scope="module")
def _fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model(SPECS["llama"], "FP8", kv=True)
    return write_folder(tmp_path_factory.mktemp("fp8") / "in", model, 2)


@pytest.fixture
def fp8(_fp8: Path, tmp_path: Path) -> Path:
    """An FP8 checkpoint of two ranks, to be damaged."""
    return Path(shutil.copytree(_fp8, tmp_path / "in"))


# Formats whose heads cannot move ----------------------------------------------------------------
@pytest.mark.parametrize(
    "algo, reason, way",
    (
        ("W8A16", "interleaved", "--convert-only"),
        ("W4A16", "interleaved", "--convert-only"),
        ("W4A16_GPTQ", "interleaved", "FP8 or W4A16_AWQ"),
        ("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "attention layer of its own", "FP8 or W4A16_AWQ"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "attention layer of its own", "FP8 or W4A16_AWQ"),
        ("W4A8_QSERVE_PER_GROUP", "attention layer of its own", "FP8 or W4A16_AWQ"),
        ("MIXED_PRECISION", "another format", "FP8 or W4A16_AWQ"),
        ("NVFP4", "not supported", "FP8 or W4A16_AWQ"),
        ("W4A8_AWQ", "not supported", "FP8 or W4A16_AWQ"),
        ("NEVER_HEARD_OF", "not supported", "FP8 or W4A16_AWQ"),
    ),
)
def test_other_formats_are_refused_with_a_reason_and_a_way_out(
    algo: str, reason: str, way: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "in", make_model(SPECS["llama"], "FP8"))
    change_config(folder, lambda c: c["quantization"].update(quant_algo=algo))
    source = open_trtllm_checkpoint(folder, None)  # a dense engine may still be built of it
    assert source.quant_algo == algo
    with pytest.raises(UsageError) as e:
        permute(source, tmp_path / "out")
    message = str(e.value)
    assert algo in message
    assert reason in message
    assert way in message
    assert "\n" not in message


def test_int8_caches_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", make_model(SPECS["llama"]))
    change_config(folder, lambda c: c["quantization"].update(kv_cache_quant_algo="INT8"))
    with pytest.raises(
        UsageError, match="kv_cache_quant_algo: expected 'FP8' or null, found 'INT8'"
    ):
        permute(open_trtllm_checkpoint(folder, None), tmp_path / "out")


def test_heads_are_not_ordered_twice(tmp_path: Path) -> None:
    permute(open_model(tmp_path / "in", make_model(SPECS["llama"])), tmp_path / "once")
    source = open_trtllm_checkpoint(tmp_path / "once", None)
    with pytest.raises(UsageError, match="in a Razor order already"):
        permute(source, tmp_path / "twice")


def test_a_layout_of_other_ranks_or_layers_is_an_error(tmp_path: Path) -> None:
    source = open_model(tmp_path / "in", make_model(SPECS["llama"]))
    layout = dense_layout(SPECS["llama"], 2)
    with pytest.raises(RazorError, match="expected 1 ranks, 3 layers and 4 KV heads"):
        convert(source, layout, None, TrtLlmOptions(1), tmp_path / "out")
    with pytest.raises(UsageError, match=r"pp_size: expected 1\.\.3"):
        convert(source, layout, None, TrtLlmOptions(2, 4), tmp_path / "out")


QKV = "transformer.layers.1.attention.qkv"


@pytest.mark.parametrize(
    "change, message",
    (
        (lambda ts: ts.pop(f"{QKV}.weight"), "expected on 2 ranks, found on 1"),
        (lambda ts: ts.update({"a\nb": ("F32", np.zeros(1, np.float32))}), r"a\\nb: expected on 2"),
        (
            lambda ts: ts.update({f"{QKV}.weight": ("F8_E4M3", np.zeros((128, 31), np.uint8))}),
            r"attention\.qkv\.weight \(expected \[128, 32\], found \[128, 31\]\)",
        ),
        (
            lambda ts: ts.update({"transformer.ln_f.weight": ("F32", np.ones(32, np.float32))}),
            r"rank1\.safetensors: transformer\.ln_f\.weight: dtype: expected F32, found F16",
        ),
        (
            lambda ts: ts.update({"transformer.layers.3.x": ("F16", np.zeros(1, np.float16))}),
            "expected layers 0..2",
        ),
    ),
)
def test_tensors_of_one_rank_that_do_not_fit(
    change: Callable[[Stored], object], message: str, fp8: Path
) -> None:
    change_tensors(fp8, change)
    with pytest.raises(UsageError, match=message):
        open_trtllm_checkpoint(fp8, None)


@pytest.mark.parametrize(
    "change, message",
    (
        (lambda ts: ts.pop(f"{QKV}.weight"), rf"missing: {re.escape(QKV)}\.weight"),
        (lambda ts: ts.pop(f"{QKV}.weights_scaling_factor"), r"missing: .*weights_scaling_factor"),
        (lambda ts: ts.pop("lm_head.weight"), r"missing: lm_head\.weight"),
        (
            lambda ts: ts.pop("transformer.layers.2.attention.kv_cache_scaling_factor"),
            r"missing: transformer\.layers\.2\.attention\.kv_cache_scaling_factor",
        ),
        (
            lambda ts: ts.update({"../../etc/x\n": ("F32", np.zeros(1, np.float32))}),
            r"1 unexpected: \.\./\.\./etc/x\\n",
        ),
        (
            lambda ts: ts.update({f"{QKV}.weight": ("I8", np.zeros((128, 1, 32), np.int8))}),
            "mis-shaped",
        ),
        (
            lambda ts: ts.update(
                {f"{QKV}.activation_scaling_factor": ("U8", np.zeros(1, np.uint8))}
            ),
            "dtype: expected BF16 or F16 or F32, found U8",
        ),
    ),
)
def test_tensors_of_all_ranks_that_do_not_fit(
    change: Callable[[Stored], object], message: str, fp8: Path
) -> None:
    for rank in range(2):
        change_tensors(fp8, change, f"rank{rank}.safetensors")
    with pytest.raises(UsageError, match=message) as e:
        open_trtllm_checkpoint(fp8, None)
    assert "\n" not in str(e.value)


def test_scales_that_differ_between_ranks_are_refused(fp8: Path, tmp_path: Path) -> None:
    name = f"{QKV}.weights_scaling_factor"
    change_tensors(fp8, lambda ts: ts.update({name: ("F32", np.array([7], np.float32))}))
    with pytest.raises(UsageError, match=r"rank1.*expected the same values as in rank0.*one scale"):
        permute(open_trtllm_checkpoint(fp8, None), tmp_path / "out", kv="fp8")


def test_ranks_that_share_a_kv_head_must_agree(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", make_model(SPECS["llama"]), 8)

    def other_keys(tensors: Stored) -> None:
        dtype, value = tensors[f"{QKV}.weight"]
        value = value.copy()
        value[16] += 1  # the first row behind the query head
        tensors[f"{QKV}.weight"] = dtype, value

    change_tensors(folder, other_keys, "rank3.safetensors")
    source = open_trtllm_checkpoint(folder, None)
    with pytest.raises(UsageError, match="share a KV head hold different weights"):
        permute(source, tmp_path / "out")


def test_missing_and_surplus_ranks(fp8: Path) -> None:
    shutil.copy(fp8 / "rank1.safetensors", fp8 / "rank2.safetensors")
    with pytest.raises(UsageError, match=r"says 2 ranks, but there is rank2\.safetensors"):
        open_trtllm_checkpoint(fp8, None)
    (fp8 / "rank2.safetensors").unlink()
    (fp8 / "rank1.safetensors").unlink()
    with pytest.raises(UsageError, match=r"rank1\.safetensors: no such file"):
        open_trtllm_checkpoint(fp8, None)


def _header(size: int, header: bytes) -> bytes:
    return size.to_bytes(8, "little") + header


_HUGE = json.dumps(
    {f"{QKV}.weight": {"dtype": "F16", "shape": [1 << 40, 32], "data_offsets": [0, 1 << 46]}}
).encode()


@pytest.mark.parametrize(
    "damage",
    (
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: _header((1 << 64) - 1, data[8:]),
        lambda data: _header(1 << 40, data[8:]),
        lambda data: _header(4, b"[[[["),
        lambda data: _header(len(_HUGE), _HUGE),
        lambda data: data[:8] + data[8:].replace(b'"shape"', b'"shbpe"', 1),
    ),
)
def test_damaged_rank_files(damage: Callable[[bytes], bytes], fp8: Path) -> None:
    path = fp8 / "rank1.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RazorError, match=r"rank1\.safetensors: damaged") as e:
        open_trtllm_checkpoint(fp8, None)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("file", ("config.json", "rank1.safetensors"))
def test_flipped_bits_are_refused_or_harmless(file: str, fp8: Path) -> None:
    path = fp8 / file
    data = path.read_bytes()
    end = len(data)
    if file != "config.json":
        end = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(1)
    refusals = []
    for _ in range(150):
        changed = bytearray(data)
        changed[rng.integers(end)] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            open_trtllm_checkpoint(fp8, None)
        except RazorError as e:
            refusals.append(str(e))
    assert len(refusals) > 75
    assert not [message for message in refusals if "\n" in message]


def test_a_file_cut_after_it_was_opened(fp8: Path, tmp_path: Path) -> None:
    source = open_trtllm_checkpoint(fp8, None)
    data = (fp8 / "rank1.safetensors").read_bytes()
    (fp8 / "rank1.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(RazorError, match="became shorter"):
        permute(source, tmp_path / "out", kv="fp8")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "change, message",
    (
        (lambda c: c["mapping"].update(tp_size=10**9), "mapping.tp_size: expected 1..1024"),
        (lambda c: c["mapping"].update(pp_size=True), "mapping.pp_size: expected"),
        (lambda c: c["mapping"].update(pp_size=0), "mapping.pp_size: expected"),
        (lambda c: c["mapping"].update(tp_size="2"), "mapping.tp_size: expected"),
        (lambda c: c["mapping"].update(world_size=3), "world_size: expected tp_size . pp_size = 2"),
        (lambda c: c["mapping"].update(tp_size=1, pp_size=9, world_size=9), "at most the 3 layers"),
        (lambda c: c["mapping"].update(tp_size=3, world_size=3), "tp_size: expected a divisor"),
        (lambda c: c["mapping"].update(cp_size=2), "cp_size: expected 1"),
        (lambda c: c.update(mapping=[2]), "mapping: expected an object"),
        (lambda c: c.update(quantization="FP8"), "quantization: expected an object"),
        (lambda c: c["quantization"].update(quant_algo=8), "quant_algo: expected a name or null"),
        (lambda c: c["quantization"].update(quant_algo=["FP8"]), "quant_algo: expected a name"),
        (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers"),
        (lambda c: c.update(hidden_size=10**12), "hidden_size"),
        (lambda c: c.update(architecture="../../GPT"), "architecture"),
        (lambda c: c.update(intermediate_size=127), "mlp.fc.weight: 127 elements do not divide"),
        (
            lambda c: c["quantization"].update(quant_algo=None),
            "quant_algo: None does not fit the rank files, whose weights are F8_E4M3",
        ),
        (
            lambda c: c["quantization"].update(quant_algo="W4A16_AWQ", group_size=0),
            "group_size: expected 2..4096, found 0",
        ),
        (
            lambda c: c["quantization"].update(quant_algo="W4A16_AWQ", group_size=1 << 70),
            "group_size: expected 2..4096",
        ),
        (
            lambda c: c["quantization"].update(quant_algo="W4A16_AWQ", group_size=24),
            "do not come in pairs and in groups of 24",
        ),
        (
            lambda c: c["quantization"].update(
                quant_algo="W4A16_AWQ", group_size=16, has_zero_point=True
            ),
            "has_zero_point: expected false",
        ),
    ),
)
def test_configs_that_do_not_fit(change: Callable[[Any], object], message: str, fp8: Path) -> None:
    change_config(fp8, change)
    with pytest.raises(UsageError, match=message) as e:
        open_trtllm_checkpoint(fp8, None)
    assert "\n" not in str(e.value)


def test_quantised_by_name_only(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", make_model(SPECS["llama"]))
    change_config(folder, lambda c: c["quantization"].update(quant_algo="FP8"))
    with pytest.raises(
        UsageError, match="'FP8' does not fit the rank files, whose weights are not"
    ):
        open_trtllm_checkpoint(folder, None)


@pytest.mark.parametrize("text", ("", "{", "[]", "\xff", '{"architecture": 1}'))
def test_damaged_config(text: str, fp8: Path) -> None:
    (fp8 / "config.json").write_bytes(text.encode("latin-1"))
    assert is_trtllm_checkpoint(fp8)
    with pytest.raises(RazorError, match=r"config\.json"):
        open_trtllm_checkpoint(fp8, None)


def test_the_source_is_never_written_over(fp8: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(fp8)
    before = (fp8 / "rank0.safetensors").read_bytes()
    for target in (fp8, fp8 / ".." / "in", tmp_path / "link"):
        with pytest.raises(UsageError, match="is the checkpoint itself"):
            permute(open_trtllm_checkpoint(fp8, None), target, kv="fp8")
    assert (fp8 / "rank0.safetensors").read_bytes() == before


# Opening ----------------------------------------------------------------------------------------
def test_what_is_a_tensorrt_llm_checkpoint(fp8: Path, tmp_path: Path) -> None:
    assert is_trtllm_checkpoint(fp8)
    assert not is_trtllm_checkpoint(tmp_path)
    assert not is_trtllm_checkpoint(fp8 / "config.json")
    assert not is_trtllm_checkpoint(tmp_path / "nowhere")
    (fp8 / "rank0.safetensors").unlink()
    assert is_trtllm_checkpoint(fp8)  # the error will say what is missing
    for config in ({"architectures": ["LlamaForCausalLM"]}, {"pretrained_config": {}}):
        (fp8 / "config.json").write_text(json.dumps(config))
        assert not is_trtllm_checkpoint(fp8)


def test_identity_and_tokenizer(fp8: Path, tmp_path: Path) -> None:
    source = open_trtllm_checkpoint(fp8, None)
    identity = source.identity()
    assert open_trtllm_checkpoint(fp8, None).identity() == identity
    assert source.nbytes() == sum(
        value.nbytes
        for rank in range(2)
        for _, value in read_safetensors(fp8 / f"rank{rank}.safetensors").values()
    )
    assert source.tokenizer() is None
    assert Path(source.location) == fp8
    assert source.spec.torch_dtype == "float16"

    def change(tensors: Stored) -> None:
        dtype, value = tensors[f"{QKV}.weight"]
        value = value.view(np.uint8).copy()
        value[0, 0] ^= 1
        tensors[f"{QKV}.weight"] = dtype, value

    change_tensors(fp8, change)  # rank 1 has the same name unchanged
    assert open_trtllm_checkpoint(fp8, None).identity() != identity


def test_another_model_than_named(fp8: Path) -> None:
    with pytest.raises(UsageError, match="not the model llama2-7b: "):
        open_trtllm_checkpoint(fp8, "llama2-7b")


def test_progress_counts_bytes_to_the_end(fp8: Path, tmp_path: Path) -> None:
    source = open_trtllm_checkpoint(fp8, None)
    calls: list[tuple[str, int, int]] = []
    options = TrtLlmOptions(1, kv_dtype="fp8")
    (tmp_path / "out").mkdir()
    permute_checkpoint(
        source,
        dense_layout(source.spec, 1),
        None,
        options,
        tmp_path / "out",
        lambda *call: calls.append(call),
    )
    written = read_safetensors(tmp_path / "out" / "rank0.safetensors")
    total = sum(value.nbytes for _, value in written.values())
    assert calls[-1] == ("convert", total, total)
    assert [done for _, done, _ in calls] == sorted({done for _, done, _ in calls})
