"""TensorRT-LLM (TensorRT engines, releases 1.0 - 1.2): Razor attention in its network definitions.

What decides an engine
    ``release``        which TensorRT-LLM is here, and which caches for local heads it allows
    ``options``        ranks and sizes; the ``razor`` section of a config.json
    ``arguments``      what TensorRT-LLM's builder is told
    ``checks``         what cannot be built, refused before anything long starts
    ``ranks``          which KV heads a rank holds, in which order
    ``engine_config``  the plan: cache layers, windows, slots, fields of the plugin

Checkpoints
    ``model_config``   config.json from a model's shape, and back
    ``permute``        a checkpoint with its heads in another order
    ``checkpoint``     Hugging Face weights → rank files
    ``rank_files``     writes rank files
    ``rank_tensors``   tensors of rank files: names, shapes, what a rank holds
    ``rank_source``    reads rank files as one model
    ``source``         a TensorRT-LLM checkpoint, quantised or not
    ``quantized``      one with its heads in order, for other ranks

Building
    ``backend``        converts, builds, describes
    ``driver``         builds all ranks, each in a child
    ``build_rank``     the child
    ``models``         model classes for TensorRT-LLM's builder (imports tensorrt_llm)
    ``attention``      their attention layer (imports tensorrt_llm)
    ``engine_json``    finishes config.json of an engine
    ``runtime_fields`` checks it as TensorRT-LLM's runtime reads it

Running
    ``cache_settings`` what an engine says of its caches, and what they weigh
    ``runtime``        ranks, bindings, plugin and log of a process
    ``requests``       what goes into an executor, and what comes out
    ``executor``       runs an engine in TensorRT-LLM's executor
"""
