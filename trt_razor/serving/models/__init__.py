"""Python models of a repository. ``triton_python_backend_utils`` exists only inside a server."""
