"""What is kept of a context: one file a method, each a dataclass of options that compresses."""
