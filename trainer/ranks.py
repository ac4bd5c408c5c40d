"""The processes of a training: who is who, gradients reduced between them, and leaving together.

Started by torchrun there are several ranks; started by python alone there is one. Messages between them go over gloo
on the CPU, gradients over NCCL on CUDA: asking how the others are costs the GPU no wait.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.errors import ConfigError, HardbatchError


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the ranks, and its device."""

    rank: int
    world_size: int
    device: torch.device
    _control: Any = None

    @property
    def is_main(self) -> bool:
        """True in the rank that prints and writes."""
        return self.rank == 0

    def wrap(self, stage: nn.Module) -> nn.Module:
        """The stage with gradients averaged over the ranks, each parameter once a step; itself where there is one."""
        if self.world_size == 1:
            return stage
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the newer name of broadcast_buffers is newer than 2.10
            return nn.parallel.DistributedDataParallel(
                stage,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False,  # constants: positions and frequencies
                gradient_as_bucket_view=True,
            )

    def sum(self, *values: float) -> list[float]:
        """Sums of the values over all ranks, in float64."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._control)
        return [float(value) for value in total]

    def max(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.world_size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._control)
        return int(largest)

    def raise_together(self, error: HardbatchError | None) -> None:
        """Raises on every rank where any has an error: the same one everywhere, with each message once."""
        if self.world_size == 1:
            if error is not None:
                raise error
            return
        if not self.max(error is not None):
            return
        errors: list[HardbatchError | None] = [None] * self.world_size
        dist.all_gather_object(errors, error, group=self._control)
        found = [one for one in errors if one is not None]
        lines = dict.fromkeys(str(one) for one in found)
        raise type(found[0])("\n".join(lines))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A user's mistake found in the body by any rank is raised by all of them at its end.

        The body must not wait for other ranks.
        """
        error: HardbatchError | None = None
        try:
            yield
        except HardbatchError as found:
            error = found
        self.raise_together(error)


def rank_of_environment() -> int:
    """This process's rank as torchrun tells it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Joins the process group that torchrun describes, for the body. Raises ConfigError where CUDA is missing."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device can be used here; give auto or cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        if (own.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {rank_of_environment()} has no GPU of its own: this machine has {torch.cuda.device_count()}; "
                "give torchrun a smaller --nproc-per-node"
            )
        torch.cuda.set_device(own)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks(rank=0, world_size=1, device=own)
        return
    dist.init_process_group("nccl" if cuda else "gloo", device_id=own if cuda else None)
    try:
        control = dist.new_group(backend="gloo")
        yield Ranks(rank=dist.get_rank(), world_size=world_size, device=own, _control=control)
    finally:
        dist.destroy_process_group()
