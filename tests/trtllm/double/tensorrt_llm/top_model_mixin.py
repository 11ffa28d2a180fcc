"""``TopModelMixin``: what every model class has (only what the builder calls is doubled)."""

from typing import Any


class TopModelMixin:
    def prepare_inputs(self, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def default_plugin_config(cls, **kwargs: Any) -> Any:
        from .plugin import PluginConfig

        return PluginConfig()
