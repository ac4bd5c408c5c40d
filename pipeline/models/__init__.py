"""Embedding models: where they are, which one is meant, and running it."""
