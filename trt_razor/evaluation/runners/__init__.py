"""Who computes: ``hf`` (a transformers model, every method) or ``engine`` (a built engine, as it is)."""
