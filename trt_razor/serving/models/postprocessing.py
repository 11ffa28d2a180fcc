"""Triton model ``postprocessing``: ids to text, without memory of earlier requests.

A character or a leading space that is split over two responses of a stream cannot be put together
here; ``tensorrt_llm_bls``, and the text that our own engine model gives, do that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.serving.models import tensors


def decode(
    tokenizer: Tokenizer, ids: np.ndarray, lengths: np.ndarray, skip_special: bool
) -> list[str]:
    """Texts of all sequences, in order.

    Args:
        ids: [batch, beams, tokens], what is past a sequence's length is not looked at.
        lengths: [batch, beams].

    Raises:
        UsageError: shapes or lengths that do not fit.
    """
    if ids.ndim != 3:
        raise UsageError(f"TOKENS_BATCH: expected [batch, beams, tokens], found {list(ids.shape)}")
    if lengths.shape != ids.shape[:2]:
        raise UsageError(
            f"SEQUENCE_LENGTH: expected {list(ids.shape[:2])}, found {list(lengths.shape)}"
        )
    most = ids.shape[2]
    if lengths.size and not 0 <= lengths.min() <= lengths.max() <= most:
        raise UsageError(
            f"SEQUENCE_LENGTH: expected 0..{most}, found {lengths.min()}..{lengths.max()}"
        )
    flat = ids.reshape(lengths.size, most)
    return [
        tokenizer.decode(row[:n].tolist(), skip_special)
        for row, n in zip(flat, lengths.ravel(), strict=True)
    ]


class TritonPythonModel:
    """The model as Triton runs it."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the tokenizer; the public parameters are ``tokenizer_dir``, ``skip_special_tokens``."""
        try:
            self._skip = tensors.flag(tensors.parameters(args), "skip_special_tokens", True)
            self._tokenizer = tensors.load_tokenizer(args)
        except RazorError as e:
            raise tensors.load_failure(e) from None

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request; a bad request fails alone."""
        return [self._answer(r) for r in requests]

    def _answer(self, request: Any) -> Any:
        try:
            found = tensors.arrays(request, ("TOKENS_BATCH", "SEQUENCE_LENGTH"))
            for name in ("TOKENS_BATCH", "SEQUENCE_LENGTH"):
                if name not in found:
                    raise UsageError(f"{name}: required, but not in the request")
            ids, lengths = found["TOKENS_BATCH"], found["SEQUENCE_LENGTH"]
            texts = decode(self._tokenizer, ids, lengths, self._skip)
            # 1-D although the model has a batch axis: so does the public one, and clients read [0].
            output = tensors.tensor("OUTPUT", tensors.strings(texts))
            return tensors.triton().InferenceResponse(output_tensors=[output])
        except RazorError as e:
            return tensors.error_response(e)
        except Exception as e:
            tensors.log_unexpected("postprocessing", e)
            return tensors.error_response(e)
