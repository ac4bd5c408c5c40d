"""Embedding models: finding them, resolving their settings, running them."""
