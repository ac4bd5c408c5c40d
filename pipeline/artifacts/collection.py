"""Collections on disk: documents, queries, and judgements of which document answers which query.

Three layouts are known. In each, a part is a file or several, in Parquet, JSON Lines, TSV or CSV, and
ids are strings or whole numbers:

    ours   corpus.parquet   queries.parquet   qrels.parquet
    BEIR   corpus.jsonl     queries.jsonl     qrels/test.tsv
    MTEB   corpus/*         queries/*         data/test-00000-of-00001.parquet (or qrels/, default/)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from hardbatch.pipeline.artifacts.compressed import BROKEN, open_decompressed, without_suffix
from hardbatch.pipeline.errors import InputError, first_line

HELP = "give a folder with corpus.parquet, queries.parquet and qrels.parquet, or one of BEIR or MTEB"

# What the columns are called here, then elsewhere.
DOCUMENTS = {"doc_id": ("_id", "id", "corpus-id"), "text": ()}
TITLE = {"title": ()}
QUERIES = {"query_id": ("_id", "id", "query-id"), "text": ()}
QRELS = {"query_id": ("query-id",), "doc_id": ("corpus-id", "corpus_id"), "score": ("relevance",)}

_FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".tsv": "tsv", ".csv": "csv"}
_QRELS_FOLDERS = ("qrels", "data", "default")
_TREC = {3: ["query-id", "corpus-id", "score"], 4: ["query-id", "iteration", "corpus-id", "score"]}
_TEXTS = ("text", "title")
_BYTES_PER_READ = 2**24
_FAILURES = (pa.ArrowException, ValueError, *BROKEN)


def corpus_files(folder: Path) -> list[Path]:
    """The files of the documents. Raises InputError if there are none."""
    return _part_files(folder, "corpus")


def queries_files(folder: Path) -> list[Path]:
    """The files of the queries. Raises InputError if there are none."""
    return _part_files(folder, "queries")


def qrels_files(folder: Path, split: str) -> list[Path]:
    """The files of the judgements of `split`, or of the only split.

    Raises:
        InputError: There are none, or several splits, of which none is called `split`.
    """
    found = _data_files(folder, "qrels")
    for name in _QRELS_FOLDERS:
        found = found or (_data_files(folder / name, "*") if (folder / name).is_dir() else [])
    splits = dict.fromkeys(map(split_of, found))
    if len(splits) > 1 and split not in splits:
        raise InputError(
            f"{folder}: has judgements of {', '.join(splits)}, but none called {split}; name one of their files, for "
            f"example {found[0].relative_to(folder)}"
        )
    if not found:
        raise InputError(f"{folder / 'qrels.parquet'}: no such file; {HELP}")
    return [path for path in found if split_of(path) == split or len(splits) == 1]


def collection_of(qrels: Path) -> Path | None:
    """The folder of the collection whose judgements `qrels` is, or None if it is not such a file."""
    folder = qrels.parent if split_of(qrels) == "qrels" else qrels.parent.parent
    is_part = folder == qrels.parent or qrels.parent.name in _QRELS_FOLDERS
    return folder if is_part and is_collection(folder) and qrels.suffix in _FORMATS else None


def split_files(qrels: Path) -> tuple[Path, list[Path]]:
    """The folder of the collection whose judgements `qrels` is, and all files of its split."""
    folder = collection_of(qrels)
    if folder is None:
        raise InputError(f"{qrels}: the corpus or the queries beside it were removed or renamed; {HELP}")
    return folder, qrels_files(folder, split_of(qrels))


def is_collection(folder: Path) -> bool:
    """Whether a folder has documents and queries of a collection."""
    try:
        return bool(corpus_files(folder) and queries_files(folder))
    except InputError:
        return False


def split_of(path: Path) -> str:
    """The split that a file is of: test for test.tsv and for test-00000-of-00002.parquet."""
    return re.sub(r"-\d+-of-\d+$", "", Path(without_suffix(path.name)).stem)


def read_batches(
    path: Path, columns: Mapping[str, Sequence[str]], optional: Mapping[str, Sequence[str]] | None = None
) -> Iterator[pa.RecordBatch]:
    """Reads columns of a part of a collection, a record batch at a time.

    Args:
        path: A file of it.
        columns: Columns that it must have, with the other names that they may have.
        optional: Columns that are read if it has them.

    Yields:
        Batches with the columns called as in `columns` and `optional`.

    Raises:
        InputError: The file cannot be read, or a column is missing.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; {HELP}")
    format_ = _format_of(path)
    present: list[str] = []
    try:
        with open_decompressed(path) as stream:
            names, batches = _OPEN[format_](stream, path, {*columns, *(optional or {})})
            present = list(names)
            names_of = _names_in(path, present, columns, optional or {})
            for batch in batches(list(names_of)):
                chosen = batch.select(list(names_of)).rename_columns(list(names_of.values()))
                chosen.validate(full=True)  # else invalid UTF-8 is found only by whoever uses the texts
                for field in chosen.schema:
                    if field.name in _TEXTS and not (_is_text(field.type) or pa.types.is_null(field.type)):
                        raise InputError(f"{path}: column '{field.name}' is {field.type}, expected text")
                yield chosen
    except _FAILURES as error:
        kind = {"parquet": "Parquet", "jsonl": "JSON Lines"}.get(format_, format_.upper())
        raise InputError(f"{path}: cannot be read as {kind}: {first_line(error)}") from None


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _part_files(folder: Path, part: str) -> list[Path]:
    found = _data_files(folder, part) or (_data_files(folder / part, "*") if (folder / part).is_dir() else [])
    if not found:
        raise InputError(f"{folder / part}.parquet: no such file; {HELP}")
    return found


