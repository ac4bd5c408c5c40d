"""Workers that are actors of Ray, on this machine or on the nodes of a cluster. Only this module imports Ray.

Ray starts the actors and says when one is lost. What is done stands in the artifacts, on a file system that all
nodes share: nothing is kept in Ray.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hardbatch.pipeline.errors import ConfigError, WorkerError, first_line
from hardbatch.pipeline.executors.pool import Answer, Bench, Lost, Opening, PoolExecutor
from hardbatch.pipeline.executors.processes import num_cores, threads_of_each, visible_gpus
from hardbatch.pipeline.reproducible import make_reproducible
from hardbatch.pipeline.step import Progress, Unit, Work

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # actors without a GPU keep the environment
try:
    import ray
    from ray._private import ray_constants
    from ray.exceptions import RayError, RayTaskError
except ImportError:
    raise ConfigError('--executor ray: Ray is not installed; pip install "hardbatch[ray]"') from None

_STORE_BYTES = 100 * 2**20  # requests and answers are all that passes through Ray
_SECONDS_TO_DIE = 10.0
_SECONDS_TO_CONNECT = 10.0


class _Actor:
    """A bench in a process of Ray."""

    def __init__(self, threads: int) -> None:
        make_reproducible()  # before the work imports torch
        os.environ.update(OMP_NUM_THREADS=str(threads), RAYON_NUM_THREADS=str(threads))
        self._bench = Bench()

    def open(self, opening: Opening) -> Exception | None:
        return self._bench.open(opening)

    def run(self, unit: Unit, following: Unit | None) -> Exception | None:
        return self._bench.run(unit, following)


class RayWorker:
    """An actor, as the executor sees it; `answer` is what it has been asked for last."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.answer: Any = None

    def open(self, opening: Opening) -> None:
        """Asks the actor to open a work."""
        self.answer = self.actor.open.remote(opening)

    def run(self, unit: Unit, following: Unit | None) -> None:
        """Asks the actor to run a unit."""
        self.answer = self.actor.run.remote(unit, following)


class RayExecutor(PoolExecutor[RayWorker]):
    """Runs units on Ray actors, each with a GPU for work on CUDA, otherwise with its share of the cores.

    Ray is started or joined when the first units are run: a run that only looks artifacts up does without.

    Args:
        num_workers: The number of actors; by default that of the cluster's GPUs, or else of its nodes.
        address: `HOST:PORT` of a cluster, or `auto`; by default an instance of Ray is started on this machine.
    """

    has_teams = True

    def __init__(self, num_workers: int | None, address: str | None) -> None:
        if address is not None and address.startswith("ray://"):
            raise ConfigError("--ray-address: give HOST:PORT or auto on a node of the cluster, not a ray:// address")
        super().__init__(num_workers or 0)
        self._address = address
        self._is_open = self._is_owner = False

    def run(self, work: Work, units: Sequence[Unit], progress: Progress, device: str = "cpu") -> int:
        """Runs units; see `PoolExecutor`.

        Raises:
            ConfigError: No cluster answers at the address, or it has no GPU for work on CUDA.
        """
        if units and not self._is_open:
            self._open()
        return super().run(work, units, progress, device)

    def _open(self) -> None:
        if not ray.is_initialized():
            _connect(self._num_workers, self._address)
            self._is_owner = True
        self._is_open = True
        self._resources = ray.cluster_resources()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._num_workers = self._num_workers or int(self._resources.get("GPU", 0)) or len(nodes)

        # An actor must fit on a node: no share may be larger than the smallest of them.
        share = threads_of_each(self._num_workers, int(self._resources.get("CPU", 1)))
        self._threads = max(1, min(share, *(int(node.get("CPU", 0)) for node in nodes)))

    def close(self) -> None:
        """Ends all actors, and Ray in this process if this executor started or joined it."""
        super().close()
        if self._is_owner:
            ray.shutdown()
        self._is_open = self._is_owner = False

    def _start(self, number: int, device: str) -> RayWorker:
        on_gpu = device == "cuda"
        if on_gpu and not self._resources.get("GPU"):
            raise ConfigError("embed.device: 'cuda', but no node of the Ray cluster has a GPU; set it to cpu")
        actor = ray.remote(_Actor).options(
            num_cpus=0 if on_gpu else self._threads,
            num_gpus=1 if on_gpu else 0,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )
        return RayWorker(actor.remote(self._threads))

    def _wait(self, workers: Mapping[int, RayWorker]) -> Iterable[tuple[int, Answer]]:
        numbers = {worker.answer: number for number, worker in workers.items()}
        ready: list[Any] = []
        while not ready:
            ready, _ = ray.wait(list(numbers), timeout=1.0)
            if not ready and not any(node["Alive"] and node["Resources"].get("CPU") for node in ray.nodes()):
                raise WorkerError("no node of the Ray cluster is left to work on; start nodes, then run this again")
        return [(numbers[answer], _receive(answer)) for answer in ready]

    def _end(self, workers: Sequence[RayWorker]) -> None:
        for worker in workers:
            ray.kill(worker.actor)
        if workers and ray.is_initialized():
            ray.wait([worker.answer for worker in workers], num_returns=len(workers), timeout=_SECONDS_TO_DIE)


def _receive(answer: Any) -> Answer:
    try:
        received: Answer = ray.get(answer)
        return received
    except RayTaskError as error:
        return WorkerError(f"a Ray worker cannot run this hardbatch: {first_line(error.cause)}")
    except RayError as error:
        how = first_line(error)
        if "creation task" not in how:
            return Lost(how)
        reason = str(error).splitlines()[-1].strip()  # such as a package that the node lacks
        return WorkerError(f"a Ray worker cannot start: {reason}; install the same hardbatch on every node")


def _connect(num_workers: int, address: str | None) -> None:
    """Joins a cluster, or starts Ray on this machine; leaves our signal handlers in place."""
    where: dict[str, Any] = {"address": address}
    if address is not None and address != "auto":
        _require_answer(address)  # Ray itself tries for minutes
    elif address is None:
        where = {
            "address": "local",
            "num_cpus": max(num_workers, num_cores()),
            "num_gpus": len(visible_gpus()),
            "object_store_memory": _STORE_BYTES,
            "include_dashboard": False,
        }
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    is_cluster = ray_constants.ENABLE_RAY_CLUSTER
    try:
        # Without a cluster Ray calls this machine 127.0.0.1, and then its servers listen there alone.
        ray_constants.ENABLE_RAY_CLUSTER = is_cluster and address is not None
        ray.init(**where, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--ray-address {address}: {first_line(error)}; start Ray there with `ray start`") from None
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = is_cluster
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _require_answer(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), _SECONDS_TO_CONNECT):
            pass
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"--ray-address {address}: {first_line(error)}; give HOST:PORT as `ray start --head` prints it, or auto"
        ) from None
