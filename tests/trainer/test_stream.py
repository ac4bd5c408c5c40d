"""trainer.stream: batches in order over ranks and epochs, read ahead by threads that end with the iteration."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.utils.data as torch_data

from hardbatch.pipeline.errors import ConfigError, IntegrityError
from hardbatch.trainer.shards import Shards, TextBatch, open_shards
from hardbatch.trainer.stream import BatchStream

ROOT = Path(__file__).resolve().parents[2]
N = 6  # batches of the finished run
MASKS = ("equivalent_BB", "positive_BB")


@pytest.fixture(scope="module")
def shards(finished_run: tuple[Path, Path, Path]) -> Shards:
    return open_shards(finished_run[2])


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert threads() == []


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def content(batch: TextBatch) -> dict[str, Any]:
    masks = {name: mask.tolist() for name, mask in vars(batch).items() if name in MASKS and mask is not None}
    return {**vars(batch), **masks}


def take(shards: Shards, number: int, **settings: Any) -> list[dict[str, Any]]:
    return [content(batch) for batch in islice(BatchStream(shards, **settings), number)]


def test_batches_come_in_the_order_of_the_seed_over_epochs(shards: Shards) -> None:
    order = shards.order(seed=5)
    found = take(shards, 3 * N, seed=5)
    assert [batch["position"] for batch in found] == list(range(3 * N))
    expected = [shards.read_batch(order.batch_at(position), position) for position in range(3 * N)]
    assert found == [content(batch) for batch in expected]
    assert take(shards, N, seed=6) != found[:N]


@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize("prefetch", [1, 3, 20])
def test_threads_and_prefetch_change_nothing(shards: Shards, num_workers: int, prefetch: int) -> None:
    assert take(shards, 15, num_workers=num_workers, prefetch=prefetch) == take(shards, 15, num_workers=1, prefetch=1)


@pytest.mark.parametrize("position", [0, 1, 5, 6, 17])
def test_any_position_goes_on_with_the_same_batches(shards: Shards, position: int) -> None:
    assert take(shards, 9, position=position) == take(shards, 30)[position : position + 9]


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 4), (4, 1)])
def test_ranks_share_the_order_of_one(shards: Shards, world_size: int, accumulate: int) -> None:
    settings = {"world_size": world_size, "accumulate": accumulate, "stop": 2 * N}
    ranks = [list(BatchStream(shards, rank=rank, **settings)) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    step_size = world_size * accumulate
    for start in range(0, len(ranks[0]), accumulate):
        first = ranks[0][start].position
        for rank, batches in enumerate(ranks):
            of_step = [batch.position for batch in batches[start : start + accumulate]]
            assert of_step == [first + a * world_size + rank for a in range(accumulate)]
    taken = sorted(batch.position for rank in ranks for batch in rank)
    whole = N - N % step_size
    assert taken == [*range(whole), *range(N, N + whole)]


def test_a_position_in_a_tail_too_short_starts_the_next_epoch(shards: Shards) -> None:
    stream = BatchStream(shards, position=5, world_size=2, rank=1)
    assert stream.position == N
    assert [batch.position for batch in islice(stream, 2)] == [N + 1, N + 3]


@pytest.mark.parametrize(
    ("stop", "expected"), [(0, []), (1, []), (2, [0]), (5, [0, 2]), (6, [0, 2, 4]), (7, [0, 2, 4])]
)
def test_no_step_passes_stop(shards: Shards, stop: int, expected: list[int]) -> None:
    assert [batch.position for batch in BatchStream(shards, world_size=2, stop=stop)] == expected


def test_weights_of_the_caller_are_taken(shards: Shards) -> None:
    stream = BatchStream(shards, weights={"numbers": 2.0}, stop=2 * N)
    assert stream.order.epoch_length == 2 * N
    assert sorted(batch.batch_id for batch in stream) == sorted([*range(N)] * 2)


def test_every_iteration_starts_at_the_position(shards: Shards) -> None:
    stream = BatchStream(shards, position=2, stop=5)
    assert [[batch.position for batch in stream] for _ in range(2)] == [[2, 3, 4]] * 2


def test_the_folder_does_as_well_as_what_was_opened(shards: Shards) -> None:
    assert [content(batch) for batch in BatchStream(str(shards.path), stop=3)] == take(shards, 3)


def test_what_tokenize_makes_is_what_comes(shards: Shards) -> None:
    stream = BatchStream(shards, tokenize=lambda batch: (batch.position, threading.current_thread().name), stop=N)
    found = list(stream)
    assert [position for position, _ in found] == list(range(N))
    assert all(name.startswith("batches") for _, name in found)


def test_pinning_is_left_to_the_batch(shards: Shards) -> None:
    @dataclass(frozen=True)
    class Pinnable:
        pinned: bool = False

        def pin_memory(self) -> Pinnable:
            return Pinnable(pinned=True)

    for pin_memory in (False, True):
        stream = BatchStream(shards, tokenize=lambda batch: Pinnable(), pin_memory=pin_memory, stop=2)
        assert [batch.pinned for batch in stream] == [pin_memory] * 2


# length, copies and torch's DataLoader


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 6, 7, 11, 12, 13, 30])
@pytest.mark.parametrize("position", [0, 1, 5, 6, 8])
@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (5, 1)])
def test_the_length_is_the_number_of_batches(
    shards: Shards, stop: int, position: int, world_size: int, accumulate: int
) -> None:
    stream = BatchStream(shards, stop=stop, position=position, world_size=world_size, accumulate=accumulate)
    assert len(stream) == len(list(stream.positions()))


def test_an_endless_stream_has_no_length_but_advice(shards: Shards) -> None:
    with pytest.raises(TypeError, match="give stop=6 for one epoch"):
        len(BatchStream(shards))


def test_a_copy_gives_the_same_batches(shards: Shards) -> None:
    stream = BatchStream(shards, position=2, stop=N, seed=3, weights={"numbers": 1.0})
    next(iter(stream))  # an iteration cannot be pickled, so a copy has none
    copy = pickle.loads(pickle.dumps(stream))  # noqa: S301 -- our own bytes
    assert [content(batch) for batch in copy] == take(shards, N - 2, position=2, seed=3)
    copy.close()


def positions_of(batches: list[TextBatch]) -> list[int]:
    return [batch.position for batch in batches]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # this machine may have few cores
@pytest.mark.parametrize("num_workers", [0, 1, 2, 3, 9])
def test_workers_of_a_loader_share_the_batches_in_their_order(shards: Shards, num_workers: int) -> None:
    stream = BatchStream(shards, seed=1, stop=7, num_workers=1)
    loader = torch_data.DataLoader(stream, batch_size=None, num_workers=num_workers)
    for _ in range(2):
        assert [content(batch) for batch in loader] == take(shards, 7, seed=1)
    assert len(loader) == 7


def test_workers_that_are_spawned_share_the_batches(shards: Shards) -> None:
    stream = BatchStream(shards, stop=5, rank=1, world_size=2)
    loader = torch_data.DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert positions_of(list(loader)) == [1, 3]


class Wrapped(torch_data.IterableDataset):
    """A dataset of one's own around an endless stream that is made in the worker."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[int]:
        return (batch.position for batch in islice(BatchStream(self.path), 4))


