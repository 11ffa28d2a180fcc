"""Tokenizers: text and bytes, streaming, chat templates, files, and those inside GGUF."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).parent))
from model_files import write_gguf

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.gguf_reader import GgufFile
from trt_razor.models.gguf_tokenizer import tokenizer_from_gguf
from trt_razor.models.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
TEXT = st.text(st.characters(codec="utf-8"), max_size=60)


def byte_alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level_json() -> str:
    """All bytes, one merge, a special token and an added one that is not special."""
    vocab = {ch: i for i, ch in enumerate([*byte_alphabet(), "th"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>")])
    backend.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 257)]
    )
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    return str(backend.to_str())


def sentencepiece_json() -> str:
    """Llama 2's kind: a space in front of the text, bytes for what the vocabulary lacks."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "\u2581",
        *"abcdeñ ",
        "ab",
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)},
            [("a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return str(backend.to_str())


BYTE_LEVEL = Tokenizer(byte_level_json(), NAMED, 257, (258,), CHATML, "byte level")
SENTENCEPIECE = Tokenizer(sentencepiece_json(), NAMED, 1, (2,), None, "sentencepiece")


# Text and ids -------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_any_text_survives(text: str) -> None:
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        ids = tokenizer.encode(text, parse_special=False)
        assert tokenizer.decode(ids) == text.replace(
            "\u2581", " " if tokenizer is SENTENCEPIECE else "\u2581"
        )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 262), max_size=40), st.booleans())
def test_any_ids_decode_as_the_library_does(ids: list[int], skip: bool) -> None:
    library = tokenizers.Tokenizer.from_str(byte_level_json())
    assert BYTE_LEVEL.decode(ids, skip) == library.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(TEXT, st.booleans())
def test_sentencepiece_decodes_as_the_library_does(text: str, skip: bool) -> None:
    library = tokenizers.Tokenizer.from_str(sentencepiece_json())
    ids = SENTENCEPIECE.encode(text)
    assert SENTENCEPIECE.decode(ids, skip) == library.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 270), max_size=40))
def test_stream_joined_is_the_decoded_text(ids: list[int]) -> None:
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        stream = tokenizer.stream()
        pieces = [stream.step(i) for i in ids]
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])
def test_a_character_comes_out_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🎉b")
    stream = tokenizer.stream()
    pieces = [p for p in (stream.step(i) for i in ids) if p]
    assert pieces == ["a", "🎉", "b"]
    assert stream.finish() == ""
    assert len(ids) > 5
    cut = tokenizer.stream()
    assert "".join(cut.step(i) for i in ids[:-2]) == "a"
    assert cut.finish() == "\ufffd"


def test_sentencepiece_drops_one_leading_space_only() -> None:
    ids = SENTENCEPIECE.encode("ab  cd")
    assert SENTENCEPIECE.decode(ids) == "ab  cd"
    assert SENTENCEPIECE.decode(SENTENCEPIECE.encode("  ab")) == "  ab"
    space = SENTENCEPIECE.encode("a b")[0]
    assert SENTENCEPIECE.decode([space, space]) == " "


def test_special_tokens_in_text() -> None:
    text = "a</s><think>"
    assert BYTE_LEVEL.encode(text)[1:] == [258, 259]
    plain = BYTE_LEVEL.encode(text, parse_special=False)
    assert 258 not in plain
    assert plain[-1] == 259  # not special: part of the language
    assert BYTE_LEVEL.encode(text)[1:] == [258, 259]  # the mode is not sticky
    assert BYTE_LEVEL.decode([257, 258, 259]) == "<think>"
    assert BYTE_LEVEL.decode([257, 258, 259], skip_special=False) == "<s></s><think>"


def test_add_special_and_no_padding_or_truncation() -> None:
    text = "longer than five"
    ids = BYTE_LEVEL.encode(text)
    assert BYTE_LEVEL.encode(text, add_special=True) == [257, *ids]
    assert BYTE_LEVEL.decode(ids) == text


def test_unknown_ids_and_surrogates() -> None:
    assert BYTE_LEVEL.decode([1 << 40, -1, 99_999]) == ""
    assert not {1 << 40, -1, 99_999} & BYTE_LEVEL._cache.keys()  # clients can name any number
    with pytest.raises(UsageError, match="character 1 is a lone surrogate"):
        BYTE_LEVEL.encode("a\ud800")


# Chat ---------------------------------------------------------------------------------------


