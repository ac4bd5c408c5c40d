"""InfoNCE from queries to documents within one batch, without the equivalence sets (Eqs. 1 and 4).

A query may have more positives than its own document: the documents of the batch that are known to
answer it as well. Its loss is then the mean over its positives p of InfoNCE with p as the only
positive, where the other positives are left out of the softmax as all equivalent documents are:

    loss_i = 1/|P(i)| Σ_{p ∈ P(i)} −log( exp(s_ip) / (exp(s_ip) + Σ_{n ∈ N(i)} exp(s_in)) )

- The mean is outside the logarithm, as in L_out of SupCon (Khosla et al. 2020, Eq. 2). Inside it,
  the positive with the highest score would receive nearly the whole gradient.
- SupCon keeps the other positives in the denominator. At τ = 0.02 that pushes away every positive
  that scores above the rest, the own document included, and the loss cannot reach 0.
- Each query has the same weight, however many positives it has. With one positive, the loss is
  InfoNCE.

Shapes: B slots, D embedding width, M hard negatives of the whole batch, N = B + M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of a batch.

    Attributes:
        value: The mean over queries (differentiable, float32).
        accuracy: The share of queries whose own document scores above all their negatives.
    """

    value: Tensor
    accuracy: Tensor


def info_nce(
    queries_BD: Tensor,
    documents_BD: Tensor,
    equivalent_BB: Tensor,
    *,
    temperature: float,
    positive_BB: Tensor | None = None,
    negatives_MD: Tensor | None = None,
    negative_owner_M: Tensor | None = None,
) -> Loss:
    """Computes InfoNCE, in float32 even under autocast.

    Args:
        queries_BD: Unit embeddings of the queries.
        documents_BD: Unit embeddings of their documents.
        equivalent_BB: If `equivalent_BB[i, j]` is True, document j is not a negative of query i.
            The query's own document always stays.
        temperature: Divides the cosines.
        positive_BB: If `positive_BB[i, j]` is True, document j is a positive of query i, beside its
            own document. None if the own documents are the only positives.
        negatives_MD: Unit embeddings of hard negatives.
        negative_owner_M: The slot of the only query that uses each hard negative.
    """
    with torch.autocast(queries_BD.device.type, enabled=False):
        queries_BD = queries_BD.float()
        slots_B = torch.arange(len(queries_BD), device=queries_BD.device)
        own_BB = slots_B[:, None] == slots_B
        masked_BB = equivalent_BB if positive_BB is None else equivalent_BB | positive_BB
        cosines_BB = queries_BD @ documents_BD.float().T / temperature
        scores_BN = cosines_BB.masked_fill(masked_BB & ~own_BB, -torch.inf)

        if negatives_MD is not None and negative_owner_M is not None and len(negatives_MD):
            hard_BM = queries_BD @ negatives_MD.float().T / temperature
            foreign_BM = negative_owner_M != slots_B[:, None]
            scores_BN = torch.cat([scores_BN, hard_BM.masked_fill(foreign_BM, -torch.inf)], 1)

        if positive_BB is None:
            value = F.cross_entropy(scores_BN, slots_B)
        else:
            value = _mean_over_positives(cosines_BB, scores_BN, positive_BB | own_BB)
        accuracy = (scores_BN.detach().argmax(1) == slots_B).float().mean()
    return Loss(value=value, accuracy=accuracy)


def mask_rate(equivalent_BB: Tensor) -> float:
    """Returns the masked share of the B (B - 1) entries off the diagonal."""
    size = len(equivalent_BB)
    return float(equivalent_BB.sum() / max(1, size * (size - 1)))


def _mean_over_positives(cosines_BB: Tensor, scores_BN: Tensor, positive_BB: Tensor) -> Tensor:
    """Returns the loss of this module's docstring; its memory is that of the scores.

    −log(exp(s) / (exp(s) + exp(n))) is softplus(n − s), where n is the log-sum-exp over the
    negatives: −inf, and hence a loss of 0, for a query that has none.
    """
    own_BN = torch.eye(*scores_BN.shape, dtype=torch.bool, device=scores_BN.device)
    negatives_B = scores_BN.masked_fill(own_BN, -torch.inf).logsumexp(1)
    losses_BB = F.softplus(negatives_B[:, None] - cosines_BB).masked_fill(~positive_BB, 0.0)
    return (losses_BB.sum(1) / positive_BB.sum(1)).mean()
