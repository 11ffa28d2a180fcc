"""Shared by the tests of the evaluation."""

from __future__ import annotations

import pytest

from trt_razor.models.checkpoint import Checkpoint, open_checkpoint
from trt_razor.models.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    """The real SmolLM2-135M; a test that uses it is marked ``real``."""
    pytest.importorskip("gguf")
    return open_checkpoint("smollm2-135m", None)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Checkpoint) -> Tokenizer:
    return smollm2.tokenizer()
