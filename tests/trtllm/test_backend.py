"""Builds with ``--backend tensorrt-llm`` as a user starts them, with TensorRT-LLM's double."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import doubles
import pytest
from tiny_models import write_model

from trt_razor import build, cli
from trt_razor.engine import Engine
from trt_razor.errors import UsageError
from trt_razor.headmap import HeadMap
from trt_razor.models.spec import ModelSpec
from trt_razor.trtllm import backend
from trt_razor.trtllm.engine_json import local_cache_of
from trt_razor.trtllm.release import LocalCache

MODEL: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 96,
    "head_dim": 64,
}
RETRIEVAL = ((1,), (0, 3), ())
RAZOR = [
    "--razor",
    "--sinks",
    "4",
    "--min-window",
    "9",
    "--max-seq-len",
    "64",
    "--tokens-per-block",
    "8",
]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(params=["1.0.0", "1.2.1"])
def release(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """An image with TensorRT-LLM, our plugin and a GPU."""
    path = tmp_path / "double"
    with doubles.installed(path, request.param):
        for name, value in doubles.environment(path).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(backend, "gpu_capability", lambda: "9.0")
        yield request.param


@pytest.fixture
def model(tmp_path: Path) -> ModelSpec:
    """A Hugging Face folder ``model`` and a head map ``heads.json``; the current folder is theirs."""
    spec = write_model(tmp_path / "model", **MODEL)
    HeadMap(spec.name, spec.fingerprint(), 3, 4, RETRIEVAL, "test", "by hand").save(
        tmp_path / "heads.json"
    )
    return spec


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """``build_engine.py`` with some arguments: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> tuple[int, str, str]:
        try:
            code = cli.build_main(["--backend", "tensorrt-llm", *args])
        except SystemExit as e:
            code = int(e.code or 0)
        found = capfd.readouterr()
        return code, found.out, found.err

    return call


def _plugins(engine: Path, rank: int = 0) -> list[dict[str, Any]]:
    plugins: list[dict[str, Any]] = doubles.network(engine / f"rank{rank}.engine")["plugins"]
    return plugins


def test_razor_engine_for_two_ranks(
    release: str, model: ModelSpec, run: Run, tmp_path: Path
) -> None:
    args = ["--checkpoint", "model", "--heads", "heads.json", *RAZOR, "--tp-size", "2"]
    code, out, err = run(*args, "--output", "e")
    assert code == 0, err
    assert "1 added to the 3 that retrieve" in err
    assert f"TensorRT-LLM {release}: local heads in" in err
    assert "KV per sequence of 64 tokens and GPU: " in out
    engine = Engine.load(tmp_path / "e")
    names = {
        "manifest.json",
        "config.json",
        "heads.json",
        "rank0.engine",
        "rank1.engine",
        "tokenizer",
    }
    assert {p.name for p in engine.directory.iterdir()} == names
    m = engine.manifest
    assert (m.backend, m.dtype, m.max_batch_size, m.prefill_chunk) == (
        "tensorrt-llm",
        "float16",
        16,
        0,
    )
    assert m.facts["tensorrt_llm"] == release
    cyclic = release == "1.0.0"
    assert m.facts["local_cache"] == ("cyclic" if cyclic else "slots")
    # 4 sinks and 10 rows in blocks of 8; the last layer has local heads alone.
    windows = "64,20,64,20,20" if cyclic else "64"
    assert m.facts["max_attention_window_size"] == windows
    assert m.facts["sink_token_length"] == ("4" if cyclic else "0")
    assert m.facts["preload"] == "libtrt_razor_preload_trt10.so"
    config = json.loads((tmp_path / "e" / "config.json").read_text())["pretrained_config"]
    assert config["runtime_defaults"].get("sink_token_length") == (4 if cyclic else None)
    for rank in range(2):
        fields = [p["fields"] for p in _plugins(tmp_path / "e", rank)]
        assert [f["num_retrieval"] for f in fields] == [1, 1, 0]
        assert all(f["num_heads"] == 4 and f["num_kv_heads"] == 2 for f in fields)
    with pytest.raises(UsageError, match="run by TensorRT-LLM's executor or by Triton"):
        engine.open()

    code, _, err = run(*args, "--output", "e")
    assert code == 2
    assert "an engine is already there; --force rebuilds it" in err
    assert run(*args, "--output", "e", "--force", "--kv-dtype", "fp8", "--comp-tokens", "0")[0] == 0
    assert all(p["fields"]["kv_cache_fp8"] == 1 for p in _plugins(tmp_path / "e"))


