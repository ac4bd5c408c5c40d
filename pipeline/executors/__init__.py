"""Who runs the units of a stage: this process, other processes of this machine, or actors of a Ray cluster."""
