"""From a Hugging Face folder to logits of an in-flight batch: every part of the TensorRT-LLM path but
TensorRT-LLM itself, whose Python side is the double and whose runtime is the emulator.

The reference is the original model with its heads where they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import doubles
import numpy as np
import pytest
import torch
from fake_host import Host
from in_flight import Request
from plugin_build import HERE, build_plugins
from served_model import ServedModel
from shim_build import build_folder, build_shim
from tiny_models import write_model

from trt_razor.build import BuildRequest, build_engine
from trt_razor.convert import convert_only
from trt_razor.engine import Engine
from trt_razor.errors import UsageError
from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import Checkpoint, open_checkpoint
from trt_razor.policy import RazorPolicy
from trt_razor.reference import ReferenceDecoder, new_layer_caches
from trt_razor.trtllm import backend
from trt_razor.trtllm.engine_config import TrtLlmOptions

TOLERANCE = 0.006
"""Of the largest logit: rows of q, k, v, of the cache and of the output are float16 in the plugin. About twice
the worst that was seen; where a number falls to the other side of an FP8 step, it is that step."""

LLAMA: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 96,
    "head_dim": 64,
    "vocab_size": 97,
    "eos_token_id": 1,
}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
QWEN2 = {
    **LLAMA,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 512,
    "rope_theta": 1e6,
}
BAICHUAN = {
    "architectures": ["BaichuanForCausalLM"],
    "model_type": "baichuan",
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "hidden_size": 384,
    "vocab_size": 64000,
    "model_max_length": 128,
    "max_position_embeddings": None,  # without it, ALiBi
    "num_key_value_heads": None,
}
POLICY = RazorPolicy(sink_tokens=4, min_window=9, compression=None, comp_tokens=1)


@dataclass(frozen=True)
class Case:
    """A model and what is asked for. ``heads``: retrieval heads by layer; some layers have none, some
    only such."""

    config: dict[str, Any]
    heads: tuple[tuple[int, ...], ...]
    tp_size: int = 1
    policy: RazorPolicy = POLICY
    chunk: int = 0
    kv_dtype: str = "auto"
    tolerance: float = TOLERANCE


CASES = {
    "llama": Case(LLAMA, ((1,), (), (0, 1, 2, 3))),
    "llama-2-ranks": Case(LLAMA, ((2,), (0, 3), ()), 2, replace(POLICY, comp_tokens=0)),
    "llama-chunks": Case(LLAMA, ((1,), (2,), (0, 3)), chunk=24),
    "llama-fp8": Case(
        LLAMA,
        ((2,), (0,), (1, 3)),
        kv_dtype="fp8",
        policy=replace(POLICY, comp_tokens=0),
        tolerance=0.06,
    ),
    "qwen2-2-ranks": Case(QWEN2, ((3,), (1, 2), (0, 2)), 2, replace(POLICY, compression=4)),
    "qwen3": Case(QWEN3, ((0, 2), (3,), (1,))),
    "baichuan-alibi-2-ranks": Case(BAICHUAN, ((4,), (0, 5)), 2),
}
RELEASES = ("1.0.0", "1.2.1")


@pytest.fixture(scope="module")
def host() -> Host:
    """The plugins over the CPU build of the kernels."""
    shim = build_shim(build_folder() / "shim")
    build = build_plugins(shim.parent / "plugins-stand-in", HERE / "fake_trt", shim)
    return Host(build.folder / "libfake_host.so", build.plugins)


@pytest.fixture(params=RELEASES)
def release(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """TensorRT-LLM's double, here and in children, on a machine with a GPU."""
    path = tmp_path / "double"
    with doubles.installed(path, request.param):
        for name, value in doubles.environment(path).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(backend, "gpu_capability", lambda: "9.0")
        yield request.param


