"""Row 3: the process dies, or a step fails, at each fault point between the writes of the pipeline; it then recovers.

Each case runs into a fault in a workspace of its own, looks at what lies there, and runs again.
"""

from __future__ import annotations

import errno
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hardbatch.pipeline.artifacts.artifact import MANIFEST, find_artifact
from hardbatch.pipeline.artifacts.commit import open_builder, write_unit
from hardbatch.pipeline.artifacts.faults import LONG_POINTS, POINTS
from hardbatch.pipeline.errors import DiskError, IntegrityError, NoSpaceError
from tests.reliability.forked import Forks
from tests.reliability.processes import KILLED, ROOT
from tests.reliability.workspaces import assert_same, content, faults_in, hidden, write_corpus

Record = Callable[[int, str], None]
CODES = {"kill": KILLED, "ENOSPC": NoSpaceError.exit_code, "EIO": DiskError.exit_code}
TOLD = {"kill": "", "ENOSPC": "no space left", "EIO": "input/output error"}
BEFORE = {  # points that only a run passes which goes on after a kill: where that was
    "sweep.removed": ("unit.fsynced:1", "file.written:2", "manifest.fsynced:3"),
    "unit.unrecorded": ("manifest.written:2", "manifest.fsynced:2", "manifest.fsynced:6"),
}


class Corpus:
    """A corpus, what a clean run makes of it, and how often that run and one that goes on pass each point."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.folder = folder
        self.forks = forks
        self.manifest = write_corpus(folder / "corpus", {"alpha": 26})
        self.counts = Counter(forks.count_points(self.arguments(folder / "clean")))
        self.expected = content(folder / "clean")
        self._num_cases = 0

    def arguments(self, workspace: Path) -> list[object]:
        return ["run", self.manifest, "--workspace", workspace]

    def case(self, point: str, number: int, action: str) -> None:
        """One fault, and the run after it."""
        self._num_cases += 1
        workspace = self.folder / f"case-{self._num_cases}"
        name = f"{point}:{number}={action}"
        if point in BEFORE:
            before = self.forks.run(self.arguments(workspace), f"{BEFORE[point][number - 1]}=kill")
            assert before.code == KILLED, f"{name}\n{before.log}"
            number = 1
        broken = self.forks.run(self.arguments(workspace), f"{point}:{number}={action}")
        assert broken.code == CODES[action], f"{name}\n{broken.log}"
        assert faults_in(workspace) == [], name
        if action != "kill":
            assert TOLD[action] in broken.log and "Traceback" not in broken.log, f"{name}\n{broken.log}"
            assert point == "sweep.removed" or hidden(workspace) == [], name
        again = self.forks.run(self.arguments(workspace))
        assert again.code == 0, f"{name}\n{again.log}"
        assert_same(workspace, self.expected, name)
        assert faults_in(workspace) == [], name

    def numbers(self, point: str, parts: int) -> list[int]:
        """First, last, and some in between of the times that the point is passed."""
        last = len(BEFORE.get(point, ())) or self.counts[point]
        return sorted({1 + (last - 1) * i // (parts - 1) for i in range(parts)})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[Corpus]:
    yield Corpus(tmp_path_factory.mktemp("faults"), forks)


def test_every_point_is_listed_and_passed(corpus: Corpus, tmp_path: Path) -> None:
    written = re.findall(r'fault_point\("([^"]+)"\)', "".join(p.read_text() for p in (ROOT / "pipeline").rglob("*.py")))
    assert sorted(written) == sorted((*POINTS, *LONG_POINTS))
    passed = set(corpus.counts)
    for point, (before, *_) in BEFORE.items():
        workspace = tmp_path / point
        assert corpus.forks.run(corpus.arguments(workspace), f"{before}=kill").code == KILLED
        passed |= set(corpus.forks.count_points(corpus.arguments(workspace)))
    assert passed == set(POINTS)


@pytest.mark.parametrize("action", CODES)
@pytest.mark.parametrize("point", POINTS)
def test_a_fault_at_a_point(corpus: Corpus, point: str, action: str, record_row: Record) -> None:
    numbers = corpus.numbers(point, 3)
    corpus.case(point, numbers[(POINTS.index(point) + list(CODES).index(action)) % len(numbers)], action)
    record_row(3, f"quick: {len(POINTS)} points, kill, ENOSPC and EIO at one place each: all recovered")


@pytest.mark.soak
@pytest.mark.parametrize("action", CODES)
@pytest.mark.parametrize("point", POINTS)
def test_a_fault_at_a_point_wherever_it_is_passed(corpus: Corpus, point: str, action: str, record_row: Record) -> None:
    numbers = corpus.numbers(point, 7)
    for number in numbers:
        corpus.case(point, number, action)
    record_row(3, f"{point} {action}: {len(numbers)} tried, {len(numbers)} recovered")


# what the mechanism rests on, one step at a time


def make(path: Path, units: dict[str, bytes]) -> None:
    for unit, data in units.items():
        with write_unit(path, unit) as writer:
            writer.add_file(f"data/{unit}.bin").write_bytes(data)


def finish(builder: Any, *units: str) -> None:
    builder.finish(units=units, stage="s", stage_version=1, domain="d", key="k", config={}, inputs={})


def test_a_committed_unit_whose_bytes_were_torn_is_redone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with open_builder(path) as builder:
        make(path, {"one": b"12345"})
        assert builder.committed("one")
        (path / "data/one.bin").write_bytes(b"12\0\0\0")  # as after a loss of power: the size is right
        assert not builder.committed("one")


def test_no_record_stands_beside_files_of_another_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    with open_builder(path) as builder:
        make(path, {"one": b"12345"})

        def die(name: str) -> None:
            if name == "unit.renamed":
                raise KeyboardInterrupt

        monkeypatch.setattr("hardbatch.pipeline.artifacts.commit.fault_point", die)
        with pytest.raises(KeyboardInterrupt):
            make(path, {"one": b"54321"})  # as another version of a library gives
        assert (path / "data/one.bin").read_bytes() == b"54321"
        assert not (path / "units/one.json").exists() and not builder.committed("one")


def test_a_damaged_manifest_is_never_taken_for_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with open_builder(path) as builder:
        make(path, {"one": b"12345"})
        (path / MANIFEST).write_bytes(b'{"format_version": 1')
        with pytest.raises(IntegrityError, match=rf"damaged; delete the folder {path} and run again"):
            finish(builder, "one")
    assert not list(path.glob(".*"))


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_filesystem_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def link(*_: object) -> None:
        raise OSError(number, "no hard links here")

    monkeypatch.setattr("hardbatch.pipeline.artifacts.commit.os.link", link)
    path = tmp_path / "a"
    with open_builder(path) as builder:
        make(path, {"one": b"12345"})
        finish(builder, "one")
        first = (path / MANIFEST).read_bytes()
        builder.finish(units=["one"], stage="s", stage_version=1, domain="d", key="k", config={"x": 1}, inputs={})
    assert (path / MANIFEST).read_bytes() == first
    assert find_artifact(path) is not None
    assert not list(path.glob(".*"))


def test_every_new_folder_is_entered_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of power after a commit must not take the folder away that a committed file lies in."""
    synced: list[Path] = []
    monkeypatch.setattr("hardbatch.pipeline.artifacts.files.fsync_path", lambda path: synced.append(path))
    path = tmp_path / "stage" / "key"
    with open_builder(path):
        make(path, {"one": b"12345"})
    assert {tmp_path, tmp_path / "stage", path} <= set(synced)
