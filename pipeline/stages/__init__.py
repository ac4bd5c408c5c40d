"""The stages: each reads artifacts, lets `batching` do the work, and commits an artifact."""
