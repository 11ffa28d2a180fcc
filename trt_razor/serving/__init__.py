"""Serving with Triton Inference Server: model repositories and the models inside them."""
