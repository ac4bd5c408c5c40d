"""Batches of one rank, in order, read and tokenised ahead by threads.

    for batch in BatchStream("workspace/demo/shards/KEY", seed=0, tokenize=load_tokenizer(folder, ...)):
        ...  # batch.position is the whole state: pass it as `position` to get the same batches again

It can be used by itself: it depends neither on torch, nor on other processes, nor on a model. In torch's
`DataLoader` it is an iterable dataset, whose worker processes share its batches:

    loader = DataLoader(BatchStream(SHARDS, stop=1_000), batch_size=None, num_workers=2)
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypedDict, TypeVar, Unpack, overload
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
    similar_lengths: int
    num_workers: int
    prefetch: int
    pin_memory: bool


class _Place(NamedTuple):
    """A micro-batch of this rank: the position where its step starts, and which of the step's A it is."""

    step: int
    number: int


class BatchStream(Generic[T]):
    """The batches of one rank from `position` on, endlessly or up to `stop`.

    A step of W ranks that accumulate A micro-batches takes W · A consecutive positions, and
    micro-batch a of rank r in the step that starts at p is the batch at p + a·W + r. For example,
    with W = 2 and A = 2, rank 0 reads p and p + 2, and rank 1 reads p + 1 and p + 3.

    A step that would pass `stop` is not begun, so that all ranks make the same number of steps. The
    tail of an epoch that is too short for a step is left out.

    Each iteration starts at `position` again, except for the first one after `load_state_dict`. Its
    threads end when it is exhausted, closed or garbage-collected, or when the stream is closed. An
    error of a thread is raised at the batch that caused it.

    In the worker processes of torch's `DataLoader`, worker w of n takes every n-th of these batches,
    from the w-th on. So each batch comes once, and in the same order as without workers. Ranks are
    not known to a `DataLoader`: give each one its own `rank` and `world_size`. A stream can be
    pickled if `tokenize` can.

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
        similar_lengths: int = 1,
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
            similar_lengths: How many consecutive batches are of similar length, so that as many ranks
                take equally long over a step; 1: the order ignores lengths.
            num_workers: Threads that read, check, parse and tokenise.
            prefetch: Batches held ready. At most prefetch + 1 batches are in memory.
            pin_memory: Calls `pin_memory()` of what `tokenize` returns.

        Raises:
            ConfigError: If an epoch has fewer batches than a step takes, or for an unknown domain or
                a weight below 0.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank}: must be 0 to {world_size - 1}, below the world size")
        if min(accumulate, num_workers, prefetch, similar_lengths) < 1 or position < 0:
            raise ValueError(
                "accumulate, similar_lengths, num_workers and prefetch must be 1 or more, position 0 or more"
            )

        self.shards = shards if isinstance(shards, Shards) else open_shards(shards)
        self._order: dict[str, Any] = {"seed": seed, "weights": weights, "similar_lengths": similar_lengths}
        self.order = self.shards.order(**self._order)
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
        self._upcoming = _Place(self.position, 0)
        self._resume: tuple[_Place, bool] | None = None  # and whether it was loaded in a worker process
        _register_as_dataset()

    def __iter__(self) -> Iterator[T]:
        worker, num_workers = _worker_of_loader()
        start, is_workers_own = self._resume or (_Place(self.position, 0), False)
        self._resume = None
        places = islice(self._places(start), 0 if is_workers_own else worker, None, num_workers)

        # Its first place is the state from now on, although reading begins when the first batch is asked for.
        first = list(islice(places, 1))
        self._upcoming = first[0] if first else self._end
        iteration = self._iterate(chain(first, places))
        self._running.add(iteration)
        return iteration

    def __len__(self) -> int:
        """The number of batches of an iteration from `position` to `stop`, in all worker processes together.

        Raises:
            TypeError: If the stream is endless.
        """
        if self._stop is None:
            raise TypeError(
                f"the stream is endless; give stop={self.order.epoch_length} for one epoch, or count your own steps"
            )
        num_batches, size = self.order.epoch_length, self.step_size
        first_end = min(self._stop, (self.position // num_batches + 1) * num_batches)
        epochs, rest = divmod(self._stop - first_end, num_batches)
        num_steps = max(0, first_end - self.position) // size + epochs * (num_batches // size) + rest // size
        return num_steps * len(self._offsets)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy in another process needs; iterations stay here, and the order is made again there."""
        return {name: value for name, value in vars(self).items() if name not in ("order", "_running")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.order = self.shards.order(**self._order)
        self._running = WeakSet()
        _register_as_dataset()

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that was given; every value is of JSON.

        Returns:
            `position` is where the step of the next batch starts, and `number` which of the step's
            accumulated batches it is. `shards`, `seed` and `similar_lengths` say what this is a state of.
        """
        return {
            "position": self._upcoming.step,
            "number": self._upcoming.number,
            **self._identity(),
        }

    def _identity(self) -> dict[str, Any]:
        """What a state and a stream must share."""
        return {
            "shards": self.shards.key,
            "seed": self._order["seed"],
            "similar_lengths": self._order["similar_lengths"],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Makes the next iteration start at the place of a state; those after it start at `position` again.

        torchdata's `StatefulDataLoader` saves and loads the state of each worker process by itself.

        Raises:
            ConfigError: If the state is one of other shards, or of another order of batches.
        """
        state = {"similar_lengths": 1} | dict(state_dict)  # which earlier states do not have
        for name, own in self._identity().items():
            if state[name] != own:
                raise ConfigError(
                    f"{self.shards.path}: the state is of {name} {state[name]}, the stream of {name} {own}; "
                    "make the stream as it was, or start without the state"
                )
        self._upcoming = _Place(state_dict["position"], state_dict["number"])
        self._resume = self._upcoming, _worker_of_loader() != (0, 1)

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
        return map(self._position_at, self._places(_Place(self.position, 0)))

    def _position_at(self, place: _Place) -> int:
        return place.step + self._offsets[place.number]

    @property
    def _end(self) -> _Place:
        """The place after the last batch, if the stream is not endless."""
        return _Place(max(self.position, self._stop or 0), 0)

    def _places(self, start: _Place) -> Iterator[_Place]:
        step, number = start
        while self._stop is None or step + self.step_size <= self._stop:
            yield from (_Place(step, a) for a in range(number, len(self._offsets)))
            step, number = self.order.next_step(step, self.step_size), 0

    def _iterate(self, places: Iterator[_Place]) -> Generator[T]:
        pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="batches")
        ahead: deque[tuple[_Place, Future[T]]] = deque()
        try:
            ahead.extend(self._submit(pool, place) for place in islice(places, self._prefetch))
            while ahead:
                start = time.perf_counter()
                batch = ahead.popleft()[1].result()
                self.waited_s += time.perf_counter() - start
                ahead.extend(self._submit(pool, place) for place in islice(places, 1))
                self._upcoming = ahead[0][0] if ahead else self._end
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, place: _Place) -> tuple[_Place, Future[Any]]:
        # The consumer's thread looks up the row, so that only one thread draws the order of an epoch.
        position = self._position_at(place)
        return place, pool.submit(self._load, self.order.batch_at(position), position)

    def _load(self, row: int, position: int) -> Any:
        batch = self.shards.read_batch(row, position)
        if self._tokenize is None:
            return batch
        tokenized = self._tokenize(batch)
        return tokenized.pin_memory() if self._pin_memory else tokenized


def _worker_of_loader() -> tuple[int, int]:
    """Which worker process of a `DataLoader` this is, and how many there are; (0, 1) in any other process."""
    data = sys.modules.get("torch.utils.data")  # a worker process has it
    info = data.get_worker_info() if data else None
    return (info.id, info.num_workers) if info else (0, 1)


def _register_as_dataset() -> None:
    """Makes streams iterable datasets for torch, if that is loaded; without this, a `DataLoader` asks for an index."""
    if data := sys.modules.get("torch.utils.data"):
        data.IterableDataset.register(BatchStream)
