"""Hardness: how alike the negatives of a batch are, and the bounds it is measured against.

    H = the mean of c_ij = (d_i·q_j + d_j·q_i) / 2 over ordered pairs of slots i ≠ j, the mean term of Eq. 2
    share = (H − H_random) / (H_knn − H_random)

H_random is the expectation of H over random batches, in closed form. H_knn is the mean over anchors i of their
B−1 largest c_ij among all pairs of the domain, which no partition attains. Masked figures leave out the
equivalence sets, and use the same two bounds. Group hardness is the mean over i ≠ j of one group.

Shape letters: n pairs of the domain, B slots of a batch, A anchors, D dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.batching.points import PairPoints

TEMPERATURE = 0.02  # the paper's
_BLOCK_ROWS = 4_096
_DECIMALS = 6


@dataclass(frozen=True, kw_only=True)
class BatchHardness:
    """Figures of one batch.

    `group_hardness` is None if the batch has no groups of two or more pairs, `masked_hardness` if every
    negative is masked.
    """

    hardness: float
    group_hardness: float | None
    masked_hardness: float | None
    mask_rate: float
    surrogate_loss: float


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What the hardness of a domain is measured against: H_random and H_knn."""

    random: float
    knn: float

    def share(self, hardness: float) -> float:
        """The position of `hardness` between random batches (0) and every pair among its nearest (1)."""
        spread = self.knn - self.random
        return (hardness - self.random) / spread if spread > 0 else 0.0


def measure_batch(
    queries_BD: Array,
    documents_BD: Array,
    mask_BB: Array,
    surrogate_queries_BD: Array,
    surrogate_documents_BD: Array,
    group_size: int = 1,
) -> BatchHardness:
    """Measures one batch.

    Args:
        queries_BD: Vectors of the clustering model, float32.
        documents_BD: The same of the documents.
        mask_BB: The equivalence sets (bool): which slots j are not negatives of slot i.
        surrogate_queries_BD: Vectors of the surrogate, for the loss.
        surrogate_documents_BD: The same of the documents.
        group_size: K, if each K consecutive slots are a group of alike pairs.

    Returns:
        The figures, rounded to 6 decimals. `surrogate_loss` is InfoNCE at τ = 0.02 over what is not masked.
    """
    size = len(queries_BD)
    half_BB = documents_BD.astype(np.float64) @ queries_BD.astype(np.float64).T
    similar_BB = (half_BB + half_BB.T) / 2
    is_negative = ~np.eye(size, dtype=bool)
    unmasked = is_negative & ~mask_BB
    group_B = np.arange(size) // group_size
    is_of_group = is_negative & (group_B[:, None] == group_B)

    scores_BB = surrogate_queries_BD.astype(np.float64) @ surrogate_documents_BD.astype(np.float64).T / TEMPERATURE
    own_B = np.diag(scores_BB).copy()
    scores_BB[mask_BB] = -np.inf
    top_B = scores_BB.max(1)
    loss_B = top_B + np.log(np.exp(scores_BB - top_B[:, None]).sum(1)) - own_B

    return BatchHardness(
        hardness=round(float(similar_BB[is_negative].mean()), _DECIMALS),
        group_hardness=_mean(similar_BB[is_of_group]),
        masked_hardness=_mean(similar_BB[unmasked]),
        mask_rate=round(float(mask_BB[is_negative].mean()), _DECIMALS),
        surrogate_loss=round(float(loss_B.mean()), _DECIMALS),
    )


def _mean(values: Array) -> float | None:
    return round(float(values.mean()), _DECIMALS) if len(values) else None


def measure_bounds(points: PairPoints, batch_size: int, *, num_anchors: int, seed: int) -> Bounds | None:
    """Measures the bounds of a domain for batches of `batch_size`; None if it has fewer pairs than that.

    Takes A·n·2D multiplications, and holds A × 4,096 scores.
    """
    if len(points) < batch_size:
        return None

    anchors = np.sort(np.random.default_rng(seed).permutation(len(points))[:num_anchors])
    documents_AD, queries_AD = (torch.from_numpy(side) for side in points.sides(anchors))
    top_AB = torch.empty((len(anchors), 0))
    document_sum = np.zeros(points.dimension)
    query_sum = np.zeros(points.dimension)
    own_sum = 0.0  # of d_i·q_i
    for start in range(0, len(points), _BLOCK_ROWS):
        rows = np.arange(start, min(start + _BLOCK_ROWS, len(points)))
        documents, queries = points.sides(rows)
        document_sum += documents.sum(0, dtype=np.float64)
        query_sum += queries.sum(0, dtype=np.float64)
        own_sum += float(np.einsum("nd,nd->", documents, queries, dtype=np.float64))

        # c_ij of the anchors and this block, without the anchors' own; of these and the best so far, the best remain.
        similar = documents_AD @ torch.from_numpy(queries).T
        similar.addmm_(queries_AD, torch.from_numpy(documents).T).mul_(0.5)
        inside = (anchors >= start) & (anchors < start + len(rows))
        similar[np.flatnonzero(inside), anchors[inside] - start] = -torch.inf
        top_AB = torch.cat([top_AB, similar], dim=1)
        top_AB = top_AB.topk(min(batch_size - 1, top_AB.shape[1]), dim=1, sorted=False).values

    # Σ_{i≠j} d_i·q_j = (Σd)·(Σq) − Σ d_i·q_i
    n = len(points)
    random = (float(document_sum @ query_sum) - own_sum) / (n * (n - 1))
    return Bounds(random=round(random, _DECIMALS), knn=round(float(top_AB.double().mean()), _DECIMALS))
