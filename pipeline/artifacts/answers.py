"""Reads what relate wrote: the classes of a domain's texts, and with them which document answers which query."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hardbatch.pipeline.arrays import Array, PairSet
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.vectors import Pairs


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The relation "same answer" of a domain.

    Document d answers query q if a known pair joins a query of q's class with a document of d's class.
    Classes are made from texts alone: two documents of one query remain in two classes.

    Attributes:
        query_class: The class of each query row (int64).
        document_class: The class of each document row (int64), those of hard negatives among them.
        pairs: The known pairs.
    """

    query_class: Array
    document_class: Array
    pairs: Pairs

    @cached_property
    def _known(self) -> PairSet:
        return PairSet(self.query_class[self.pairs.query_row], self.document_class[self.pairs.document_row])

    def answers(self, query_rows: Array, document_rows: Array) -> Array:
        """Whether each document answers each query (bool); the two arrays of rows broadcast.

        For a batch, `answers(query_rows[:, None], document_rows[None, :])` is True on the diagonal.
        """
        return self._known.contains(self.query_class[query_rows], self.document_class[document_rows])


def load_answers(path: Path, pairs: Pairs) -> Answers:
    """Reads the `answers` artifact at `path`. Classes take 8 bytes a text, the known pairs 8 bytes each.

    Args:
        path: The folder of the artifact.
        pairs: The pairs of the same domain.

    Raises:
        IntegrityError: The artifact is incomplete or damaged.
    """
    artifact = read_artifact(path)
    query_class, document_class = (np.load(artifact.path / f"{side}.npy") for side in ("queries", "documents"))
    return Answers(query_class=query_class, document_class=document_class, pairs=pairs)
