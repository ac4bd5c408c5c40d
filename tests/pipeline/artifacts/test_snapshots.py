"""Snapshots: K-Means resumes to the same clusters, whenever it was killed; a damaged snapshot is ignored."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from hardbatch.pipeline.artifacts import snapshots as module
from hardbatch.pipeline.artifacts.snapshots import Snapshots
from hardbatch.pipeline.batching.kmeans import kmeans
from hardbatch.pipeline.batching.nearest import Nearest
from hardbatch.pipeline.batching.points import InMemory
from hardbatch.pipeline.batching.two_level import two_level_kmeans
from tests.pipeline.batching.examples import folded_points


class KilledError(Exception):
    """Stands for a SIGKILL."""


@pytest.fixture
def at_once(monkeypatch):
    """Every snapshot is due."""
    monkeypatch.setattr(module, "_LEAST_SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(module, "_TIMES_ITS_COST", 0)


def test_arrays_come_back_as_they_were(at_once, tmp_path):
    snapshots = Snapshots(tmp_path / "kept")
    assert snapshots.load() is None
    snapshots.save(lambda: {"a": np.arange(3), "b": np.zeros((0, 2), dtype=np.float32)})
    snapshots.save(lambda: {"a": np.arange(4), "b": np.ones((1, 2), dtype=np.float32)})
    found = Snapshots(tmp_path / "kept").load()
    assert found["a"].tolist() == [0, 1, 2, 3] and found["b"].dtype == np.float32 and found["b"].shape == (1, 2)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    snapshots.clear()
    assert not (tmp_path / "kept").exists() and snapshots.load() is None


def test_on_a_full_disk_the_previous_one_stays(at_once, tmp_path, monkeypatch):
    snapshots = Snapshots(tmp_path)
    snapshots.save(lambda: {"a": np.arange(3)})

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    (kept,) = tmp_path.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full)
        snapshots.save(lambda: {"a": np.arange(4)})
        Snapshots(kept).save(dict)  # a file instead of its folder
    assert list(tmp_path.iterdir()) == [kept] and snapshots.load()["a"].tolist() == [0, 1, 2]
    snapshots.save(lambda: {"a": np.arange(4)})
    assert snapshots.load()["a"].tolist() == [0, 1, 2, 3]


def test_they_are_kept_only_when_it_is_time(tmp_path):
    for folder in (tmp_path / "kept", None):
        Snapshots(folder).save(lambda: pytest.fail("it is not time"))
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: raw[:60] + b"x" * 9 + raw[69:]]
)
def test_a_damaged_one_is_ignored(at_once, tmp_path, damage):
    snapshots = Snapshots(tmp_path)
    snapshots.save(lambda: {"a": np.arange(300)})
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert snapshots.load() is None


@pytest.mark.parametrize(("find", "num_clusters"), [(kmeans, 20), (two_level_kmeans, 36)])
def test_killed_after_any_snapshot_it_ends_with_the_same_clusters(at_once, tmp_path, monkeypatch, find, num_clusters):
    points, passed, assignments, begin = InMemory(folded_points(1_500)), [], [], Nearest.__init__

    def count(self, *arguments, **keywords):
        assignments.append(1)
        begin(self, *arguments, **keywords)

    def run(folder, kill_after=None):
        def fault_point(name):
            passed.append(name)
            if len(passed) == kill_after:
                raise KilledError

        passed.clear()
        assignments.clear()
        monkeypatch.setattr(module, "fault_point", fault_point)
        snapshots = Snapshots(folder)
        kept = {"on_iteration": snapshots.save, "resume_from": snapshots.load()}
        return find(points, num_clusters, iterations=10, tolerance=0.0, balance=0.02, seed=3, **kept)

    monkeypatch.setattr(Nearest, "__init__", count)
    whole = run(tmp_path / "whole")
    num_snapshots, work = len(passed), len(assignments)
    assert num_snapshots == (9 if find is kmeans else 6 + 3)  # after each iteration, or each cell and wide iteration
    for last in range(1, num_snapshots + 1):
        with pytest.raises(KilledError):
            run(tmp_path / str(last), last)
        again = run(tmp_path / str(last))
        for name in ("labels", "centroids", "prices", "objective", "levels"):
            assert np.array_equal(getattr(again, name), getattr(whole, name))
        assert len(passed) == num_snapshots - last  # nothing that was kept is done again
        assert len(assignments) < work
        work = len(assignments)
