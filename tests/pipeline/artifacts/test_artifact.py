"""artifacts.artifact: the commit protocol, faults that are found, locks of live and of killed owners."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hardbatch.pipeline.artifacts.artifact import (
    FORMAT_VERSION,
    MANIFEST,
    Artifact,
    find_artifact,
    iter_artifact_paths,
    read_artifact,
    verify_artifact,
)
from hardbatch.pipeline.artifacts.commit import open_builder, write_unit
from hardbatch.pipeline.artifacts.files import (
    DigestCache,
    canonical_json,
    content_key,
    sha256_outside,
    write_file_atomic,
)
from hardbatch.pipeline.errors import InputError, IntegrityError, LockedError

ROOT = Path(__file__).resolve().parents[3]
HOLDER = """
import sys, time
from pathlib import Path
from hardbatch.pipeline.artifacts.commit import open_builder, write_unit
with open_builder(Path(sys.argv[1])) as builder, write_unit(builder.path, "late") as writer:
    writer.add_file("data/late.bin").write_bytes(b"half of it")
    print("held", flush=True)
    time.sleep(60)
"""


PROMPT = "vrai \u00e9 \u2192"


def finish(builder: Any, *, config: dict[str, Any] | None = None, units: tuple[str, ...] = ("one", "two")) -> Artifact:
    return builder.finish(
        units=units,
        stage="pairs",
        stage_version=1,
        domain="d",
        key="k",
        config=config or {"prompt": PROMPT},
        inputs={"pairs": "abc"},
        sources=[{"name": "x.jsonl", "bytes": 3}],
        counts={"rows": 7},
        produced_with={"numpy": "1"},
    )


def make_artifact(path: Path) -> Artifact:
    with open_builder(path) as builder:
        for unit in ("one", "two"):
            with write_unit(path, unit) as writer:
                writer.add_file(f"data/{unit}.bin", rows=3).write_bytes(unit.encode() * 100)
                writer.counts = {"rows": 3}
        return finish(builder)


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the artifact, in the middle of a unit."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def visible(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


# commit


def test_a_finished_artifact_reads_back_and_verifies(tmp_path: Path) -> None:
    made = make_artifact(tmp_path / "a")
    found = find_artifact(tmp_path / "a")
    assert found == made
    assert verify_artifact(tmp_path / "a") == []
    assert found is not None
    assert found.bytes == 600
    assert [path.name for path in found.files("data")] == ["one.bin", "two.bin"]
    assert found.manifest.files["data/one.bin"].rows == 3
    assert found.manifest.config == {"prompt": PROMPT}
    assert list(iter_artifact_paths(tmp_path)) == [tmp_path / "a"]


def test_nothing_is_visible_before_the_commit_nor_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with open_builder(path) as builder:
        with pytest.raises(RuntimeError, match="stop"), write_unit(path, "one") as writer:
            writer.add_file("data/one.bin").write_bytes(b"x")
            assert not (path / "data" / "one.bin").exists()
            raise RuntimeError("stop")
        assert not builder.committed("one")
    assert visible(path) == []
    assert find_artifact(path) is None


@pytest.mark.parametrize("name", ["data/one.bin", "units/one.json"])
@pytest.mark.parametrize("content", [None, b"", b"1234", b"[1, 2]", b'{"files": [], "counts": {}}'])
def test_a_unit_is_redone_if_a_file_or_its_record_is_not_whole(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    with open_builder(tmp_path) as builder:
        with write_unit(tmp_path, "one") as writer:
            writer.add_file("data/one.bin").write_bytes(b"12345")
        assert builder.committed("one")
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert not builder.committed("one")


def test_the_manifest_is_created_only_if_absent(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a")
    before = (tmp_path / "a" / MANIFEST).read_bytes()
    with open_builder(tmp_path / "a") as builder:
        kept = finish(builder, config={"other": 1})
    assert (tmp_path / "a" / MANIFEST).read_bytes() == before
    assert kept.manifest.config == {"prompt": PROMPT}


def test_no_artifact_without_a_manifest(tmp_path: Path) -> None:
    assert find_artifact(tmp_path / "nothing") is None
    (tmp_path / "file").write_text("x")
    assert find_artifact(tmp_path / "file") is None
    with pytest.raises(IntegrityError, match="not complete"):
        read_artifact(tmp_path / "nothing")


def test_an_atomic_write_leaves_the_old_bytes_where_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file_atomic(tmp_path / "x", b"old")

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr("hardbatch.pipeline.artifacts.files.os.replace", fail)
    with pytest.raises(OSError, match="no"):
        write_file_atomic(tmp_path / "x", b"new")
    assert visible(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_content_key_depends_on_every_part_and_not_on_their_order() -> None:
    assert content_key(a=1, b={"x": 1, "y": 2}) == content_key(b={"y": 2, "x": 1}, a=1)
    assert len({content_key(a=1), content_key(a=2), content_key(b=1), content_key(a="1"), content_key(a=[1])}) == 5


# faults


@pytest.mark.parametrize("name", ["data/one.bin", "data/two.bin"])
@pytest.mark.parametrize("place", [0, 150, 299])
def test_a_flipped_bit_in_a_file_is_found_and_named(tmp_path: Path, name: str, place: int) -> None:
    make_artifact(tmp_path / "a")
    raw = bytearray((tmp_path / "a" / name).read_bytes())
    raw[place] ^= 4
    (tmp_path / "a" / name).write_bytes(raw)
    faults = verify_artifact(tmp_path / "a")
    assert len(faults) == 1
    assert str(tmp_path / "a" / name) in faults[0]


@pytest.mark.parametrize("fault", ["missing", "truncated", "longer", "a folder"])
def test_a_missing_or_resized_file_is_found_by_both_checks(tmp_path: Path, fault: str) -> None:
    make_artifact(tmp_path / "a")
    file = tmp_path / "a/data/one.bin"
    raw = file.read_bytes()
    file.unlink()
    if fault == "a folder":
        file.mkdir()
    elif fault != "missing":
        file.write_bytes(raw[:-1] if fault == "truncated" else raw + b"x")
    with pytest.raises(IntegrityError, match=r"one\.bin.*delete the folder"):
        find_artifact(tmp_path / "a")
    (line,) = verify_artifact(tmp_path / "a")
    assert str(file) in line


def test_an_extra_file_in_a_folder_below_the_data_is_found(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a")
    (tmp_path / "a/data/below").mkdir()
    for name in ("data/extra.bin", "data/below/extra.bin"):
        (tmp_path / "a" / name).write_bytes(b"x")
    faults = verify_artifact(tmp_path / "a")
    assert len(faults) == 2 and all("extra.bin: not a file of this artifact" in line for line in faults)


def test_any_flipped_bit_of_the_manifest_is_found(tmp_path: Path) -> None:
    """Whitespace between the JSON tokens apart: there a flip changes no content, or breaks the JSON."""
    make_artifact(tmp_path / "a")
    manifest = tmp_path / "a" / MANIFEST
    raw = manifest.read_bytes()
    content = json.loads(raw)
    for place in range(len(raw)):
        for bit in (0, 2, 5):
            flipped = bytearray(raw)
            flipped[place] ^= 1 << bit
            try:
                unchanged = json.loads(flipped) == content
            except ValueError:
                unchanged = False
            manifest.write_bytes(flipped)
            if not unchanged:
                with pytest.raises(IntegrityError, match=r"manifest\.json"):
                    find_artifact(tmp_path / "a")


@pytest.mark.parametrize(
    "field",
    ["stage", "stage_version", "domain", "key", "config", "inputs", "sources", "files", "counts", "produced_with",
     "digest", "format_version"],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, "x", 0, [], {}, -1, 1.5], ids=repr)
def test_a_changed_or_missing_field_of_the_manifest_is_found(tmp_path: Path, field: str, value: object) -> None:
    make_artifact(tmp_path / "a")
    manifest = tmp_path / "a" / MANIFEST
    content = json.loads(manifest.read_bytes())
    assert field in content
    changed = {**content, field: value}
    dropped = {name: kept for name, kept in content.items() if name != field}
    for altered in (changed, dropped):
        manifest.write_text(json.dumps(altered))
        with pytest.raises(IntegrityError, match=r"manifest\.json"):
            find_artifact(tmp_path / "a")
        assert len(verify_artifact(tmp_path / "a")) == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"{}",
        pytest.param(b"[" * 100_000, id="deep"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"manifest\.json.*damaged"):
        find_artifact(tmp_path)
    assert len(verify_artifact(tmp_path)) == 1


def test_a_letter_damaged_to_a_lone_surrogate_is_found(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a")
    manifest = tmp_path / "a" / MANIFEST
    raw = manifest.read_bytes()
    assert rb"\u00e9" in raw
    manifest.write_bytes(raw.replace(rb"\u00e9", rb"\ud8e9"))
    with pytest.raises(IntegrityError):
        find_artifact(tmp_path / "a")


def test_a_newer_format_is_refused_in_one_clear_line(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a")
    manifest = tmp_path / "a" / MANIFEST
    content = json.loads(manifest.read_bytes())
    manifest.write_text(json.dumps({**content, "format_version": FORMAT_VERSION + 1, "new_field": 1}))
    expected = rf"format version {FORMAT_VERSION + 1}.*reads up to {FORMAT_VERSION}.*newer hardbatch"
    with pytest.raises(IntegrityError, match=expected) as caught:
        find_artifact(tmp_path / "a")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_the_format_before_is_read(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a")
    manifest = tmp_path / "a" / MANIFEST
    content = {**json.loads(manifest.read_bytes()), "format_version": FORMAT_VERSION - 1}
    del content["digest"]
    content["digest"] = hashlib.sha256(canonical_json(content)).hexdigest()
    manifest.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    artifact = find_artifact(tmp_path / "a")
    assert artifact is not None and artifact.manifest.format_version == FORMAT_VERSION - 1
    assert verify_artifact(tmp_path / "a") == []


@given(
    data=st.binary(max_size=40),
    cuts=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), max_size=4),
)
@example(data=b"abcdef", cuts=[(0, 5), (1, 2)])
def test_the_digest_outside_ranges_is_that_of_the_other_bytes(
    data: bytes, cuts: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "outside.bin"
    path.write_bytes(data)
    inside = {place for offset, length in cuts for place in range(offset, offset + length)}
    others = bytes(byte for place, byte in enumerate(data) if place not in inside)
    assert sha256_outside(path, cuts) == hashlib.sha256(others).hexdigest()


# locks


def test_a_live_owner_keeps_others_out_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d" / "key"
    with holder(path) as process:
        with pytest.raises(
            LockedError, match=rf"being written by process {process.pid} on .* since \d{{4}}-"
        ) as caught:
            open_builder(path).__enter__()
        assert caught.value.exit_code == 5
        assert str(path) in str(caught.value)


def test_a_killed_owner_is_taken_over_and_its_files_are_swept(tmp_path: Path) -> None:
    path = tmp_path / "d" / "key"
    with holder(path) as process:
        assert list((path / "data").glob(".*.tmp"))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert visible(path) != []
        with open_builder(path) as builder:
            assert visible(path) == []
            assert not builder.committed("late")
    assert [file.name for file in path.parent.iterdir()] == ["key"]  # no lock file stays


def test_one_process_does_not_get_the_same_lock_twice(tmp_path: Path) -> None:
    with open_builder(tmp_path / "a"):
        with pytest.raises(LockedError, match=str(os.getpid())):
            open_builder(tmp_path / "a").__enter__()
        with open_builder(tmp_path / "b"):
            pass
    with open_builder(tmp_path / "a"):
        pass


# digests


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes were read for a digest."""
    names: list[str] = []

    def digest(path: Path) -> str:
        names.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr("hardbatch.pipeline.artifacts.files.sha256_file", digest)
    return names


