"""TensorRT-LLM (TensorRT engines, releases 1.0 - 1.2): Razor attention in its network definitions."""
