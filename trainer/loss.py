"""InfoNCE within one batch, q→d, with the equivalence sets left out (Eq. 1 and Eq. 4 of the paper).

Shapes: B slots, D embedding width, M hard negatives of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Mean loss (differentiable, float32), and the share of queries whose own document scores highest."""

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
    """InfoNCE of unit embeddings; `equivalent_BB[i, j]` leaves document j out of the softmax of query i.

    A query's own document always stays in. Hard negative m is read by the query of slot `negative_owner_M[m]` alone.
    Computed in float32 whatever autocast says.
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
    """Share of the B (B - 1) places off the diagonal that are masked."""
    size = len(equivalent_BB)
    return float(equivalent_BB.sum() / max(1, size * (size - 1)))
