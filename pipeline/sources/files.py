"""Where rows come from: the files that a manifest names. `rows.py` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from hardbatch.pipeline.artifacts.files import DigestCache, content_key
from hardbatch.pipeline.config import Dataset
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
_VERSION_FIELDS = (  # what filesystems say about the version of a file, each in its own words
    "ETag", "etag", "sha256", "blob_id", "last_commit", "md5Hash", "Content-MD5", "Digest", "generation",
    "LastModified", "Last-Modified", "last_modified", "updated", "mtime",
)  # fmt: skip


class SourceFile(NamedTuple):
    """A file of a dataset: its name in messages and keys, where it is, how it is read, what its bytes are.

    `modified_ns` is the time of a local file's last change as it was planned with.
    """

    name: str
    location: str
    format: str
    num_bytes: int
    sha256: str
    modified_ns: int | None = None


class RawRow(NamedTuple):
    """One row as the source has it; `problem` (a reason code) and `detail` where it could not be read."""

    row: int
    query: Any
    document: Any
    negatives: Any
    problem: str | None = None
    detail: str = ""


def list_source_files(dataset: Dataset, root: Path, digests: DigestCache) -> list[SourceFile]:
    """The files of a dataset, in the order of the manifest and of their names.

    Local paths are relative to `root` and must stay below it. Raises ConfigError for a path that leads out of it or a
    format that cannot be told, InputError for a file that is not there or is not the expected one.
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
    """`source` below `root`; raises ConfigError where it is absolute or leads out of `root`, also through a link."""
    path = Path(source)
    if path.is_absolute():
        raise ConfigError(f"{where}: path '{source}' is absolute; give it relative to {root}, or set --data-root")
    if ".." in path.parts:
        raise ConfigError(f"{where}: path '{source}' leads out of {root}; give a path below it, or set --data-root")
    try:
        inside = (root / path).resolve().is_relative_to(root.resolve())
        (root / path).exists()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL, a name too long
        raise ConfigError(f"{where}: {source!r} is no usable path: {first_line(error)}") from None
    if not inside:
        raise ConfigError(f"{where}: path '{source}' leads out of {root} through a link; copy the file below it")
    return root / path


def _list_local(source: str, dataset: Dataset, root: Path, digests: DigestCache) -> list[SourceFile]:
    where = f"dataset '{dataset.name}'"
    if any(char in source for char in "*?["):
        local_path(source.split("*")[0].split("?")[0].split("[")[0] or ".", root, where)
        try:
            paths = [path for path in sorted(root.glob(source)) if not path.is_dir()]
        except (ValueError, OSError, NotImplementedError) as error:
            raise ConfigError(f"{where}: '{source}' is no usable pattern: {first_line(error)}") from None
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
    if "::" in source or source.split("://")[0] not in _PROTOCOLS:  # others read local files, or run commands
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
    except Exception as error:  # every filesystem has its own: all mean that the source cannot be reached
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
            raise ConfigError(f"dataset '{dataset.name}': sha256 is given for '{name}', which is none of its files")
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ConfigError(
                f"dataset '{dataset.name}': sha256 is given for '{name}', which may be {names}; give its path"
            )
        if found[0].sha256 != expected:
            raise InputError(f"{found[0].name}: sha256 is {found[0].sha256}, the manifest expects {expected}")


def no_column(file: SourceFile, field: str, name: str, names: list[str]) -> InputError:
    """What to raise where a file has not the column `name`, but `names`."""
    seen = ", ".join(str(name)[:_NAME_CHARACTERS] for name in names[:20])
    return InputError(
        f"{file.name}: no column '{name}' for {field}; it has: {seen}. Map it in the manifest: columns.{field}"
    )
