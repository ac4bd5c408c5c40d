"""Row 11: killed during K-Means, a run goes on from its last iteration to the same centroids."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.reliability.processes import KILLED, Ended, run, tree

EAGER = """
import sys
from hardbatch.pipeline.artifacts import snapshots
snapshots._LEAST_SECONDS_BETWEEN = 0.0  # every snapshot is due
snapshots._TIMES_ITS_COST = 0
from hardbatch.pipeline.cli import main
sys.exit(main(sys.argv[1:]))
"""
LEXICAL = '\n[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\n'
METHODS = {"one level": (), "two levels": ("cluster.two_level_above=4",)}


def cluster(manifest: Path, workspace: Path, settings: tuple[str, ...], fault: str = "") -> Ended:
    """`hardbatch run`, with a snapshot after each iteration."""
    chosen = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-c", EAGER, "run", manifest, "--workspace", workspace, *chosen]
    return run(command, environment={"HARDBATCH_FAULT": fault})


def artifacts(workspace: Path) -> dict[str, bytes]:
    return {path: content for path, content in tree(workspace).items() if "/" in path and "/logs/" not in path}


def kill_at_each(manifest: Path, folder: Path, settings: tuple[str, ...], places: list[int]) -> int:
    """Kills a run at the given snapshots of each attempt, one attempt after the other; how many iterations it took."""
    assert cluster(manifest, folder / "clean", settings).code == 0
    for place in places:
        assert cluster(manifest, folder / "killed", settings, f"snapshot.saved:{place}=kill").code == KILLED
        assert list((folder / "killed").glob("*/clusters/*/*/snapshots/*.npz"))
        assert not list((folder / "killed").glob("*/clusters/*/*/manifest.json"))
    assert cluster(manifest, folder / "killed", settings).code == 0
    assert artifacts(folder / "killed") == artifacts(folder / "clean")
    assert not list((folder / "killed").rglob("snapshots"))
    (objective,) = (folder / "killed").glob("*/clusters/*/*/objective.parquet")
    return len(pl.read_parquet(objective))


@pytest.fixture
def manifest(tmp_path: Path, rows: Callable[..., list[dict[str, Any]]]) -> Path:
    generator = np.random.default_rng(0)
    pairs = rows(600, num_topics=40)
    for row in pairs:
        row["document"] += " and ".join(map(str, generator.integers(0, 50, 6)))
    pl.DataFrame(pairs).write_ndjson(tmp_path / "pairs.jsonl")
    path = tmp_path / "corpus.toml"
    dataset = 'corpus = "c"\n[[dataset]]\nname = "numbers"\nsource = "pairs.jsonl"\n[pack]\nbatch_size = 16\n'
    path.write_text(dataset + "[cluster]\ntolerance = 0\n" + LEXICAL)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_killed_between_iterations_it_goes_on_to_the_same_centroids(method, manifest, tmp_path, record_row):
    iterations = kill_at_each(manifest, tmp_path, METHODS[method], [2, 3])
    record_row(11, f"{method}: killed twice of {iterations} iterations, same bytes")


@pytest.mark.soak
@pytest.mark.parametrize("method", METHODS)
def test_killed_in_every_iteration_of_real_pairs(method, tmp_path, record_row):
    """Each attempt lives for a single snapshot, so that none would ever end without them."""
    if "HARDBATCH_DATA" not in os.environ:
        pytest.skip("HARDBATCH_DATA is not set: it names the folder of real pairs")
    source = Path(os.environ["HARDBATCH_DATA"]) / "train" / "intents_clinc.parquet"
    pl.read_parquet(source).head(6_000).write_parquet(tmp_path / "pairs.parquet")
    manifest = tmp_path / "corpus.toml"
    dataset = 'corpus = "c"\n[[dataset]]\nname = "intents"\nsource = "pairs.parquet"\n[cluster]\ntolerance = 0\n'
    manifest.write_text(dataset + LEXICAL)
    settings = ("cluster.cluster_size=256", "cluster.two_level_above=16") if METHODS[method] else ()
    kills = 9 if method == "one level" else 7
    iterations = kill_at_each(manifest, tmp_path, settings, [1] * kills)
    record_row(11, f"{method}, real pairs: killed {kills} times of {iterations} iterations, same bytes")
