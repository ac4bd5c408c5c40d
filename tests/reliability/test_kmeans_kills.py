"""Row 11: killed during K-Means, a run continues after its last iteration to the same centroids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.reliability import warm
from tests.reliability.processes import KILLED, Ended, tree
from tests.reliability.workspaces import real_corpus, run_over
from tests.samples import LEXICAL, make_rows

SNAPSHOTS = "hardbatch.pipeline.artifacts.snapshots"
EVERY_SNAPSHOT_IS_DUE = {f"{SNAPSHOTS}._LEAST_SECONDS_BETWEEN": 0.0, f"{SNAPSHOTS}._TIMES_ITS_COST": 0}
Command = list[object]


def toy(folder: Path) -> Command:
    generator = np.random.default_rng(0)
    pairs = make_rows(600, num_topics=40)
    for row in pairs:
        row["document"] += " and ".join(map(str, generator.integers(0, 50, 6)))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    manifest = folder / "corpus.toml"
    dataset = 'corpus = "c"\n[[dataset]]\nname = "numbers"\nsource = "pairs.jsonl"\n[pack]\nbatch_size = 16\n'
    manifest.write_text(dataset + "[cluster]\ntolerance = 0\n" + LEXICAL)
    return run_over(manifest)


def real(folder: Path) -> Command:
    return real_corpus(folder, {"intents_clinc": 6_000}, "[cluster]\ntolerance = 0\n")


@pytest.mark.parametrize(
    ("corpus", "settings", "places"),
    [
        pytest.param(toy, [], [2, 3], id="one level"),
        pytest.param(toy, ["cluster.two_level_above=4"], [2, 3], id="two levels"),
        # Each attempt lives for a single snapshot, so that none would ever end without them.
        pytest.param(real, [], [1] * 9, marks=pytest.mark.soak, id="one level, real pairs"),
        pytest.param(
            real,
            ["cluster.cluster_size=256", "cluster.two_level_above=16"],
            [1] * 7,
            marks=pytest.mark.soak,
            id="two levels, real pairs",
        ),
    ],
)
def test_killed_between_iterations_it_continues_to_the_same_centroids(
    tmp_path: Path,
    record_row: Callable[[int, str], None],
    corpus: Callable[[Path], Command],
    settings: list[str],
    places: list[int],
) -> None:
    command = corpus(tmp_path)

    def cluster(workspace: Path, fault: str = "") -> Ended:
        words = [*command, workspace, *(word for setting in settings for word in ("--set", setting))]
        return warm.run(warm.PIPELINE, words, fault=fault, constants=EVERY_SNAPSHOT_IS_DUE)

    clean, killed = tmp_path / "clean", tmp_path / "killed"
    assert cluster(clean).code == 0
    for place in places:
        assert cluster(killed, f"snapshot.saved:{place}=kill").code == KILLED
        assert list(killed.glob("*/clusters/*/*/snapshots/*.npz"))
        assert not list(killed.glob("*/clusters/*/*/manifest.json"))
    assert cluster(killed).code == 0
    artifacts, expected = (
        {name: data for name, data in tree(workspace).items() if "/" in name} for workspace in (killed, clean)
    )
    assert artifacts == expected
    assert not list(killed.rglob("snapshots"))
    (objective,) = killed.glob("*/clusters/*/*/objective.parquet")
    record_row(11, f"killed {len(places)} times of {len(pl.read_parquet(objective))} iterations, same bytes")
