"""Every random number of a step, from (seed, position of the batch) alone: never from the rank, the step or the time.

So a resumed run, another number of ranks and a second pass over a chunk all draw the same.
Shapes: N texts, J context size, B slots.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits from its parts, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw_context(num_documents: int, context_size: int, *, seed: int, position: int) -> Tensor:
    """Rows (int64) of the documents that are the context of a batch: all of them, or `context_size` drawn ones."""
    if num_documents <= context_size:
        return torch.arange(num_documents)
    generator = torch.Generator().manual_seed(derive_seed(seed, position, "context"))
    return torch.randperm(num_documents, generator=generator)[:context_size].sort().values


def draw_kept_context(
    num_texts: int, context_size: int, *, sequence_dropout: float, no_context_rate: float, seed: int, position: int
) -> Tensor:
    """`keep_NJ` (bool): False where a text reads the null vector in the place of a context document (Section 4.2).

    Each place of each text is dropped with the rate `sequence_dropout`; with the rate `no_context_rate` all places of
    all texts of the batch are, so that a whole batch trains the embeddings that have no context.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, position, "sequence_dropout"))
    if torch.rand((), generator=generator) < no_context_rate:
        return torch.zeros(num_texts, context_size, dtype=torch.bool)
    return torch.rand(num_texts, context_size, generator=generator) >= sequence_dropout


@contextlib.contextmanager
def replayed(device: torch.device, *parts: int | str) -> Iterator[None]:
    """Seeds torch by `parts` for its body and restores the generators after: dropout masks come out the same again."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(*parts))
        yield
