"""Only ``kv_cache_type`` is doubled."""
