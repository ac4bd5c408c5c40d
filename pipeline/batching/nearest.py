"""Assigns points to their nearest centroids, by products of blocks; the same for any block size and number of threads.

Shape letters: n points, k clusters, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from hardbatch.pipeline.arrays import Array

_SCORES_HELD = 2**21  # float32 scores of a block of points: 8 MiB
_SCORES_HELD_ON_GPU = 2**26
_ROWS, _COLUMNS = 512, 32  # products are padded to multiples: oneDNN keeps the code of each shape that it has met
_ROUGH = 1.1 * 2**-8  # of |c||s|: bfloat16 rounds either factor by up to 2^-9 of it, the sum by much less
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

    Takes `centroids_kD` (float32) and `prices_k` (float32; None for zeros). Large buffers on the CPU are numpy's: those
    of torch are aligned, and what glibc frees of aligned pieces it may not find again.
    """

    def __init__(self, centroids_kD: Array, prices_k: Array | None = None, *, device: str = "cpu") -> None:
        k = len(centroids_kD)
        self._device = torch.device(device)
        self._centroids = torch.from_numpy(_padded(centroids_kD, _COLUMNS)).to(self._device)
        squares = (centroids_kD.astype(np.float64) ** 2).sum(1)
        self._longest = float(squares.max()) ** 0.5
        offsets = np.full(len(self._centroids), -np.inf)  # no point is nearest to the padding
        offsets[:k] = -0.5 * squares
        if prices_k is not None:
            offsets[:k] += prices_k
        self._offsets = torch.from_numpy(offsets).to(self._device)
        held = _SCORES_HELD if self._device.type == "cpu" else _SCORES_HELD_ON_GPU
        self._block_rows = max(1, held // len(offsets) // _ROWS) * _ROWS

    def __call__(self, points_nD: Array, *, exact: bool = True) -> Array:
        """The clusters (int32, n). Not `exact`: products as in `fast_products`, and near-ties stay as they come."""
        assign = self._assign_exact if exact else self._assign_low_precision
        labels = np.empty(len(points_nD), dtype=np.int32)
        for start in range(0, len(points_nD), self._block_rows):
            block = points_nD[start : start + self._block_rows]
            chosen = assign(torch.from_numpy(_padded(block, _ROWS)).to(self._device))
            labels[start : start + len(block)] = chosen[: len(block)].cpu().numpy()
        return labels

    def _assign_low_precision(self, points: torch.Tensor) -> torch.Tensor:
        with fast_products():
            return _argmax(self._scores(points))

    def _assign_exact(self, points: torch.Tensor) -> torch.Tensor:
        """In float32 where rough scores do not tell, in float64 where float32 does not either."""
        with fast_products():
            scores = self._scores(points)
        chosen = _argmax(scores)
        best = scores.gather(1, chosen[:, None])
        second = scores.scatter_(1, chosen[:, None], -torch.inf).amax(1)
        slack = 2 * _ROUGH * self._longest * torch.linalg.vector_norm(points, dim=1)
        unsure = torch.nonzero(best[:, 0] - second <= slack).flatten()
        del scores
        if len(unsure) > 0:
            chosen[unsure] = self._assign_float32(_rows(points, unsure))
        return chosen

    def _assign_float32(self, points: torch.Tensor) -> torch.Tensor:
        scores = self._scores(points)
        best = scores.topk(2, dim=1)
        chosen = best.indices[:, 0].clone()
        least = best.values[:, 0] - _NEAR_TIE
        for row in torch.nonzero(best.values[:, 1] >= least).flatten().tolist():
            candidates = torch.nonzero(scores[row] >= least[row]).flatten()
            products = self._centroids[candidates].double() * points[row].double()
            chosen[row] = candidates[int((products.sum(1) + self._offsets[candidates]).argmax())]
        return chosen

    def _scores(self, points: torch.Tensor) -> torch.Tensor:
        shape = len(points), len(self._centroids)
        out = torch.from_numpy(np.empty(shape, dtype=np.float32)) if points.device.type == "cpu" else None
        return torch.addmm(self._offsets.float(), points, self._centroids.T, out=out)


def _argmax(scores: torch.Tensor) -> torch.Tensor:
    """The place of the largest score of each row; on a CPU numpy's takes a tenth of torch's time."""
    return torch.from_numpy(scores.numpy().argmax(1)) if scores.device.type == "cpu" else scores.argmax(1)


def _rows(points: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(points.numpy()[rows.numpy()]) if points.device.type == "cpu" else points[rows]


def _padded(vectors: Array, multiple: int) -> Array:
    """With rows of zeros up to a multiple of rows; the array itself where there is none to add."""
    missing = -len(vectors) % multiple
    return np.concatenate([vectors, np.zeros((missing, vectors.shape[1]), dtype=np.float32)]) if missing else vectors