def test_a_stream_inside_a_dataset_is_shared_too(shards: Shards) -> None:
    loader = torch_data.DataLoader(Wrapped(shards.path), batch_size=None, num_workers=2)
    assert list(loader) == list(range(8))


# state


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("taken", range(8))
def test_a_state_continues_with_the_next_batch(shards: Shards, world_size: int, accumulate: int, taken: int) -> None:
    settings = {"stop": 3 * N, "world_size": world_size, "accumulate": accumulate}
    stream = BatchStream(shards, **settings)
    expected = [batch.position for batch in stream]
    iteration = iter(stream)
    assert [next(iteration).position for _ in range(min(taken, len(expected)))] == expected[:taken]
    state = json.loads(json.dumps(stream.state_dict()))
    stream.close()

    other = BatchStream(shards, **settings)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert [batch.position for batch in other] == expected[taken:]
    assert [batch.position for batch in other] == expected  # only the first iteration continues


def test_a_state_after_the_last_batch_leaves_nothing(shards: Shards) -> None:
    stream = BatchStream(shards, stop=4)
    list(stream)
    other = BatchStream(shards, stop=4)
    other.load_state_dict(stream.state_dict())
    assert (list(other), len(list(other))) == ([], 4)


def test_states_survive_a_break_out_of_the_loop(shards: Shards) -> None:
    stream = BatchStream(shards)
    for batch in stream:
        if batch.position == 2:
            break
    assert (stream.state_dict()["position"], threads()) == (3, [])


@pytest.mark.parametrize("change", [{"seed": 1}, {"shards": "0123456789abcdef"}])
def test_a_state_of_something_else_is_refused(shards: Shards, change: dict[str, Any]) -> None:
    stream = BatchStream(shards)
    with pytest.raises(ConfigError, match=f"the state is of {next(iter(change))} "):
        stream.load_state_dict(stream.state_dict() | change)


@pytest.mark.parametrize("taken", [(0, 0), (1, 0), (1, 1), (2, 2), (4, 3)])
def test_each_worker_continues_from_its_own_state(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, taken: tuple[int, int]
) -> None:
    """As torchdata's StatefulDataLoader has it: state, iterator and state again, in each worker for itself."""
    found: list[int] = []
    for worker, number in enumerate(taken):
        monkeypatch.setattr(torch_data, "get_worker_info", lambda w=worker: SimpleNamespace(id=w, num_workers=2))
        stream = BatchStream(shards, stop=7)
        iteration = iter(stream)
        found += [next(iteration).position for _ in range(number)]
        state = stream.state_dict()
        stream.close()

        resumed = BatchStream(shards, stop=7)
        resumed.load_state_dict(state)
        iteration = iter(resumed)
        assert resumed.state_dict() == state
        found += [batch.position for batch in iteration]
    assert sorted(found) == list(range(7))


