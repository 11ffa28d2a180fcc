from .mode import QuantAlgo, QuantMode

__all__ = ["QuantAlgo", "QuantMode"]
