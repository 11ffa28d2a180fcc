"""What a model still predicts: natural text that goes on after a context was compressed.

The run measures the continuation's negative log likelihood, and the KL divergence and agreement to
the dense model. Nothing of the continuation is known when the context is compressed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from trt_razor.errors import UsageError
from trt_razor.evaluation.haystack import as_tuples, check_lengths
from trt_razor.evaluation.samples import Sample
from trt_razor.evaluation.tasks.interface import TASKS
from trt_razor.evaluation.text import check_text, load_text
from trt_razor.models.tokenizer import Tokenizer


@TASKS.add("perplexity")
@dataclass(frozen=True)
class Perplexity:
    """Windows of a text, cut into a context and its continuation.

    Windows of one length never overlap; which ones are taken depends on the seed.

    Attributes:
        lengths: tokens of a context, with the token that starts a text if the model has one.
        windows: samples per length.
        continuation: tokens after the context.
        text, part: where the windows come from, see ``evaluation.text``.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    windows: int = 4
    continuation: int = 64
    text: str = "stdlib"
    part: str = "test"

    def __post_init__(self) -> None:
        as_tuples(self, "lengths")
        check_lengths(self.lengths)
        for name in ("windows", "continuation"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"{name}: expected at least 1, found {value!r}")
        check_text(self.text, self.part)

    def count(self) -> int:
        return len(self.lengths) * self.windows

    def samples(self, tokenizer: Tokenizer, seed: int) -> Iterator[Sample]:
        """Raises UsageError, before the first sample, if the text is too short for the windows."""
        text = load_text(self.text, self.part)
        starts = tuple(tokenizer.encode("", add_special=True))
        tokens = tokenizer.encode(
            "\n\n".join(" ".join(p) for p in text.paragraphs), parse_special=False
        )
        for length in self.lengths:
            need = length - len(starts) + self.continuation
            have = len(tokens) // need if length > len(starts) else 0
            if have < self.windows:
                raise UsageError(
                    f"text '{self.text}', part '{self.part}': {len(tokens)} tokens give {have} "
                    f"windows of {length} + {self.continuation}, expected {self.windows}; ask for "
                    "fewer windows or shorter lengths, or give a longer text"
                )
        for length in self.lengths:
            body = length - len(starts)
            step = body + self.continuation
            rng = random.Random(f"perplexity {self.part} {seed} {length}")
            slack = rng.randrange(len(tokens) % step + 1)
            chosen = sorted(rng.sample(range(len(tokens) // step), self.windows))
            for number, window in enumerate(chosen):
                at = slack + window * step
                yield Sample(
                    id=f"{length}-{number}",
                    context_id=f"{length}-{number}",
                    group=str(length),
                    context=(*starts, *tokens[at : at + body]),
                    continuation=tuple(tokens[at + body : at + step]),
                    meta={"length": length, "offset": at, "seed": seed, **text.describe()},
                )
