"""The executor that a user names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from hardbatch.pipeline.errors import ConfigError
from hardbatch.pipeline.step import Executor, InlineExecutor

EXECUTORS = ("inline", "processes", "ray")


@contextmanager
def open_executor(
    name: str = "inline", num_workers: int | None = None, ray_address: str | None = None
) -> Iterator[Executor]:
    """Opens an executor; on leaving, its workers are ended. Artifacts do not depend on it.

    Args:
        name: `inline` (this process), `processes` of this machine, or `ray`.
        num_workers: The number of workers; by default one for each GPU, and without GPUs one for each node of Ray.
        ray_address: `HOST:PORT` of a Ray cluster, or `auto` on one of its nodes; by default a local instance is
            started.

    Raises:
        ConfigError: The executor is unknown, lacks a package or GPUs, or does not take one of the arguments.
    """
    if name not in EXECUTORS:
        raise ConfigError(f"--executor '{name}': is not an executor; choose one of {', '.join(EXECUTORS)}")
    if num_workers is not None and name == "inline":
        raise ConfigError("--workers: 'inline' works in this process alone; add --executor processes or ray")
    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"--workers {num_workers}: give at least 1")
    if ray_address is not None and name != "ray":
        raise ConfigError(f"--ray-address: '{name}' does not use Ray; add --executor ray, or leave it out")

    if name == "inline":
        yield InlineExecutor()
        return
    if name == "processes":
        from hardbatch.pipeline.executors.processes import ProcessExecutor, visible_gpus

        num_workers = num_workers or len(visible_gpus())
        if not num_workers:
            raise ConfigError("--executor processes: no GPU was found; give the number of processes with --workers")
        pool: ProcessExecutor | RayExecutor = ProcessExecutor(num_workers)
    else:
        from hardbatch.pipeline.executors.ray_actors import RayExecutor

        pool = RayExecutor(num_workers, ray_address)
    with closing(pool):
        yield pool
