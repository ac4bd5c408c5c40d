"""files: paths as a shell treats them, links, and folders that say what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hardbatch.pipeline.artifacts.files import DigestCache
from hardbatch.pipeline.config import Dataset
from hardbatch.pipeline.errors import ConfigError, InputError
from hardbatch.pipeline.sources.files import list_source_files
from tests.pipeline.sources.reading import pairs_of, read_dataset, write_as

PAIR = [{"query": "q", "document": "d"}]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def names(root: Path, source: Any, **options: Any) -> list[str]:
    follow_links = options.pop("follow_links", False)
    dataset = Dataset(name="n", source=source, **options)
    digests = DigestCache(root.parent / ".digests.json")
    return [file.name for file in list_source_files(dataset, root, digests, follow_links=follow_links)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "sub/c.jsonl"]),
        ("**/c.jsonl", ["sub/c.jsonl"]),
        ("sub/**", ["sub/c.jsonl"]),
        ("**", ["a.jsonl", "b.jsonl", "sub/c.jsonl"]),
        ("./[ab].jsonl", ["a.jsonl", "b.jsonl"]),
        ("*/c.jsonl", ["sub/c.jsonl"]),
        (".*.jsonl", ["._a.jsonl"]),
        (".ipynb_checkpoints/*", [".ipynb_checkpoints/a-checkpoint.jsonl"]),
        ("sub/.hidden.jsonl", ["sub/.hidden.jsonl"]),
    ],
)
def test_hidden_names_are_matched_only_if_they_are_meant(root: Path, source: str, expected: list[str]) -> None:
    for name in ("a", "b", "sub/c", "._a", "sub/.hidden", ".ipynb_checkpoints/a-checkpoint"):
        write_as(root / f"{name}.jsonl", PAIR)
    assert names(root, source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("pairs[v2].jsonl", "pairs[v2].jsonl"),
        ("[2024] export/a*.jsonl", "[2024] export/a.jsonl"),
        ("*/what?.jsonl", "[2024] export/what?.jsonl"),
        ("**/b*.jsonl", "[2024] export/b*.jsonl"),
        ("pairs[[]v2].jsonl", "pairs[v2].jsonl"),
    ],
)
def test_a_name_that_exists_is_taken_literally(root: Path, source: str, expected: str) -> None:
    for name in ("pairs[v2]", "pairsv", "[2024] export/a", "[2024] export/what?", "[2024] export/b*", "2 export/a"):
        write_as(root / f"{name}.jsonl", PAIR)
    assert names(root, source) == [expected]


def test_a_loop_of_links_does_not_lead_astray(root: Path) -> None:
    write_as(root / "sub" / "a.jsonl", PAIR)
    (root / "sub" / "loop").symlink_to(root)
    assert names(root, "**/*.jsonl") == ["sub/a.jsonl"]


def test_the_home_folder_and_absolute_paths_are_below_the_root_or_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_as(root / "data" / "a.jsonl", PAIR)
    monkeypatch.setenv("HOME", str(root))
    for source in ("~/data/a.jsonl", "~/data/*.jsonl", str(root / "data" / "a.jsonl")):
        assert names(root, source) == ["data/a.jsonl"]
    with pytest.raises(ConfigError, match=r"path '~/other/a\.jsonl' is absolute and not below .*--data-root"):
        names(root / "data", "~/other/a.jsonl")
    with pytest.raises(InputError, match=r"no file '~nobody-here/a\.jsonl'"):
        names(root, "~nobody-here/a.jsonl")


def test_a_snapshot_in_the_hubs_cache_is_read(tmp_path: Path) -> None:
    repository = tmp_path / "datasets--org--set"
    snapshot = repository / "snapshots" / "0123abcd"
    write_as(repository / "blobs" / "9f86d081.jsonl", PAIR)
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data" / "a.jsonl").symlink_to("../../../blobs/9f86d081.jsonl")
    assert pairs_of(read_dataset(snapshot, "data/*.jsonl")) == [("q", "d")]
    assert names(snapshot / "data", "a.jsonl") == ["a.jsonl"]

    # The blobs of another repository, or a file beside them, are as far away as any other file.
    for target in (tmp_path / "models--org--other" / "blobs" / "x.jsonl", repository / "x.jsonl"):
        write_as(target, PAIR)
        (snapshot / "out.jsonl").unlink(missing_ok=True)
        (snapshot / "out.jsonl").symlink_to(target)
        with pytest.raises(ConfigError, match=r"leads out of .* through a link; to allow that: --follow-links"):
            names(snapshot, "out.jsonl")


def test_links_are_followed_if_the_command_line_says_so(root: Path) -> None:
    write_as(root.parent / "disk" / "a.jsonl", PAIR)
    (root / "data").symlink_to(root.parent / "disk")
    (root / "b.jsonl").symlink_to(root.parent / "disk" / "a.jsonl")
    for source in ("data/*.jsonl", "data/a.jsonl", "*.jsonl"):
        with pytest.raises(ConfigError, match="through a link"):
            names(root, source)
        assert len(names(root, source, follow_links=True)) == 1
    with pytest.raises(ConfigError, match=r"'\.\./disk/a\.jsonl' leads out of"):
        names(root, "../disk/a.jsonl", follow_links=True)


def test_a_link_to_nothing_says_so(root: Path) -> None:
    (root / "a.jsonl").symlink_to(root / ".git" / "annex" / "objects" / "x")
    with pytest.raises(InputError, match=r"no file 'a\.jsonl' below .*: it is a link to a file that is not there"):
        names(root, "*.jsonl")


# folders


def save_to_disk(folder: Path, rows: list[dict[str, Any]], **state: Any) -> None:
    """Writes a folder as `Dataset.save_to_disk` of the `datasets` library does."""
    for number, row in enumerate(rows):
        write_as(folder / f"data-{number:05d}-of-{len(rows):05d}.arrow", [row])
    files = [{"filename": f"data-{number:05d}-of-{len(rows):05d}.arrow"} for number in range(len(rows))]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"} | state))
    (folder / "dataset_info.json").write_text("{}")


def test_a_folder_of_save_to_disk_is_read_in_its_order(root: Path) -> None:
    save_to_disk(root / "set", [{"query": f"q{i}", "document": ["d"]} for i in range(3)])
    write_as(root / "set" / "cache-1234.arrow", [{"query": "cached", "document": ["x"]}])
    assert pairs_of(read_dataset(root, "set")) == [("q0", "d"), ("q1", "d"), ("q2", "d")]
    (root / "set" / "state.json").write_text("{}")
    assert len(read_dataset(root, "set")) == 3


def test_a_dictionary_of_datasets_names_its_splits(root: Path) -> None:
    for split in ("train", "test"):
        save_to_disk(root / "sets" / split, PAIR)
    (root / "sets" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match=r"'sets' is a folder; name one of its splits: test, train"):
        names(root, "sets")
    assert len(names(root, "sets/train")) == 1


@pytest.mark.parametrize(
    "state", ["[]", "nonsense", '{"_data_files": [{"filename": "../secret.arrow"}]}', '{"_data_files": [1]}']
)
def test_a_broken_state_is_refused(root: Path, state: str) -> None:
    save_to_disk(root / "set", PAIR)
    (root / "set" / "state.json").write_text(state)
    with pytest.raises(InputError, match=r"'set/state\.json'"):
        names(root, "set")


def test_a_folder_of_spark_is_read_without_its_markers(root: Path) -> None:
    folder = root / "out"
    for name in ("part-00000-c000.snappy", "part-00002-c000.snappy", "lang=en/part-00001-c000.snappy"):
        write_as(folder / f"{name}.parquet", PAIR)
        (folder / f".{Path(name).name}.parquet.crc").write_bytes(b"crc")
    for name in ("_SUCCESS", "_committed_123", "_started_123", "_metadata", "part-00003-c000.snappy.parquet"):
        (folder / name).write_bytes(b"")
    write_as(folder / "_temporary" / "0" / "part-00009.parquet", PAIR)
    expected = [f"out/{name}.parquet" for name in ("part-00000-c000.snappy", "part-00002-c000.snappy")]
    assert names(root, "out/*") == names(root, "out/part-*.parquet") == expected
    assert sorted(names(root, "out")) == sorted([*expected, "out/lang=en/part-00001-c000.snappy.parquet"])


def test_parts_of_hadoop_have_no_suffix(root: Path) -> None:
    for number, content in enumerate(("a\tb\n", "", "c\td\n")):
        (root / "out").mkdir(exist_ok=True)
        (root / "out" / f"part-r-{number:05d}").write_text(content)
    (root / "out" / "_SUCCESS").touch()
    settings = {"format": "tsv", "csv": {"header": False}, "columns": {"query": 1, "document": 2}}
    for source in ("out", "out/*", "out/part-r-*"):
        assert pairs_of(read_dataset(root, source, **settings)) == [("a", "b"), ("c", "d")]
    with pytest.raises(ConfigError, match=r"cannot tell the format of 'out/part-r-00000'"):
        names(root, "out")


def test_an_empty_file_is_an_error_unless_spark_wrote_it(root: Path) -> None:
    write_as(root / "a.jsonl", PAIR)
    (root / "b.jsonl").touch()
    with pytest.raises(InputError, match=r"b\.jsonl: the file is empty"):
        read_dataset(root, "*.jsonl")
    (root / "_SUCCESS").touch()
    assert names(root, "*.jsonl") == ["a.jsonl"]
    with pytest.raises(InputError, match=r"all files of 'b\.jsonl' are empty"):
        names(root, "b.jsonl")


# arrow


@pytest.mark.parametrize("name", ["x.arrow", "x.feather"])
def test_a_damaged_arrow_file_is_refused(root: Path, name: str) -> None:
    write_as(root / name, [{"query": f"q{i}", "document": "d"} for i in range(9)])
    content = (root / name).read_bytes()
    (root / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"{name}: (is not a readable Arrow file|broken after row \d)"):
        read_dataset(root)


@pytest.mark.parametrize(("name", "format_"), [("x.arrow", "parquet"), ("x.feather", "jsonl"), ("x.arrow", "csv")])
def test_an_arrow_file_read_as_another_format_is_named(root: Path, name: str, format_: str) -> None:
    write_as(root / name, PAIR)
    with pytest.raises(InputError, match=rf"{name}: is an Arrow file, read as {format_}"):
        read_dataset(root, format=format_)
