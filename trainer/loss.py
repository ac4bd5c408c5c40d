"""InfoNCE from queries to documents within one batch, without the equivalence sets (Eq. 1 and Eq. 4 of the paper).

Shapes: B slots, D embedding width, M hard negatives of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The mean loss (differentiable, float32), and the share of queries whose own document scores highest."""

    value: Tensor
    accuracy: Tensor


def info_nce(
    queries_BD: Tensor,
    documents_BD: Tensor,
    equivalent_BB: Tensor,
    *,
    temperature: float,
    negatives_MD: Tensor | None = None,
    negative_owner_M: Tensor | None = None,
) -> Loss:
    """Computes InfoNCE, in float32 even under autocast.

    Args:
        queries_BD: Unit embeddings of the queries.
        documents_BD: Unit embeddings of their documents.
        equivalent_BB: If `equivalent_BB[i, j]` is True, document j is left out of the softmax of
            query i. The query's own document always stays.
        temperature: Divides the cosines.
        negatives_MD: Unit embeddings of hard negatives.
        negative_owner_M: The slot of the only query that uses each hard negative.
    """
    with torch.autocast(queries_BD.device.type, enabled=False):
        queries_BD = queries_BD.float()
        slots_B = torch.arange(len(queries_BD), device=queries_BD.device)
        own_BB = slots_B[:, None] == slots_B
        scores = (queries_BD @ documents_BD.float().T / temperature).masked_fill(equivalent_BB & ~own_BB, -torch.inf)

        if negatives_MD is not None and negative_owner_M is not None and len(negatives_MD):
            hard_BM = queries_BD @ negatives_MD.float().T / temperature
            foreign_BM = negative_owner_M != slots_B[:, None]
            scores = torch.cat([scores, hard_BM.masked_fill(foreign_BM, -torch.inf)], 1)

        value = F.cross_entropy(scores, slots_B)
        accuracy = (scores.detach().argmax(1) == slots_B).float().mean()
    return Loss(value=value, accuracy=accuracy)


def mask_rate(equivalent_BB: Tensor) -> float:
    """Returns the masked share of the B (B - 1) entries off the diagonal."""
    size = len(equivalent_BB)
    return float(equivalent_BB.sum() / max(1, size * (size - 1)))
