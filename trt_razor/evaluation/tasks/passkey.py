"""Passkey: five digits inside filler that repeats itself, the easiest test of a long context.

The task of Mohtashami and Jaggi (arXiv 2305.16300), with filler of our own. Repetition is unlike
natural text: every dropped token has twins, so this says less about compression than ``needle``.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from trt_razor.evaluation.haystack import SentenceEncoder, as_tuples, check_places, hide
from trt_razor.evaluation.prompts import Ask, frame, turns
from trt_razor.evaluation.samples import Sample
from trt_razor.evaluation.tasks.interface import TASKS
from trt_razor.evaluation.text import check_part
from trt_razor.models.tokenizer import Tokenizer

INSTRUCTION = "A pass key is hidden in a long and dull text. Find it and remember it."
FILLER = (
    "The river runs past the mill.",
    "The wheel turns and the stones grind.",
    "Carts come up the road and carts go down again.",
    "Nobody is in a hurry here.",
    "The miller counts his sacks and sings to himself.",
    "Rain is good for the wheel and bad for the roof.",
    "The day goes by and evening comes to the valley.",
    "Then it is morning and the work begins anew.",
)


@TASKS.add("passkey")
@dataclass(frozen=True)
class Passkey:
    """One key in repeated sentences; each sample is a context of its own.

    Attributes:
        lengths: tokens of a context.
        trials: samples per length.
        depths: places of the key, 0 (start) to 1 (end), in turn; at random if empty.
        depth_range: where random places lie.
        part: "calibration" or "test": their keys are drawn apart.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    trials: int = 20
    depths: tuple[float, ...] = ()
    depth_range: tuple[float, float] = (0.0, 1.0)
    part: str = "test"

    def __post_init__(self) -> None:
        as_tuples(self, "lengths", "depths", "depth_range")
        check_places(self.lengths, self.trials, self.depths, self.depth_range)
        check_part(self.part)

    def count(self) -> int:
        return len(self.lengths) * self.trials

    def samples(self, tokenizer: Tokenizer, seed: int) -> Iterator[Sample]:
        encode = SentenceEncoder(tokenizer)
        for length in self.lengths:
            for trial in range(self.trials):
                rng = random.Random(f"passkey {self.part} {seed} {length} {trial}")
                key, start = str(rng.randrange(10000, 100000)), rng.randrange(len(FILLER))
                depth = rng.uniform(*self.depth_range)
                if self.depths:
                    depth = self.depths[trial % len(self.depths)]
                ask = Ask("What is the pass key?", "The pass key is", key)
                f = frame(tokenizer, INSTRUCTION, [ask])
                filler = itertools.islice(itertools.cycle(FILLER), start, None)
                fact = f"The pass key is {key}. Remember it: {key} is the pass key."
                hidden = hide(encode, f.opening, length, filler, [fact], [depth])
                yield Sample(
                    id=f"{length}-{trial}",
                    context_id=f"{length}-{trial}",
                    group=str(length),
                    context=hidden.ids,
                    turns=turns(f, [ask]),
                    meta={
                        "length": length,
                        "depth": round(depth, 4),
                        "positions": list(hidden.positions),
                        "seed": seed,
                        "part": self.part,
                    },
                )
