"""Snapshots: K-Means goes on from its last iteration to the same clusters; nothing of them is left, or believed."""

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

SETTINGS = {"iterations": 10, "tolerance": 0.0, "balance": 0.02, "seed": 3}


class KilledError(Exception):
    """Stands for a SIGKILL."""


def some_points(num_points=1_500):
    generator = np.random.default_rng(0)
    topics = generator.standard_normal((30, 8))
    return InMemory(
        (topics[generator.integers(0, 30, num_points)] + generator.standard_normal((num_points, 8))).astype("f4")
    )


@pytest.fixture
def at_once(monkeypatch):
    """Every snapshot is due."""
    monkeypatch.setattr(module, "_LEAST_SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(module, "_TIMES_ITS_COST", 0)


def test_arrays_come_back_as_they_were(at_once, tmp_path):
    snapshots = Snapshots(tmp_path / "kept")
    assert snapshots.load("one") is None
    snapshots.save("one", lambda: {"a": np.arange(3), "b": np.zeros((0, 2), dtype=np.float32)})
    snapshots.save("one", lambda: {"a": np.arange(4), "b": np.ones((1, 2), dtype=np.float32)})
    assert list(Snapshots(tmp_path / "kept").load_all()) == ["one"] and Snapshots(None).load_all() == {}
    found = Snapshots(tmp_path / "kept").load("one")
    assert found["a"].tolist() == [0, 1, 2, 3] and found["b"].dtype == np.float32 and found["b"].shape == (1, 2)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["one.npz"]
    snapshots.clear()
    assert not (tmp_path / "kept").exists() and snapshots.load("one") is None


def test_without_room_the_one_before_stays(at_once, tmp_path, monkeypatch):
    snapshots = Snapshots(tmp_path)
    snapshots.save("one", lambda: {"a": np.arange(3)})

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full)
        snapshots.save("one", lambda: {"a": np.arange(4)})
        Snapshots(tmp_path / "one.npz").save("two", dict)  # a file where its folder should be
    assert [path.name for path in tmp_path.iterdir()] == ["one.npz"]
    assert snapshots.load("one")["a"].tolist() == [0, 1, 2]
    snapshots.save("one", lambda: {"a": np.arange(4)})
    assert snapshots.load("one")["a"].tolist() == [0, 1, 2, 3]


def test_they_are_kept_only_when_it_is_time(tmp_path):
    calls = []
    Snapshots(tmp_path / "kept").save("one", lambda: calls.append(1) or {})
    Snapshots(None).save("one", lambda: calls.append(1) or {})
    assert not calls and not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: raw[:60] + b"x" * 9 + raw[69:]]
)
def test_a_damaged_one_is_not_believed(at_once, tmp_path, damage):
    snapshots = Snapshots(tmp_path)
    snapshots.save("one", lambda: {"a": np.arange(300)})
    path = tmp_path / "one.npz"
    path.write_bytes(damage(path.read_bytes()))
    assert snapshots.load("one") is None and snapshots.load_all() == {}


@pytest.mark.parametrize(("find", "num_clusters"), [(kmeans, 20), (two_level_kmeans, 36)])
def test_killed_at_any_snapshot_it_ends_with_the_same_clusters(at_once, tmp_path, monkeypatch, find, num_clusters):
    points = some_points()
    whole = find(points, num_clusters, **SETTINGS)
    saved = []
    monkeypatch.setattr(module, "fault_point", saved.append)
    find(points, num_clusters, **kept_in(tmp_path / "all"), **SETTINGS)
    assert len(saved) >= (9 if find is kmeans else 15)  # after each iteration; of two levels also after each cell
    for last in range(1, len(saved) + 1):
        passed = []

        def fault_point(name, last=last, passed=passed):
            passed.append(name)
            if len(passed) == last:
                raise KilledError

        monkeypatch.setattr(module, "fault_point", fault_point)
        folder = tmp_path / str(last)
        with pytest.raises(KilledError):
            find(points, num_clusters, **kept_in(folder), **SETTINGS)
        work = counted_assignments(monkeypatch)
        again = find(points, num_clusters, **kept_in(folder), **SETTINGS)
        assert np.array_equal(again.labels, whole.labels) and np.array_equal(again.centroids, whole.centroids)
        assert np.array_equal(again.prices, whole.prices)
        assert again.objective == whole.objective and again.levels == whole.levels
        if find is kmeans:
            assert len(work) == len(whole.objective) - last  # no iteration is done twice
    assert len(work) == (1 if find is kmeans else 7)  # after the last: the cells' last, and the last one in 6 cells


def kept_in(folder):
    """The arguments of K-Means that goes on from the snapshots in `folder` and leaves its own there."""
    snapshots = Snapshots(folder)
    return {"on_iteration": snapshots.save, "resume_from": snapshots.load_all()}


def counted_assignments(monkeypatch):
    """A list that grows with each iteration (one group of points each) from here on."""
    made = []
    begin = Nearest.__init__

    def counted(self, *arguments, **keywords):
        made.append(1)
        begin(self, *arguments, **keywords)

    monkeypatch.setattr(Nearest, "__init__", counted)
    return made
