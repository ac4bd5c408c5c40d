"""Row 21: the figures behind tests/trainer/test_gradcache.py, with more ranks, steps and settings.

Differences are relative to each tensor's norm, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hardbatch.trainer.batch import Batch
from hardbatch.trainer.gradcache import GradCache
from hardbatch.trainer.model import BACKBONE_TYPES
from tests.trainer import test_gradcache as exactness

pytestmark = pytest.mark.soak
NUM_STEPS = 50
make_masked = exactness.make_batch


def make_unmasked(position: int, num_negatives: int = 0) -> Batch:
    batch = make_masked(position, num_negatives)
    return replace(batch, equivalent_BB=torch.zeros_like(batch.equivalent_BB))


BATCHES = {"mask on": make_masked, "mask off": make_unmasked}


def test_cached_against_one_graph(record_row: Callable[[int, str], None]) -> None:
    worst, compared = dict.fromkeys(BATCHES, 0.0), 0
    for name, make_batch in BATCHES.items():
        for model_type in BACKBONE_TYPES:
            for position, num_negatives in ((3, 0), (4, 5), (5, 2)):
                batch = make_batch(position, num_negatives)
                expected_loss, expected = exactness.one_graph(exactness.make_encoder(model_type), exactness.STEP, batch)
                encoder = exactness.make_encoder(model_type)
                assert torch.equal(GradCache(encoder, exactness.STEP).backward(batch).value, expected_loss)
                error = exactness.worst_error(exactness.gradients_of(encoder), expected)
                worst[name], compared = max(worst[name], error), compared + 1
    assert max(worst.values()) < exactness.BOUND
    told = ", ".join(f"{error:.0e} with {name}" for name, error in worst.items())
    record_row(
        21, f"cached against one graph, {compared} batches: losses bit-equal, gradients differ by {told} at most"
    )


def rank_main(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    results = {}
    for name, make_batch in BATCHES.items():
        exactness.make_batch = make_batch
        steps = exactness.train_rank(rank, world_size, 1, exactness.STEP)
        gradients, parameters = next(steps)
        for _ in range(NUM_STEPS - 1):
            _, parameters = next(steps)
        results[name] = {"gradients": gradients, "digest": exactness.digest(parameters)}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_against_one_that_accumulates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, record_row: Callable[[int, str], None]
) -> None:
    mp.spawn(rank_main, args=(world_size, exactness.free_port(), str(tmp_path)), nprocs=world_size)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    worst = {}
    for name, make_batch in BATCHES.items():
        monkeypatch.setattr(exactness, "make_batch", make_batch)
        alone, _ = next(exactness.train_rank(0, 1, world_size, exactness.STEP))
        worst[name] = max(exactness.worst_error(one[name]["gradients"], alone) for one in found)
        assert len({one[name]["digest"] for one in found}) == 1
    assert max(worst.values()) < exactness.BOUND
    told = ", ".join(f"{error:.0e} with {name}" for name, error in worst.items())
    record_row(
        21,
        f"{world_size} ranks against 1 that accumulates: gradients within {told}; parameters bit-equal across "
        f"ranks after {NUM_STEPS} steps",
    )
