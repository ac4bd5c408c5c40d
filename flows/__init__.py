"""How Prefect runs the pipeline: the flow, and the local service that serves it."""
