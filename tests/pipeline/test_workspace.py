"""workspace and its view: what is there, what the latest run needs, and deleting the rest."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from hardbatch.pipeline.artifacts.artifact import MANIFEST, iter_artifact_paths, verify_artifact
from hardbatch.pipeline.artifacts.commit import open_builder
from hardbatch.pipeline.errors import LockedError
from hardbatch.pipeline.run import plan_corpus, run_step
from hardbatch.pipeline.workspace import LATEST, StoredArtifact, delete_artifacts, list_artifacts, point_latest_at
from hardbatch.trainer.shards import open_shards

Finished = tuple[Path, Path, Path]
STAGES = ["pairs", "answers", "vectors", "clusters", "hardness", "consistency", "batches", "shards"]


def run_again(manifest: Path, workspace: Path, *overrides: str) -> Path:
    plan = plan_corpus(manifest, workspace, overrides=overrides)
    for step in plan.steps:
        run_step(step)
    return plan.shards


def states(workspace: Path) -> dict[str, str]:
    """The state of each artifact, by its folder below the corpus."""
    return {
        artifact.path.relative_to(workspace / "small").as_posix(): artifact.state
        for artifact in list_artifacts(workspace)
    }


def make_older(workspace: Path, seconds: float) -> None:
    """Makes all that there is `seconds` older."""
    then = time.time() - seconds
    for path in workspace.rglob("*"):
        os.utime(path, (then, then), follow_symlinks=False)


@pytest.fixture
def two_runs(copied_run: Finished) -> tuple[Path, Path, Path, Path]:
    """(manifest, workspace, older shards, latest shards): the second run packs with another seed."""
    manifest, workspace, older = copied_run
    make_older(workspace, 7_200)
    return manifest, workspace, older, run_again(manifest, workspace, "pack.seed=1")


def test_a_corpus_may_have_the_name_of_a_stage(copied_run: Finished) -> None:
    _, workspace, _ = copied_run
    expected = set(states(workspace).items())
    (workspace / "small").rename(workspace / "pairs")
    for folder in (workspace, workspace / "pairs"):
        found = list_artifacts(folder)
        assert {item.corpus for item in found} == {"pairs"}
        assert {(item.path.relative_to(workspace / "pairs").as_posix(), item.state) for item in found} == expected


def test_latest_leads_to_the_shards_of_the_latest_run(two_runs: tuple[Path, Path, Path, Path]) -> None:
    manifest, workspace, older, newer = two_runs
    link = workspace / "small" / LATEST
    assert link.readlink() == Path("shards") / newer.name  # relative, so that a workspace can be moved
    assert open_shards(link).key == newer.name

    run_again(manifest, workspace)  # reuses everything, and is the latest run all the same
    assert link.resolve() == older.resolve()
    before = link.lstat().st_mtime_ns
    run_again(manifest, workspace)
    assert link.lstat().st_mtime_ns == before
    assert [path.name for path in workspace.rglob(f".{LATEST}*")] == []


def test_what_was_opened_through_latest_stays_what_it_is(two_runs: tuple[Path, Path, Path, Path]) -> None:
    manifest, workspace, _, newer = two_runs
    shards = open_shards(workspace / "small" / LATEST)
    run_again(manifest, workspace)
    row = shards.order(seed=0).batch_at(0)
    assert shards.read_batch(row, 0).queries == open_shards(newer).read_batch(row, 0).queries


def test_a_leftover_of_a_killed_run_is_no_obstacle_to_latest(copied_run: Finished) -> None:
    _, workspace, shards = copied_run
    (workspace / "small" / LATEST).unlink()
    (workspace / "small" / f".{LATEST}.tmp").symlink_to("elsewhere")
    point_latest_at(shards)
    assert (workspace / "small" / LATEST).resolve() == shards.resolve()


def test_a_folder_in_the_place_of_latest_is_left_alone(copied_run: Finished) -> None:
    _, workspace, shards = copied_run
    (workspace / "small" / LATEST).unlink()
    (workspace / "small" / LATEST).mkdir()
    point_latest_at(shards)
    assert (workspace / "small" / LATEST).is_dir()


def test_the_list_says_what_the_latest_run_needs(two_runs: tuple[Path, Path, Path, Path], cli: Any) -> None:
    _, workspace, older, newer = two_runs
    found = list_artifacts(workspace)
    assert [artifact.stage for artifact in found] == sorted((a.stage for a in found), key=STAGES.index)
    unused = {artifact.path for artifact in found if artifact.state == "unused"}
    assert [artifact.path for artifact in found if artifact.state == "latest"] == [newer]
    assert older in unused and {path.parent.parent.name for path in unused - {older}} == {"batches"}
    assert len(found) == 10 and len(unused) == 2

    code, out, _ = cli("list", workspace)
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and rows[0] == ["corpus", "stage", "domain", "key", "size", "age", "state"]
    assert next(row for row in rows if older.name in row)[-3:] == ["2.0", "h", "unused"]
    assert next(row for row in rows if newer.name in row)[-1] == "latest"
    of_corpus = cli("list", workspace / "small")[1].splitlines()
    assert len(of_corpus) == len(rows) and of_corpus[-2].startswith("10 artifacts, ")


def test_gc_shows_what_is_unused_and_deletes_it_when_asked(two_runs: tuple[Path, Path, Path, Path], cli: Any) -> None:
    manifest, workspace, older, newer = two_runs
    before = states(workspace)
    code, out, _ = cli("gc", workspace)
    assert code == 0 and older.name in out and newer.name not in out
    assert out.splitlines()[-1].startswith("2 artifacts, ") and "--delete" in out
    assert states(workspace) == before

    code, out, _ = cli("gc", workspace, "--delete")
    assert code == 0 and out.splitlines()[-1].endswith(" deleted")
    assert states(workspace) == {path: state for path, state in before.items() if state != "unused"}
    assert [fault for path in iter_artifact_paths(workspace) for fault in verify_artifact(path)] == []
    assert not list(workspace.rglob(".*.lock"))
    assert cli("gc", workspace)[1].startswith("nothing to delete")
    assert run_again(manifest, workspace, "pack.seed=1") == newer


def test_what_was_made_since_the_latest_run_is_kept(two_runs: tuple[Path, Path, Path, Path]) -> None:
    """An interrupted run with new settings has made vectors, and begun clusters, that its next try goes on with."""
    manifest, workspace, _, newer = two_runs
    make_older(workspace, 3_600)
    plan = plan_corpus(manifest, workspace, overrides=["embed.query_prompt=q: ", "pack.seed=2"])
    for step in plan.steps[:3]:
        run_step(step)
    begun = workspace / "small" / "clusters" / "numbers" / ("0" * 16)
    (begun / "snapshots").mkdir(parents=True)
    found = states(workspace)
    assert list(found.values()).count("newer") == 1
    assert found[f"clusters/numbers/{begun.name}"] == "unfinished"
    assert found[f"shards/{newer.name}"] == "latest"


def test_an_old_unfinished_artifact_is_unused(copied_run: Finished) -> None:
    manifest, workspace, _ = copied_run
    begun = workspace / "small" / "clusters" / "numbers" / ("0" * 16)
    (begun / "snapshots").mkdir(parents=True)
    make_older(workspace, 60)
    run_again(manifest, workspace, "pack.seed=1")
    assert states(workspace)[f"clusters/numbers/{begun.name}"] == "unused"


def test_without_links_the_newest_shards_are_the_latest(two_runs: tuple[Path, Path, Path, Path]) -> None:
    _, workspace, _, newer = two_runs
    before = states(workspace)
    (workspace / "small" / LATEST).unlink()
    assert states(workspace) == before
    shutil.rmtree(newer)
    (workspace / "small" / LATEST).symlink_to(Path("shards") / newer.name)  # leads nowhere now
    assert "latest" in states(workspace).values()


def test_nothing_is_deleted_while_a_run_writes(two_runs: tuple[Path, Path, Path, Path], cli: Any) -> None:
    _, workspace, older, newer = two_runs
    with open_builder(newer):
        code, _, err = cli("gc", workspace, "--delete")
    assert code == 5 and "being written by process" in err
    assert (older / MANIFEST).exists()


def test_a_deletion_that_is_cut_short_leaves_no_broken_artifact(
    two_runs: tuple[Path, Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, workspace, older, _ = two_runs
    unused: list[StoredArtifact] = [item for item in list_artifacts(workspace) if item.state == "unused"]

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        delete_artifacts(unused[::-1])
    monkeypatch.undo()
    assert not (older / MANIFEST).exists() and (older / "data").exists()
    assert run_again(manifest, workspace) == older  # completes it again
    assert verify_artifact(older) == []


def test_a_lock_of_a_dead_run_does_not_stop_gc(two_runs: tuple[Path, Path, Path, Path]) -> None:
    _, workspace, older, _ = two_runs
    older.with_name(f".{older.name}.lock").write_text("process 1 on elsewhere since long ago\n")
    try:
        delete_artifacts([item for item in list_artifacts(workspace) if item.state == "unused"])
    except LockedError:
        pytest.fail("nobody holds that lock")
    assert not older.exists()
