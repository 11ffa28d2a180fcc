"""Tokenizer: text to ids and back, streaming, chat templates.

Encoding is the ``tokenizers`` library's. Decoding is done here, over bytes: every id stands for
some bytes, the text is those bytes read as UTF-8. So a stream can hold back half a character,
and its pieces are the decoded text by construction.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from trt_razor.errors import MissingExtra, RazorError, UsageError
from trt_razor.files import write_text_atomic
from trt_razor.models.stored import read_json

_SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """The tokenizer of a checkpoint.

    Attributes:
        bos_token_id: id that starts a text, or None.
        eos_token_ids: ids that end an answer.
        chat_template: Jinja source, or None.
        vocab_size: ids the tokenizer knows; a model may have a few more rows.
        where: file it comes from, which messages name.
    """

    def __init__(
        self,
        tokenizer_json: str,
        named_tokens: Mapping[str, str],
        bos_token_id: int | None,
        eos_token_ids: Sequence[int],
        chat_template: str | None,
        where: str,
    ) -> None:
        """
        Args:
            tokenizer_json: content of a ``tokenizer.json``.
            named_tokens: ``bos_token``, ``eos_token`` … → text, for chat templates.
            bos_token_id, eos_token_ids, chat_template: see the class.
            where: file the parts come from, for messages.

        Raises:
            UsageError: a kind of decoder that is not supported.
            RazorError: damaged JSON.
        """
        self._json, self.where = tokenizer_json, where
        self._named = dict(named_tokens)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        self.chat_template = chat_template
        try:
            decoder = json.loads(tokenizer_json).get("decoder")
        except (ValueError, AttributeError, RecursionError) as e:
            raise RazorError(f"{where}: damaged: not a tokenizer ({e})") from None
        self._backend = _backend(tokenizer_json, where)
        self._backend_plain: Any = None
        self._added = {
            i: (t.content.encode("utf-8"), bool(t.special))
            for i, t in self._backend.get_added_tokens_decoder().items()
        }
        self._piece_bytes, self._strip_spaces = _decoder(decoder, where)
        self._cache: dict[int, bytes] = {}
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)

    # Text and ids -----------------------------------------------------------------------------
    def encode(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Ids of a text.

        Args:
            text: any text.
            add_special: add what the tokenizer puts around a text (for Llama: BOS).
            parse_special: read special tokens spelled out in the text (``<|im_end|>``) as those
                tokens, as the output of ``chat`` needs; False for text from outside, where they
                stay plain characters.

        Raises:
            UsageError: the text has lone surrogates, which no UTF-8 can hold.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise UsageError(
                f"text: character {e.start} is a lone surrogate, not Unicode"
            ) from None
        backend = self._backend
        if not parse_special:
            if self._backend_plain is None:
                self._backend_plain = _backend(self._json, self.where)
                self._backend_plain.encode_special_tokens = True
            backend = self._backend_plain
        return list(backend.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        stream = self.stream(skip_special)
        return "".join([stream.step(i) for i in ids]) + stream.finish()

    def stream(self, skip_special: bool = True) -> TextStream:
        """Decoder for ids that arrive one by one."""
        return TextStream(lambda i: self.token_bytes(i, skip_special), self._strip_spaces)

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """Bytes one id stands for; empty for an unknown id, and for a special one if skipped."""
        added = self._added.get(token_id)
        if added is not None:
            content, special = added
            return b"" if special and skip_special else content
        known = self._cache.get(token_id)
        if known is None:
            piece = self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
            if piece is None:  # not kept: there is no end of unknown ids
                return b""
            known = self._cache[token_id] = self._piece_bytes(piece)
        return known

    @functools.cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token: a text of n bytes is at least n / this many ids."""
        return max((len(self.token_bytes(i, False)) for i in range(self.vocab_size)), default=1)

    def named_id(self, name: str) -> int | None:
        """Id of a token by its name in the configuration (``eos_token``, ``pad_token`` …)."""
        text = self._named.get(name)
        known = None if text is None else self._backend.token_to_id(text)
        return None if known is None else int(known)

    # Chat -------------------------------------------------------------------------------------
    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation in the model's own format; encode it with ``parse_special``.

        Args:
            messages: ``{"role": "user" | "assistant" | "system", "content": text}`` in order.
            add_generation_prompt: end with the opening of the assistant's answer.

        Raises:
            UsageError: the model has no chat template, or it refuses these messages.
        """
        if self.chat_template is None:
            raise UsageError(
                f"{self.where}: this model has no chat template; give a plain prompt instead"
            )
        try:
            import jinja2
            import jinja2.ext
            import jinja2.sandbox
        except ImportError:
            raise MissingExtra("jinja2", "models", "the chat template") from None

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        # The template is untrusted code of the checkpoint: sandboxed, nothing of ours inside.
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        env.filters["tojson"] = lambda x, indent=None: json.dumps(
            x, ensure_ascii=False, indent=indent
        )
        env.globals["raise_exception"] = raise_exception
        env.globals["strftime_now"] = lambda fmt: datetime.now().strftime(fmt)
        try:
            return env.from_string(self.chat_template).render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                **self._named,
            )
        except Exception as e:  # whatever a foreign template may raise
            reason = " ".join(str(e).split())[:200]
            raise UsageError(f"{self.where}: the chat template failed: {reason}") from None

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a conversation in the model's own format.

        Control tokens spelled out in a content (``<|im_end|>`` in a user's text) stay plain
        characters there: nobody can end his turn and speak as somebody else.

        Raises:
            UsageError: as ``chat`` and ``encode``.
        """
        # A stand-in for each control token in a content, which no text can hold by accident.
        flags = {t.content: t for t in self._backend.get_added_tokens_decoder().values()}
        controls = sorted((c for c, t in flags.items() if c and t.special), key=len, reverse=True)
        if not controls:
            return self.encode(self.chat(messages, add_generation_prompt))
        control = re.compile("|".join(map(re.escape, controls)))
        mark = secrets.token_hex(8)
        found: list[str] = []

        def hide(match: re.Match[str]) -> str:
            found.append(match[0])
            return f"\ue000{mark}:{len(found) - 1}\ue001"

        def hidden(value: Any) -> Any:
            if isinstance(value, str):
                return control.sub(hide, value)
            if isinstance(value, Mapping):
                return {k: hidden(v) for k, v in value.items()}
            return [hidden(v) for v in value] if isinstance(value, (list, tuple)) else value

        text = self.chat([hidden(m) for m in messages], add_generation_prompt)
        if not found:
            return self.encode(text)
        # The control tokens that are left are the template's own. What stands between two of them
        # is encoded in one piece, or a stand-in would tear words apart.
        stand_in = re.compile(f"\ue000{mark}:(\\d+)\ue001")
        ids: list[int] = []
        parts, kept = re.split(f"({control.pattern})", text), ""
        for i, part in enumerate(parts):
            plain = stand_in.sub(lambda m: found[int(m[1])], part)
            if plain == part:
                kept += part
                continue
            if i and flags[parts[i - 1]].rstrip:  # a control token that takes spaces beside it
                plain = plain.lstrip()
            if i + 1 < len(parts) and flags[parts[i + 1]].lstrip:
                plain = plain.rstrip()
            ids += self.encode(kept) if kept else []
            ids += self.encode(plain, parse_special=False)
            kept = ""
        return ids + (self.encode(kept) if kept else [])

    # Files ------------------------------------------------------------------------------------
    def save(self, folder: Path) -> None:
        """Write the Hugging Face files that ``load`` reads; each is whole or not there.

        Raises:
            RazorError: the folder cannot be written.
        """
        config = {**self._named, "chat_template": self.chat_template}
        generation = {
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids),
        }
        for name, data in (
            ("tokenizer_config.json", config),
            ("generation_config.json", generation),
        ):
            write_text_atomic(folder / name, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        write_text_atomic(folder / "tokenizer.json", self._json)

    @classmethod
    def find(cls, folder: Path) -> Tokenizer | None:
        """``load``, or None where the folder has no ``tokenizer.json``."""
        return cls.load(folder) if (folder / "tokenizer.json").exists() else None

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read ``tokenizer.json`` and, where present, ``tokenizer_config.json``,
        ``chat_template.jinja``, ``generation_config.json`` and ``config.json``.

        Raises:
            UsageError: no tokenizer there, or a kind that is not supported.
            RazorError: a damaged file.
        """
        path = folder / "tokenizer.json"
        read_json(path, "the tokenizer")  # size and form, with messages that name the file
        config, generation, model = (
            read_json(folder / n, n) if (folder / n).exists() else {}
            for n in ("tokenizer_config.json", "generation_config.json", "config.json")
        )
        named = {k: t for k in _NAMED if (t := _token_text(config.get(k))) is not None}
        template = _chat_template(folder, config)
        tokenizer = cls(path.read_text(encoding="utf-8"), named, None, (), template, str(path))
        ids = {k: tokenizer._backend.token_to_id(t) for k, t in named.items()}
        eos = [*_ids(generation.get("eos_token_id")), *_ids(ids.get("eos_token"))]
        eos += _ids(model.get("eos_token_id"))
        bos = [*_ids(ids.get("bos_token")), *_ids(generation.get("bos_token_id"))]
        bos += _ids(model.get("bos_token_id"))
        tokenizer.bos_token_id = next(iter(bos), None)
        tokenizer.eos_token_ids = tuple(dict.fromkeys(eos))
        return tokenizer


class TextStream:
    """Turns ids into text one at a time; the pieces joined are the decoded text."""

    def __init__(self, token_bytes: Callable[[int], bytes], strip_spaces: int) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = strip_spaces  # leading spaces the tokenizer put before the first word

    def step(self, token_id: int) -> str:
        """Text that is complete with this id; empty while a character is still in parts."""
        data = self._token_bytes(token_id)
        if self._strip and data:
            kept = data.lstrip(b" ")
            dropped = min(self._strip, len(data) - len(kept))
            # The first other character ends the stripping.
            self._strip = 0 if kept else self._strip - dropped
            data = data[dropped:]
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole, or nothing."""
        return self._utf8.decode(b"", final=True)


def _backend(tokenizer_json: str, where: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingExtra("tokenizers", "models", "the tokenizer") from None
    try:
        backend = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as e:  # the library raises bare Exception
        reason = " ".join(str(e).split())[:200]
        raise RazorError(f"{where}: damaged or too new: not a tokenizer ({reason})") from None
    # Settings of somebody's training run, not of the tokenizer.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _decoder(decoder: Any, where: str) -> tuple[Callable[[str], bytes], int]:
    """How a piece of the vocabulary becomes bytes, and how many leading spaces are dropped."""
    parts = [decoder]
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence":
        parts = decoder.get("decoders") or []
    kinds = [p.get("type") if isinstance(p, dict) else None for p in parts]
    if "ByteLevel" in kinds:
        return _byte_level_bytes, 0
    strip = 0
    for kind, part in zip(kinds, parts, strict=True):
        if kind == "Replace" and part.get("pattern") == {"String": _SPACE}:
            known = part.get("content") == " "
        elif kind == "Metaspace" and part.get("replacement") == _SPACE:
            scheme = part.get(
                "prepend_scheme", "always" if part.get("add_prefix_space") else "never"
            )
            known, strip = True, int(scheme != "never")
        elif kind == "Strip":
            known, strip = part.get("content") == " ", int(part.get("start", 0))
        else:
            known = kind in ("ByteFallback", "Fuse")
        if not known:
            raise UsageError(
                f"{where}: decoder: expected ByteLevel or SentencePiece (Replace, ByteFallback, "
                f"Fuse, Strip, Metaspace), found {kind}"
            )
    return _sentencepiece_bytes, strip


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character → byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(other)}


_BYTE_OF = _byte_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes([_BYTE_OF[ch] for ch in piece])
    except KeyError:
        return piece.encode("utf-8", "replace")


def _sentencepiece_bytes(piece: str) -> bytes:
    single = _BYTE_TOKEN.fullmatch(piece)
    if single:
        return bytes([int(single[1], 16)])
    return piece.replace(_SPACE, " ").encode("utf-8", "replace")


def _token_text(value: Any) -> str | None:
    """A special token as configs write it: a string, or an object with its content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise RazorError(f"{file}: cannot read the chat template: {e}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None
