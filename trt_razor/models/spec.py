"""ModelSpec: the shape of a decoder-only model, from a Hugging Face ``config.json``.

One description serves the planner, the reference, head finding and the graph. Supported
architectures: llama (1, 2, 3, 3.1), mistral, qwen2 (Qwen1.5 / 2 / 2.5), qwen3, baichuan (1 and 2,
7B with RoPE and 13B with ALiBi).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from trt_razor.errors import UsageError, did_you_mean

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "baichuan")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: base ``theta`` and one of the scalings none, linear, llama3, yarn.

    Field names are those of Hugging Face ``rope_scaling``.
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a decoder-only model. Sizes in elements, positions in tokens."""

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    position: str = "rope"  # or "alibi"
    rope: RopeSpec = field(default_factory=RopeSpec)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    norm_head: bool = False  # Baichuan 2: rows of lm_head are normalised to length 1
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    torch_dtype: str = "bfloat16"  # dtype of the published weights

    @property
    def group(self) -> int:
        """g = Hq / Hkv: query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def fingerprint(self) -> str:
        """sha256 over everything that decides what a head does, but not over name or weights."""
        data = asdict(self)
        for key in ("name", "bos_token_id", "eos_token_ids", "torch_dtype", "max_positions"):
            data.pop(key)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every weight by its Hugging Face name, with its shape (``nn.Linear``: [out, in])."""
        h, f = self.hidden_size, self.intermediate_size
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, h)}
        for i in range(self.num_layers):
            p = f"model.layers.{i}."
            out[p + "input_layernorm.weight"] = (h,)
            for proj, size in (("q", self.q_size), ("k", self.kv_size), ("v", self.kv_size)):
                out[f"{p}self_attn.{proj}_proj.weight"] = (size, h)
                if self.qkv_bias:
                    out[f"{p}self_attn.{proj}_proj.bias"] = (size,)
            if self.qk_norm:
                out[p + "self_attn.q_norm.weight"] = (self.head_dim,)
                out[p + "self_attn.k_norm.weight"] = (self.head_dim,)
            out[p + "self_attn.o_proj.weight"] = (h, self.q_size)
            if self.o_bias:
                out[p + "self_attn.o_proj.bias"] = (h,)
            out[p + "post_attention_layernorm.weight"] = (h,)
            for proj, shape in (("gate", (f, h)), ("up", (f, h)), ("down", (h, f))):
                out[f"{p}mlp.{proj}_proj.weight"] = shape
                if self.mlp_bias:
                    out[f"{p}mlp.{proj}_proj.bias"] = shape[:1]
        out["model.norm.weight"] = (h,)
        if not self.tie_embeddings:
            out["lm_head.weight"] = (self.vocab_size, h)
        return out

    def num_parameters(self) -> int:
        return sum(math.prod(s) for s in self.tensors().values())


# From a Hugging Face config.json -------------------------------------------------------------

_ARCHITECTURE_OF_CLASS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "BaichuanForCausalLM": "baichuan",
    "BaiChuanForCausalLM": "baichuan",
}
# What transformers assumes when a config leaves num_key_value_heads out (null means num_heads).
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_DTYPES = ("float32", "float16", "bfloat16")
# A config comes from an untrusted file: these bounds are far above any real model and keep every
# size computed from it small enough to handle.
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 24
MAX_POSITIONS = 1 << 26
_ABSENT: Any = object()


