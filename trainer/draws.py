"""The random numbers of a step, which depend only on the seed and the position of the batch.

They never depend on the rank, the step or the time, so a resumed run, another number of ranks and a
second pass over a chunk all draw the same.

Shapes: N texts, J context size.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Returns a seed of 63 bits that depends only on `parts`, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw_context(num_documents: int, context_size: int, *, seed: int, position: int) -> Tensor:
    """Draws the documents that are the context of a batch.

    Returns:
        Their rows (int64), in order: `context_size` of them, or all if there are no more.
    """
    if num_documents <= context_size:
        return torch.arange(num_documents)
    generator = torch.Generator().manual_seed(derive_seed(seed, position, "context"))
    return torch.randperm(num_documents, generator=generator)[:context_size].sort().values


def draw_kept_context(
    num_texts: int, context_size: int, *, sequence_dropout: float, no_context_rate: float, seed: int, position: int
) -> Tensor:
    """Draws which context documents each text reads (Section 4.2).

    Each document of each text is dropped at the rate `sequence_dropout`. At the rate
    `no_context_rate`, all documents of all texts of the batch are dropped, so that a whole batch
    trains embeddings without context.

    Returns:
        `keep_NJ` (bool): False if the text reads the null vector in place of the context document.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, position, "sequence_dropout"))
    if torch.rand((), generator=generator) < no_context_rate:
        return torch.zeros(num_texts, context_size, dtype=torch.bool)
    return torch.rand(num_texts, context_size, generator=generator) >= sequence_dropout


@contextlib.contextmanager
def replayed(device: torch.device, *parts: int | str) -> Iterator[None]:
    """Seeds torch with `parts` for the body, so that dropout masks repeat, and restores the generators afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(*parts))
        yield
