"""``KVCacheType`` of the compiled bindings (1.0, 1.1).

Later versions take it from ``tensorrt_llm.llmapi.kv_cache_type`` (read, in a version near 1.2; which
release moved it is inferred), so code for all releases must not need either.
"""

from .._release import RELEASE

if RELEASE < (1, 2):
    from ..llmapi._kv_cache_type import KVCacheType as KVCacheType
