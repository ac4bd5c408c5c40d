"""How Prefect runs the pipeline: the flow, and the local service that serves it."""

if __name__ != "hardbatch.flows":  # a second copy of every class, which no `except` would know
    raise ImportError("import hardbatch.flows, not flows")
