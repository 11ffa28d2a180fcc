"""How a context and the questions after it become tokens: the model's chat template, or plain text."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trt_razor.errors import UsageError
from trt_razor.evaluation.samples import Turn
from trt_razor.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Ask:
    """One question of a conversation.

    Attributes:
        question: what the user says.
        lead: words the assistant's answer is made to begin with; the answer follows after a space.
            Empty: the model begins by itself.
        answer: the right answer, without a space before it.
    """

    question: str
    lead: str
    answer: str


@dataclass(frozen=True)
class Frame:
    """What stands around a context.

    Attributes:
        opening: ids before the context's text: special tokens, system and user header, instruction.
        prompts: for each question the ids from the end of the context, or of the answer before, to
            where its answer begins.
        answers: ids of each answer as the model writes it: with the space before it, if its
            tokenizer keeps one.
    """

    opening: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]


def frame(tokenizer: Tokenizer, instruction: str, asks: Sequence[Ask]) -> Frame:
    """A user gives an instruction, a context and a question, then asks again.

    With a chat template the context is the middle of the first user's message:
    ``instruction``, empty line, context, empty line, question. Without one the same is written as
    plain text with ``Question:`` and ``Answer:``.

    Raises:
        UsageError: the model's chat template fails.
    """
    if tokenizer.chat_template is None:
        return _plain(tokenizer, instruction, asks)
    # Marks no template can hold by accident; the text between two of them is one piece.
    mark = secrets.token_hex(8)
    here = f"\ue000{mark}\ue001"
    messages = [{"role": "user", "content": f"{instruction}\n\n{here}\n\n{asks[0].question}"}]
    opening, rest = _around(tokenizer, messages, here)
    prompts = [rest + asks[0].lead]
    for before, ask in itertools.pairwise(asks):
        messages = [
            {"role": "user", "content": before.question},
            {"role": "assistant", "content": f"{before.lead}{here}."},
            {"role": "user", "content": ask.question},
        ]
        prompts.append(_around(tokenizer, messages, here)[1] + ask.lead)
    return Frame(
        tuple(tokenizer.encode(opening)),
        tuple(tuple(tokenizer.encode(p)) for p in prompts),
        tuple(answer_ids(tokenizer, a.lead, a.answer) for a in asks),
    )


def _around(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], here: str
) -> tuple[str, str]:
    before, found, after = tokenizer.chat(messages).partition(here)
    if not found or here in after:
        raise UsageError(
            f"{tokenizer.where}: the chat template does not write a message once and whole; "
            "this task cannot be asked with it"
        )
    return before, after


def _plain(tokenizer: Tokenizer, instruction: str, asks: Sequence[Ask]) -> Frame:
    prompts = [
        f"{'.' if i else ''}\n\nQuestion: {a.question}\nAnswer: {a.lead}".rstrip()
        for i, a in enumerate(asks)
    ]
    return Frame(
        tuple(tokenizer.encode(f"{instruction}\n\n", add_special=True)),
        tuple(tuple(tokenizer.encode(p)) for p in prompts),
        tuple(answer_ids(tokenizer, a.lead or "Answer:", a.answer) for a in asks),
    )


def answer_ids(tokenizer: Tokenizer, lead: str, answer: str) -> tuple[int, ...]:
    """Ids of an answer that follows ``lead`` after a space (or begins a message: ``lead`` empty).

    They are what encoding both together adds, so that they are the model's own way to write it.
    """
    if not lead:
        return tuple(tokenizer.encode(answer))
    before, both = tokenizer.encode(lead), tokenizer.encode(f"{lead} {answer}")
    if both[: len(before)] == before:
        return tuple(both[len(before) :])
    return tuple(tokenizer.encode(f" {answer}"))  # a tokenizer that joins over the gap


def turns(f: Frame, asks: Sequence[Ask]) -> tuple[Turn, ...]:
    """The questions of a frame with their answers, to be forced or generated."""
    return tuple(
        Turn(
            prompt=prompt,
            references=(ask.answer,),
            answer=answer,
            max_new_tokens=len(answer) + 2,
            metric="contains",
        )
        for prompt, ask, answer in zip(f.prompts, asks, f.answers, strict=True)
    )
