"""Row 3: the process dies, or a step fails, at each fault point between the writes of the pipeline; it then recovers.

Each case has a workspace of its own.
"""

from __future__ import annotations

import errno
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hardbatch.pipeline import cli
from hardbatch.pipeline.artifacts.artifact import MANIFEST, find_artifact
from hardbatch.pipeline.artifacts.commit import open_builder, write_unit
from hardbatch.pipeline.artifacts.faults import LONG_POINTS, POINTS
from hardbatch.pipeline.errors import DiskError, IntegrityError, NoSpaceError
from tests.reliability import warm
from tests.reliability.processes import KILLED, ROOT, Ended
from tests.reliability.workspaces import assert_same, content, faults_in, hidden, run_over, write_corpus

Record = Callable[[int, str], None]
CODES = {"kill": KILLED, "ENOSPC": NoSpaceError.exit_code, "EIO": DiskError.exit_code}
TOLD = {"kill": "", "ENOSPC": "no space left", "EIO": "input/output error"}

# Points that only a run passes which continues after a kill, and where that kill was.
BEFORE = {
    "sweep.removed": ("unit.fsynced:1", "file.written:2", "manifest.fsynced:3"),
    "unit.unrecorded": ("manifest.written:3", "manifest.fsynced:3", "manifest.fsynced:8"),
}


class Corpus:
    """A corpus, what a clean run makes of it, and how often that run passes each point."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = run_over(write_corpus(folder / "corpus", {"alpha": 26}))
        self.counts = self.count_points(folder / "clean")
        self.expected = content(folder / "clean")

    def count_points(self, workspace: Path) -> Counter[str]:
        """Runs over a workspace to the end; how often the run passed each fault point."""
        passed: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            for name, value in warm.SMALL_MODEL.items():  # as the other runs over this workspace have it
                patch.setattr(name, value)
            for module in ("commit", "files", "lock"):
                patch.setattr(f"hardbatch.pipeline.artifacts.{module}.fault_point", passed.append)
            assert cli.main([*map(str, self.command), str(workspace)]) == 0
        return Counter(passed)

    def run(self, workspace: Path, fault: str = "") -> Ended:
        return warm.run(warm.PIPELINE, [*self.command, workspace], fault=fault)

    def case(self, workspace: Path, point: str, number: int, action: str) -> None:
        """Runs into one fault, looks at what is there, and runs again."""
        name = f"{point}:{number}={action}"
        if point in BEFORE:
            assert self.run(workspace, f"{BEFORE[point][number - 1]}=kill").code == KILLED
            number = 1
        broken = self.run(workspace, f"{point}:{number}={action}")
        assert broken.code == CODES[action], f"{name}\n{broken.errors}"
        assert faults_in(workspace) == [], name
        if action != "kill":
            assert TOLD[action] in broken.errors and "Traceback" not in broken.errors, f"{name}\n{broken.errors}"
            assert point == "sweep.removed" or hidden(workspace) == [], name

        again = self.run(workspace)
        assert again.code == 0, f"{name}\n{again.errors}"
        assert_same(workspace, self.expected, name)
        assert faults_in(workspace) == [], name

    def numbers(self, point: str, parts: int) -> list[int]:
        """First, last, and some in between of the times that the point is passed."""
        last = len(BEFORE.get(point, ())) or self.counts[point]
        return sorted({1 + (last - 1) * i // (parts - 1) for i in range(parts)})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("faults"))


def test_every_point_is_listed_and_passed(corpus: Corpus, tmp_path: Path) -> None:
    written = re.findall(r'fault_point\("([^"]+)"\)', "".join(p.read_text() for p in (ROOT / "pipeline").rglob("*.py")))
    assert sorted(written) == sorted((*POINTS, *LONG_POINTS))
    passed = set(corpus.counts)
    for point, (before, *_) in BEFORE.items():
        assert corpus.run(tmp_path / point, f"{before}=kill").code == KILLED
        passed |= set(corpus.count_points(tmp_path / point))
    assert passed == set(POINTS)


@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["once", "everywhere"])
@pytest.mark.parametrize("action", CODES)
@pytest.mark.parametrize("point", POINTS)
def test_a_fault_at_a_point(
    corpus: Corpus, tmp_path: Path, point: str, action: str, everywhere: bool, record_row: Record
) -> None:
    numbers = corpus.numbers(point, 7 if everywhere else 3)
    if not everywhere:
        numbers = [numbers[(POINTS.index(point) + list(CODES).index(action)) % len(numbers)]]
    for number in numbers:
        corpus.case(tmp_path / str(number), point, number, action)
    where = f"{point} {action}: {len(numbers)} places" if everywhere else f"{len(POINTS)} points, {len(CODES)} actions"
    record_row(3, f"{where}: all recovered")


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
    """A loss of power after a commit must not take away the folder of a committed file."""
    synced: list[Path] = []
    monkeypatch.setattr("hardbatch.pipeline.artifacts.files.fsync_path", lambda path: synced.append(path))
    path = tmp_path / "stage" / "key"
    with open_builder(path):
        make(path, {"one": b"12345"})
    assert {tmp_path, tmp_path / "stage", path} <= set(synced)