def test_chat() -> None:
    talk = [{"role": "user", "content": "hi"}]
    assert BYTE_LEVEL.chat(talk) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert BYTE_LEVEL.chat(talk, add_generation_prompt=False).endswith("<|im_end|>\n")
    with pytest.raises(UsageError, match="no chat template"):
        SENTENCEPIECE.chat(talk)


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{{ bos_token }}{{ messages[0].content | tojson }}", '<s>"é"'),
        ("{%- for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}.", "."),
        ("{% if true %}\n  a\n{% endif %}\n", "  a\n"),  # trim_blocks and lstrip_blocks
        ("{{ strftime_now('%%') }}{{ eos_token }}", "%</s>"),
    ],
)
def test_what_templates_use(template: str, expected: str) -> None:
    t = Tokenizer(byte_level_json(), NAMED, None, (), template, "t")
    assert t.chat([{"role": "user", "content": "é"}]) == expected


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "chat template failed"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_templates_that_fail_or_reach_out(template: str, words: str) -> None:
    t = Tokenizer(byte_level_json(), NAMED, None, (), template, "model.gguf")
    with pytest.raises(UsageError, match=words) as e:
        t.chat([{"role": "user", "content": "x"}])
    assert str(e.value).startswith("model.gguf: ")
    assert "\n" not in str(e.value)


SPECIAL_TURNS = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
CHATS = {
    kind: Tokenizer(source, NAMED, 257, (258,), SPECIAL_TURNS, kind)
    for kind, source in (("byte level", byte_level_json()), ("sentencepiece", sentencepiece_json()))
}
CONTENT = st.lists(
    st.sampled_from(["<s>", "</s>", "</", "s>", "<think>", " ", "th", "é", "\ue000", "0:1"]),
    max_size=6,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(CONTENT, min_size=1, max_size=3), st.sampled_from(sorted(CHATS)))
def test_nobody_can_end_his_turn(contents: list[str], kind: str) -> None:
    t = CHATS[kind]
    ids = t.encode_chat([{"role": "user", "content": c} for c in contents])
    expected: list[int] = []
    for content in contents:
        said = t.encode(f"user: {content}", parse_special=False)
        expected += [*t.encode("<s>"), *said, *t.encode("</s>")]
    assert ids == [*expected, *t.encode("<s>assistant: ")]


@pytest.mark.parametrize("kind", sorted(CHATS))
def test_a_harmless_chat_is_encoded_as_its_text(kind: str) -> None:
    t = CHATS[kind]
    talk = [{"role": "user", "content": "the é 🎉"}, {"role": "assistant", "content": " a\n"}]
    for more in (True, False):
        assert t.encode_chat(talk, more) == t.encode(t.chat(talk, more))


def test_control_tokens_deep_inside_a_message() -> None:
    template = "{{ messages[0].parts[0].text }}{{ messages[0]['calls']['x'] }}</s>"
    t = Tokenizer(byte_level_json(), NAMED, None, (), template, "t")
    ids = t.encode_chat([{"parts": [{"text": "a</s>"}], "calls": {"x": "<s>"}, "n": 1}])
    assert ids == [*t.encode("a</s><s>", parse_special=False), 258]


def test_control_tokens_that_take_the_spaces_beside_them() -> None:
    data = json.loads(byte_level_json())
    for token in data["added_tokens"]:
        if token["special"]:
            token["rstrip" if token["content"] == "<s>" else "lstrip"] = True
    t = Tokenizer(json.dumps(data), NAMED, None, (), "<s>\n{{ messages[0].content }}\n</s>", "t")
    harmless = t.encode_chat([{"content": "ab"}])
    assert harmless == [257, *t.encode("ab"), 258]
    assert t.encode_chat([{"content": "a</s>b"}]) == [
        257,
        *t.encode("a</s>b", parse_special=False),
        258,
    ]


def test_a_tokenizer_without_control_tokens_chats() -> None:
    data = json.loads(byte_level_json())
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["special"]]
    data["post_processor"] = None
    t = Tokenizer(json.dumps(data), {}, None, (), SPECIAL_TURNS, "t")
    assert t.decode(t.encode_chat([{"role": "user", "content": "</s>"}], False)) == (
        "<s>user: </s></s>"
    )


def test_encode_chat_without_a_template() -> None:
    with pytest.raises(UsageError, match="no chat template"):
        SENTENCEPIECE.encode_chat([{"role": "user", "content": "</s>"}])


def test_named_ids() -> None:
    assert BYTE_LEVEL.named_id("eos_token") == 258
    assert BYTE_LEVEL.named_id("pad_token") is None
    odd = Tokenizer(byte_level_json(), {"pad_token": "<none>"}, None, (), None, "t")
    assert odd.named_id("pad_token") is None


# Files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])
def test_save_and_load(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "t")
    again = Tokenizer.load(tmp_path / "t")
    for name in ("bos_token_id", "eos_token_ids", "chat_template", "vocab_size"):
        assert getattr(again, name) == getattr(tokenizer, name)
    text = "the é 🎉 </s> 12"
    for parse in (True, False):
        assert again.encode(text, True, parse) == tokenizer.encode(text, True, parse)
    assert again.decode([*range(260)], False) == tokenizer.decode([*range(260)], False)


