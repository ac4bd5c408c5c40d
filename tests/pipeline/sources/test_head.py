"""head: the beginning of a remote file, without the rest of it."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from hardbatch.pipeline.errors import UnreachableError
from hardbatch.pipeline.sources import head
from hardbatch.pipeline.sources.files import SourceFile
from hardbatch.pipeline.views.look import look_text

NUM_ROWS = 30_000
WORDS = [f"w{number}" for number in np.random.default_rng(0).integers(0, 10**9, NUM_ROWS)]
ROWS = [{"question": f"how is {word} done", "answer": f"{word},\nby hand"} for word in WORDS]


def as_parquet(rows: list[dict[str, str]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=2_000, compression="none")
    return out.getvalue()


def as_arrow(rows: list[dict[str, str]]) -> bytes:
    table, out = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2_000)
    return out.getvalue()


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = "question,answer\n" + "".join(f'{row["question"]},"{row["answer"]}"\n' for row in ROWS)
TSV = "question\tanswer\n" + "".join(f'"{row["question"]}\tby hand\n' for row in ROWS)
FILES = {
    "a.parquet": as_parquet(ROWS),
    "a.arrow": as_arrow(ROWS),
    "a.jsonl": JSONL,
    "a.jsonl.gz": gzip.compress(JSONL),
    "a.csv": CSV.encode(),
    "a.tsv": TSV.encode(),
}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """A remote filesystem; of a text format, 100,000 bytes are a head."""
    monkeypatch.setattr("hardbatch.pipeline.sources.files._PROTOCOLS", ("memory",))
    monkeypatch.setattr(head, "_HEAD_BYTES", 100_000)
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/bucket", recursive=True)


@pytest.fixture
def num_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads of remote files."""
    sizes: list[int] = []

    def read(self: MemoryFile, size: int = -1) -> bytes:
        data = io.BytesIO.read(self, size)
        sizes.append(len(data))
        return data

    def cat_file(self: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        data = self.store[path].getvalue()[start:end]
        sizes.append(len(data))
        return bytes(data)

    monkeypatch.setattr(MemoryFile, "read", read)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return sizes


@pytest.mark.parametrize("name", FILES)
def test_a_look_at_a_remote_file_reads_its_beginning_once(
    memory: fsspec.AbstractFileSystem, num_read: list[int], name: str
) -> None:
    memory.pipe({f"/bucket/{name}": FILES[name]})
    text = look_text(f"memory://bucket/{name}")
    found = next(line for line in text.split("\n") if line.startswith("of the first "))
    num_kept = int(found.split()[3].replace(",", ""))
    assert "quarantined" not in found and 1_000 < num_kept <= 10_000, text
    assert 'columns = { query = "question", document = "answer" }' in text
    assert 0 < sum(num_read) < len(FILES[name]) / 2


def test_a_file_that_cannot_be_cut_is_fetched_whole(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe({"/bucket/a.json": b"[" + b",".join(JSONL.splitlines()) + b"]"})
    assert "of the first 10,000 pairs, 10,000 would be kept" in look_text("memory://bucket/a.json")


def test_of_several_remote_files_the_first_one_is_looked_at(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe({"/bucket/a.jsonl": b"\n".join(JSONL.splitlines()[:30]), "/bucket/b.jsonl": b"broken"})
    text = look_text("memory://bucket/*.jsonl")
    assert "2 files" in text and "of the first 30 pairs, 30 would be kept" in text


def test_a_remote_file_that_has_gone_is_named(tmp_path: Path) -> None:
    file = SourceFile("memory://bucket/none.jsonl", "memory://bucket/none.jsonl", "jsonl", 0, "")
    with pytest.raises(UnreachableError, match=r"none\.jsonl: cannot be fetched"):
        head.fetch_head(file, tmp_path, 10)
