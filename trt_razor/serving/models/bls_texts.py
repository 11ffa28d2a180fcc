"""The text of ``tensorrt_llm_bls``'s responses: decoded here, or taken from the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trt_razor.errors import RazorError
from trt_razor.serving.models import tensors
from trt_razor.serving.models.answers import Answers


def _numpy(outputs: Mapping[str, Any], name: str) -> np.ndarray:
    values: np.ndarray = outputs[name].as_numpy()
    return values


def index_of(outputs: Mapping[str, Any], name: str) -> int:
    return int(_numpy(outputs, name).reshape(-1)[0]) if name in outputs else 0


class DecodedTexts:
    """Texts decoded here from the engine's ids."""

    needs = ("output_ids", "sequence_length")

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def of(self, outputs: Mapping[str, Any], row: int, number: int) -> Any:
        """The tensor ``text_output`` of a response, or None if its sequence is over."""
        for name in self.needs:
            if name not in outputs:
                raise RazorError(f"tensorrt_llm: no {name} in its response")
        ids, lengths = (_numpy(outputs, n) for n in self.needs)
        found = self._answers.add(ids, lengths, row, number)
        return None if found is None else tensors.tensor("text_output", tensors.strings(found))

    @property
    def stopped(self) -> bool:
        """Whether stop words ended all answers."""
        return self._answers.stopped

    def left(self) -> list[tuple[int, int, str]]:
        """(row, number, text) of what the answers still hold at the end."""
        return self._answers.finish()


class EngineTexts:
    """Texts that the engine gives, stop texts cut already."""

    needs = ("text_output",)
    stopped = False

    def __init__(self, accumulate: bool) -> None:
        self._so_far: dict[tuple[int, int], bytes] | None = {} if accumulate else None

    def of(self, outputs: Mapping[str, Any], row: int, number: int) -> Any:
        """The tensor ``text_output`` of a response."""
        if "text_output" not in outputs:
            raise RazorError("tensorrt_llm: no text_output in its response")
        if self._so_far is None:
            return tensors.tensor("text_output", _numpy(outputs, "text_output").copy())
        values = _numpy(outputs, "text_output")
        text = self._so_far.get((row, number), b"") + b"".join(values.reshape(-1))
        self._so_far[row, number] = text
        whole = np.empty(values.shape, object)
        whole[...] = text
        return tensors.tensor("text_output", whole)

    def left(self) -> list[tuple[int, int, str]]:
        """Nothing: the engine holds nothing back at the end."""
        return []


Texts = DecodedTexts | EngineTexts


def repeated(result: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A sequence's last response once more, for text that came out at its end: no new tokens."""
    again = {**result, "text_output": tensors.tensor("text_output", tensors.strings([text]))}
    if "num_output_tokens" in again:
        again["num_output_tokens"] = tensors.tensor("num_output_tokens", np.zeros((1, 1), np.int32))
    if "output_log_probs" in again:
        empty = _numpy(again, "output_log_probs")[..., :0]
        again["output_log_probs"] = tensors.tensor("output_log_probs", empty)
    return again


def joined(responses: Sequence[Mapping[str, Any]]) -> list[Any]:
    """One response out of one per row, in the order of the rows."""
    if not responses:
        raise RazorError("tensorrt_llm: ended without an answer")
    if len(responses) == 1:
        return list(responses[0].values())
    result = []
    for name in responses[0]:
        parts = [_numpy(r, name) for r in responses if name in r]
        shape = np.max([p.shape[1:] for p in parts], axis=0, initial=0)
        padded = [np.pad(p, _room(p.shape, shape), constant_values=-1) for p in parts]
        result.append(tensors.tensor(name, np.concatenate(padded)))
    return result


def _room(shape: Sequence[int], wanted: np.ndarray) -> list[tuple[int, int]]:
    return [(0, 0), *((0, int(n) - have) for n, have in zip(wanted, shape[1:], strict=True))]