class Rounded:
    """Weights of a checkpoint as float16 files have them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.spec = checkpoint, checkpoint.spec

    def tensor(self, name: str) -> np.ndarray[Any, Any]:
        return self.checkpoint.tensor(name).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_original_model(
    host: Host, release: str, name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    heads, policy = case.heads, case.policy
    spec = write_model(tmp_path / "model", **case.config)
    assert spec.position == ("alibi" if "alibi" in name else "rope")
    head_map = HeadMap(
        spec.name, spec.fingerprint(), spec.num_layers, spec.num_kv_heads, heads, "test", "by hand"
    )
    head_map.save(tmp_path / "heads.json")
    asked: dict[str, Any] = {
        "razor": True,
        "backend": "tensorrt-llm",
        "policy": policy,
        "max_seq_len": 64,
        "max_batch_size": 3,
        "prefill_chunk": case.chunk,
        "trtllm": TrtLlmOptions(tp_size=case.tp_size, kv_dtype=case.kv_dtype, tokens_per_block=8),
    }
    if case.chunk and release != "1.0.0":
        request = BuildRequest(
            checkpoint=tmp_path / "model", heads=str(tmp_path / "heads.json"), **asked
        )
        with pytest.raises(UsageError, match="reads the prompts of hybrid models in one go"):
            build_engine(request)
        return
    converted = convert_only(
        BuildRequest(
            checkpoint=tmp_path / "model",
            heads=str(tmp_path / "heads.json"),
            output=tmp_path / "converted",
            convert_only=True,
            **asked,
        )
    )
    engine = build_engine(BuildRequest(checkpoint=converted, output=tmp_path / "engine", **asked))
    found = Engine.load(engine.directory)
    assert found.manifest.backend == "tensorrt-llm"
    assert found.manifest.facts["tp_size"] == str(case.tp_size)
    built = found.head_map
    assert built is not None
    for asked_for, got in zip(heads, built.retrieval_heads, strict=True):
        assert set(asked_for) <= set(got), "a retrieval head was lost"

    model = ServedModel(host, engine.directory, converted, release != "1.0.0")
    rng = np.random.default_rng(7)
    requests = [Request(i, *shape) for i, shape in enumerate([(40, 12), (3, 30), (25, 6), (1, 20)])]
    tokens = {
        r.number: torch.from_numpy(rng.integers(0, spec.vocab_size, r.prompt + r.max_new))
        for r in requests
    }
    served = model.serve(requests, tokens)

    reference = ReferenceDecoder(Rounded(open_checkpoint(None, tmp_path / "model")))
    # Keys and values are rounded as the engine's cache rounds them: what is left is the arithmetic.
    kv = torch.float8_e4m3fn if case.kv_dtype == "fp8" else torch.float16
    caches = {r.number: new_layer_caches(spec, policy, built, 64, kv) for r in requests}
    dense = {r.number: new_layer_caches(spec, policy, None, 64, kv) for r in requests}
    rows = generations = chunks = 0
    apart: list[float] = []
    for batch, logits in served:
        first = 0
        for part in batch.parts:
            new = tokens[part.sequence][part.begin : part.total]
            expected = reference.forward(new, caches[part.sequence])
            other = reference.forward(new, dense[part.sequence])
            mine = logits[first : first + part.tokens]
            scale = float(expected.abs().max())
            error = float((mine - expected).abs().max()) / scale
            assert error <= case.tolerance, f"{part.sequence} at {part.begin}: {error:.3f}"
            if not part.context and part.total > 25:
                apart.append(float((other - expected).abs().max()) / scale)
            first += part.tokens
            rows += part.tokens
            generations += not part.context
            chunks += part.context and part.total < part.prompt
    assert rows == sum(len(t) - 1 for t in tokens.values())
    assert generations >= 60
    assert bool(chunks) == bool(case.chunk)
    # Without compression every logit row that sees dropped tokens is far from what it should be.
    assert min(apart) > 5 * case.tolerance, f"the dense model is as near: {min(apart):.3f}"