def test_dense_engine_has_no_plugin_of_ours(
    release: str, model: ModelSpec, run: Run, tmp_path: Path
) -> None:
    code, out, err = run("--checkpoint", "model", "--max-seq-len", "64", "--output", "d")
    assert code == 0, err
    assert "(dense)" in out
    assert {p["type"] for p in _plugins(tmp_path / "d")} == {"GPTAttention"}
    config = json.loads((tmp_path / "d" / "config.json").read_text())["pretrained_config"]
    assert config["architecture"] == "LlamaForCausalLM"
    assert "razor" not in config
    assert config["num_hidden_layers"] == 3
    assert "local_cache" not in Engine.load(tmp_path / "d").manifest.facts


def test_random_weights_are_never_written(
    release: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 72B model's would take 145 GB."""
    monkeypatch.setattr(build, "check_space", lambda *_: None)
    monkeypatch.setattr(
        backend, "convert_checkpoint", lambda *_: pytest.fail("weights are written")
    )
    code, _, err = run(
        "--model", "qwen-72b", "--random-weights", "--razor", "--tp-size", "8", "--max-seq-len", "32768",
        "--output", "q",
    )  # fmt: skip
    assert code == 0, err
    assert len(list((tmp_path / "q").glob("rank*.engine"))) == 8
    assert sum(p.stat().st_size for p in (tmp_path / "q").iterdir() if p.is_file()) < 50e6
    assert len(_plugins(tmp_path / "q", 7)) == 80


def test_conversion_alone(model: ModelSpec, run: Run, tmp_path: Path) -> None:
    """On a machine without TensorRT-LLM, GPU and plugin."""
    args = [
        "--checkpoint",
        "model",
        "--heads",
        "heads.json",
        *RAZOR,
        "--tp-size",
        "2",
        "--convert-only",
    ]
    code, _, err = run(*args, "--output", "c")
    assert code == 2
    assert "tensorrt_llm: not installed" in err
    code, out, err = run(*args, "--output", "c", "--trtllm-version", "1.2.1")
    assert code == 0, err
    assert "converted in" in out
    names = {p.name for p in (tmp_path / "c").iterdir()}
    assert {"config.json", "heads.json", "rank0.safetensors", "rank1.safetensors"} < names
    assert "tokenizer.json" in names
    section = json.loads((tmp_path / "c" / "config.json").read_text())["razor"]
    assert section["tp_size"] == 2
    assert section["num_retrieval"] == [1, 1, 0]
    code, _, err = run(*args, "--output", "c", "--trtllm-version", "1.2.1")
    assert code == 2
    assert "exists and is not empty" in err


def test_conversion_replaces_nothing(
    model: ModelSpec, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another conversion has been faster, or somebody put a file there meanwhile."""
    args = ["--checkpoint", "model", "--heads", "heads.json", *RAZOR, "--output", "c"]
    convert = backend.convert_checkpoint

    def meanwhile(*given: Any) -> None:
        convert(*given)
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "mine.txt").write_text("mine")

    monkeypatch.setattr(backend, "convert_checkpoint", meanwhile)
    code, _, err = run(*args, "--convert-only", "--trtllm-version", "1.2.1", "--force")
    assert code == 2
    assert "c: exists and is not empty" in err
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["mine.txt"]
    assert not list(tmp_path.glob(".c*"))


def test_conversion_tells_trtllm_build_where_local_heads_live(
    model: ModelSpec, run: Run, tmp_path: Path
) -> None:
    args = ["--checkpoint", "model", "--heads", "heads.json", *RAZOR, "--convert-only"]
    for name, chosen in (("release", []), ("slots", ["--local-cache", "slots"])):
        code, _, err = run(*args, *chosen, "--trtllm-version", "1.0.0", "--output", name)
        assert code == 0, err
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert local_cache_of(config) is (LocalCache.SLOTS if chosen else None)


def test_build_puts_local_heads_where_the_conversion_was_told(
    release: str, model: ModelSpec, run: Run, tmp_path: Path
) -> None:
    args = ["--checkpoint", "model", "--heads", "heads.json", *RAZOR, "--convert-only"]
    for name in ("slots", "cyclic"):
        chosen = ["--local-cache", name, "--trtllm-version", "1.0.0", "--output", name]
        assert run(*args, *chosen)[0] == 0
        code, _, err = run("--checkpoint", name, *RAZOR, "--output", f"{name}-engine")
        assert code == 0, err
        found = Engine.load(tmp_path / f"{name}-engine").manifest.facts["local_cache"]
        assert found == ("slots" if release == "1.2.1" else name)  # which has no other way


def test_heads_of_another_shape(model: ModelSpec, run: Run, tmp_path: Path) -> None:
    """The fingerprint is the model's, the counts are not."""
    HeadMap(model.name, model.fingerprint(), 3, 5, RETRIEVAL, "test", "by hand").save(
        tmp_path / "five.json"
    )
    args = ["--checkpoint", "model", "--heads", "five.json", *RAZOR, "--convert-only"]
    code, _, err = run(*args, "--trtllm-version", "1.0.0", "--output", "c")
    assert code == 2
    assert "five.json: expected 3 layers of 4 KV heads, those of 'model', found 3 of 5" in err


def test_converted_checkpoint_is_built_as_it_is(
    release: str, model: ModelSpec, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*RAZOR, "--tp-size", "2"]
    code, _, err = run(
        "--checkpoint", "model", "--heads", "heads.json", *args, "--convert-only", "--output", "c"
    )
    assert code == 0, err
    monkeypatch.setattr(
        backend, "permute_checkpoint", lambda *_: pytest.fail("heads are moved twice")
    )
    code, _, err = run("--checkpoint", "c", *args, "--output", "e")
    assert code == 0, err
    engine = Engine.load(tmp_path / "e")
    assert engine.head_map is not None
    assert engine.head_map.num_retrieval == 4
    assert engine.tokenizer() is not None
    # Another policy or number of ranks would need the heads where they were.
    changes = {
        "policy: {'sink_tokens': 4,": ["--comp-tokens", "0"],
        "tp_size: 2, found 1": ["--tp-size", "1"],
    }
    for words, changed in changes.items():
        code, _, err = run("--checkpoint", "c", *args, *changed, "--output", "f")
        assert code == 2
        assert "its heads are in order already, for tp_size 2; expected its " + words in err
        assert not (tmp_path / "f").exists()
    assert cli.build_main(["--backend", "onnxruntime", "--checkpoint", "c"]) == 2


def _edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_converted_checkpoint_that_was_edited(
    release: str, model: ModelSpec, run: Run, tmp_path: Path
) -> None:
    args = ["--checkpoint", "model", "--heads", "heads.json", *RAZOR, "--convert-only"]
    assert run(*args, "--output", "c")[0] == 0
    _edit_config(tmp_path / "c", lambda c: c["quantization"].update(quant_algo="NVFP4"))
    code, _, err = run("--checkpoint", "c", *RAZOR, "--output", "f")
    assert code == 2
    assert "quantization.quant_algo: expected FP8, W4A16_AWQ, W8A16, W4A16 or none" in err
    _edit_config(tmp_path / "c", lambda c: c["quantization"].update(quant_algo=None))
    # Without its section nobody knows that its heads have been moved.
    _edit_config(tmp_path / "c", lambda c: c.pop("razor"))
    for more in (RAZOR, ["--max-seq-len", "64"]):
        code, _, err = run("--checkpoint", "c", *more, "--output", "f")
        assert code == 2
        assert "expected the object 'razor', as heads.json lies beside it" in err
        assert not (tmp_path / "f").exists()


REFUSED: list[tuple[list[str], str]] = [
    (["--tp-size", "3"], "tp_size: expected a divisor of the 8 attention heads"),
    (["--tp-size", "4"], "leaves each rank one of the 4 KV heads"),
    (["--pp-size", "2"], "pp_size: expected a divisor of the 3 layers"),
    (["--dtype", "float32"], "dtype: expected float16 or bfloat16 for --backend tensorrt-llm"),
    (["--tokens-per-block", "24"], "tokens_per_block: expected a power of two"),
    (["--max-num-tokens", "3"], "max_num_tokens: expected at least 16, one token of a prompt"),
    (["--max-seq-len", "12"], "nothing would be compressed"),
    (["--kv-dtype", "fp8", "--prefill-chunk", "16"], "cannot be read in chunks with an FP8 cache"),
    (["--trtllm-version", "1.2.1"], "--trtllm-version: an engine is built by the TensorRT-LLM that is"),
    (["--max-seq-len", "200"], "max_seq_len: expected at most 128"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "words"), REFUSED, ids=[" ".join(c) for c, _ in REFUSED])
def test_refused_before_anything_long(
    release: str,
    model: ModelSpec,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(build, "resolve_heads", lambda *_: pytest.fail("too late"))
    code, _, err = run(
        "--checkpoint", "model", "--heads", "heads.json", *RAZOR, *changed, "--output", "e"
    )
    assert code == 2
    assert words in err
    assert err.count("\n") <= 4  # what was decided, and one line of error
    assert not list(tmp_path.glob("*e*partial*"))
    assert not (tmp_path / "e").exists()


def test_what_the_machine_lacks(
    release: str, model: ModelSpec, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--checkpoint", "model", "--heads", "heads.json", *RAZOR, "--output", "e"]
    monkeypatch.setenv("TRT_RAZOR_PLUGIN", str(tmp_path / "nothing.so"))
    code, _, err = run(*args)
    assert code == 1
    assert "TRT_RAZOR_PLUGIN" in err
    monkeypatch.setattr(backend, "gpu_capability", lambda: None)
    code, _, err = run(*args)
    assert code == 2
    assert "builds on a GPU, nvidia-smi found none here" in err


def test_a_build_that_fails_leaves_nothing(
    release: str, model: ModelSpec, run: Run, tmp_path: Path
) -> None:
    """The builder of the second rank finds that its weights are gone."""
    args = ["--tp-size", "2", *RAZOR]
    assert (
        run(
            "--checkpoint",
            "model",
            "--heads",
            "heads.json",
            *args,
            "--convert-only",
            "--output",
            "c",
        )[0]
        == 0
    )
    broken = tmp_path / "c" / "rank1.safetensors"
    header = int.from_bytes(broken.read_bytes()[:8], "little")
    data = bytearray(broken.read_bytes())
    start = data.find(b"attention.dense.weight", 8, 8 + header)
    data[start : start + 9] = b"attontion"
    broken.write_bytes(bytes(data))
    code, _, err = run("--checkpoint", "c", *args, "--output", "e")
    assert code != 0
    assert "attontion" in err or "attention.dense" in err
    assert not (tmp_path / "e").exists()
    assert not list(tmp_path.glob(".e*"))


def test_options_of_this_backend_alone(model: ModelSpec, run: Run, tmp_path: Path) -> None:
    for option in (
        ["--kv-dtype", "fp8"],
        ["--local-cache", "slots"],
        ["--convert-only"],
        ["--gather-logits"],
    ):
        code = cli.build_main(
            ["--backend", "onnxruntime", "--checkpoint", str(tmp_path / "model"), *option]
        )
        assert code == 2
    assert cli.build_main(["--checkpoint", str(tmp_path / "model"), "--tp-size", "2"]) == 2


def test_plan_needs_no_tensorrt_llm(run: Run) -> None:
    code, out, err = run(
        "--model", "qwen-72b", "--razor", "--plan", "--tp-size", "8", "--max-seq-len", "32768"
    )
    assert code == 0, err
    assert "qwen-72b · 32,768 tokens · 8 GPUs" in out
    for option in (["--kv-dtype", "fp8"], ["--tokens-per-block", "64"], ["--convert-only"]):
        code, _, err = run("--model", "qwen-72b", "--razor", "--plan", *option)
        assert code == 2
        assert "takes --tp-size and --pp-size only" in err
