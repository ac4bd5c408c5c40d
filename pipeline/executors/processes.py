"""Workers that are processes of this machine: one per GPU, or as many as asked for.

A worker is `python -m hardbatch.pipeline.executors.processes FD`, where FD is its end of a pipe for requests and
answers. Its standard input stays silent as long as its parent lives: when it ends, so does the worker.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import FrameType

from hardbatch.pipeline.errors import LeavingError
from hardbatch.pipeline.executors.pool import Answer, Bench, Lost, Opening, PoolExecutor
from hardbatch.pipeline.step import Unit

_SECONDS_TO_LEAVE = 5.0


class ProcessWorker:
    """A worker process, as its parent sees it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            # A process group of its own, so that Ctrl-C reaches the parent alone, which then ends its workers.
            self.process = subprocess.Popen(  # noqa: S603 -- this very module
                [sys.executable, "-P", "-m", __spec__.name, str(theirs.fileno())],
                env=dict(environment),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.PIPE,
                stdout=2,  # what a command prints on standard output is a result
                process_group=0,
            )

    def open(self, opening: Opening) -> None:
        """Asks the worker to open a work."""
        self._send("open", opening)

    def run(self, unit: Unit, following: Unit | None) -> None:
        """Asks the worker to run a unit."""
        self._send("run", unit, following)

    def _send(self, *request: object) -> None:
        try:
            self.connection.send(request)
        except OSError:
            pass  # it has died, which receiving its answer shows

    def receive(self) -> Answer:
        """Returns the answer of the worker, once its connection is ready."""
        try:
            answer: Answer = self.connection.recv()
            return answer
        except (EOFError, OSError):
            code = self.process.wait()
            return Lost(f"killed by signal {-code}" if code < 0 else f"exit code {code}")


class ProcessExecutor(PoolExecutor[ProcessWorker]):
    """Runs units on processes of this machine. Each has its share of the cores and, if there are any, one GPU.

    Args:
        num_workers: The number of processes.
    """

    def __init__(self, num_workers: int) -> None:
        super().__init__(num_workers)
        self._gpus = visible_gpus()

    def _start(self, number: int, device: str) -> ProcessWorker:
        threads = str(threads_of_each(self._num_workers, num_cores()))
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[number % len(self._gpus)]
        return ProcessWorker(environment)

    def _wait(self, workers: Mapping[int, ProcessWorker]) -> Iterable[tuple[int, Answer]]:
        numbers = {worker.connection: number for number, worker in workers.items()}
        ready = [numbers[connection] for connection in wait(list(numbers)) if isinstance(connection, Connection)]
        return [(number, workers[number].receive()) for number in ready]

    def _end(self, workers: Sequence[ProcessWorker]) -> None:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            try:
                worker.process.wait(_SECONDS_TO_LEAVE)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.connection.close()
            assert worker.process.stdin is not None
            worker.process.stdin.close()


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_each(num_workers: int, num_cores: int) -> int:
    """The threads of each of several workers that share cores; no more than OMP_NUM_THREADS, if that is set."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    share = max(1, num_cores // num_workers)
    return min(share, int(limit)) if limit.isdecimal() and int(limit) else share


def main() -> None:
    """Answers the requests of the parent until it closes the connection, ends, or sends SIGTERM."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, _leave)
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    connection, bench = Connection(descriptor), Bench()
    try:
        while True:
            method, *arguments = connection.recv()
            connection.send(getattr(bench, method)(*arguments))
    except (LeavingError, EOFError, OSError):
        pass
    os._exit(0)  # without waiting for the unit that is being prepared


def _leave(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise LeavingError(signum)


def _end_with_parent() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)  # at once: the artifact may have another owner already


if __name__ == "__main__":
    main()
