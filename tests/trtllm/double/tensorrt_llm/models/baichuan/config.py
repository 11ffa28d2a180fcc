"""``BaichuanConfig``. Read: one field of its own; no RoPE base, which is always 10000."""

from __future__ import annotations

from typing import Any

from ..pretrained_config import PretrainedConfig


class BaichuanConfig(PretrainedConfig):
    def __init__(self, *, model_version: str | None = None, **kwargs: Any) -> None:
        self.model_version = model_version
        super().__init__(**kwargs)
        if self.model_version is None:
            generation = 1 if self.vocab_size == 64000 else 2
            size = "7b" if self.num_attention_heads == 32 else "13b"
            self.model_version = f"v{generation}_{size}"
