"""From a corpus of (query, document) pairs to hard, equal-size, false-negative-masked batches."""

if __name__ != "hardbatch.pipeline":  # a second copy of every class, which no `except` would know
    raise ImportError("import hardbatch.pipeline, not pipeline")
