"""The files that a manifest names as sources; `rows.py` reads them."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hardbatch.pipeline.artifacts.collection import (
    collection_of,
    corpus_files,
    is_collection,
    qrels_files,
    queries_files,
    split_files,
)
from hardbatch.pipeline.artifacts.compressed import without_suffix
from hardbatch.pipeline.artifacts.files import DigestCache, content_key, user_path
from hardbatch.pipeline.config import Dataset
from hardbatch.pipeline.errors import ConfigError, InputError, UnreachableError, first_line

_FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
}
_PROTOCOLS = ("hf", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hdfs", "webhdfs", "https", "http")
_MAGIC = "*?["
_SPLIT = "train"  # of a collection that has several

# What Spark, Hadoop and Delta Lake leave beside the data.
_MARKER = re.compile(r"_SUCCESS|_metadata|_common_metadata|_temporary|_delta_log|_(committed|started)_.*")
_HUB_NAME = re.compile(r"[\w-]+/[\w-]+")
_VERSION_FIELDS = (  # what the filesystems call the version of a file
    "ETag", "etag", "sha256", "blob_id", "last_commit", "md5Hash", "Content-MD5", "Digest", "generation",
    "LastModified", "Last-Modified", "last_modified", "updated", "mtime",
)  # fmt: skip


class SourceFile(NamedTuple):
    """A file of a dataset.

    Attributes:
        name: What messages and keys call it.
        location: Its path or URL.
        format: parquet, arrow, jsonl, csv, tsv, python or collection.
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
    """A pair as the source has it; `problem` (a reason code) and `detail` say why it could not be read.

    `negatives` is a list, or None if none are mapped. `extra` has the values of the extra columns. A row of the
    source may be several pairs.
    """

    row: int
    query: Any
    document: Any
    negatives: Any
    problem: str | None = None
    detail: str = ""
    extra: Sequence[Any] = ()


