"""What several test files are made of: words for tiny corpora, and pairs that are held in arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

LEXICAL = """
[embed]
model = "lexical"
surrogate_model = "lexical"
"""

WORDS = [
    "river", "stone", "bread", "market", "winter", "letter", "garden",
    "engine", "silver", "window", "doctor", "music", "forest", "paper",
]  # fmt: skip


def make_rows(num_rows: int, start: int = 0, num_topics: int = 7) -> list[dict[str, Any]]:
    """Distinct pairs about a few topics; no text occurs twice on a side."""
    return [
        {"query": f"what is number {i} of topic {i % num_topics}", "document": f"number {i} lies in {i % num_topics}"}
        for i in range(start, start + num_rows)
    ]


class Sides:
    """d and q of pairs that are held in arrays, in the shape of FoldedPoints."""

    def __init__(self, documents: np.ndarray, queries: np.ndarray) -> None:
        self.documents, self.queries, self.dimension = documents, queries, documents.shape[1]

    def __len__(self) -> int:
        return len(self.documents)

    def sides(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.documents[rows].copy(), self.queries[rows].copy()

    def joined(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate(self.sides(rows), axis=1)

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.documents[rows] + self.queries[rows]