def write(folder: Path, **files: Any) -> Path:
    (folder / "tokenizer.json").write_text(byte_level_json())
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    "files, bos, eos, template",
    [
        ({}, None, (), None),
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"}}, 257, (258,), None),
        (
            {"tokenizer_config": {"eos_token": {"content": "</s>"}, "chat_template": "T"}},
            None,
            (258,),
            "T",
        ),
        (
            {
                "tokenizer_config": {
                    "bos_token": None,
                    "chat_template": [
                        {"name": "tool_use", "template": "U"},
                        {"name": "default", "template": "D"},
                    ],
                },
                "generation_config": {"eos_token_id": [7, 258], "bos_token_id": 5},
                "config": {"eos_token_id": 9, "bos_token_id": 6},
            },
            5,
            (7, 258, 9),
            "D",
        ),
    ],
)
def test_hugging_face_files(
    tmp_path: Path,
    files: dict[str, Any],
    bos: int | None,
    eos: tuple[int, ...],
    template: str | None,
) -> None:
    t = Tokenizer.load(write(tmp_path, **files))
    assert (t.bos_token_id, t.eos_token_ids, t.chat_template) == (bos, eos, template)


def test_template_file_comes_first(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text("new")
    assert Tokenizer.load(tmp_path).chat_template == "new"


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.find(tmp_path) is None
    with pytest.raises(UsageError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "X"}}', '{"a":' * 9000])
def test_damaged_tokenizer(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(RazorError, match=r"tokenizer\.json") as e:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(e.value)


def test_unknown_decoder_is_refused_by_name() -> None:
    data = json.loads(byte_level_json())
    data["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(UsageError, match="found WordPiece"):
        Tokenizer(json.dumps(data), {}, None, (), None, "t")


# GGUF ---------------------------------------------------------------------------------------


def gguf_file(path: Path, pre: str, **more: Any) -> GgufFile:
    """All bytes; merges that would join up to four digits; special and user-defined tokens."""
    tokens = [*byte_alphabet(), "12", "123", "1234", "<|im_end|>", "<b>", "<tool>"]
    metadata = {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": pre,
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__token_type": [1] * 259 + [3, 3, 4],
        "tokenizer__ggml__merges": ["1 2", "12 3", "123 4"],
        "tokenizer__ggml__bos_token_id": 260,
        **more,
    }
    return GgufFile(write_gguf(path / "t.gguf", "llama", {}, **metadata))


@pytest.mark.parametrize(
    "pre, pieces, starts_with_bos",
    [
        ("smollm", ["1", "2", "3", "4"], False),
        ("qwen2", ["1", "2", "3", "4"], False),
        ("llama-bpe", ["123", "4"], True),
        ("gpt-2", ["1234"], False),
    ],
)
def test_pre_tokenizers_split_digits_each_in_its_way(
    tmp_path: Path, pre: str, pieces: list[str], starts_with_bos: bool
) -> None:
    pytest.importorskip("gguf")
    t = tokenizer_from_gguf(gguf_file(tmp_path, pre))
    assert t is not None
    ids = t.encode("1234")
    assert [t.decode([i]) for i in ids] == pieces
    assert t.encode("1234", add_special=True) == ([260] if starts_with_bos else []) + ids
    assert t.encode("<|im_end|><tool>") == [259, 261]
    assert t.decode([259, 261]) == "<tool>"
    assert t.eos_token_ids == (259,)  # a control token of that name ends an answer
    assert t.bos_token_id == 260


def test_gguf_tokenizers_that_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for key, value, words in (
        ("pre", "deepseek-llm", "tokenizer.ggml.pre: expected smollm, .* found 'deepseek-llm'"),
        ("model", "llama", "tokenizer.ggml.model: expected 'gpt2' .* found 'llama'"),
    ):
        file = gguf_file(tmp_path, "smollm")
        file.metadata[f"tokenizer.ggml.{key}"] = value
        with pytest.raises(UsageError, match=words):
            tokenizer_from_gguf(file)
    for key, value in (
        ("merges", ["no such pieces at all"]),
        ("merges", ["q zzz"]),
        ("token_type", [1]),
        ("token_type", ["1"] * 262),
        ("token_type", 1),
        ("bos_token_id", -1),
        ("tokens", "text"),
        ("eos_token_id", 10**6),
    ):
        file = gguf_file(tmp_path, "smollm")
        file.metadata[f"tokenizer.ggml.{key}"] = value
        with pytest.raises(RazorError, match=r"t\.gguf") as e:
            tokenizer_from_gguf(file)
        assert "\n" not in str(e.value)
    file = gguf_file(tmp_path, "smollm")
    del file.metadata["tokenizer.ggml.model"]
    assert tokenizer_from_gguf(file) is None
