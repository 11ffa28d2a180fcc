"""Weights, configuration and metadata of a GGUF file (llama.cpp's format, versions 2 and 3).

The header is parsed here, with every length checked against the file before it is used, because
the file is untrusted; the ``gguf`` package supplies the block formats and their dequantisation.
"""

from __future__ import annotations

import functools
import mmap
import struct
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from trt_razor.errors import MissingExtra, RazorError, UsageError
from trt_razor.models.spec import ModelSpec
from trt_razor.models.stored import StoredTensor, check_tensors, elements, samples_digest

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_MAX_ENTRIES = 1 << 16
_MAX_STRING = 16 << 20
_CHUNK_ELEMENTS = 4 << 20  # dequantised at a time: bounds temporary memory
# Value types of the format: 8 is a string, 9 an array.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` → ``blk.3.attn_q.weight``."""
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, rest = stem[len("model.layers.") :].partition(".")
        return f"blk.{layer}.{_NAMES[rest]}.{suffix}"
    return f"{_NAMES[stem]}.{suffix}"


class GgufFile:
    """Header of a GGUF file.

    Attributes:
        path: the file.
        metadata: key → int, float, bool, str, list of str, or NumPy array of numbers.
        tensors: name → StoredTensor with its shape in row-major order.

    Raises:
        RazorError: truncated, damaged, or not a GGUF file.
        UsageError: a kind of GGUF that is not supported (big-endian, split, unknown block format).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._parse(_Cursor(data, path))
        except (OSError, ValueError) as e:  # ValueError: an empty file cannot be mapped
            raise RazorError(f"{path}: cannot read the GGUF file: {e}") from None

    def _parse(self, c: _Cursor) -> None:
        if c.take(4) != b"GGUF":
            raise RazorError(f"{self.path}: not a GGUF file (its first bytes are not 'GGUF')")
        version = c.scalar("I")
        if version not in (2, 3):
            big = version & 0xFFFF == 0
            raise UsageError(
                f"{self.path}: GGUF version: expected 2 or 3, found "
                f"{'a big-endian file' if big else version}"
            )
        num_tensors, num_keys = c.scalar("Q"), c.scalar("Q")
        if max(num_tensors, num_keys) > _MAX_ENTRIES:
            c.damaged(f"{num_tensors} tensors and {num_keys} keys")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = c.string()
            self.metadata[key] = c.value()
        if self.number("split.count", int, 1) > 1:
            raise UsageError(f"{self.path}: one part of a split GGUF; merge the parts first")
        infos = [c.tensor_info() for _ in range(num_tensors)]
        alignment = self.number("general.alignment", int, 32)
        if not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            c.damaged(f"general.alignment = {alignment}")
        start = -(-c.at // alignment) * alignment
        self.tensors: dict[str, StoredTensor] = {}
        for name, shape, kind, offset in infos:
            type_name, block, size, readable = _block_format(kind)
            if not readable:
                raise UsageError(
                    f"{self.path}: tensor {name[:80]!r}: block format {type_name} cannot be dequantised; "
                    "use another quantisation of the model, or its Hugging Face folder"
                )
            if shape[-1] % block:
                c.damaged(f"tensor {name[:80]!r}: a row of {shape[-1]} is no multiple of {block}")
            nbytes = elements(shape) // block * size
            if name in self.tensors or offset % alignment or start + offset + nbytes > c.size:
                c.damaged(
                    f"tensor {name[:80]!r}: bytes {start + offset} .. {start + offset + nbytes} of a file "
                    f"of {c.size} bytes"
                )
            self.tensors[name] = StoredTensor(
                name, type_name, shape, self.path, start + offset, nbytes
            )

    def number(self, key: str, kind: type, default: Any = None) -> Any:
        """A scalar of the metadata, or ``default`` where it is absent."""
        value = self.metadata.get(key, default)
        if value is not None and type(value) is not kind:
            raise UsageError(
                f"{self.path}: {key}: expected one {kind.__name__}, found {repr(value)[:60]}"
            )
        return value

    def dequantise(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor as float32, in its stored order."""
        from gguf import GGMLQuantizationType, dequantize

        t = self.tensors[name]
        kind = GGMLQuantizationType[t.dtype]
        rows = t.raw().reshape(-1, t.nbytes // max(1, elements(t.shape[:-1])))
        out = np.empty((rows.shape[0], t.shape[-1]), np.float32)
        step = max(1, _CHUNK_ELEMENTS // t.shape[-1])
        for i in range(0, rows.shape[0], step):
            block = rows[i : i + step]
            if kind == GGMLQuantizationType.F32:
                out[i : i + step] = block.view(np.float32)
            elif kind == GGMLQuantizationType.F16:
                out[i : i + step] = block.view(np.float16)
            else:
                out[i : i + step] = dequantize(block, kind)
        return out.reshape(t.shape)

    def hf_config(self) -> dict[str, Any]:
        """The metadata in the terms of a Hugging Face ``config.json``.

        Raises:
            UsageError: an architecture or a feature that is not supported.
        """
        arch = self.number("general.architecture", str)
        if arch not in ARCHITECTURES:
            raise UsageError(
                f"{self.path}: general.architecture: expected {', '.join(ARCHITECTURES)}, "
                f"found {arch!r}"
            )

        def get(key: str, kind: type = int, default: Any = None) -> Any:
            value = self.number(f"{arch}.{key}", kind, default)
            # float32 → the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06
            return float(str(np.float32(value))) if kind is float and value is not None else value

        embed = self.tensors.get("token_embd.weight")
        heads, hidden = get("attention.head_count"), get("embedding_length")
        head_dim = get("attention.key_length")
        if head_dim is None and heads and hidden:
            head_dim = hidden // heads
        for key in ("attention.value_length", "rope.dimension_count"):
            if get(key, default=head_dim) != head_dim:
                raise UsageError(
                    f"{self.path}: {arch}.{key}: expected {head_dim} (all of a head), found {get(key)}"
                )
        config: dict[str, Any] = {
            "model_type": arch,
            "num_hidden_layers": get("block_count"),
            "hidden_size": hidden,
            "intermediate_size": get("feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", default=heads),
            "head_dim": head_dim,
            "vocab_size": embed.shape[0] if embed is not None else get("vocab_size"),
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
            "rope_theta": get("rope.freq_base", float, 10000.0),
            "num_experts": get("expert_count", default=0),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attention_bias": "blk.0.attn_q.bias" in self.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self.tensors,
            "bos_token_id": self.number("tokenizer.ggml.bos_token_id", int),
            "eos_token_id": self.number("tokenizer.ggml.eos_token_id", int),
            "torch_dtype": "float32",  # what dequantise() returns
        }
        scaling = get("rope.scaling.type", str, "none")
        if scaling != "none":
            if get("rope.scaling.attn_factor", float, 1.0) != 1.0:
                raise UsageError(f"{self.path}: {arch}.rope.scaling.attn_factor: expected 1")
            config["rope_scaling"] = {
                "rope_type": scaling,
                "factor": get("rope.scaling.factor", float),
                "original_max_position_embeddings": get("rope.scaling.original_context_length")
                or config["max_position_embeddings"],
            }
        if "rope_freqs.weight" in self.tensors and head_dim:
            config["rope_scaling"] = self._llama3_scaling(config)
        window = get("attention.sliding_window", default=0)
        if window and isinstance(config["max_position_embeddings"], int):
            # Up to the window's length it changes nothing; beyond it we would be wrong.
            config["max_position_embeddings"] = min(window, config["max_position_embeddings"])
        return config

    def _llama3_scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """Llama 3.1's RoPE scaling, which GGUF stores as one divisor for each frequency.

        Recognised by recomputing the divisors from the published constants; others are refused.
        """
        stored = self.tensors["rope_freqs.weight"]
        dim = config["head_dim"]
        if stored.shape != (dim // 2,) or stored.dtype != "F32":
            raise UsageError(
                f"{self.path}: rope_freqs.weight: expected F32 [{dim // 2}], found "
                f"{stored.dtype} {list(stored.shape)}"
            )
        divisors = self.dequantise("rope_freqs.weight").astype(np.float64)
        if np.all(divisors == 1.0):
            return config.get("rope_scaling")
        factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
        with np.errstate(all="ignore"):  # damaged numbers become NaN, which matches nothing
            turns = original * config["rope_theta"] ** (-np.arange(0, dim, 2) / dim) / (2 * np.pi)
            keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
            same = np.allclose(1.0 / divisors, keep + (1.0 - keep) / factor, rtol=1e-3)
        if not same:
            raise UsageError(
                f"{self.path}: rope_freqs.weight: not the scaling of Llama 3.1; use the Hugging "
                "Face folder of the model"
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }


class GgufWeights:
    """Tensors of a GGUF file under their Hugging Face names, as float32.

    Raises:
        UsageError: tensors that do not fit ``spec``.
    """

    def __init__(self, file: GgufFile, spec: ModelSpec) -> None:
        self._file, self._spec = file, spec
        expected = {gguf_name(n): s for n, s in spec.tensors().items()}
        found = {n: t.shape for n, t in file.tensors.items()}
        check_tensors(expected, found, {"rope_freqs.weight"}, str(file.path))
        self._used = [file.tensors[n] for n in expected]

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def read(self, name: str) -> npt.NDArray[Any]:
        array = self._file.dequantise(gguf_name(name))
        if self._spec.architecture in ("llama", "mistral"):
            if ".q_proj." in name:
                return _half_rotation(array, self._spec.num_heads)
            if ".k_proj." in name:
                return _half_rotation(array, self._spec.num_kv_heads)
        return array

    def digest(self) -> str:
        return samples_digest(self._used)


def _half_rotation(rows: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Undo GGUF's row order of llama's q and k: pairs (2i, 2i+1) back to (i, i + head_dim/2)."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


@functools.cache
def _block_format(kind: int) -> tuple[str, int, int, bool]:
    """Name, elements and bytes of a block of a GGML type, and whether it can be dequantised."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
    except ImportError:
        raise MissingExtra("gguf", "gguf", "reading a GGUF file") from None
    try:
        qtype = GGMLQuantizationType(kind)
        block, size = GGML_QUANT_SIZES[qtype]
    except (ValueError, KeyError):
        return f"type {kind}", 1, 1, False
    try:
        if qtype.name not in ("F32", "F16"):
            dequantize(np.zeros((1, size), np.uint8), qtype)
    except NotImplementedError:
        return qtype.name, block, size, False
    return qtype.name, block, size, True


class _Cursor:
    """Reads the header front to back; no length is believed before it is checked."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def damaged(self, what: str) -> NoReturn:
        raise RazorError(f"{self.path}: truncated or damaged GGUF file: {what}; fetch it again")

    def take(self, n: int) -> bytes:
        if n > self.size - self.at:
            self.damaged(f"{n} bytes expected at byte {self.at} of {self.size}")
        self.at += n
        return self.data[self.at - n : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        n = self.scalar("Q")
        if n > _MAX_STRING:
            self.damaged(f"a string of {n} bytes at byte {self.at}")
        # Vocabularies of real models hold a few broken bytes; they must not stop the rest.
        return self.take(n).decode("utf-8", "replace")

    def value(self) -> Any:
        kind = self.scalar("I")
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            self.damaged(f"value type {kind} at byte {self.at}")
        item, n = self.scalar("I"), self.scalar("Q")
        if item == _STRING:
            if n > (self.size - self.at) // 8:  # a string takes 8 bytes or more
                self.damaged(f"an array of {n} strings at byte {self.at}")
            return [self.string() for _ in range(n)]
        if item not in _SCALARS:
            self.damaged(f"an array of value type {item} at byte {self.at}")
        dtype = np.dtype("<" + _SCALARS[item]) if _SCALARS[item] != "?" else np.dtype(np.bool_)
        return np.frombuffer(self.take(n * dtype.itemsize), dtype)

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dims = self.string(), self.scalar("I")
        if not 1 <= dims <= 4:
            self.damaged(f"tensor {name[:80]!r} of {dims} dimensions")
        shape = tuple(reversed([self.scalar("Q") for _ in range(dims)]))
        if not all(0 < s < 1 << 40 for s in shape):
            self.damaged(f"tensor {name[:80]!r} of shape {list(shape)}")
        return name, shape, self.scalar("I"), self.scalar("Q")
