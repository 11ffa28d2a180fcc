"""Needle in a haystack: numbers hidden in a long text, asked for when the text is compressed.

Depth × length grid of single needles (G. Kamradt's test of 2023), several needles in one context,
several questions in one conversation, or one question for several numbers. The model answers
"The magic number for X is" …: how it phrases an answer is not what is measured.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trt_razor.errors import UsageError, did_you_mean
from trt_razor.evaluation.haystack import SentenceEncoder, as_tuples, check_places, hide
from trt_razor.evaluation.prompts import Ask, frame, turns
from trt_razor.evaluation.samples import Sample
from trt_razor.evaluation.tasks.interface import TASKS
from trt_razor.evaluation.text import Text, check_text, load_text
from trt_razor.models.tokenizer import Tokenizer

INSTRUCTION = "You read a document and answer a question about it."
MODES = ("single", "turns", "together")

# Different names for the two parts: nothing that was tuned on one is met again in the other.
_CALIBRATION = (
    "Lisbon Oslo Quito Cairo Perth Turin Lyon Accra Osaka Lima Rome Tokyo Dublin Vienna Boston "
    "Madrid Prague Athens Berlin Bergen Bogota Brest Cadiz Calgary Canberra Chicago Cologne "
    "Cordoba Cork Dallas Damascus Darwin Delhi Denver Detroit Dresden Durban Edinburgh Florence "
    "Fresno Geneva Genoa Ghent Glasgow Granada Hamburg Havana Helsinki Houston Istanbul Jakarta "
    "Kabul Kampala Karachi Kingston Krakow Kyoto Lagos Lahore Leeds Leipzig Lille Liverpool "
    "London Luanda Lusaka Malaga Manila"
)
_TEST = (
    "Memphis Miami Milan Melbourne Montreal Moscow Mumbai Munich Nagoya Nairobi Nantes Naples "
    "Nashville Nottingham Ottawa Oxford Padua Palermo Panama Paris Phoenix Pisa Porto Portland "
    "Pretoria Reims Riga Salzburg Santiago Seattle Seoul Seville Shanghai Sheffield Singapore "
    "Sofia Stockholm Sydney Tallinn Tampa Tehran Toledo Toronto Tunis Utrecht Valencia Vancouver "
    "Venice Verona Warsaw Wellington York Zurich Adelaide Aberdeen Amsterdam Baghdad Bangkok "
    "Barcelona Basel Belfast Belgrade Bologna Brisbane Bristol Brussels Budapest Cambridge"
)
NAMES = {"calibration": _CALIBRATION.split(), "test": _TEST.split()}


@dataclass(frozen=True)
class Wording:
    """How a needle is put and asked for: {} is a name, or several.

    Heads that find one wording need not find another: report more than one.
    """

    fact: str
    question: str
    lead: str
    questions: str
    leads: str


WORDINGS = {
    "number": Wording(
        "The magic number for {} is",
        "What is the magic number for {}?",
        "The magic number for {} is",
        "What are the magic numbers for {}?",
        "The magic numbers for {} are",
    ),
    "code": Wording(
        "The secret code of the {} office is",
        "What is the secret code of the {} office?",
        "The secret code of the {} office is",
        "What are the secret codes of the {} offices?",
        "The secret codes of the {} offices are",
    ),
    "printer": Wording(
        "The printer on the {} floor has the serial number",
        "Which serial number does the printer on the {} floor have?",
        "The printer on the {} floor has the serial number",
        "Which serial numbers do the printers on the {} floors have?",
        "The printers on the {} floors have the serial numbers",
    ),
    "members": Wording(
        "Last year the chess club of {} had exactly",
        "How many members did the chess club of {} have last year?",
        "Last year the chess club of {} had exactly",
        "How many members did the chess clubs of {} have last year?",
        "Last year the chess clubs of {} had exactly",
    ),
    "room": Wording(
        "The key to the house in {} is kept in locker",
        "In which locker is the key to the house in {} kept?",
        "The key to the house in {} is kept in locker",
        "In which lockers are the keys to the houses in {} kept?",
        "The keys to the houses in {} are kept in lockers",
    ),
}

TUNING_WORDINGS = ("number", "code", "printer")
"""Wordings that heads may be chosen with."""

HELD_OUT_WORDINGS = ("members", "room")
"""Wordings that nothing may be tuned on. Heads chosen on one wording may find only that one: a
wording that no choice has seen is the only test of that, as a test text is of tuning on texts."""


@TASKS.add("needle")
@dataclass(frozen=True)
class Needle:
    """Numbers hidden in a text.

    Attributes:
        lengths: tokens of a context, from its first special token to the end of its text.
        trials: samples per length.
        needles: numbers hidden in each context.
        questions: how many of them are asked; all of them if None.
        mode: "single": each question is a sample of its own about the same context, which is read
            once; "turns": asked one after another in one conversation; "together": one question
            for all of them.
        depths: places of the needles, 0 (start) to 1 (end), given to the needles in turn, so that
            every one is met equally often; at random if empty.
        depth_range: where random places lie.
        wording: of the needles, a name in ``WORDINGS``, or several that contexts have in turn.
        text, part: the haystack, see ``evaluation.text``.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    trials: int = 20
    needles: int = 1
    questions: int | None = None
    mode: str = "single"
    depths: tuple[float, ...] = ()
    depth_range: tuple[float, float] = (0.0, 1.0)
    wording: str | tuple[str, ...] = "number"
    text: str = "python"
    part: str = "test"

    def __post_init__(self) -> None:
        as_tuples(self, "lengths", "depths", "depth_range")
        check_places(self.lengths, self.trials, self.depths, self.depth_range)
        check_text(self.text, self.part)
        if self.mode not in MODES:
            raise UsageError(f"mode '{self.mode}': {did_you_mean(str(self.mode), MODES)}")
        for wording in self.wordings or ("",):
            if wording not in WORDINGS:
                raise UsageError(f"wording '{wording}': {did_you_mean(str(wording), WORDINGS)}")
        most = len(NAMES[self.part])
        if not 1 <= self.needles <= most:
            raise UsageError(f"needles: expected 1 .. {most}, found {self.needles}")
        if self.questions is not None and not 1 <= self.questions <= self.needles:
            raise UsageError(
                f"questions: expected 1 .. needles ({self.needles}), found {self.questions}"
            )

    @property
    def wordings(self) -> tuple[str, ...]:
        return (self.wording,) if isinstance(self.wording, str) else tuple(self.wording)

    def count(self) -> int:
        return len(self.lengths) * self.trials

    def samples(self, tokenizer: Tokenizer, seed: int) -> Iterator[Sample]:
        text = load_text(self.text, self.part)
        encode = SentenceEncoder(tokenizer)
        asked = self.questions or self.needles
        per_context = asked if self.mode == "single" else 1
        for length in self.lengths:
            for trial in range(0, self.trials, per_context):
                wanted = min(per_context, self.trials - trial)
                index = trial // per_context
                yield from self._context(tokenizer, encode, text, seed, length, index, wanted)

    def _context(
        self,
        tokenizer: Tokenizer,
        encode: SentenceEncoder,
        text: Text,
        seed: int,
        length: int,
        index: int,
        wanted: int,
    ) -> Iterator[Sample]:
        """The samples of one context; ``wanted``: how many of its questions a "single" asks."""
        rng = random.Random(f"needle {self.part} {seed} {length} {index}")
        names = rng.sample(NAMES[self.part], self.needles)
        values = [str(v) for v in rng.sample(range(10000, 100000), self.needles)]
        start = rng.randrange(len(text.sentences))
        low, high = self.depth_range
        depths = [rng.uniform(low, high) for _ in names]
        order = rng.sample(range(self.needles), self.questions or self.needles)
        if self.depths:
            # The asked needles take the places in turn, also over contexts; the others follow.
            rest = [i for i in range(self.needles) if i not in order]
            for i, needle in enumerate([*order, *rest]):
                depths[needle] = self.depths[(index * len(order) + i) % len(self.depths)]
        wording = self.wordings[index % len(self.wordings)]
        say = WORDINGS[wording]
        facts = [f"{say.fact.format(n)} {v}." for n, v in zip(names, values, strict=True)]
        filler = itertools.chain(text.sentences[start:], text.sentences[:start])

        asks = [_ask(say, [names[i]], [values[i]]) for i in order]
        if self.mode == "together":
            asks = [_ask(say, [names[i] for i in order], [values[i] for i in order])]
        frames = [frame(tokenizer, INSTRUCTION, asks)]
        if self.mode == "single":
            frames = [frame(tokenizer, INSTRUCTION, [a]) for a in asks[:wanted]]
        hidden = hide(encode, frames[0].opening, length, filler, facts, depths)

        context_id = f"{length}-{index}"
        for number, (f, needle) in enumerate(zip(frames, order, strict=False)):
            shown = [needle] if self.mode == "single" else order
            meta: dict[str, Any] = {
                "length": length,
                "wording": wording,
                # A picture's depth is one number: a sample about several needles has none.
                **({"depth": round(depths[needle], 4)} if len(shown) == 1 else {}),
                "needle": needle,
                "needles": self.needles,
                "positions": [hidden.positions[i] for i in shown],
                "depths": [round(depths[i], 4) for i in shown],
                "names": [names[i] for i in shown],
                "seed": seed,
                **text.describe(),
            }
            mine = [asks[number]] if self.mode == "single" else asks
            yield Sample(
                id=f"{context_id}-{number}",
                context_id=context_id,
                group=str(length),
                context=hidden.ids,
                turns=turns(f, mine),
                meta=meta,
            )


def _ask(say: Wording, names: list[str], values: list[str]) -> Ask:
    if len(names) == 1:
        return Ask(say.question.format(names[0]), say.lead.format(names[0]), values[0])
    who = _listed(names)
    return Ask(say.questions.format(who), say.leads.format(who), _listed(values))


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"
