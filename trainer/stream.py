"""Batches of one rank, in order, read and tokenised ahead by threads.

    for batch in BatchStream("workspace/demo/shards/KEY", seed=0, tokenize=load_tokenizer(folder, ...)):
        ...  # batch.position is the whole state: pass it as `position` to get the same batches again

It can be used by itself: it depends neither on torch, nor on other processes, nor on a model.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypedDict, TypeVar, Unpack, overload
from weakref import WeakSet

from hardbatch.pipeline.errors import ConfigError
from hardbatch.trainer.order import BatchOrder
from hardbatch.trainer.shards import Shards, TextBatch, open_shards

__all__ = ["BatchOrder", "BatchStream", "Shards", "TextBatch", "open_shards"]

T = TypeVar("T")


class _Settings(TypedDict, total=False):
    """The keywords of a `BatchStream`, documented there."""

    seed: int
    position: int
    stop: int | None
    rank: int
    world_size: int
    accumulate: int
    weights: Mapping[str, float] | None
    num_workers: int
    prefetch: int
    pin_memory: bool


class BatchStream(Generic[T]):
    """The batches of one rank from `position` on, endlessly or up to `stop`.

    A step of W ranks that accumulate A micro-batches takes W · A consecutive positions, and
    micro-batch a of rank r in the step that starts at p is the batch at p + a·W + r. For example,
    with W = 2 and A = 2, rank 0 reads p and p + 2, and rank 1 reads p + 1 and p + 3.

    A step that would pass `stop` is not begun, so that all ranks make the same number of steps. The
    tail of an epoch that is too short for a step is left out.

    Each iteration starts at `position` again. Its threads end when it is exhausted, closed or
    garbage-collected, or when the stream is closed. An error of a thread is raised at the batch
    that caused it.

    Attributes:
        shards: The shards.
        order: The order of their batches.
        step_size: W · A.
        position: Where iterations start.
        waited_s: Seconds that consumers have waited for batches.
    """

    @overload
    def __init__(
        self: BatchStream[TextBatch],
        shards: Shards | Path | str,
        *,
        tokenize: None = None,
        **settings: Unpack[_Settings],
    ) -> None: ...

    @overload
    def __init__(
        self, shards: Shards | Path | str, *, tokenize: Callable[[TextBatch], T], **settings: Unpack[_Settings]
    ) -> None: ...

    def __init__(
        self,
        shards: Shards | Path | str,
        *,
        tokenize: Callable[[TextBatch], Any] | None = None,
        seed: int = 0,
        position: int = 0,
        stop: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        weights: Mapping[str, float] | None = None,
        num_workers: int = 2,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        """Prepares the stream; reading begins with an iteration.

        Args:
            shards: The shards, or their folder.
            tokenize: Turns a `TextBatch` into what the stream yields; None yields the `TextBatch`.
            seed: Seed of the order.
            position: Where to start in the order of batches.
            stop: Where to stop; None never stops.
            rank: This rank.
            world_size: W, the number of ranks.
            accumulate: A, the micro-batches of a rank in one step.
            weights: How often an epoch reads the batches of a domain, in place of the weights of
                the shards.
            num_workers: Threads that read, check, parse and tokenise.
            prefetch: Batches held ready. At most prefetch + 1 batches are in memory.
            pin_memory: Calls `pin_memory()` of what `tokenize` returns.

        Raises:
            ConfigError: If an epoch has fewer batches than a step takes, or for an unknown domain or
                a weight below 0.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank}: must be 0 to {world_size - 1}, below the world size")
        if min(accumulate, num_workers, prefetch) < 1 or position < 0:
            raise ValueError("accumulate, num_workers and prefetch must be 1 or more, position 0 or more")

        self.shards = shards if isinstance(shards, Shards) else open_shards(shards)
        self.order = self.shards.order(seed=seed, weights=weights)
        self.step_size = world_size * accumulate
        if self.step_size > self.order.epoch_length:
            raise ConfigError(
                f"{self.shards.path}: an epoch has {self.order.epoch_length} batches, a step takes {self.step_size} "
                f"({world_size} ranks x {accumulate} accumulated); use fewer, or make more batches with a smaller "
                "pack.batch_size"
            )
        self.position = self.order.step_at(position, self.step_size)
        self.waited_s = 0.0

        self._stop = stop
        self._offsets = [a * world_size + rank for a in range(accumulate)]
        self._tokenize = tokenize
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._running: WeakSet[Generator[T]] = WeakSet()

    def __iter__(self) -> Iterator[T]:
        iteration = self._iterate()
        self._running.add(iteration)
        return iteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the running iterations and their threads."""
        for iteration in list(self._running):
            iteration.close()

    def positions(self) -> Iterator[int]:
        """Yields the positions of this rank, in order."""
        start = self.position
        while self._stop is None or start + self.step_size <= self._stop:
            yield from (start + offset for offset in self._offsets)
            start = self.order.next_step(start, self.step_size)

    def _iterate(self) -> Generator[T]:
        positions = self.positions()
        pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="batches")
        ahead: deque[Future[T]] = deque()
        try:
            ahead.extend(self._submit(pool, position) for position in islice(positions, self._prefetch))
            while ahead:
                start = time.perf_counter()
                batch = ahead.popleft().result()
                self.waited_s += time.perf_counter() - start
                ahead.extend(self._submit(pool, position) for position in islice(positions, 1))
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, position: int) -> Future[Any]:
        # The consumer's thread looks up the row, so that only one thread draws the order of an epoch.
        return pool.submit(self._load, self.order.batch_at(position), position)

    def _load(self, row: int, position: int) -> Any:
        batch = self.shards.read_batch(row, position)
        if self._tokenize is None:
            return batch
        tokenized = self._tokenize(batch)
        return tokenized.pin_memory() if self._pin_memory else tokenized
