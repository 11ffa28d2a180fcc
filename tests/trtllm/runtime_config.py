"""How TensorRT-LLM's C++ runtime (1.0 - 1.2) reads config.json of an engine, written anew for tests.

Nothing here comes from trt_razor: what the runtime would make of an engine must not be what we hope it
does. Stricter than the runtime in two ways: a wrong type is an error where the runtime would convert
(true to 1, 2.5 to 2), and an unknown kind of layer is one where it would assume attention.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


class ParseError(Exception):
    """The runtime throws on loading; the message begins with the field."""


class LoadError(Exception):
    """The configuration parses, but the runtime cannot make a model of it."""


@dataclass(frozen=True)
class RnnConfig:
    state_size: int
    conv_kernel: int
    rnn_hidden_size: int
    rnn_conv_dim_size: int
    rnn_head_size: int


@dataclass(frozen=True)
class ModelConfig:
    """What the runtime knows of an engine. Heads and hidden size are those of a rank.

    ``kv_heads``: per attention layer of the whole model.
    """

    name: str
    variant: str
    tp_size: int
    pp_size: int
    gpus_per_node: int
    layer_types: tuple[str, ...]
    num_heads: int
    hidden_size: int
    head_size: int
    vocab_size: int
    kv_heads: tuple[int, ...]
    dtype: str
    kv_dtype: str
    logits_dtype: str
    max_batch_size: int
    max_beam_width: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int | None
    kv_cache_type: str
    packed: bool
    context_fmha: bool
    paged_context_fmha: bool
    tokens_per_block: int
    attention_plugin: bool
    mamba_plugin: bool
    paged_state: bool
    manage_weights: bool
    rnn: RnnConfig | None
    default_windows: tuple[int, ...] | None
    default_sinks: int | None

    @property
    def transformer_based(self) -> bool:
        return self.variant in ("gpt", "glm", "chatglm", "recurrentgemma")

    @property
    def rnn_based(self) -> bool:
        return self.variant in ("mamba", "recurrentgemma")

    def layers(self, rank: int) -> range:
        """Layers of a pipeline stage: all kinds count alike, the first stages take the rest."""
        size, extra = divmod(len(self.layer_types), self.pp_size)
        first = rank * size + min(rank, extra)
        return range(first, first + size + (rank < extra))

    def local_layers(self, kind: str, rank: int = 0) -> list[int]:
        """Numbers, in the whole model, of the layers of a kind in a pipeline stage."""
        return [i for i in self.layers(rank) if self.layer_types[i] == kind]

    def local_kv_heads(self, rank: int = 0) -> tuple[int, ...]:
        """KV heads of the attention layers of a pipeline stage: rows of the pool mapping."""
        first = sum(len(self.local_layers("attention", r)) for r in range(rank))
        return self.kv_heads[first : first + len(self.local_layers("attention", rank))]

    def windows(self, told: list[int] | None = None, rank: int = 0) -> list[int]:
        """Windows of the attention layers of a pipeline stage, as the engine is given them.

        Args:
            told: the server's setting, which goes before the engine's own default.
        """
        given = told or list(self.default_windows or ()) or [self.max_seq_len]
        if min(given) <= 0:
            raise LoadError("max_attention_window: below 1")
        given = [min(w, self.max_seq_len) for w in given]
        first = sum(len(self.local_layers("attention", r)) for r in range(rank))
        count = len(self.local_layers("attention", rank))
        return [given[(first + i) % len(given)] for i in range(count)]

    def state_inputs(self) -> list[tuple[str, str]]:
        """Names of the addresses of state slots. Numbers are those of layers of the whole model.

        Raises:
            LoadError: a stage has fewer states than the whole model: an index out of range.
        """
        wanted = [i for i, kind in enumerate(self.layer_types) if kind == "recurrent"]
        if self.pp_size > 1 and wanted:
            raise LoadError("state slots in several pipeline stages")
        return [(f"conv_state_ptr_{i}", f"rnn_state_ptr_{i}") for i in wanted]

    def state_shapes(self, max_sequences: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """conv_state (dtype of the model) and rnn_state (float32) of a rank."""
        if self.rnn is None:
            raise LoadError("no sizes of states")
        layers = len(self.local_layers("recurrent"))
        conv = (layers, max_sequences, self.rnn.conv_kernel - 1, self.rnn.rnn_conv_dim_size)
        return conv, (layers, max_sequences, self.rnn.state_size, self.rnn.rnn_hidden_size)

    def slot_bytes(self) -> int:
        """Bytes of all states of one sequence on a rank."""
        total = 0
        size = {"float32": 4, "float16": 2, "bfloat16": 2}[self.dtype]
        for shape, item in zip(self.state_shapes(1), (size, 4), strict=True):
            volume = item
            for n in shape:
                volume *= n
            total += volume
        return total

    def check_in_flight(self) -> None:
        """Conditions of in-flight batching. Raises LoadError with the reason."""
        paged = self.kv_cache_type in ("DISABLED", "PAGED")
        as_transformer = self.transformer_based and self.attention_plugin and self.packed and paged
        as_rnn = self.rnn_based and self.mamba_plugin and self.packed and self.paged_state
        if not (as_transformer or as_rnn):
            raise LoadError("no in-flight batching with these plugins, input and cache")
        if self.rnn_based:
            if not self.paged_state:
                raise LoadError("states that are not paged")
            if not self.mamba_plugin:
                raise LoadError("states without mamba_conv1d_plugin")
            if self.max_beam_width != 1:
                raise LoadError("states with beams")
            self.state_inputs()
        if self.packed and self.context_fmha:
            longest = self.max_num_tokens or 0
        else:
            longest = self.max_input_len
        if longest < 1:
            raise LoadError("no prompt fits")

    def block_reuse(self, asked: bool = True) -> bool:
        """Whether the executor keeps reuse of cached blocks switched on."""
        return asked and self.paged_context_fmha

    def chunked_context(self, asked: bool = True) -> bool:
        return asked and self.paged_context_fmha and not self.rnn_based


# Parsing ------------------------------------------------------------------------------------------
_MISSING = object()


def _need(data: dict[str, Any], name: str, kind: type, where: str) -> Any:
    """A field that must be there."""
    if name not in data:
        raise ParseError(f"{where}{name}: absent")
    return _is(data[name], kind, f"{where}{name}")


def _or(data: dict[str, Any], name: str, kind: type, default: Any, where: str) -> Any:
    """A field with a default for absent and null; another type throws."""
    if data.get(name) is None:
        return default
    return _is(data[name], kind, f"{where}{name}")


def _optional(data: dict[str, Any], name: str, kind: type) -> Any:
    """A field that is left alone where it is absent or of another type."""
    value = data.get(name)
    return value if type(value) is kind else None


def _is(value: Any, kind: type, name: str) -> Any:
    if type(value) is not kind:
        raise ParseError(f"{name}: {type(value).__name__}, not {kind.__name__}")
    if kind is int and not -(1 << 31) <= value < 1 << 31:
        raise ParseError(f"{name}: {value} is no 32-bit integer")
    return value


def _numbers(data: dict[str, Any], name: str, kind: type, where: str) -> list[Any]:
    values = _or(data, name, list, [], where)
    return [_is(v, kind, f"{where}{name}[{i}]") for i, v in enumerate(values)]


def without_comments(text: str) -> str:
    """The runtime's parser skips // and /* */ outside strings."""
    out, i, quoted = [], 0, False
    while i < len(text):
        c = text[i]
        if quoted:
            if c == "\\":
                out.append(text[i : i + 2])
                i += 2
                continue
            quoted = c != '"'
        elif c == '"':
            quoted = True
        elif text.startswith("//", i):
            end = text.find("\n", i)
            i = len(text) if end < 0 else end
            continue
        elif text.startswith("/*", i):
            end = text.find("*/", i)
            if end < 0:
                raise ParseError("comment without an end")
            i = end + 2
            continue
        out.append(c)
        i += 1
    return "".join(out)


