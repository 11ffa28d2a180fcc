"""The tokenizer inside a GGUF file, rebuilt for the ``tokenizers`` library.

Only byte-level BPE ("gpt2" in GGUF's terms), and of its pre-tokenizers only those listed here:
a wrong split of the text gives plausible but wrong ids, so others are refused by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trt_razor.errors import MissingExtra, RazorError, UsageError
from trt_razor.models.gguf_reader import GgufFile
from trt_razor.models.tokenizer import Tokenizer

# GGUF token types
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
# Control tokens that end an answer whatever the file's eos_token_id says.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2_SPLIT = _WORDS + r"\p{N}" + _REST
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_KNOWN = ("smollm", "gpt-2", "qwen2", *_LLAMA3)


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer | None:
    """The tokenizer of a GGUF file, or None if it has none.

    Raises:
        UsageError: a kind of tokenizer or pre-tokenizer that is not supported.
        RazorError: its tables contradict each other.
    """
    model = file.number("tokenizer.ggml.model", str)
    if model is None or model == "none":
        return None
    if model != "gpt2":
        raise UsageError(
            f"{file.path}: tokenizer.ggml.model: expected 'gpt2' (byte-level BPE), found {model!r}; "
            "use the Hugging Face folder of the model"
        )
    pre = file.number("tokenizer.ggml.pre", str)
    if pre not in _KNOWN:
        raise UsageError(
            f"{file.path}: tokenizer.ggml.pre: expected {', '.join(_KNOWN)}, found {pre!r}; use the "
            "Hugging Face folder of the model"
        )
    tokens = _strings(file, "tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ")) for m in _strings(file, "tokenizer.ggml.merges")]
    types = file.metadata.get("tokenizer.ggml.token_type")
    if types is None:
        types = np.ones(len(tokens), np.int32)
    kinds = types.tolist() if isinstance(types, np.ndarray) else []
    if len(kinds) != len(tokens) or any(len(m) != 2 for m in merges):
        raise RazorError(f"{file.path}: damaged tokenizer: its tables do not fit each other")

    def token_id(key: str) -> int | None:
        i = file.number(f"tokenizer.ggml.{key}", int)
        if i is not None and not 0 <= i < len(tokens):
            raise RazorError(
                f"{file.path}: tokenizer.ggml.{key}: {i} is not one of {len(tokens)} ids"
            )
        return i

    bos = token_id("bos_token_id")
    eos = [i for k in ("eos", "eot", "eom") if (i := token_id(f"{k}_token_id")) is not None]
    eos += [i for i, t in enumerate(tokens) if kinds[i] == _CONTROL and t in _ENDS]
    named = {
        f"{key}_token": tokens[i]
        for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (i := token_id(f"{name}_token_id")) is not None
    }
    add_bos = file.number("tokenizer.ggml.add_bos_token", bool, pre in _LLAMA3)
    start = (tokens[bos], bos) if add_bos and bos is not None else None
    return Tokenizer(
        _build(file, pre, tokens, kinds, merges, start),
        named,
        bos,
        tuple(dict.fromkeys(eos)),
        file.number("tokenizer.chat_template", str),
        str(file.path),
    )


def _build(
    file: GgufFile,
    pre: str,
    tokens: list[str],
    kinds: list[int],
    merges: list[Any],
    start: tuple[str, int] | None,
) -> str:
    """``tokenizer.json`` of a byte-level BPE."""
    try:
        from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors
        from tokenizers import Tokenizer as Backend
        from tokenizers import pre_tokenizers as split
    except ImportError:
        raise MissingExtra("tokenizers", "models", "the tokenizer") from None
    try:
        vocab = {t: i for i, t in enumerate(tokens)}
        # Llama 3 takes a whole word that is in the vocabulary even if no merges lead to it.
        backend = Backend(models.BPE(vocab, merges, ignore_merges=pre in _LLAMA3))
        if pre == "qwen2":
            backend.normalizer = normalizers.NFC()
        if pre in ("smollm", "gpt-2"):
            steps: list[Any] = [split.Digits(individual_digits=True)] if pre == "smollm" else []
            steps.append(split.ByteLevel(add_prefix_space=False, use_regex=True))
        else:
            pattern = _QWEN2_SPLIT if pre == "qwen2" else _LLAMA3_SPLIT
            steps = [
                split.Split(Regex(pattern), "isolated"),
                split.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        backend.pre_tokenizer = split.Sequence(steps)
        backend.decoder = decoders.ByteLevel()
        if start is not None:
            backend.post_processor = processors.TemplateProcessing(
                single=[start[0], "$A"], special_tokens=[start]
            )
        added = {
            t: AddedToken(t, normalized=False, special=kinds[i] != _USER_DEFINED)
            for i, t in enumerate(tokens)
            if kinds[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        }
        backend.add_special_tokens([a for a in added.values() if a.special])
        backend.add_tokens([a for a in added.values() if not a.special])
        return str(backend.to_str())
    except Exception as e:  # the library raises bare Exception
        reason = " ".join(str(e).split())[:200]
        raise RazorError(f"{file.path}: damaged tokenizer ({reason})") from None


def _strings(file: GgufFile, key: str) -> list[str]:
    value = file.metadata.get(key)
    if not isinstance(value, list):
        raise RazorError(f"{file.path}: {key}: expected a list of strings")
    return value
