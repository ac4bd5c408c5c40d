"""The processes of a training: who is who, gradients reduced between them, and leaving together.

Started by torchrun there are several ranks; started by python alone there is one. Messages between them go over gloo
on the CPU, gradients over NCCL on CUDA: asking how the others are costs the GPU no wait.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import ConfigError, HardbatchError
from pipeline.files import as_user_error

_BUCKET_ELEMENTS = 2**24  # reduced at once: 64 MiB
T = TypeVar("T")


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

    def share_weights(self, module: nn.Module) -> None:
        """Gives every rank the parameters of the main one."""
        if self.world_size > 1:
            for parameter in module.parameters():
                dist.broadcast(parameter.data, src=0)

    def average_gradients(self, module: nn.Module) -> None:
        """Averages the gradients over the ranks: each parameter once, in a fixed order, so that runs repeat to the bit.

        Called once a step, when all its batches are done: what the ranks did for them may differ. The last chunk of
        each stage is all that a reduction during the backward pass could overlap with.
        """
        if self.world_size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(gradient.numel() for gradient in bucket) >= _BUCKET_ELEMENTS:
                self._average(bucket)
                bucket = []
        if bucket:
            self._average(bucket)

    def _average(self, gradients: list[Tensor]) -> None:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world_size
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def require_equal(self, facts: dict[str, Any], help_line: str) -> None:
        """Raises ConfigError on every rank where the ranks do not agree on `facts`."""
        if self.world_size == 1:
            return
        told: list[dict[str, Any]] = [{}] * self.world_size
        dist.all_gather_object(told, facts, group=self._control)
        differ = [name for name in facts if any(other[name] != told[0][name] for other in told)]
        if differ:
            values = "; ".join(f"{name}: {', '.join(str(other[name]) for other in told)}" for name in differ)
            raise ConfigError(f"the ranks do not agree ({values}); {help_line}")

    def from_main(self, value: T) -> T:
        """The main rank's value, on every rank."""
        if self.world_size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0, group=self._control)
        return told[0]

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
        raise type(found[0])(*dict.fromkeys(line for one in found for line in one.args))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A user's mistake (or a full disk) found in the body by any rank is raised by all of them at its end.

        The body must not wait for other ranks.
        """
        error: HardbatchError | None = None
        try:
            yield
        except HardbatchError as found:
            error = found
        except OSError as found:
            error = as_user_error(found)
            if error is None:
                raise
        self.raise_together(error)


@contextlib.contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Joins the process group that torchrun describes, for the body. Raises ConfigError where CUDA is missing."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device can be used here; give auto or cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if num_local > torch.cuda.device_count():
            raise ConfigError(
                f"{num_local} ranks on a machine with {torch.cuda.device_count()} GPUs; give torchrun a smaller "
                "--nproc-per-node, or --device cpu"
            )
        torch.cuda.set_device(own)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks(rank=0, world_size=1, device=own)
        return
    dist.init_process_group("nccl" if cuda else "gloo", device_id=own if cuda else None)
    control = dist.new_group(backend="gloo")
    try:
        yield Ranks(rank=dist.get_rank(), world_size=world_size, device=own, _control=control)
    except HardbatchError:
        dist.destroy_process_group()  # all ranks leave together; after any other error the group may hang: let it be
        raise
    dist.destroy_process_group()
