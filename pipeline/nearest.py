"""Assigns points to their nearest centroids, by products of blocks; the same for any block size and number of threads.

Shape letters: n points, k clusters, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from pipeline.vectors import Array

_SCORES_HELD = 2**24  # float32 scores of a block of points: 64 MiB
_MIN_BLOCK_ROWS = 64
_NEAR_TIE = 1e-4  # scores are dot products of vectors of norm up to 2 in float32: two orders above their error


@contextmanager
def fast_products() -> Iterator[None]:
    """Lets float32 products use what is fastest on the hardware (TF32, bfloat16 terms, another library)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Nearest:
    """Assigns points to the cluster that maximises c·s − ‖c‖²/2 + price, the lowest id on a tie.

    Takes `centroids_kD` (float32) and `prices_k` (float32; None for zeros).
    """

    def __init__(self, centroids_kD: Array, prices_k: Array | None = None, *, device: str = "cpu") -> None:
        self._centroids = torch.from_numpy(centroids_kD).to(device)
        self._offsets = -0.5 * (self._centroids.double() ** 2).sum(1)
        if prices_k is not None:
            self._offsets += torch.from_numpy(prices_k).to(device)
        self._block_rows = max(_MIN_BLOCK_ROWS, _SCORES_HELD // len(centroids_kD))

    def __call__(self, points_nD: Array, *, exact: bool = True) -> Array:
        """The clusters (int32, n). Not `exact`: products as in `fast_products`, and near-ties stay as they come."""
        assign = self._exactly if exact else self._roughly
        labels = np.empty(len(points_nD), dtype=np.int32)
        for start in range(0, len(points_nD), self._block_rows):
            block = torch.from_numpy(points_nD[start : start + self._block_rows]).to(self._centroids.device)
            labels[start : start + len(block)] = assign(block).cpu().numpy()
        return labels

    def _roughly(self, points: torch.Tensor) -> torch.Tensor:
        with fast_products():
            return torch.addmm(self._offsets.float(), points, self._centroids.T).argmax(1)

    def _exactly(self, points: torch.Tensor) -> torch.Tensor:
        scores = torch.addmm(self._offsets.float(), points, self._centroids.T)
        best = scores.topk(min(2, scores.shape[1]), dim=1)
        chosen = best.indices[:, 0].clone()
        least = best.values[:, 0] - _NEAR_TIE
        for row in torch.nonzero(best.values[:, -1] >= least).flatten().tolist():
            candidates = torch.nonzero(scores[row] >= least[row]).flatten()
            products = self._centroids[candidates].double() * points[row].double()
            chosen[row] = candidates[int((products.sum(1) + self._offsets[candidates]).argmax())]
        return chosen