def spec_from_hf_config(
    config: Mapping[str, Any], name: str, where: str = "config.json"
) -> ModelSpec:
    """ModelSpec from the parsed ``config.json`` of a Hugging Face checkpoint.

    Reads the form of transformers 4 (``rope_theta``, ``rope_scaling``) and of transformers 5
    (``rope_parameters``). Fields that are absent take the defaults of the transformers
    configuration class, except sizes, which must be there.

    ``max_positions`` is ``max_position_embeddings``, raised to what a YaRN scaling states it
    reaches, and lowered to the sliding window where the model has one: up to that length a
    sliding window and full attention are the same thing.

    Raises:
        UsageError: unknown architecture, missing or impossible field, or a feature that would
            silently change the result (mixture of experts, quantised weights, partial, dynamic or
            long RoPE, another activation).
    """
    if not isinstance(config, Mapping):
        raise UsageError(f"{where}: expected a JSON object, found {type(config).__name__}")
    c = ConfigFields(config, where)
    architecture = _architecture(c)
    _refuse_unsupported(c)

    num_heads = c.integer("num_attention_heads", 1, MAX_HEADS)
    hidden_size = c.integer("hidden_size", 1, MAX_WIDTH)
    num_kv_heads = num_heads
    if architecture != "baichuan" and c.get("num_key_value_heads", _ABSENT) is not None:
        default = _DEFAULT_KV_HEADS.get(architecture, num_heads)
        num_kv_heads = c.integer("num_key_value_heads", 1, MAX_HEADS, default)
    if num_heads % num_kv_heads:
        c.fail("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}", num_kv_heads)

    if c.get("head_dim") is not None:
        head_dim = c.integer("head_dim", 1, MAX_HEAD_DIM)
    elif architecture == "qwen3":
        head_dim = 128
    elif hidden_size % num_heads == 0:
        head_dim = hidden_size // num_heads
    else:
        c.fail("hidden_size", f"a multiple of num_attention_heads={num_heads}", hidden_size)
    if not 2 <= head_dim <= MAX_HEAD_DIM or head_dim % 2:
        c.fail("head_dim", f"an even number 2..{MAX_HEAD_DIM}", head_dim)

    vocab_size = c.integer("vocab_size", 2, MAX_VOCAB)
    num_layers = c.integer("num_hidden_layers", 1, MAX_LAYERS)
    # Baichuan 13B is the ALiBi model of its family: it states model_max_length, not positions.
    alibi = architecture == "baichuan" and (
        hidden_size == 5120 or "max_position_embeddings" not in c
    )
    limit = "model_max_length" if alibi and "model_max_length" in c else "max_position_embeddings"
    max_positions = c.integer(limit, 1, MAX_POSITIONS)
    rope = RopeSpec()
    if not alibi:
        rope = _rope(c, max_positions)
        if rope.scaling == "yarn":
            reach = int(rope.original_max_positions * rope.factor)
            max_positions = min(max(max_positions, reach), MAX_POSITIONS)
    window = _sliding_window(c, architecture, num_layers)
    if window is not None:
        max_positions = min(max_positions, window)

    attention_bias = architecture in ("llama", "qwen3") and c.boolean("attention_bias", False)
    dtype = c.get("dtype") or c.get("torch_dtype") or "bfloat16"
    if dtype not in _DTYPES:
        c.fail("torch_dtype", f"one of {', '.join(_DTYPES)}", dtype)
    return ModelSpec(
        name=name,
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=c.integer("intermediate_size", 1, MAX_WIDTH),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_positions=max_positions,
        rms_norm_eps=c.number("rms_norm_eps", 1e-12, 1e-1, 1e-6),
        position="alibi" if alibi else "rope",
        rope=rope,
        qkv_bias=architecture == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=architecture == "llama" and c.boolean("mlp_bias", False),
        qk_norm=architecture == "qwen3",
        tie_embeddings=c.boolean("tie_word_embeddings", False),
        norm_head=architecture == "baichuan" and _norm_head(c, vocab_size),
        bos_token_id=next(iter(c.token_ids("bos_token_id")), None),
        eos_token_ids=c.token_ids("eos_token_id"),
        torch_dtype=dtype,
    )


class ConfigFields:
    """Typed access to a config; every failure names the file, the field, expected and found."""

    def __init__(self, data: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.data, self.where, self.prefix = data, where, prefix

    def __contains__(self, name: str) -> bool:
        return name in self.data

    def get(self, name: str, default: Any = None) -> Any:
        return self.data.get(name, default)

    def fail(self, name: str, expected: str, found: object) -> NoReturn:
        raise UsageError(
            f"{self.where}: {self.prefix}{name}: expected {expected}, found {repr(found)[:80]}"
        )

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self.get(name, default)
        if value is None and name not in self:
            raise UsageError(
                f"{self.where}: {self.prefix}{name}: missing; expected an integer {low}..{high}"
            )
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.fail(name, f"an integer {low}..{high}", value)
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self.get(name)
        value = default if value is None else value
        # The comparison is False for NaN.
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not low <= value <= high
        ):
            self.fail(name, f"a number {low:g}..{high:g}", value)
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(name, "true or false", value)
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for i in ids:
            if not isinstance(i, int) or isinstance(i, bool) or not -1 <= i < MAX_VOCAB:
                self.fail(name, "a token id or a list of them", value)
        return tuple(i for i in ids if i >= 0)  # -1 stands for "none" in some configs


def _architecture(c: ConfigFields) -> str:
    names = c.get("architectures")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(n, str) for n in names)
    ):
        c.fail("architectures", "a list of class names", names)
    model_type = c.get("model_type")
    if names:
        found = _ARCHITECTURE_OF_CLASS.get(names[0])
        if found is None:
            raise UsageError(
                f"{c.where}: architectures: {names[0]!r} is not supported; supported: "
                f"{', '.join(_ARCHITECTURE_OF_CLASS)}"
            )
        return found
    if model_type not in ARCHITECTURES:
        raise UsageError(
            f"{c.where}: model_type: {model_type!r} is not supported; "
            f"{did_you_mean(str(model_type), ARCHITECTURES)}"
        )
    return str(model_type)


