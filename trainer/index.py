"""The index of shards as arrays, and the checks before step 1: what is written holds, down to every footer.

Reads no batch: the manifest has the digest of the index, and the index those of the footers. Shards of format version 1
have no digests of footers; their files are read whole and compared with the manifest, which takes longer.

Legend: I rows of the index.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hardbatch.pipeline.artifacts.artifact import MANIFEST, Artifact
from hardbatch.pipeline.artifacts.files import sha256_file, sha256_outside
from hardbatch.pipeline.artifacts.footer import read_head, record_ranges
from hardbatch.pipeline.errors import IntegrityError

INDEX = "index.parquet"
_COLUMNS = ["batch_id", "packing", "domain", "file", "row_group", "byte_offset", "byte_length", "sha256"]
_SINCE_VERSION_2 = ["footer_sha256", "record_offset", "record_length"]
_SINCE_VERSION_3 = ["same_answer_rate"]
_FOOTER_READERS = 8  # threads


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Where each batch is, and its digest; offsets and lengths are in bytes of its file."""

    files: tuple[str, ...]
    heads: tuple[bytes, ...]  # of each file's footer
    domains: tuple[str, ...]
    batch_ids_I: NDArray[np.int64]
    packings_I: NDArray[np.int32]
    domains_I: NDArray[np.int64]  # indices into `domains`
    files_I: NDArray[np.int64]  # indices into `files`
    row_groups_I: NDArray[np.int32]
    offsets_I: NDArray[np.int64]  # of the row group's data
    lengths_I: NDArray[np.int64]
    record_offsets_I: NDArray[np.int64]  # of the row group's record in the footer
    record_lengths_I: NDArray[np.int64]
    sha256_I: NDArray[np.uint8]  # of the row group's data, I × 32
    same_answer_rates_I: NDArray[np.float64] | None  # share of a batch's B (B - 1) slots that are in `positive_slots`


def read_index(artifact: Artifact) -> Index:
    """Reads and checks the index of a `shards` artifact.

    Raises:
        IntegrityError: If the index or a footer is not what was written, or if the files of the
            folder are not those of the index.
    """
    table = _read_table(artifact)
    files, files_I = _encode(table["file"])
    domains, domains_I = _encode(table["domain"])

    # The manifest, the index and the folder must agree on the files. The pattern finds what
    # scan_parquet("data/*.parquet") reads.
    listed = {name for name in artifact.manifest.files if name.startswith("data/")}
    if listed != set(files):
        name = min(listed ^ set(files))
        raise IntegrityError(
            f"{artifact.path}: {MANIFEST} and {INDEX} differ on {name}; {how_to_repair(artifact.path)}"
        )
    for part in sorted((artifact.path / "data").glob("[!.]*.parquet")):
        if f"data/{part.name}" not in listed:
            raise IntegrityError(
                f"{part}: does not belong to these shards; remove it, or {how_to_repair(artifact.path)}"
            )

    # Footers are read by file; the threads mostly wait for the disk.
    by_file_I = np.argsort(files_I, kind="stable")
    rows_of = np.split(by_file_I, np.searchsorted(files_I[by_file_I], np.arange(1, len(files))))
    with ThreadPoolExecutor(_FOOTER_READERS, thread_name_prefix="footers") as pool:
        parts = list(pool.map(lambda name, rows: _check_footer(artifact, name, table.take(rows)), files, rows_of))
    records_I = np.empty((len(table), 2), dtype=np.int64)
    for rows, (_, records) in zip(rows_of, parts, strict=True):
        records_I[rows] = records

    return Index(
        files=files,
        heads=tuple(head for head, _ in parts),
        domains=domains,
        batch_ids_I=table["batch_id"].to_numpy(),
        packings_I=table["packing"].to_numpy(),
        domains_I=domains_I,
        files_I=files_I,
        row_groups_I=table["row_group"].to_numpy(),
        offsets_I=table["byte_offset"].to_numpy(),
        lengths_I=table["byte_length"].to_numpy(),
        record_offsets_I=records_I[:, 0].copy(),
        record_lengths_I=records_I[:, 1].copy(),
        sha256_I=_digests(table["sha256"]),
        same_answer_rates_I=table["same_answer_rate"].to_numpy() if "same_answer_rate" in table.column_names else None,
    )


def how_to_repair(path: Path) -> str:
    """Returns the advice for a damaged artifact."""
    return f"delete the folder {path} and run the pipeline again to recreate it"


def _read_table(artifact: Artifact) -> pa.Table:
    path = artifact.path / INDEX
    record = artifact.manifest.files.get(INDEX)
    data = b"" if record is None else path.read_bytes()
    if record is None or hashlib.sha256(data).hexdigest() != record.sha256:
        raise IntegrityError(f"{path}: is not what was written: its sha256 differs; {how_to_repair(artifact.path)}")
    file = pq.ParquetFile(pa.BufferReader(data))
    version = artifact.manifest.format_version
    columns = _COLUMNS + (version >= 2) * _SINCE_VERSION_2 + (version >= 3) * _SINCE_VERSION_3
    table = file.read(columns=columns, use_threads=False)
    if missing := set(columns) - set(table.column_names):
        raise IntegrityError(f"{path}: has no column {min(missing)}; {how_to_repair(artifact.path)}")
    return table


def _encode(column: pa.ChunkedArray) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Returns the distinct words of a column, sorted, and for each row the index of its word among them."""
    encoded = column.combine_chunks().dictionary_encode()
    words = encoded.dictionary.to_pylist()
    order = sorted(range(len(words)), key=words.__getitem__)
    return tuple(words[i] for i in order), np.argsort(order)[encoded.indices.to_numpy()]


def _digests(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """Converts digests from 64 hex digits to 32 bytes each."""
    text = column.combine_chunks().buffers()[2]
    return np.frombuffer(bytes.fromhex(text[: 64 * len(column)].to_pybytes().decode()), np.uint8).reshape(-1, 32)


def _check_footer(artifact: Artifact, name: str, rows: pa.Table) -> tuple[bytes, NDArray[np.int64]]:
    """Checks the footer of a file.

    Returns:
        The head of the footer, and (offset, length) of the record of each row of the index in `rows`.
    """
    path = artifact.path / name
    try:
        if "footer_sha256" in rows.column_names:
            ranges = zip(rows["byte_offset"].to_pylist(), rows["byte_length"].to_pylist(), strict=True)
            what, expected, found = "footer", rows["footer_sha256"][0].as_py(), sha256_outside(path, ranges)
            records = np.stack([rows["record_offset"].to_numpy(), rows["record_length"].to_numpy()], axis=1)
        else:
            what, expected, found = "file", artifact.manifest.files[name].sha256, sha256_file(path)
            records = np.array(record_ranges(path))[rows["row_group"].to_numpy()]
        if found != expected:
            raise ValueError(f"the sha256 of the {what} differs")
        return read_head(path), records
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: is not what was written: {error}; {how_to_repair(artifact.path)}") from None
