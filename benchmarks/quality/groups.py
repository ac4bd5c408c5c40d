"""Other ways to make groups of alike pairs, in place of our clusters, tour and refinement.

They are methods of benchmarks/batching.py: the paper's procedure, and B3. Batches are drawn from these groups as from
any others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.vectors import FoldedPoints
from hardbatch.pipeline.batching import pack as module
from hardbatch.pipeline.batching.pack import PackSettings

METHODS = {
    "paper": "shipped: doubled, 256 a centroid, 100 × 3; tour",
    "b3": "b3: mutual neighbours from rank 30 on, METIS",
    "b3-from-0": "b3: mutual neighbours from rank 0 on, METIS",
}


@contextmanager
def groups_made_by(method: str) -> Iterator[None]:
    """Makes the stage `pack` cut groups by that method, a key of METHODS."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import batching

    def make_groups(
        points: FoldedPoints, labels: Array, centroids: Array, settings: PackSettings, classes: Array | None = None
    ) -> tuple[Array, Array]:
        groups, _ = batching.METHODS[METHODS[method]](points, settings.group_size, settings.seed)
        return groups, np.setdiff1d(np.arange(len(points)), groups)

    with patch.object(module, "make_groups", make_groups):
        yield
