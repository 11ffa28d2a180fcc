"""A task makes samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from trt_razor.evaluation.registry import Registry
from trt_razor.evaluation.samples import Sample
from trt_razor.models.tokenizer import Tokenizer


class Task(Protocol):
    """Options are the fields of the class; ``name`` is set by the registry."""

    name: str

    def samples(self, tokenizer: Tokenizer, seed: int) -> Iterator[Sample]:
        """All samples, those of one context next to each other.

        Args:
            tokenizer: of the model; its chat template if it has one.
            seed: of the run. The same options and seed give the same samples, token for token.
        """
        ...

    def count(self) -> int:
        """Number of samples, for the progress bar, without making them."""
        ...


TASKS: Registry[Task] = Registry("task", "trt_razor.evaluation.tasks")
