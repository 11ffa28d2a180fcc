"""Weights of the layer in use, for loops that go through the model layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from trt_razor.models.checkpoint import WeightSource


class LayerMemo:
    """Weights of the layer in use, so that several probes cost one reading of the file."""

    def __init__(self, checkpoint: WeightSource) -> None:
        self.spec = checkpoint.spec
        self._checkpoint = checkpoint
        self._layer = ""
        self._held: dict[str, np.ndarray[Any, Any]] = {}

    def tensor(self, name: str) -> np.ndarray[Any, Any]:
        layer = ".".join(name.split(".")[:3])  # model.layers.<i>
        if layer != self._layer:
            self._held.clear()
            self._layer = layer
        if name not in self._held:
            self._held[name] = self._checkpoint.tensor(name)
        return self._held[name]
