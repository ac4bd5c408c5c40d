"""How Prefect runs the pipeline: the flow, and the local service that serves it."""

# A second copy of every class would be imported under another name, and no `except` would catch its errors.
if __name__ != "hardbatch.flows":
    raise ImportError("import hardbatch.flows, not flows")
