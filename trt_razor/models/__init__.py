"""Models: what an architecture is (ModelSpec), the zoo of names, checkpoints and tokenizers."""