def test_digest_cache_reads_a_file_again_only_when_it_changes(tmp_path: Path, hashed: list[str]) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"one")
    cache = DigestCache(tmp_path / ".digests.json")
    assert cache.digest(file) == hashlib.sha256(b"one").hexdigest() == cache.digest(file)
    cache.save()
    written = (tmp_path / ".digests.json").stat().st_mtime_ns
    again = DigestCache(tmp_path / ".digests.json")
    assert again.digest(file) == hashlib.sha256(b"one").hexdigest()
    again.save()  # writes only if there is something new
    assert (tmp_path / ".digests.json").stat().st_mtime_ns == written and hashed == ["x"]
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert DigestCache(tmp_path / ".digests.json").digest(file) == hashlib.sha256(b"two").hexdigest()
    assert hashed == ["x", "x"]
    with pytest.raises(InputError, match="cannot be read"):
        cache.digest(tmp_path / "none")


@pytest.mark.parametrize(
    "content",
    ["", "{", '{"PATH": []}', *(pytest.param(text) for text in ("[]", "null", '{"PATH": 5}'))],
)
def test_a_damaged_digest_cache_is_made_anew(tmp_path: Path, content: str) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"one")
    (tmp_path / ".digests.json").write_text(content.replace("PATH", str(file)))
    assert DigestCache(tmp_path / ".digests.json").digest(file) == hashlib.sha256(b"one").hexdigest()


def test_digest_cache_tells_files_of_the_same_relative_path_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for folder, content in (("a", b"one"), ("b", b"two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x").write_bytes(content)
        os.utime(tmp_path / folder / "x", ns=(1, 1))  # as unpacked from an archive
        monkeypatch.chdir(tmp_path / folder)
        cache = DigestCache(tmp_path / ".digests.json")
        digests.append(cache.digest(Path("x")))
        cache.save()
    assert digests[0] != digests[1]
