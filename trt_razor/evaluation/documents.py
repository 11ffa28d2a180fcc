"""A document between an instruction and a question, as tokens; cut in the middle if it is too long."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from trt_razor.errors import UsageError
from trt_razor.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Around:
    """What stands around a document.

    Attributes:
        opening: ids before it: special tokens, the user's header, the instruction.
        prompt: ids after it: the question, to where the answer begins.
    """

    opening: tuple[int, ...]
    prompt: tuple[int, ...]


def around(
    tokenizer: Tokenizer, before: str, after: str, lead: str = "", chat: bool = True
) -> Around:
    """One user message ``before`` + document + ``after``, and an answer that begins with ``lead``.

    Texts come from files of strangers: control tokens spelled out in them stay plain characters.

    Args:
        chat: use the model's chat template if it has one; False for tasks that are plain text that
            goes on.

    Raises:
        UsageError: the chat template fails.
    """
    head, tail = "", ""
    templated = chat and tokenizer.chat_template is not None
    if templated:
        mark = f"\ue000{secrets.token_hex(8)}\ue001"  # no template holds it by accident
        parts = tokenizer.chat([{"role": "user", "content": mark}]).split(mark)
        if len(parts) != 2:
            raise UsageError(
                f"{tokenizer.where}: the chat template shows a message {len(parts) - 1} times, "
                f"expected once"
            )
        head, tail = parts
        lead = lead.lstrip()  # it begins a message
    return Around(
        (*tokenizer.encode(head, add_special=not templated), *text_ids(tokenizer, before)),
        (*text_ids(tokenizer, after), *tokenizer.encode(tail), *text_ids(tokenizer, lead)),
    )


def text_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a text from outside, nothing added."""
    return tuple(tokenizer.encode(text, parse_special=False)) if text else ()


def cut_middle(around: Around, document: tuple[int, ...], max_length: int) -> tuple[int, ...]:
    """The document without its middle, so that everything is ``max_length`` tokens or fewer.

    Half of them are the beginning of opening and document, half the end of document and prompt,
    which is how LongBench and InfiniteBench cut.

    Raises:
        UsageError: opening and prompt alone are longer.
    """
    opening, prompt = len(around.opening), len(around.prompt)
    room = max_length - opening - prompt
    if room < 1:
        raise UsageError(
            f"max_length {max_length}: expected more than the {opening + prompt} tokens of the "
            f"instruction and the question"
        )
    if len(document) <= room:
        return document
    front = min(max(max_length // 2 - opening, 0), room)
    back = room - front
    return document[:front] + document[len(document) - back :]
