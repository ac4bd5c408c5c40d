"""From a corpus of (query, document) pairs to hard, equal-size, false-negative-masked batches."""