def _refuse_unsupported(c: ConfigFields) -> None:
    for name in ("quantization_config", "compression_config"):
        if c.get(name):
            raise UsageError(
                f"{c.where}: {name}: these weights are quantised, expected float32, float16 or "
                "bfloat16; use the unquantised checkpoint, or dequantise it first"
            )
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if c.get(name):
            c.fail(name, "a dense model (no mixture of experts)", c.get(name))
    act = c.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        c.fail("hidden_act", "'silu'", act)


def _norm_head(c: ConfigFields, vocab_size: int) -> bool:
    """Baichuan 2 normalises lm_head's rows, Baichuan 1 does not; nothing in the config says so."""
    if vocab_size == 125696 or "z_loss_weight" in c:
        return True
    if vocab_size == 64000:
        return False
    c.fail("vocab_size", "64000 (Baichuan 1) or 125696 (Baichuan 2)", vocab_size)


def _sliding_window(c: ConfigFields, architecture: str, num_layers: int) -> int | None:
    """Length of the sliding window that some layer uses, or None."""
    if architecture == "mistral":
        if c.get("sliding_window", 4096) is None:
            return None
    elif architecture in ("qwen2", "qwen3"):
        if not c.boolean("use_sliding_window", False):
            return None
        layer_types = c.get("layer_types")
        if isinstance(layer_types, list):
            if "sliding_attention" not in layer_types:
                return None
        elif c.integer("max_window_layers", 0, MAX_POSITIONS, 28) >= num_layers:
            return None
        if c.get("sliding_window", 4096) is None:
            return None
    else:
        return None
    return c.integer("sliding_window", 1, MAX_POSITIONS, 4096)


def _rope(c: ConfigFields, max_positions: int) -> RopeSpec:
    name = "rope_parameters" if c.get("rope_parameters") else "rope_scaling"
    raw = c.get(name) or {}
    if not isinstance(raw, Mapping):
        c.fail(name, "an object", raw)
    if any(isinstance(v, Mapping) for v in raw.values()):
        c.fail(name, "one set of values for all layers", raw)
    s = ConfigFields(raw, c.where, prefix=f"{name}.")
    holder = s if "partial_rotary_factor" in s else c
    partial = holder.number("partial_rotary_factor", 0.0, 1.0, 1.0)
    if partial != 1.0:
        holder.fail("partial_rotary_factor", "1 (all of a head is rotated)", partial)
    theta = (s if "rope_theta" in s else c).number("rope_theta", 2.0, 1e15, 10000.0)
    kind = s.get("rope_type") or s.get("type") or "default"
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind not in ("linear", "llama3", "yarn"):
        s.fail("rope_type", "default, linear, llama3 or yarn", kind)
    factor = s.number("factor", 1.0, 1e6)
    if kind == "linear":
        return RopeSpec(theta=theta, scaling="linear", factor=factor)
    original = s.integer("original_max_position_embeddings", 1, MAX_POSITIONS, max_positions)
    if kind == "llama3":
        low = s.number("low_freq_factor", 1e-3, 1e6)
        high = s.number("high_freq_factor", 1e-3, 1e6)
        if not low < high:
            s.fail("high_freq_factor", f"more than low_freq_factor={low:g}", high)
        return RopeSpec(
            theta, "llama3", factor, original, low_freq_factor=low, high_freq_factor=high
        )
    if not s.boolean("truncate", True):
        s.fail("truncate", "true", False)
    fast = s.number("beta_fast", 1e-3, 1e6, 32.0)
    slow = s.number("beta_slow", 1e-3, 1e6, 1.0)
    if not slow < fast:
        s.fail("beta_fast", f"more than beta_slow={slow:g}", fast)
    return RopeSpec(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=_yarn_attention_factor(s, factor),
    )


def _yarn_attention_factor(s: ConfigFields, factor: float) -> float | None:
    """What multiplies cos and sin, if the config decides it; None = 0.1 ln(factor) + 1."""
    if s.get("attention_factor") is not None:
        return s.number("attention_factor", 1e-6, 1e6)
    if s.get("mscale") and s.get("mscale_all_dim"):
        top, bottom = (
            0.1 * s.number(key, 1e-6, 1e6) * math.log(factor) + 1.0
            for key in ("mscale", "mscale_all_dim")
        )
        return top / bottom
    return None
