"""Double of TensorRT-LLM 1.0.0, 1.1.0, 1.2.1: what defining and building networks takes (doubles.py).

The real package loads its libraries and registers its plugins when imported; nothing here.
"""

from ._common import default_net, default_trtnet, net_guard
from .builder import BuildConfig, Engine, EngineConfig, build
from .functional import Tensor
from .mapping import Mapping
from .module import Module
from .network import Network
from .parameter import Parameter
from .version import __version__

__all__ = [
    "BuildConfig",
    "Engine",
    "EngineConfig",
    "Mapping",
    "Module",
    "Network",
    "Parameter",
    "Tensor",
    "__version__",
    "build",
    "default_net",
    "default_trtnet",
    "net_guard",
]
