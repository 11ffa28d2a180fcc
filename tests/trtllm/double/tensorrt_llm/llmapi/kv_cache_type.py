"""Where 1.2 has ``KVCacheType`` (inferred, see ``tensorrt_llm.bindings``)."""

from .._release import RELEASE
from ._kv_cache_type import KVCacheType as KVCacheType

if RELEASE < (1, 2):
    raise ModuleNotFoundError("No module named 'tensorrt_llm.llmapi.kv_cache_type'")
