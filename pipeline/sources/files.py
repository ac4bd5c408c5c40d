"""The files that a manifest names as sources; `rows.py` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from hardbatch.pipeline.artifacts.files import DigestCache, content_key
from hardbatch.pipeline.config import Columns, Dataset
from hardbatch.pipeline.errors import ConfigError, InputError, UnreachableError, first_line

_FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
}
_NAME_CHARACTERS = 60
_PROTOCOLS = ("hf", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hdfs", "webhdfs", "https", "http")
_VERSION_FIELDS = (  # what the filesystems call the version of a file
    "ETag", "etag", "sha256", "blob_id", "last_commit", "md5Hash", "Content-MD5", "Digest", "generation",
    "LastModified", "Last-Modified", "last_modified", "updated", "mtime",
)  # fmt: skip


class SourceFile(NamedTuple):
    """A file of a dataset.

    Attributes:
        name: What messages and keys call it.
        location: Its path or URL.
        format: parquet, jsonl, csv, tsv or python.
        num_bytes: Its size.
        sha256: The digest of its bytes; for a remote file one of its name, size and version, unless it was given.
        modified_ns: When a local file was last changed, as of planning.
    """

    name: str
    location: str
    format: str
    num_bytes: int
    sha256: str
    modified_ns: int | None = None


class RawRow(NamedTuple):
    """One row as the source has it; `problem` (a reason code) and `detail` say why it could not be read."""

    row: int
    query: Any
    document: Any
    negatives: Any
    problem: str | None = None
    detail: str = ""


def list_source_files(dataset: Dataset, root: Path, digests: DigestCache) -> list[SourceFile]:
    """Lists the files of a dataset, in the order of the manifest and of their names.

    Args:
        dataset: The dataset of the manifest.
        root: The folder that local paths are relative to, and must stay below.
        digests: Digests of local files; new ones are added.

    Raises:
        ConfigError: A path leads out of `root`, or the format of a file is unknown.
        InputError: A file does not exist, or is not the one that `dataset.sha256` expects.
        UnreachableError: A remote source does not answer.
    """
    files: list[SourceFile] = []
    for source in dataset.sources:
        if source.startswith("python:"):
            files += _list_python(source, digests)
        elif "://" in source or "::" in source:
            files += _list_remote(source, dataset)
        else:
            files += _list_local(source, dataset, root, digests)
    _check_digests(dataset, files)
    return files


def local_path(source: str, root: Path, where: str) -> Path:
    """Resolves a local path; `where` is how a message starts.

    Raises:
        ConfigError: `source` is absolute or leads out of `root`, directly or through a link.
    """
    path = Path(source)
    if path.is_absolute():
        raise ConfigError(f"{where}: path '{source}' is absolute; give it relative to {root}, or set --data-root")
    if ".." in path.parts:
        raise ConfigError(f"{where}: path '{source}' leads out of {root}; give a path below it, or set --data-root")
    try:
        inside = (root / path).resolve().is_relative_to(root.resolve())
        (root / path).exists()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL, a name too long
        raise ConfigError(f"{where}: {source!r} is not a usable path: {first_line(error)}") from None
    if not inside:
        raise ConfigError(f"{where}: path '{source}' leads out of {root} through a link; copy the file below it")
    return root / path


def _list_local(source: str, dataset: Dataset, root: Path, digests: DigestCache) -> list[SourceFile]:
    where = f"dataset '{dataset.name}'"
    if any(char in source for char in "*?["):
        # The folders in front of the pattern are checked before it is looked up; what it finds is checked below.
        local_path(source.split("*")[0].split("?")[0].split("[")[0] or ".", root, where)
        try:
            paths = [path for path in sorted(root.glob(source)) if not path.is_dir()]
        except (ValueError, OSError, NotImplementedError) as error:
            raise ConfigError(f"{where}: '{source}' is not a usable pattern: {first_line(error)}") from None
        if not paths:
            raise InputError(f"{where}: no file matches '{source}' below {root}; --data-root names another folder")
    else:
        paths = [local_path(source, root, where)]
    files = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        local_path(name, root, where)
        if path.is_dir():
            raise InputError(f"{where}: '{name}' is a folder; name its files, for example '{name}/*.parquet'")
        if not path.exists():
            raise InputError(f"{where}: no file '{name}' below {root}; --data-root names another folder")
        files.append(_local_file(name, path, _format_of(name, dataset), digests))
    return files


def _local_file(name: str, path: Path, format_: str, digests: DigestCache) -> SourceFile:
    try:
        name.encode()
        stat = path.stat()
    except UnicodeEncodeError:
        raise InputError(f"{name}: its name is not UTF-8; rename the file") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from None
    return SourceFile(name, str(path), format_, stat.st_size, digests.digest(path), stat.st_mtime_ns)


def _list_remote(source: str, dataset: Dataset) -> list[SourceFile]:
    where = f"dataset '{dataset.name}'"
    # Other protocols read local files or run commands, and chained ones can do so too.
    if "::" in source or source.split("://")[0] not in _PROTOCOLS:
        raise ConfigError(
            f"{where}: '{source}': give a local file as a path below the data root, a remote one as one URL "
            f"({', '.join(f'{protocol}://' for protocol in _PROTOCOLS)})"
        )
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        paths = sorted(filesystem.glob(path)) if any(char in path for char in "*?[") else [path]
        infos = [filesystem.info(path) for path in paths]
    except ImportError as error:
        raise ConfigError(f"{where}: '{source}' needs a package that is not installed: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{where}: '{source}': {error}") from None
    except Exception as error:  # every filesystem has its own errors: all mean that the source cannot be reached
        raise UnreachableError(f"{where}: '{source}' cannot be reached: {first_line(error)}") from None
    if any(info.get("type") == "directory" for info in infos):
        raise InputError(f"{where}: '{source}' is a folder; name its files, for example '{source}/*.parquet'")
    if not infos:
        raise InputError(f"{where}: no file matches '{source}'")
    files = []
    for path, info in zip(paths, infos, strict=True):
        name = filesystem.unstrip_protocol(path)
        known = [info.get(field) for field in _VERSION_FIELDS]
        digest = dataset.sha256.get(Path(path).name) or content_key(name=name, size=info.get("size"), known=str(known))
        files.append(SourceFile(name, name, _format_of(path, dataset), int(info.get("size") or 0), digest))
    return files


def _list_python(source: str, digests: DigestCache) -> list[SourceFile]:
    from hardbatch.pipeline.sources.python import list_modules

    package = source.removeprefix("python:")
    return [_local_file(f"python:{name}", path, "python", digests) for name, path in list_modules(package)]


def _format_of(name: str, dataset: Dataset) -> str:
    if dataset.format != "auto":
        return dataset.format
    suffix = Path(name.removesuffix(".gz").removesuffix(".zst")).suffix.lower()
    if suffix not in _FORMATS:
        raise ConfigError(
            f"dataset '{dataset.name}': cannot tell the format of '{name}' from its name; "
            "set format to parquet, jsonl, csv or tsv"
        )
    return _FORMATS[suffix]


def _check_digests(dataset: Dataset, files: list[SourceFile]) -> None:
    for name, expected in dataset.sha256.items():
        found = [file for file in files if name in (file.name, Path(file.name).name)]
        if not found:
            raise ConfigError(f"dataset '{dataset.name}': sha256 is given for '{name}', which is not one of its files")
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ConfigError(
                f"dataset '{dataset.name}': sha256 is given for '{name}', which could be {names}; give its path"
            )
        if found[0].sha256 != expected:
            raise InputError(f"{found[0].name}: sha256 is {found[0].sha256}, the manifest expects {expected}")


def mapped_columns(file: SourceFile, columns: Columns, present: list[str]) -> dict[str, str]:
    """The column for each field that the manifest maps; InputError if the file does not have it exactly once."""
    fields = {"query": columns.query, "document": columns.document, "negatives": columns.negatives}
    mapped = {field: name for field, name in fields.items() if name is not None}
    for field, name in mapped.items():
        if name not in present:
            raise no_column(file, field, name, present)
        if present.count(name) > 1:
            raise InputError(f"{file.name}: column '{name}' ({field}) occurs {present.count(name)} times; rename one")
    return mapped


def no_column(file: SourceFile, field: str, name: str, present: list[str]) -> InputError:
    """The error for a file that does not have the column `name` for a field."""
    seen = ", ".join(str(name)[:_NAME_CHARACTERS] for name in present[:20])
    return InputError(
        f"{file.name}: no column '{name}' for {field}; it has: {seen}. Map it in the manifest: columns.{field}"
    )
