"""Trains retrieval models on shards."""

if __name__ != "hardbatch.trainer":  # a second copy of every class, which no `except` would know
    raise ImportError("import hardbatch.trainer, not trainer")
