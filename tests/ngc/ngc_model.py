"""The model of these tests: small, random, and such that dropping tokens shows in every logit.

Weights are float16 numbers, so engines and reference start from the same ones. Queries and keys are
large enough that attention is peaked: with the usual small random weights all tokens get nearly equal
weight, and a window with a compensation token would be hard to tell from dense attention.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import open_checkpoint
from trt_razor.models.spec import ModelSpec, spec_from_hf_config
from trt_razor.policy import RazorPolicy
from trt_razor.trtllm.ranks import equalise

MAX_SEQ_LEN = 1024
MAX_BATCH_SIZE = 4
POLICY = RazorPolicy(sink_tokens=4, min_window=64, compression=5, comp_tokens=1)
RETRIEVAL = ((0, 5), (1, 2, 6), (3,), ())
"""Not the same on every layer, not in order, not even: ranks make heads move and their number grow."""
FAMILIES = ("llama", "qwen2", "qwen3", "baichuan")
"""Plain; biases of q, k, v; QK-norm; ALiBi, whose slopes move with the heads."""
_GAIN = {"q_proj": 1.5, "k_proj": 1.5}


def config(family: str) -> dict[str, Any]:
    """4 layers, 8 KV heads of 64, two query heads each; a vocabulary that engines have to pad.

    Baichuan has as many KV heads as query heads, and no vocabulary of any other size than its own.
    """
    class_name = {"llama": "Llama", "baichuan": "Baichuan"}.get(family, family.capitalize())
    out = {
        "architectures": [f"{class_name}ForCausalLM"],
        "model_type": family,
        "hidden_size": 1024,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "hidden_act": "silu",
        "vocab_size": 1000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "baichuan":  # 13B: ALiBi is told by the field that has no "position" in its name
        del out["max_position_embeddings"], out["num_key_value_heads"], out["head_dim"]
        out |= {"model_max_length": 4096, "vocab_size": 64000}
    return out


@dataclass(frozen=True)
class NgcModel:
    """A Hugging Face folder and a head map for it."""

    family: str
    folder: Path
    heads: Path
    spec: ModelSpec

    def head_map(self, tp_size: int) -> HeadMap:
        """What an engine for so many ranks is built with."""
        return equalise(HeadMap.load(self.heads), tp_size)


def write_model(folder: Path, family: str) -> NgcModel:
    """config.json, model.safetensors and heads.json in ``folder``."""
    from safetensors.numpy import save_file

    spec = spec_from_hf_config(config(family), f"ngc-{family}")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    weights = {name: _weight(rng, name, shape) for name, shape in spec.tensors().items()}
    if family == "baichuan":  # stores q, k and v as one
        for i in range(spec.num_layers):
            prefix = f"model.layers.{i}.self_attn."
            parts = [weights.pop(f"{prefix}{n}_proj.weight") for n in "qkv"]
            weights[f"{prefix}W_pack.weight"] = np.concatenate(parts)
    (folder / "config.json").write_text(json.dumps(config(family), indent=1))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # The first heads of an ALiBi model see next to nothing: take those that see far, and add such.
    alibi = spec.position == "alibi"
    first = spec.num_kv_heads - 7 if alibi else 0
    row = tuple(float(h) for h in range(spec.num_kv_heads))
    scores = {"scope": (row,) * spec.num_layers} if alibi else {}
    heads = folder / "heads.json"
    HeadMap(
        spec.name,
        spec.fingerprint(),
        spec.num_layers,
        spec.num_kv_heads,
        tuple(tuple(h + first for h in row) for row in RETRIEVAL),
        method="test",
        source="chosen by hand",
        scores=scores,
    ).save(heads)
    return NgcModel(family, folder, heads, spec)


def _weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    value = rng.standard_normal(shape, np.float32)
    part = name.split(".")[-2]
    if "norm" in part:
        value = 1 + 0.1 * value
    elif name.endswith("bias"):
        value *= 0.1
    elif part != "embed_tokens":
        value *= _GAIN.get(part, 1.0) / np.sqrt(shape[1])
    return value.astype(np.float16)


def prompts(count: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random prompts; lengths are taken in turns."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 1000, lengths[i % len(lengths)]).tolist() for i in range(count)]


class Oracle:
    """Logits of the reference in float32, on tokens that an engine has chosen."""

    def __init__(self, model: NgcModel) -> None:
        from trt_razor.reference import ReferenceDecoder

        self.decoder = ReferenceDecoder(open_checkpoint(None, model.folder))

    def logits(
        self, prompt: Sequence[int], tokens: Sequence[int], head_map: HeadMap | None
    ) -> np.ndarray:
        """[tokens, vocab]: what each of ``tokens`` should have been chosen from.

        The prompt is read in one go, as TensorRT-LLM reads it, then token by token.
        """
        policy = POLICY if head_map is not None else None
        cache = self.decoder.new_cache(policy, head_map, MAX_SEQ_LEN)
        rows = [self.decoder.prefill(prompt, cache, last_only=True)]
        rows += [self.decoder.forward([token], cache) for token in tokens[:-1]]
        return np.concatenate([row.numpy() for row in rows])

    def greedy(
        self, prompt: Sequence[int], count: int, head_map: HeadMap | None
    ) -> tuple[list[int], np.ndarray]:
        """Tokens by the reference alone, and their logits."""
        policy = POLICY if head_map is not None else None
        cache = self.decoder.new_cache(policy, head_map, MAX_SEQ_LEN)
        rows = [self.decoder.prefill(prompt, cache, last_only=True)]
        tokens = [int(rows[0].argmax())]
        while len(tokens) < count:
            rows.append(self.decoder.forward(tokens[-1:], cache))
            tokens.append(int(rows[-1].argmax()))
        return tokens, np.concatenate([row.numpy() for row in rows])


def distance(logits: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference of any logit, in standard deviations of the reference's logits."""
    return float(np.abs(logits - reference).max() / reference.std())


def wrong_tokens(tokens: Sequence[int], reference: np.ndarray, slack: float) -> list[int]:
    """Places where a token is not the reference's likeliest, near ties apart.

    Args:
        slack: standard deviations by which engine and reference may differ in a logit.
    """
    chosen = reference[np.arange(len(tokens)), list(tokens)]
    behind = (reference.max(1) - chosen) / reference.std()
    return [int(i) for i in np.flatnonzero(behind > 2 * slack)]
