from .mode import QuantAlgo, QuantMode
from .quantize import quantize

__all__ = ["QuantAlgo", "QuantMode", "quantize"]
