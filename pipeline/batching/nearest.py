"""Assigns points to their nearest centroids, the same for any block size and number of threads.

An exact assignment has three tiers, because the fastest products of the hardware are imprecise:

    low precision   all points, by the fastest products (TF32 on a GPU, bfloat16 terms on a CPU)
    float32         points whose two best scores are closer than those products may err
    float64         of these, points whose best scores are near-ties of float32 (ties.py)

Few points reach the second tier and fewer the third, so the exact assignment is nearly as fast as
the first tier alone.

Shape letters: n points, k clusters, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from hardbatch.pipeline.arrays import Array, pad_rows
from hardbatch.pipeline.batching.ties import FOLDED_NEAR_TIE, highest

_SCORES_HELD = 2**21  # float32 scores of a block of points: 8 MiB
_SCORES_HELD_ON_GPU = 2**26
_ROWS, _COLUMNS = 512, 32  # shapes of products are padded to multiples of these

# Error of a low-precision product, as a part of |c||s|: bfloat16 rounds either factor by up to 2^-8 of itself, and
# float32 sums add much less.
_LOW_PRECISION_ERROR = 1.05 * 2**-7


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
    """Assigns points to the cluster that maximises c·s − ‖c‖²/2 + price, the lowest id on a tie."""

    def __init__(self, centroids_kD: Array, prices_k: Array | None = None, *, device: str = "cpu") -> None:
        """Takes float32 centroids, and float32 prices or None for zeros."""
        k = len(centroids_kD)
        squares = (centroids_kD.astype(np.float64) ** 2).sum(1)
        self._longest = float(squares.max()) ** 0.5

        # An offset of -inf keeps every point away from the padding.
        self._exact_centroids = pad_rows(centroids_kD, _COLUMNS)
        self._exact_offsets = np.full(len(self._exact_centroids), -np.inf)
        self._exact_offsets[:k] = -0.5 * squares
        if prices_k is not None:
            self._exact_offsets[:k] += prices_k

        self._device = torch.device(device)
        self._centroids = torch.from_numpy(self._exact_centroids).to(self._device)
        self._offsets = torch.from_numpy(self._exact_offsets).float().to(self._device)
        held = _SCORES_HELD if self._device.type == "cpu" else _SCORES_HELD_ON_GPU
        self._block_rows = max(1, held // len(self._offsets) // _ROWS) * _ROWS

    def __call__(self, points_nD: Array, *, exact: bool = True) -> Array:
        """Assigns float32 points, and returns their clusters (int32, n); unless `exact`, in low precision."""
        assign = self._assign_exact if exact else self._assign_low_precision
        labels = np.empty(len(points_nD), dtype=np.int32)
        for start in range(0, len(points_nD), self._block_rows):
            block = points_nD[start : start + self._block_rows]
            chosen = assign(torch.from_numpy(pad_rows(block, _ROWS)).to(self._device))
            labels[start : start + len(block)] = chosen[: len(block)].cpu().numpy()
        return labels

    def _assign_low_precision(self, points: torch.Tensor) -> torch.Tensor:
        with fast_products():
            return _argmax(self._scores(points))

    def _assign_exact(self, points: torch.Tensor) -> torch.Tensor:
        with fast_products():
            scores = self._scores(points)
        chosen = _argmax(scores)
        best = scores.gather(1, chosen[:, None])[:, 0]
        second = scores.scatter_(1, chosen[:, None], -torch.inf).amax(1)
        del scores  # before the next tier needs a block of its own

        # Both scores may err, each in the direction that swaps them.
        error = 2 * _LOW_PRECISION_ERROR * self._longest * torch.linalg.vector_norm(points, dim=1)
        unsure = torch.nonzero(best - second <= error).flatten()
        if len(unsure) > 0:
            chosen[unsure] = self._assign_float32(_rows(points, unsure))
        return chosen

    def _assign_float32(self, points: torch.Tensor) -> torch.Tensor:
        scores = self._scores(points)
        best = scores.topk(2, dim=1)
        chosen = best.indices[:, 0].clone()

        is_near_tie = best.values[:, 1] >= best.values[:, 0] - FOLDED_NEAR_TIE
        for row in torch.nonzero(is_near_tie).flatten().tolist():
            chosen[row] = highest(
                scores[row].cpu().numpy(),
                self._exact_centroids,
                points[row].cpu().numpy(),
                near_tie=FOLDED_NEAR_TIE,
                offsets_k=self._exact_offsets,
            )
        return chosen

    def _scores(self, points: torch.Tensor) -> torch.Tensor:
        shape = len(points), len(self._centroids)
        out = torch.from_numpy(np.empty(shape, dtype=np.float32)) if points.device.type == "cpu" else None
        return torch.addmm(self._offsets, points, self._centroids.T, out=out)


def _argmax(scores: torch.Tensor) -> torch.Tensor:
    """The index of the highest score of each row; on a CPU, numpy needs a tenth of torch's time for it."""
    return torch.from_numpy(scores.numpy().argmax(1)) if scores.device.type == "cpu" else scores.argmax(1)


def _rows(points: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The points at `rows`, on a CPU in a buffer of numpy's (arrays.py)."""
    return torch.from_numpy(points.numpy()[rows.numpy()]) if points.device.type == "cpu" else points[rows]
