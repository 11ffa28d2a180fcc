"""The model that the server tests serve: tiny, but with texts that matter.

Every byte is a token, so a character outside ASCII is always split over tokens; the window is small,
so Razor drops most of what it reads; ``<poison>`` is a token whose embedding is NaN: a request that
reads it fails in the middle of passes that others share.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import RETRIEVAL, TinyModel, write_model

from trt_razor.engine import Engine
from trt_razor.errors import RazorError
from trt_razor.generate import Event, Generator, SamplingParams
from trt_razor.headmap import HeadMap

POISON = "<poison>"
POISON_ID = 258
EOS_ID = 257
MAX_SEQ_LEN = 4096
SLOTS = 4
CHUNK = 8  # so small that a long prompt takes some hundred steps


def make(folder: Path) -> TinyModel:
    """The Hugging Face folder and its head map."""
    from safetensors.numpy import load_file, save_file

    spec = write_model(folder / "tiny-llama", max_position_embeddings=2 * MAX_SEQ_LEN)
    weights = folder / "tiny-llama" / "model.safetensors"
    tensors = {name: np.array(t) for name, t in load_file(weights).items()}
    tensors["model.embed_tokens.weight"][POISON_ID] = np.nan
    # Never among the likely tokens: nobody is poisoned by his own answer.
    tensors["lm_head.weight"][POISON_ID:] = 0
    save_file(tensors, weights)
    tokenizer = folder / "tiny-llama" / "tokenizer.json"
    data = json.loads(tokenizer.read_text())
    data["added_tokens"].append({**data["added_tokens"][-1], "id": POISON_ID, "content": POISON})
    tokenizer.write_text(json.dumps(data))
    heads = HeadMap(
        spec.name, spec.fingerprint(), 2, 2, RETRIEVAL, method="test", source="chosen by hand"
    )
    heads.save(folder / "heads.json")
    return TinyModel(folder / "tiny-llama", spec, folder / "heads.json")


def build(folder: Path) -> Engine:
    """The Razor engine for ONNX Runtime."""
    model = make(folder)
    return model.build(
        folder / "engine",
        max_seq_len=MAX_SEQ_LEN,
        max_batch_size=SLOTS,
        prefill_chunk=CHUNK,
    )


@dataclass
class Expected:
    """What ``trt_razor.generate`` makes of one request, alone on one slot."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: str = ""
    logprobs: list[float] = field(default_factory=list)


class Reference:
    """The engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        tokenizer = engine.tokenizer()
        assert tokenizer is not None
        self.tokenizer = tokenizer
        self._generator = Generator(engine.open(1), CHUNK, tokenizer.eos_token_ids, tokenizer)

    def run(self, prompt: str | Sequence[int], **params: Any) -> Expected:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        expected = Expected(ids)

        def take(_: int, event: Event) -> None:
            if event.token is not None:
                expected.tokens.append(event.token)
            if event.logprob is not None:
                expected.logprobs.append(event.logprob)

        done = self._generator.run([ids], SamplingParams(**params), take)[0]
        if done.error is not None:
            raise RazorError(done.error)
        expected.text, expected.finished = done.text, done.finished
        return expected
