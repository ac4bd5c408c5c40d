"""The processes of a training: their ranks, gradients averaged between them, and errors that end all of them.

torchrun starts several ranks, python alone starts one. Messages between ranks go over gloo on the
CPU, gradients over NCCL on CUDA, so checking on other ranks does not block the GPU.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hardbatch.pipeline.artifacts.files import as_user_error
from hardbatch.pipeline.errors import ConfigError, HardbatchError

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
        """Copies the parameters of the main rank to every rank."""
        if self.world_size > 1:
            for parameter in module.parameters():
                dist.broadcast(parameter.data, src=0)

    def average_gradients(self, module: nn.Module) -> None:
        """Averages the gradients over the ranks, each parameter once and in a fixed order.

        The fixed order makes runs repeat to the bit. It is called once a step, after all batches of
        the step: ranks may compute different numbers of chunks, and a reduction during the backward
        pass could overlap only with the last chunk of each stage.
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
        """Checks that all ranks agree.

        Args:
            facts: What must be equal, by name.
            help_line: What to do if it is not.

        Raises:
            ConfigError: On every rank, if the facts of any two ranks differ.
        """
        if self.world_size == 1:
            return

        gathered: list[dict[str, Any]] = [{}] * self.world_size
        dist.all_gather_object(gathered, facts, group=self._control)
        differ = [name for name in facts if any(other[name] != gathered[0][name] for other in gathered)]
        if differ:
            values = "; ".join(f"{name}: {', '.join(str(other[name]) for other in gathered)}" for name in differ)
            raise ConfigError(f"the ranks do not agree ({values}); {help_line}")

    def from_main(self, value: T) -> T:
        """Returns the main rank's value on every rank."""
        if self.world_size == 1:
            return value

        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def sum(self, *values: float) -> list[float]:
        """Returns the sum of each value over all ranks, in float64."""
        if self.world_size == 1:
            return list(values)

        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._control)
        return [float(value) for value in total]

    def max(self, value: int) -> int:
        """Returns the largest of the ranks' values."""
        if self.world_size == 1:
            return value

        largest = torch.tensor(value)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._control)
        return int(largest)

    def min(self, value: int) -> int:
        """Returns the smallest of the ranks' values."""
        return -self.max(-value)

    def raise_together(self, error: HardbatchError | None) -> None:
        """Raises an error on every rank if any rank has one.

        The error is the same everywhere and contains each message once.
        """
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
    def errors_raised_together(self) -> Iterator[None]:
        """Raises a user's error or a full disk that any rank finds in the body on all ranks, at the end of the body.

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
def join_ranks(device: str, *, timeout_s: int = 1_800) -> Iterator[Ranks]:
    """Joins the process group that torchrun describes, for the body.

    Args:
        device: auto, cpu or cuda.
        timeout_s: Seconds that a rank waits for the others in one exchange before it fails.

    Raises:
        ConfigError: If CUDA is asked for and missing, or if two ranks would share a GPU.
    """
    own = choose_device(device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks(rank=0, world_size=1, device=own)
        return

    # Without `device_id` NCCL connects at its first use, which leaves time to refuse ranks that
    # share a GPU: NCCL itself would end them with an error that names neither.
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=timeout)
    try:
        if own.type == "cuda":
            found: list[tuple[str, str]] = [("", "")] * world_size
            gpu = (socket.gethostname(), str(torch.cuda.get_device_properties(own).uuid))
            dist.all_gather_object(found, gpu, group=control)
            refuse_shared_gpus(found)
        yield Ranks(rank=dist.get_rank(), world_size=world_size, device=own, _control=control)
    except HardbatchError:
        # All ranks leave together. After any other error, destroying the group may hang.
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def choose_device(device: str) -> torch.device:
    """Returns the device of this rank, after setting CUDA up for it; auto is CUDA if there is any.

    A launcher shows each process either all GPUs of a machine (torchrun) or its own alone (Slurm,
    Ray, Kubernetes), so the local rank counts modulo the GPUs that can be seen: local rank 3 takes
    GPU 3 of 8, and GPU 0 of 1.

    Raises:
        ConfigError: If `device` is cuda and there is none.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device can be used here; give auto or cpu")

    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(own)

    # From torch 2.11 on, cuDNN computes attention by default on recent GPUs. It builds a plan for
    # each new shape, which takes longer than the pass itself when lengths vary as they do here, and
    # its backward pass with a mask can give NaN (pytorch#196678). The flash and memory-efficient
    # kernels of torch have neither fault.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return own


def refuse_shared_gpus(gpus: Sequence[tuple[str, str]]) -> None:
    """Raises ConfigError if two ranks have the same GPU.

    Args:
        gpus: The host name and the UUID of the GPU of each rank, in the order of the ranks.
    """
    ranks_of: dict[str, list[int]] = {}
    for rank, (_, uuid) in enumerate(gpus):
        ranks_of.setdefault(uuid, []).append(rank)

    shared = [ranks for ranks in ranks_of.values() if len(ranks) > 1]
    if shared:
        host = gpus[shared[0][0]][0]
        raise ConfigError(
            f"ranks {', '.join(map(str, shared[0]))} have the same GPU of {host}; start one rank for each GPU "
            "(torchrun's --nproc-per-node), or give --device cpu"
        )
