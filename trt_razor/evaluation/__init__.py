"""How much of a model survives a smaller KV cache: tasks, methods, runs, reports.

* ``samples``: what a task asks: a context that is read, questions that come afterwards.
* ``tasks``: needle, passkey, perplexity, RULER, LongBench, InfiniteBench; one file each.
* ``methods``: what is kept of the context: Razor and the baselines at equal bytes; one file each.
* ``runners``: who computes: a Hugging Face model, or an engine.
* ``run``: samples × methods, resumable; ``report``: JSON, Markdown, pictures.

``trt-razor eval RUN.yaml`` is the way in; docs/fidelity.md says what came out.
"""
