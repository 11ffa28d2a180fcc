"""``TopModelMixin``: what every model class has (only what the builder calls is doubled)."""

from typing import Any


class TopModelMixin:
    def prepare_inputs(self, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError
