"""Several processes: sums, and leaving together."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
import torch

from hardbatch.pipeline.errors import ConfigError, InputError, IntegrityError
from hardbatch.trainer.ranks import join_ranks, refuse_shared_gpus
from tests.reliability import warm


def rank_main(rank, world_size, port, folder):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    seen = []
    with join_ranks("cpu") as ranks:
        seen.append([ranks.rank, ranks.is_main, ranks.sum(rank + 0.5, 1.0), ranks.max(10 * rank), ranks.min(5 - rank)])
        for bad in ({1: "on one"}, {0: "same", 1: "same"}, {0: "first", 1: "second"}, {}):
            try:
                with ranks.errors_raised_together():
                    if rank in bad:
                        raise (InputError if rank else IntegrityError)(bad[rank])
                seen.append("nothing")
            except (InputError, IntegrityError) as error:
                seen.append([type(error).__name__, str(error)])
        for facts in ({"step": 3}, {"step": rank, "shards": "x"}):
            try:
                ranks.require_equal(facts, "share it")
                seen.append("agreed")
            except ConfigError as error:
                seen.append(str(error))
        layer = torch.nn.Linear(2, 1)
        with torch.no_grad():
            layer.weight.fill_(rank + 1.0)
        ranks.share_weights(layer)
        layer.weight.grad = torch.full_like(layer.weight, float(rank))  # and none for the bias
        ranks.average_gradients(layer)
        seen.append([layer.weight.tolist(), layer.weight.grad.tolist(), layer.bias.grad.tolist()])
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))


def test_errors_of_any_rank_are_raised_by_all(tmp_path):
    warm.run_ranks(rank_main, 2, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first[0] == [0, True, [2.0, 2.0], 10, 4] and second[0] == [1, False, [2.0, 2.0], 10, 4]
    assert first[1:] == second[1:]
    assert first[1] == ["InputError", "on one"]
    assert first[2] == ["IntegrityError", "same"]
    assert first[3] == ["IntegrityError", "first\nsecond"]
    assert first[4] == "nothing"
    assert first[5:7] == ["agreed", "the ranks do not agree (step: 0, 1); share it"]
    assert first[7] == [[[1.0, 1.0]], [[0.5, 0.5]], [0.0]]


def test_one_process_alone():
    with join_ranks("auto" if not torch.cuda.is_available() else "cpu") as ranks:
        stage = torch.nn.Linear(2, 2)
        ranks.average_gradients(stage)
        assert stage.weight.grad is None and ranks.sum(1.5, 2) == [1.5, 2] and ranks.max(3) == 3
        with pytest.raises(InputError, match="alone"), ranks.errors_raised_together():
            raise InputError("alone")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_cuda_in_vain():
    with pytest.raises(ConfigError, match="no CUDA device can be used here"), join_ranks("cuda"):
        pass


@pytest.fixture
def two_gpus(monkeypatch):
    """Pretends that this process sees two GPUs; the list holds the devices that were made the current one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield chosen
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_attention_of_cudnn_is_off_on_cuda_alone(two_gpus):
    with join_ranks("cpu"):
        assert torch.backends.cuda.cudnn_sdp_enabled()
    with join_ranks("cuda"):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.parametrize(("local_rank", "index"), [(0, 0), (1, 1), (2, 0), (7, 1)])
def test_the_local_rank_counts_modulo_the_gpus_that_are_seen(two_gpus, monkeypatch, local_rank, index):
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with join_ranks("auto") as ranks:
        assert ranks.device == torch.device("cuda", index) and two_gpus == [ranks.device]


def test_two_ranks_with_one_gpu_are_refused():
    refuse_shared_gpus([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-3"), ("c", "GPU-4")])
    with pytest.raises(ConfigError, match=r"^ranks 1, 3 have the same GPU of b; .*--nproc-per-node"):
        refuse_shared_gpus([("a", "GPU-1"), ("b", "GPU-2"), ("b", "GPU-3"), ("b", "GPU-2")])


def late_rank(rank, world_size, port, folder, exchange):
    """Rank 1 comes to an exchange much later than the others wait."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with join_ranks("cpu", timeout_s=2) as ranks:
        exchanges = {"control": lambda: ranks.max(2), "gradients": lambda: ranks.share_weights(torch.nn.Linear(2, 2))}
        exchanges[exchange]()
        started = time.monotonic()
        if rank == 1:
            time.sleep(8)
            os._exit(0)
        try:
            exchanges[exchange]()
            seen = "no error"
        except RuntimeError as error:
            seen = str(error)
        Path(folder, "seen").write_text(f"{time.monotonic() - started:.3f} {seen}")
        os._exit(0)


@pytest.mark.parametrize("exchange", ["control", "gradients"])
def test_a_rank_that_waits_in_vain_gives_up_after_the_timeout(exchange, tmp_path):
    warm.run_ranks(late_rank, 2, str(tmp_path), exchange)
    seconds, seen = (tmp_path / "seen").read_text().split(" ", 1)
    assert 1.5 < float(seconds) < 7 and re.search("[Tt]imed out", seen), seen
