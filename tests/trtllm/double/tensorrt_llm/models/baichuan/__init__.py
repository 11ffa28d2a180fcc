"""Configuration and network of one family."""
