"""Triton model ``preprocessing``: text to ids, stop and bad words to ids, defaults for end and pad.

The names and shapes are those of the public TensorRT-LLM preprocessing model; ours adds
``PROMPT_FORMAT`` and the parameter ``prompt_format``. Messages use the names that the ensemble's
clients know (``text_input`` for ``QUERY``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.serving.models import tensors
from trt_razor.serving.models.tensors import MAX_TEXT_BYTES

FORMATS = ("raw", "chat", "messages")
ROLES = ("system", "user", "assistant", "tool")
MAX_MESSAGES = 4096
MAX_WORDS = 1024
MAX_WORD_BYTES = 4096
MAX_LIST_BYTES = 65536
INPUTS = (
    "QUERY",
    "DECODER_QUERY",
    "REQUEST_OUTPUT_LEN",
    "BAD_WORDS_DICT",
    "STOP_WORDS_DICT",
    "EMBEDDING_BIAS_WORDS",
    "EMBEDDING_BIAS_WEIGHTS",
    "END_ID",
    "PAD_ID",
    "PROMPT_TABLE_EXTRA_ID",
    "PROMPT_FORMAT",
)
IMAGES = ("IMAGE_BYTES", "IMAGE_URL", "IMAGE_SIZES", "VIDEO_BYTES")


@dataclass
class Preprocessor:
    """Requests to ids.

    Attributes:
        add_special: add what the tokenizer puts around a raw text (for Llama: BOS).
        prompt_format: of requests that name none: ``raw`` (the text as it is, special tokens
            spelled out in it are those tokens), ``chat`` (the text is a user's message in the
            model's chat template), ``messages`` (the text is a JSON list of role and content).
        vocab_size: of the engine; None = the tokenizer's, which may be smaller.
        max_input_tokens: longest prompt; None = the next model decides.
    """

    tokenizer: Tokenizer
    add_special: bool = True
    prompt_format: str = "raw"
    vocab_size: int | None = None
    max_input_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.prompt_format not in FORMATS:
            raise UsageError(
                f"parameter prompt_format: expected {', '.join(FORMATS)}, "
                f"found '{self.prompt_format}'"
            )
        if self.prompt_format != "raw" and self.tokenizer.chat_template is None:
            raise UsageError(
                f"parameter prompt_format: '{self.prompt_format}' needs a chat template, and this "
                f"model has none; use raw"
            )
        t = self.tokenizer
        self._longest_token = t.longest_token
        end = t.named_id("eos_token")
        self._end = end if end is not None else next(iter(t.eos_token_ids), -1)
        pad = t.named_id("pad_token")
        self._pad = pad if pad is not None else self._end

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of one request of B rows.

        Args:
            inputs: by name, with the batch axis in front.

        Returns:
            ``INPUT_ID`` i32 [B, L] padded on the right, ``REQUEST_INPUT_LEN`` i32 [B, 1],
            ``STOP_WORDS_IDS`` and ``BAD_WORDS_IDS`` i32 [B, 2, N], and the others.

        Raises:
            UsageError: naming the input, and the row if there are several.
        """
        for name in ("QUERY", "REQUEST_OUTPUT_LEN"):
            if name not in inputs:
                raise UsageError(f"{_public(name)}: required, but not in the request")
        batch = len(inputs["QUERY"])
        for name, values in inputs.items():
            if len(values) != batch:
                raise UsageError(f"{_public(name)}: expected {batch} rows, found {len(values)}")
        prompts = [self._prompt(inputs, row, batch) for row in range(batch)]
        end = _column(inputs, "END_ID", batch, self._end, np.int32)
        pad = _column(inputs, "PAD_ID", batch, self._pad, np.int32)
        ids, lengths = _padded(prompts, pad)
        if "DECODER_QUERY" in inputs:
            texts = [
                self._encode(inputs["DECODER_QUERY"], "DECODER_QUERY", row, batch)
                for row in range(batch)
            ]
            decoder, decoder_lengths = _padded(texts, pad)
        else:
            decoder, decoder_lengths = pad.copy(), np.ones((batch, 1), np.int32)
        outputs = {
            "INPUT_ID": ids,
            "REQUEST_INPUT_LEN": lengths,
            "DECODER_INPUT_ID": decoder,
            "REQUEST_DECODER_INPUT_LEN": decoder_lengths,
            "BAD_WORDS_IDS": self._words(inputs, "BAD_WORDS_DICT", batch),
            "STOP_WORDS_IDS": self._words(inputs, "STOP_WORDS_DICT", batch),
            "EMBEDDING_BIAS": self._bias(inputs, batch),
            "REQUEST_OUTPUT_LEN": inputs["REQUEST_OUTPUT_LEN"],
            "OUT_END_ID": end,
            "OUT_PAD_ID": pad,
        }
        if "PROMPT_TABLE_EXTRA_ID" in inputs:
            extra = _column(inputs, "PROMPT_TABLE_EXTRA_ID", batch, 0, np.uint64)
            virtual = ids >= self.tokenizer.vocab_size  # rows of the client's own table
            outputs["OUT_PROMPT_TABLE_EXTRA_IDS"] = np.where(virtual, extra, np.uint64(0))
        return outputs

    # Prompts --------------------------------------------------------------------------------------
    def _prompt(self, inputs: Mapping[str, np.ndarray], row: int, batch: int) -> list[int]:
        where = tensors.label("text_input", row, batch)
        prompt_format = self.prompt_format
        if "PROMPT_FORMAT" in inputs:
            value = tensors.one(inputs["PROMPT_FORMAT"][row], "prompt_format")
            prompt_format = tensors.text(value, "prompt_format") or self.prompt_format
        if prompt_format == "raw":
            ids = self._encode(inputs["QUERY"], "QUERY", row, batch)
        elif prompt_format in FORMATS:
            text = self._text(inputs["QUERY"], "QUERY", row, batch)
            messages = [{"role": "user", "content": text}]
            if prompt_format == "messages":
                messages = parse_messages(text, where)
            ids = self._chat(messages, prompt_format, where)
        else:
            raise UsageError(
                f"prompt_format: expected {', '.join(FORMATS)}, found {prompt_format!r:.60}"
            )
        if not ids:
            raise UsageError(f"{where}: expected at least 1 token, found an empty prompt")
        return ids

    def _encode(self, values: np.ndarray, name: str, row: int, batch: int) -> list[int]:
        text = self._text(values, name, row, batch)
        ids = self.tokenizer.encode(text, add_special=self.add_special)
        return self._fitting(ids, tensors.label(_public(name), row, batch))

    def _chat(
        self, messages: Sequence[Mapping[str, str]], prompt_format: str, where: str
    ) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise UsageError(
                f"prompt_format: '{prompt_format}' needs a chat template, and this model has none; "
                f"use raw"
            )
        try:
            return self._fitting(self.tokenizer.encode_chat(messages), where)
        except UsageError as e:  # may name a file of this machine, which is no client's business
            raise UsageError(str(e).removeprefix(f"{self.tokenizer.where}: ")) from None

    # Limits: what cannot fit is refused before it costs seconds and gigabytes ----------------------
    def _text(self, values: np.ndarray, name: str, row: int, batch: int) -> str:
        where = tensors.label(_public(name), row, batch)
        most = MAX_TEXT_BYTES
        if self.max_input_tokens is not None:
            # Twice: quotes and roles of JSON, and normalisers that shorten texts.
            most = min(most, 2 * self._longest_token * self.max_input_tokens + 1024)
        return tensors.text(tensors.one(values[row], where), where, most)

    def _fitting(self, ids: list[int], where: str) -> list[int]:
        most = self.max_input_tokens
        if most is not None and len(ids) > most:
            raise UsageError(
                f"{where}: the prompt has {len(ids)} tokens, this server takes at most {most}; "
                f"shorten it"
            )
        return ids

    # Words ----------------------------------------------------------------------------------------
    def _words(self, inputs: Mapping[str, np.ndarray], name: str, batch: int) -> np.ndarray:
        """Words of all rows as [B, 2, N]: their ids, and where each word ends."""
        if name not in inputs:
            return np.zeros((batch, 2, 0), np.int32)
        return pack_words(
            [
                [self.tokenizer.encode(word) for word in _texts(inputs[name], name, row, batch)]
                for row in range(batch)
            ]
        )

    def _bias(self, inputs: Mapping[str, np.ndarray], batch: int) -> np.ndarray:
        """What is added to the logits: [B, vocab_size], or [B, 0] without any."""
        name = "EMBEDDING_BIAS_WORDS"
        words, weights = inputs.get(name), inputs.get("EMBEDDING_BIAS_WEIGHTS")
        if words is None and weights is None:
            return np.zeros((batch, 0), np.float32)
        if words is None or weights is None or words.shape != weights.shape:
            raise UsageError(
                f"embedding_bias_weights: expected one for each of embedding_bias_words "
                f"{_shape(words)}, found {_shape(weights)}"
            )
        if not np.isfinite(weights).all():
            raise UsageError("embedding_bias_weights: expected finite numbers, found NaN or inf")
        bias = np.zeros((batch, self.vocab_size or self.tokenizer.vocab_size), np.float32)
        for row in range(batch):
            texts = _texts(words, name, row, batch)
            for word, weight in zip(texts, tensors.rows(weights)[row], strict=True):
                # Without special tokens: a bias on a word is none on BOS.
                for i in self.tokenizer.encode(word):
                    if i < bias.shape[1]:
                        bias[row, i] += weight
        return bias


def pack_words(words: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    """Ids of words, by row and word, as the engines read them: i32 [rows, 2, N].

    [:, 0] is all ids one after another, padded with 0; [:, 1] where each word ends, padded with -1.
    Words without ids are left out; N is at least 1.
    """
    kept = [[w for w in row if w] for row in words]
    n = max([1, *(sum(map(len, row)) for row in kept)])
    packed = np.zeros((len(kept), 2, n), np.int32)
    packed[:, 1] = -1
    for out, row in zip(packed, kept, strict=True):
        flat = [i for w in row for i in w]
        out[0, : len(flat)] = flat
        out[1, : len(row)] = np.cumsum([len(w) for w in row], dtype=np.int32)
    return packed


def parse_messages(text: str, where: str) -> list[dict[str, str]]:
    """A conversation from JSON: ``[{"role": "user", "content": "…"}, …]``.

    Raises:
        UsageError: saying what is wrong with which message.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        reason = " ".join(str(e).split())
        raise UsageError(f"{where}: expected a JSON list of messages: {reason}") from None
    if not isinstance(data, list):
        raise UsageError(f"{where}: expected a JSON list of messages, found {_kind(data)}")
    if not 1 <= len(data) <= MAX_MESSAGES:
        raise UsageError(f"{where}: expected 1..{MAX_MESSAGES} messages, found {len(data)}")
    for i, message in enumerate(data):
        at = f"{where}: message {i + 1} of {len(data)}"
        if not isinstance(message, dict):
            raise UsageError(f"{at}: expected an object, found {_kind(message)}")
        if other := sorted(set(message) - {"role", "content"}):
            raise UsageError(f"{at}: expected role and content, found also {other[0]!r:.60}")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise UsageError(f"{at}: role: expected {', '.join(ROLES)}, found {role!r:.60}")
        if not isinstance(content, str):
            raise UsageError(f"{at}: content: expected text, found {_kind(content)}")
    return data


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "nothing" if value is None else names.get(type(value), "a number")


def _public(name: str) -> str:
    """The name that the ensemble's clients know an input by."""
    if name == "QUERY":
        return "text_input"
    if name == "DECODER_QUERY":
        return "decoder_text_input"
    if name == "REQUEST_OUTPUT_LEN":
        return "max_tokens"
    return name.lower().removesuffix("_dict")


def _shape(values: np.ndarray | None) -> str:
    return "nothing" if values is None else str(list(values.shape))


def _texts(values: np.ndarray, name: str, row: int, batch: int) -> list[str]:
    where = tensors.label(_public(name), row, batch)
    words = tensors.rows(values)[row]
    if len(words) > MAX_WORDS:
        raise UsageError(f"{where}: {len(words)} words; at most {MAX_WORDS} are accepted")
    texts = [tensors.text(w, f"{where}: word {i + 1}", MAX_WORD_BYTES) for i, w in enumerate(words)]
    total = sum(map(len, words))
    if total > MAX_LIST_BYTES:
        raise UsageError(f"{where}: {total} bytes; at most {MAX_LIST_BYTES} are accepted")
    return texts


def _column(
    inputs: Mapping[str, np.ndarray], name: str, batch: int, default: int, dtype: Any
) -> np.ndarray:
    """An input of one number per row, or the default for all: [B, 1]."""
    values = inputs.get(name)
    if values is None:
        return np.full((batch, 1), default, dtype)
    if values.size != batch:
        raise UsageError(f"{_public(name)}: expected 1 value per row, found {_shape(values)}")
    return values.reshape(batch, 1).astype(dtype)


def _padded(prompts: Sequence[Sequence[int]], pad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids [B, longest] padded on the right, lengths [B, 1]), both i32."""
    lengths = np.array([[len(p)] for p in prompts], np.int32)
    ids = np.repeat(np.maximum(pad, 0), int(lengths.max(initial=0)), axis=1).astype(np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids, lengths


class TritonPythonModel:
    """The model as Triton runs it."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the tokenizer. Parameters: ``tokenizer_dir``, ``add_special_tokens``,
        ``prompt_format``, ``vocab_size``, ``max_input_tokens``; ``multimodal_model_path`` must be empty."""
        try:
            given = tensors.parameters(args)
            if "multimodal_model_path" in given:
                raise UsageError("parameter multimodal_model_path: images are not supported")
            self._pre = Preprocessor(
                tensors.load_tokenizer(args),
                tensors.flag(given, "add_special_tokens", True),
                given.get("prompt_format", "raw"),
                tensors.size(given, "vocab_size"),
                tensors.size(given, "max_input_tokens"),
            )
        except RazorError as e:
            raise tensors.load_failure(e) from None

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request; a bad request fails alone."""
        return [self._answer(r) for r in requests]

    def _answer(self, request: Any) -> Any:
        try:
            given = tensors.arrays(request, INPUTS)
            for name, values in tensors.arrays(request, IMAGES).items():
                if values.size:
                    raise UsageError(f"{name.lower()}: this model reads text only")
            outputs = self._pre.run(given)
            return tensors.triton().InferenceResponse(
                output_tensors=[tensors.tensor(k, v) for k, v in outputs.items()]
            )
        except RazorError as e:
            return tensors.error_response(e)
        except Exception as e:
            tensors.log_unexpected("preprocessing", e)
            return tensors.error_response(e)