def _data_files(folder: Path, name: str) -> list[Path]:
    """The files NAME.FORMAT of a folder, all of one format."""
    paths = [path for path in sorted(folder.glob(f"{name}.*")) if _format_of(path) and not path.name.startswith(".")]
    return [path for path in paths if _format_of(path) == _format_of(paths[0])]


def _format_of(path: Path) -> str:
    return _FORMATS.get(Path(without_suffix(path.name)).suffix.lower(), "")


def _names_in(
    path: Path,
    present: list[str],
    columns: Mapping[str, Sequence[str]],
    optional: Mapping[str, Sequence[str]],
) -> dict[str, str]:
    """What each column is called in the file, and what it is called here."""
    names_of = {}
    for wanted, others in {**columns, **optional}.items():
        found = next((name for name in (wanted, *others) if name in present), None)
        if found is not None:
            names_of[found] = wanted
        elif wanted in columns:
            raise InputError(f"{path}: no column '{wanted}'; it has: {', '.join(present)}")
    return names_of


def _open_parquet(stream: Any, path: Path, wanted: set[str]) -> Any:
    file = pq.ParquetFile(path)
    return file.schema_arrow.names, lambda names: file.iter_batches(columns=names)


def _open_delimited(stream: Any, path: Path, wanted: set[str]) -> Any:
    delimiter = "\t" if _format_of(path) == "tsv" else ","
    first = stream.readline().decode("utf-8-sig").rstrip("\r\n").split(delimiter)
    stream.seek(0)

    # Judgements in the format of TREC have no header, and TSV has no quoting.
    known = {name for aliases in (DOCUMENTS, QUERIES, QRELS) for key in aliases for name in (key, *aliases[key])}
    header = None if known.intersection(first) or wanted != set(QRELS) else _TREC.get(len(first))
    names = header or first

    def batches(names_read: list[str]) -> Iterator[pa.RecordBatch]:
        return iter(
            pa.csv.open_csv(
                stream,
                pa.csv.ReadOptions(column_names=header, block_size=_BYTES_PER_READ),
                pa.csv.ParseOptions(delimiter=delimiter, quote_char=False if delimiter == "\t" else '"'),
                pa.csv.ConvertOptions(include_columns=names_read, column_types=dict.fromkeys(names, pa.large_utf8())),
            )
        )

    return names, batches


def _open_jsonl(stream: Any, path: Path, wanted: set[str]) -> Any:
    first = json.loads(stream.readline().decode("utf-8-sig") or "{}")
    stream.seek(0)
    if not isinstance(first, dict):
        raise ValueError("its first line is not an object")
    names = list(dict.fromkeys([*first, *(name for name in wanted if name == "title")]))

    def batches(names_read: list[str]) -> Iterator[pa.RecordBatch]:
        # The types of the first row are those of all: pyarrow infers them for each block by itself.
        numbers = [name for name in names_read if isinstance(first.get(name), int) and name not in _TEXTS]
        fields = [(name, pa.int64() if name in numbers else pa.large_utf8()) for name in names_read]
        options = pa.json.ParseOptions(explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore")
        for lines in iter(lambda: stream.readlines(_BYTES_PER_READ), []):
            block = b"".join(lines).removeprefix(b"\xef\xbb\xbf")
            if not block.isspace():
                read = pa.json.ReadOptions(block_size=len(block) + 1)
                yield from pa.json.read_json(pa.BufferReader(block), read, options).to_batches()

    return names, batches


_OPEN = {"parquet": _open_parquet, "jsonl": _open_jsonl, "tsv": _open_delimited, "csv": _open_delimited}
