"""What is asked: one file a task, each a dataclass of options that makes samples."""