def parse(text: str) -> ModelConfig:
    """Raises ParseError naming the field, in the cases in which the runtime throws."""
    try:
        data = json.loads(without_comments(text))
    except ValueError as e:
        raise ParseError(f"no JSON: {e}") from None
    if not isinstance(data, dict):
        raise ParseError("no object")
    if _or(data, "version", str, "none", "") == "none":
        raise ParseError("version: absent: this is read as the old layout")
    config = _need(data, "pretrained_config", dict, "")
    build = _need(data, "build_config", dict, "")
    return _model(config, build, _need(build, "plugin_config", dict, "build_config."))


def _model(config: dict[str, Any], build: dict[str, Any], plugins: dict[str, Any]) -> ModelConfig:
    at, bt, pt = "pretrained_config.", "build_config.", "build_config.plugin_config."
    if _optional(config, "model_name", str) == "multiModal":
        raise ParseError(f"{at}model_name: a multimodal encoder")
    architecture = _need(config, "architecture", str, at)
    mapping = _need(config, "mapping", dict, at)
    tp = _need(mapping, "tp_size", int, f"{at}mapping.")
    pp = _or(mapping, "pp_size", int, 1, f"{at}mapping.")
    cp = _or(mapping, "cp_size", int, 1, f"{at}mapping.")
    ranks = tp * cp

    dtype = _need(config, "dtype", str, at)
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ParseError(f"{at}dtype: {dtype}")
    num_layers = _need(config, "num_hidden_layers", int, at)
    num_heads = _need(config, "num_attention_heads", int, at) // ranks
    vocab_size = _need(config, "vocab_size", int, at)
    hidden_size = _need(config, "hidden_size", int, at) // tp
    head_size = _or(config, "head_size", int, 0, at) or hidden_size // num_heads
    group = _numbers(config, "layer_types", str, at) or ["attention"]
    for kind in group:
        if kind not in ("attention", "recurrent", "linear", "no_op"):
            raise ParseError(f"{at}layer_types: unknown '{kind}', taken for attention")
    layer_types = tuple(group[i % len(group)] for i in range(num_layers))
    attention = layer_types.count("attention")

    per_layer = [-(-n // ranks) for n in _numbers(config, "num_kv_heads_per_layer", int, at)]
    all_layers = _or(config, "num_key_value_heads", int, num_heads * ranks, at)
    kv_heads = per_layer or [max(all_layers // ranks, 1)] * attention
    if len(kv_heads) != attention:
        raise ParseError(
            f"{at}num_kv_heads_per_layer: {len(kv_heads)} counts, {attention} attention layers"
        )
    logits = _or(config, "logits_dtype", str, "float32", at)
    if logits not in ("float32", "float16"):
        raise ParseError(f"{at}logits_dtype: {logits}")
    quantization = _need(config, "quantization", dict, at)
    kv_algorithm = _optional(quantization, "kv_cache_quant_algo", str)
    if kv_algorithm not in (None, "FP8", "INT8", "NVFP4"):
        raise ParseError(f"{at}quantization.kv_cache_quant_algo: unknown {kv_algorithm}")
    defaults = _or(config, "runtime_defaults", dict, {}, at)
    windows = _optional(defaults, "max_attention_window", list)
    # KvCacheConfig, which the defaults go into, checks both with TLLM_CHECK.
    sinks = _optional(defaults, "sink_token_length", int)
    if (sinks is not None and sinks < 1) or any(type(w) is int and w < 1 for w in windows or ()):
        raise ParseError(f"{at}runtime_defaults: expected positive numbers, found {defaults}")

    variant = {"MambaForCausalLM": "mamba", "RecurrentGemmaForCausalLM": "recurrentgemma"}.get(
        architecture, "gpt"
    )
    if "GLM" in architecture:
        variant = _need(config, "chatglm_version", str, at)
    rnn = None
    if variant in ("mamba", "recurrentgemma"):
        sizes = [
            _need(config, name, int, at)
            for name in ("state_size", "conv_kernel", "rnn_hidden_size", "rnn_conv_dim_size")
        ]
        rnn = RnnConfig(*sizes, _or(config, "rnn_head_size", int, 0, at))

    lora = _need(build, "lora_config", dict, bt)
    if _optional(lora, "lora_target_modules", list) and len(set(kv_heads)) > 1:
        raise ParseError(f"{bt}lora_config: adapters on layers with unequal KV heads")
    packed = _need(plugins, "remove_input_padding", bool, pt)
    max_num_tokens = _optional(build, "max_num_tokens", int)
    if packed and max_num_tokens is None:
        raise ParseError(f"{bt}max_num_tokens: absent, with packed input")
    cache_type = _or(build, "kv_cache_type", str, "continuous", bt).upper()
    if cache_type not in ("CONTINUOUS", "PAGED", "DISABLED"):
        raise ParseError(f"{bt}kv_cache_type: {cache_type}")
    if _need(plugins, "paged_kv_cache", bool, pt):
        cache_type = "PAGED"
    if "gpt_attention_plugin" not in plugins or "lora_plugin" not in plugins:
        raise ParseError(f"{pt}gpt_attention_plugin, lora_plugin: absent")
    return ModelConfig(
        name=architecture,
        variant=variant,
        tp_size=tp,
        pp_size=pp,
        gpus_per_node=_or(mapping, "gpus_per_node", int, 8, f"{at}mapping."),
        layer_types=layer_types,
        num_heads=num_heads,
        hidden_size=hidden_size,
        head_size=head_size,
        vocab_size=vocab_size,
        kv_heads=tuple(kv_heads),
        dtype=dtype,
        kv_dtype={"FP8": "fp8", "INT8": "int8", "NVFP4": "fp4"}.get(kv_algorithm or "", dtype),
        logits_dtype=logits,
        max_batch_size=_or(build, "max_batch_size", int, 0, bt),
        max_beam_width=_or(build, "max_beam_width", int, 0, bt),
        max_input_len=_or(build, "max_input_len", int, 0, bt),
        max_seq_len=_or(build, "max_seq_len", int, 0, bt),
        max_num_tokens=max_num_tokens,
        kv_cache_type=cache_type,
        packed=packed,
        context_fmha=_need(plugins, "context_fmha", bool, pt),
        paged_context_fmha=_need(plugins, "use_paged_context_fmha", bool, pt),
        tokens_per_block=_need(plugins, "tokens_per_block", int, pt),
        attention_plugin=plugins["gpt_attention_plugin"] is not None,
        mamba_plugin=plugins.get("mamba_conv1d_plugin") is not None,
        paged_state=_or(plugins, "paged_state", bool, False, pt),
        manage_weights=_or(plugins, "manage_weights", bool, False, pt),
        rnn=rnn,
        default_windows=None if windows is None else tuple(_is(w, int, "window") for w in windows),
        default_sinks=sinks,
    )