def test_a_state_loaded_before_workers_are_forked_is_shared_by_them(shards: Shards) -> None:
    stream = BatchStream(shards, stop=N)
    iteration = iter(stream)
    next(iteration), next(iteration)
    stream.close()
    stream.load_state_dict(stream.state_dict())
    assert positions_of(list(torch_data.DataLoader(stream, batch_size=None, num_workers=2))) == [2, 3, 4, 5]


# refusals


def test_fewer_batches_than_a_step_are_refused(shards: Shards) -> None:
    with pytest.raises(ConfigError, match=r"an epoch has 6 batches, a step takes 8 \(4 ranks x 2 accumulated\)"):
        BatchStream(shards, world_size=4, accumulate=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 1},
        {"rank": -1},
        {"world_size": 0},
        {"accumulate": 0},
        {"num_workers": 0},
        {"prefetch": 0},
        {"position": -1},
    ],
)
def test_settings_out_of_range_are_refused(shards: Shards, settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"rank|must be"):
        BatchStream(shards, **settings)


# errors and threads


def test_damage_reaches_the_consumer_at_its_batch(copied_run: tuple[Path, Path, Path]) -> None:
    shards = open_shards(copied_run[2])
    damaged = shards.order().batch_at(3)
    path = shards.path / shards.index.files[0]
    data = bytearray(path.read_bytes())
    data[int(shards.index.offsets_I[damaged]) + 10] ^= 1
    path.write_bytes(data)
    batches = iter(BatchStream(shards, num_workers=2, prefetch=6))
    assert [next(batches).position for _ in range(3)] == [0, 1, 2]
    with pytest.raises(IntegrityError, match=rf"part-00000\.parquet: batch {shards.index.batch_ids_I[damaged]} "):
        next(batches)
    assert threads() == []
    with pytest.raises(StopIteration):
        next(batches)


def test_an_error_of_tokenize_comes_as_it_is(shards: Shards) -> None:
    error = ConfigError("no such thing")

    def tokenize(batch: TextBatch) -> int:
        if batch.position == 2:
            raise error
        return batch.position

    batches = iter(BatchStream(shards, tokenize=tokenize))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ConfigError) as caught:
        next(batches)
    assert caught.value is error


def use_as_context(stream: BatchStream, batches: Any) -> None:
    with stream:
        pass


@pytest.mark.parametrize(
    "end",
    [
        lambda stream, batches: batches.close(),
        lambda stream, batches: stream.close(),
        use_as_context,
        lambda stream, batches: None,  # both are forgotten
        lambda stream, batches: list(batches),
    ],
    ids=["close iterator", "close stream", "with", "forget", "exhaust"],
)
def test_threads_end_with_the_iteration(shards: Shards, end: Callable[[BatchStream, Any], object]) -> None:
    stream = BatchStream(shards, num_workers=3, prefetch=8, stop=5)
    batches = iter(stream)
    other = iter(stream)
    next(batches), next(other)
    other.close()  # the iterations of a stream are independent
    assert threads()
    end(stream, batches)
    del batches
    assert threads() == []


def test_no_more_than_prefetch_is_read_ahead(shards: Shards) -> None:
    started: list[int] = []

    def tokenize(batch: TextBatch) -> int:
        started.append(batch.position)
        return batch.position

    with BatchStream(shards, tokenize=tokenize, prefetch=3) as stream:
        for position in islice(stream, 5):
            time.sleep(0.05)
            assert max(started) <= position + 3


def test_seconds_of_waiting_are_counted(shards: Shards) -> None:
    def slow(batch: TextBatch) -> TextBatch:
        time.sleep(0.05)
        return batch

    waiting = BatchStream(shards, tokenize=slow, num_workers=1, stop=4)
    list(waiting)
    assert 0.15 < waiting.waited_s < 2.0
    ready = BatchStream(shards, tokenize=slow, num_workers=1, prefetch=4, stop=4)
    for _ in ready:
        time.sleep(0.2)
    assert ready.waited_s < waiting.waited_s


def test_a_process_ends_while_batches_are_read(shards: Shards) -> None:
    program = (
        "import sys; from hardbatch.trainer.stream import BatchStream; "
        f"batches = iter(BatchStream({str(shards.path)!r}, num_workers=3, prefetch=50)); print(next(batches).batch_id)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_module_is_light() -> None:
    program = (
        "import sys, hardbatch.trainer.stream; "
        "print(sorted({'torch', 'transformers', 'polars', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_files_are_closed(shards: Shards) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    take(shards, 30)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_matrices_are_fresh(shards: Shards) -> None:
    first, again = (next(iter(BatchStream(shards, position=p))) for p in (0, 0))
    first.equivalent_BB[:] = True
    assert not np.diagonal(again.equivalent_BB).any()
