"""Shards as the trainer reads them: checked before step 1, then read batch by batch through their index.

`open_shards` reads the manifest, the sizes of all files, the index and every footer, but no batch.
Each batch is one row group. Its bytes are read in one piece, compared with the digest in the index,
and only then parsed, with the record of this row group alone (`pipeline/artifacts/footer.py`).
Nothing stays open or cached, so a batch costs the same from one file or from any of thousands, and
threads share nothing.

Legend: B slots of a batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hardbatch.pipeline.artifacts.artifact import MANIFEST, Artifact, read_artifact
from hardbatch.pipeline.artifacts.footer import MAGIC, end_of_file
from hardbatch.pipeline.errors import ConfigError, IntegrityError
from hardbatch.pipeline.schemas import SHARDS_WITH_NEGATIVES
from hardbatch.trainer.index import Index, how_to_repair, read_index
from hardbatch.trainer.order import BatchOrder

_COLUMNS = ["batch_id", "slot", "query", "document", "query_prompt", "document_prompt", "equivalent_slots"]
_MAX_SUGGESTED = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class TextBatch:
    """One batch as text, by slot: the content of a row group.

    Texts do not include their prompts. `negatives` is a list for each slot, or None if the shards
    have none. `equivalent_BB[i, j]` is True if document j may answer query i too and is therefore
    not used as a negative of it. `positive_BB[i, j]` is True if it answers query i for certain, which
    implies the former; None if the shards are of a format before version 3 and do not say so. Both
    are False on the diagonal. `extra["score"]` has the values of the extra column `score`.
    """

    position: int
    batch_id: int
    domain: str
    queries: list[str]
    documents: list[str]
    query_prompts: list[str]
    document_prompts: list[str]
    negatives: list[list[str]] | None
    equivalent_BB: NDArray[np.bool_]
    positive_BB: NDArray[np.bool_] | None
    extra: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shards:
    """A complete `shards` artifact whose index and footers have been checked; made by `open_shards`."""

    path: Path
    key: str
    batch_size: int
    num_batches: int  # over all packings
    domains: tuple[str, ...]  # those that have batches
    prompts: dict[str, tuple[str, str]]  # domain → prompt of a query, prompt of a document
    weights: dict[str, float]  # domain → how often an epoch reads its batches
    with_negatives: bool
    with_positives: bool  # since format version 3
    pairs: tuple[str, ...]  # the pairs artifacts that they come from, as pairs/DOMAIN/KEY below the corpus
    index: Index
    extra: tuple[str, ...] = ()  # the extra columns, and the places of hard negatives that go with them

    def order(
        self, *, seed: int = 0, weights: Mapping[str, float] | None = None, similar_lengths: int = 1
    ) -> BatchOrder:
        """Returns the order of batches for a seed; `weights` replaces those of the shards for the domains it names."""
        return BatchOrder(
            batch_ids_I=self.index.batch_ids_I,
            packings_I=self.index.packings_I,
            domains_I=self.index.domains_I,
            domains=self.domains,
            weights={**self.weights, **(weights or {})},
            seed=seed,
            lengths_I=self.index.lengths_I,
            similar_lengths=similar_lengths,
        )

    def read_batch(self, row: int, position: int) -> TextBatch:
        """Reads the batch in row `row` of the index; several threads may call this at once.

        Raises:
            IntegrityError: If the bytes are not those that were written; names the file and the batch.
        """
        index, size = self.index, self.batch_size
        columns = _COLUMNS + ["negatives"] * self.with_negatives + ["positive_slots"] * self.with_positives
        columns += self.extra

        try:
            # Not memory-mapped: a file that is truncated while it is read would end the process.
            with pa.OSFile(f"{self.path}/{index.files[index.files_I[row]]}") as file:
                data = file.read_at(int(index.lengths_I[row]), int(index.offsets_I[row]))
                if hashlib.sha256(data).digest() != index.sha256_I[row].tobytes():
                    raise self._damage(row, "is not what was written: its sha256 differs")

                # A footer that lists this row group alone, for pyarrow to parse.
                record = file.read_at(int(index.record_lengths_I[row]), int(index.record_offsets_I[row]))
                end = pa.BufferReader(MAGIC + end_of_file(index.heads[index.files_I[row]], record))
                parquet = pq.ParquetFile(file, metadata=pq.read_metadata(end), pre_buffer=False)
                table = parquet.read_row_group(0, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
            raise self._damage(row, f"cannot be read: {reason}") from error

        batch_id = int(index.batch_ids_I[row])
        if not table["slot"].equals(_slots(size)) or (table["batch_id"].to_numpy() != batch_id).any():
            raise self._damage(row, f"does not hold slots 0 to {size - 1} of that batch")

        return TextBatch(
            position=position,
            batch_id=batch_id,
            domain=index.domains[index.domains_I[row]],
            queries=table["query"].to_pylist(),
            documents=table["document"].to_pylist(),
            query_prompts=table["query_prompt"].to_pylist(),
            document_prompts=table["document_prompt"].to_pylist(),
            negatives=table["negatives"].to_pylist() if self.with_negatives else None,
            equivalent_BB=_as_matrix(table["equivalent_slots"].combine_chunks(), size),
            positive_BB=_as_matrix(table["positive_slots"].combine_chunks(), size) if self.with_positives else None,
            extra={name: table[name].to_pylist() for name in self.extra},
        )

    def _damage(self, row: int, what: str) -> IntegrityError:
        index = self.index
        where = f"batch {index.batch_ids_I[row]} (row group {index.row_groups_I[row]})"
        return IntegrityError(
            f"{self.path / index.files[index.files_I[row]]}: {where} {what}; {how_to_repair(self.path)}"
        )


def open_shards(path: Path | str) -> Shards:
    """Opens the shards in the folder `path`, and checks everything but the batches themselves.

    Raises:
        ConfigError: If `path` is not a folder of shards.
        IntegrityError: If the shards are incomplete or of a newer format, or if the manifest, the
            size of a file, the index or a footer is not what was written.
    """
    artifact = _find(Path(path).resolve() if Path(path).is_symlink() else Path(path))  # `latest` may move on
    index = read_index(artifact)
    config = artifact.manifest.config
    datasets = config["datasets"]
    columns = pq.read_schema(artifact.path / index.files[0]).names
    return Shards(
        path=artifact.path,
        key=artifact.manifest.key,
        batch_size=config["batch_size"],
        num_batches=len(index.batch_ids_I),
        domains=index.domains,
        prompts={name: (dataset["query_prompt"], dataset["document_prompt"]) for name, dataset in datasets.items()},
        weights={name: float(datasets[name]["weight"]) for name in index.domains if name in datasets},
        with_negatives="negatives" in columns,
        with_positives="positive_slots" in columns,
        pairs=tuple(f"{name}/{key}" for name, key in artifact.manifest.inputs.items() if name.startswith("pairs/")),
        index=index,
        extra=tuple(name for name in columns if name not in SHARDS_WITH_NEGATIVES.names),
    )


def load_shards(folder: str | Path) -> Shards:
    """Opens the shards in `folder`, the path that `hardbatch run` and `run_corpus` return.

    Checks the manifest, the sizes of all files, the index and every footer. Batches are read, and compared with their
    digests, one at a time: `shards.read_batch(row, position)` reads one, and `BatchStream(shards)` reads them in order.

    Raises:
        ConfigError: `folder` does not hold shards.
        IntegrityError: The shards are incomplete or damaged.
    """
    return open_shards(Path(folder))


@lru_cache(maxsize=4)
def _slots(size: int) -> pa.ChunkedArray:
    return pa.chunked_array([np.arange(size, dtype=np.int32)])


def _as_matrix(slots: pa.ListArray, size: int) -> NDArray[np.bool_]:
    """Returns a list of slots for each slot as a matrix: row i is True at the slots of list i."""
    ends, values = slots.offsets.to_numpy(), slots.values.to_numpy()
    matrix_BB = np.zeros((size, size), dtype=np.bool_)
    matrix_BB[np.repeat(np.arange(size), ends[1:] - ends[:-1]), values[ends[0] : ends[-1]]] = True
    return matrix_BB


def _find(path: Path) -> Artifact:
    """Returns the artifact at `path`; a folder that a user may confuse with it is refused with advice."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such folder"
        raise ConfigError(f"{path}: {what}; give the folder of the shards, the last line that `hardbatch run` prints")
    if not (path / MANIFEST).is_file():
        if (path / "units").is_dir():
            raise IntegrityError(f"{path}: no {MANIFEST} yet, so these shards are not complete; run the pipeline again")
        raise ConfigError(f"{path}: holds no shards{_suggest(path)}")

    artifact = read_artifact(path)
    if artifact.manifest.stage != "shards":
        raise ConfigError(
            f"{path}: holds {artifact.manifest.stage}, not shards; give the folder .../shards/KEY, the last line that "
            "`hardbatch run` prints"
        )
    return artifact


def _suggest(path: Path) -> str:
    if path.name == "data" and (path.parent / MANIFEST).is_file():
        return f" but their part files; give the folder above: {path.parent}"

    found = [
        manifest.parent
        for pattern in ("*", "shards/*", "*/shards/*")
        for manifest in sorted(path.glob(f"{pattern}/{MANIFEST}"))
        if manifest.parent.parent.resolve().name == "shards"
    ]
    if not found:
        return "; give the folder .../shards/KEY, the last line that `hardbatch run` prints"
    listed = ", ".join(map(str, found[:_MAX_SUGGESTED])) + (", ..." if len(found) > _MAX_SUGGESTED else "")
    return f" itself; give {'this folder' if len(found) == 1 else 'one of these folders'} in it: {listed}"