def list_source_files(
    dataset: Dataset, root: Path, digests: DigestCache, *, follow_links: bool = False
) -> list[SourceFile]:
    """Lists the files of a dataset, in the order of the manifest and of their names.

    A pattern is matched as in a shell: `*` does not match hidden names, and `**` means any folders. A
    name that exists is taken literally, whatever signs it has.

    Args:
        dataset: The dataset of the manifest.
        root: The folder that local paths are relative to, and must stay below.
        digests: Digests of local files; new ones are added.
        follow_links: Whether links may lead out of `root`.

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
            files += _list_local(source, dataset, root, digests, follow_links)
    _check_digests(dataset, files)
    return files


def local_path(source: str, root: Path, where: str, *, follow_links: bool = False) -> Path:
    """Resolves a local path; `where` is how a message starts.

    Raises:
        ConfigError: `source` leads out of `root`, directly or through a link. Links of a snapshot in the
            hub's cache may lead to the blobs of the same repository.
    """
    path = _below(source, root, where)
    try:
        resolved = (root / path).resolve()
        (root / path).exists()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL, a name too long
        raise ConfigError(f"{where}: {source!r} is not a usable path: {first_line(error)}") from None
    if not follow_links and not any(map(resolved.is_relative_to, (root.resolve(), *_hub_blobs(root)))):
        raise ConfigError(
            f"{where}: path '{source}' leads out of {root} through a link; to allow that: --follow-links, or set "
            "--data-root to a folder above both"
        )
    return root / path


def _below(source: str, root: Path, where: str) -> Path:
    """`source` relative to `root`; ~ is the home folder, and an absolute path may be one below `root`."""
    path = user_path(source)
    if ".." in path.parts:
        raise ConfigError(f"{where}: path '{source}' leads out of {root}; give a path below it, or set --data-root")
    if not path.is_absolute():
        return path
    if not path.is_relative_to(root.absolute()):
        raise ConfigError(
            f"{where}: path '{source}' is absolute and not below {root}; give it relative to that folder, or set "
            "--data-root"
        )
    return path.relative_to(root.absolute())


def _hub_blobs(root: Path) -> list[Path]:
    """The blobs that the links of a snapshot lead to, if `root` is one: REPOSITORY/snapshots/COMMIT/..."""
    resolved = root.resolve()
    return [folder.parent / "blobs" for folder in resolved.parents if folder.name == "snapshots" and folder != resolved]


def _list_local(
    source: str, dataset: Dataset, root: Path, digests: DigestCache, follow_links: bool
) -> list[SourceFile]:
    where = f"dataset '{dataset.name}'"

    def checked(path: Path) -> Path:
        return local_path(path.relative_to(root).as_posix(), root, where, follow_links=follow_links)

    is_pattern = any(sign in source for sign in _MAGIC)
    try:
        found = sorted(set(_match(root, _below(source, root, where).parts, checked)))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}: {source!r} is not a usable path or pattern: {first_line(error)}") from None
    paths = [path for path in found if not is_pattern or (os.path.lexists(path) and not path.is_dir())]
    if not paths:
        raise InputError(f"{where}: no file matches '{source}' below {root}; --data-root names another folder")
    files = []
    for path in paths:
        checked(path)
        judgements = _judgements(path) if dataset.format == "auto" else None
        if judgements is not None:
            for part in _collection_paths(judgements):
                checked(part)
            file = _collection_file(judgements.relative_to(root).as_posix(), judgements, digests)
            files += [file] if file not in files else []  # a pattern may name each file of a split
            continue
        for part in _folder_files(path, root, where) if path.is_dir() else [path]:
            checked(part)
            name = part.relative_to(root).as_posix()
            if not part.exists():
                why = ": it is a link to a file that is not there; fetch that" if part.is_symlink() else ""
                hub = f"; of a dataset on the Hugging Face hub, name the files: hf://datasets/{source}/**/*.parquet"
                why += hub if _HUB_NAME.fullmatch(source) else ""
                raise InputError(f"{where}: no file '{name}' below {root}{why}; --data-root names another folder")
            if part.stat().st_size > 0 or not _is_written_by_spark(part, root):
                files.append(_local_file(name, part, _format_of(name, dataset), digests))
    if not files:
        raise InputError(f"{where}: all files of '{source}' are empty; check what wrote them")
    return files


def _judgements(path: Path) -> Path | None:
    """The first file of the judgements, if `path` is a collection or a file of its judgements."""
    if path.is_dir() and is_collection(path):
        return qrels_files(path, _SPLIT)[0]
    return split_files(path)[1][0] if path.is_file() and collection_of(path) is not None else None


def _collection_paths(judgements: Path) -> list[Path]:
    folder, qrels = split_files(judgements)
    return [*corpus_files(folder), *queries_files(folder), *qrels]


def _collection_file(name: str, judgements: Path, digests: DigestCache) -> SourceFile:
    """A split of a collection; its digest is of all files that are read, and names the texts by their ids."""
    paths = _collection_paths(judgements)
    joined = "".join(digests.digest(path) for path in paths)
    digest = hashlib.sha256(joined.encode()).hexdigest()
    num_bytes, modified_ns = _state(paths)
    return SourceFile(name, str(judgements), "collection", num_bytes, digest, modified_ns)


def state_of(file: SourceFile) -> tuple[int, int]:
    """Size and time of the last change of a local file as they are now; raises OSError if it is gone."""
    path = Path(file.location)
    return _state(_collection_paths(path) if file.format == "collection" else [path])


def _state(paths: list[Path]) -> tuple[int, int]:
    stats = [path.stat() for path in paths]
    return sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)


def _match(folder: Path, parts: tuple[str, ...], checked: Callable[[Path], Path]) -> Iterator[Path]:
    """The paths below `folder` that the parts of a path or pattern mean; `checked` sees each folder before it is read.

    Parts without signs are appended even if they do not exist.
    """
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        yield from _match(folder, rest or ("*",), checked)
        for child in _visible(checked(folder)):
            if child.is_dir() and not child.is_symlink():
                yield from _match(child, parts, checked)
    elif (folder / part).exists() or not any(sign in part for sign in _MAGIC):
        yield from _match(folder / part, rest, checked)
    elif folder.is_dir():
        children = checked(folder).iterdir() if part.startswith((".", "_")) else _visible(checked(folder))
        for child in children:
            if fnmatch.fnmatchcase(child.name, part) and (not rest or child.is_dir()):
                yield from _match(child, rest, checked)


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not _is_hidden(path.name)] if folder.is_dir() else []


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or _MARKER.fullmatch(name) is not None


def _is_written_by_spark(path: Path, root: Path) -> bool:
    """Whether Spark or Hadoop wrote the file: its writers leave empty files, one for each part without rows."""
    return any((folder / "_SUCCESS").exists() for folder in path.parents if folder.is_relative_to(root))


def _folder_files(folder: Path, root: Path, where: str) -> list[Path]:
    """The data files of a folder that says itself which these are.

    These are the folders of `Dataset.save_to_disk`, and what Spark and Hadoop have completed.
    """
    name = folder.relative_to(root).as_posix()
    if (folder / "state.json").is_file():
        try:
            listed = json.loads((folder / "state.json").read_bytes()).get("_data_files")
            files = [str(file["filename"]) for file in listed] if listed else []
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"{where}: '{name}/state.json' does not list data files: {first_line(error)}") from None
        files = files or sorted(path.name for path in folder.glob("data-*.arrow"))
        if any(Path(file).name != file for file in files):
            raise InputError(f"{where}: '{name}/state.json' names files that are not in its folder; name them yourself")
        return [folder / file for file in files]
    if (folder / "_SUCCESS").exists():
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return [path for path in paths if not any(map(_is_hidden, path.relative_to(folder).parts))]
    splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
    advice = f"one of its splits: {', '.join(splits)}" if splits else f"its files, for example '{name}/*.parquet'"
    raise InputError(f"{where}: '{name}' is a folder; name {advice}")


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
        paths = _match_remote(filesystem, path)
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


def _match_remote(filesystem: Any, path: str) -> list[str]:
    """The paths that a path or pattern means; hidden names and the markers of Spark are left out."""
    if not any(sign in path for sign in _MAGIC) or filesystem.exists(path):
        return [path]
    prefix = re.split(r"[*?[]", path, maxsplit=1)[0].rpartition("/")[0]
    found = sorted(filesystem.glob(path))
    return [name for name in found if "/." in path or not any(map(_is_hidden, name[len(prefix) :].split("/")))]


def _list_python(source: str, digests: DigestCache) -> list[SourceFile]:
    from hardbatch.pipeline.sources.python import list_modules

    package = source.removeprefix("python:")
    return [_local_file(f"python:{name}", path, "python", digests) for name, path in list_modules(package)]


def _format_of(name: str, dataset: Dataset) -> str:
    if dataset.format != "auto":
        return dataset.format
    suffix = Path(without_suffix(name)).suffix.lower()
    if suffix not in _FORMATS:
        raise ConfigError(
            f"dataset '{dataset.name}': cannot tell the format of '{name}' from its name; "
            "set format to parquet, arrow, jsonl, csv or tsv"
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
