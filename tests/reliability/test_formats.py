"""Row 19: artifacts of older formats are read, of a newer one refused in one clear line."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from hardbatch.pipeline.artifacts.artifact import FORMAT_VERSION, MANIFEST, iter_artifact_paths
from hardbatch.pipeline.artifacts.files import canonical_json, sha256_file, sha256_outside
from hardbatch.pipeline.artifacts.footer import record_ranges, row_group_ranges
from hardbatch.pipeline.cli import main
from hardbatch.pipeline.errors import IntegrityError
from hardbatch.trainer.shards import open_shards
from hardbatch.trainer.stream import BatchStream
from tests.reliability.workspaces import faults_in, rewrite_manifest

Record = Callable[[int, str], None]
Run = tuple[Path, Path, Path]
STAGES = ("pairs", "answers", "vectors", "clusters", "hardness", "consistency", "batches", "shards")
NEW_IN_2 = ("footer_sha256", "record_offset", "record_length")
NEW_IN_3 = (
    "same_answer_rate", "mean_negatives", "min_negatives", "queries_without_negatives", "queries_with_few_negatives",
)  # fmt: skip


def make_older(workspace: Path, shards: Path, version: int) -> None:
    """The workspace as a hardbatch of format version 1 or 2 left it."""
    index = pl.read_parquet(shards / "index.parquet").drop(NEW_IN_3)
    (name,) = index["file"].unique()
    index = index.with_columns(drop_positive_slots(shards / name))
    index.drop(NEW_IN_2 if version == 1 else []).write_parquet(shards / "index.parquet")

    # The records of both files, in the manifest and in those of their units.
    changed = {
        file: {"sha256": sha256_file(shards / file), "bytes": (shards / file).stat().st_size}
        for file in ("index.parquet", name)
    }
    for unit in (shards / "units").glob("*.json"):
        content = json.loads(unit.read_bytes())
        for file in changed.keys() & content["files"].keys():
            content["files"][file].update(changed[file])
        unit.write_bytes(canonical_json(content) + b"\n")

    def change(content: dict[str, Any]) -> None:
        content["format_version"] = version
        for file in changed.keys() & content["files"].keys():
            content["files"][file].update(changed[file])
        for unit in (shards / "units").glob("*.json"):
            record = content["files"].get(f"units/{unit.name}")
            if content["stage"] == "shards" and record:
                record.update(sha256=sha256_file(unit), bytes=unit.stat().st_size)
        for domain in content["counts"].get("domains", {}).values():
            del domain["effective_negatives"]

    for path in list(iter_artifact_paths(workspace)):
        rewrite_manifest(path / MANIFEST, change)


def drop_positive_slots(part: Path) -> list[pl.Series]:
    """Rewrites a part file without that column; returns the columns of the index that say where its batches are."""
    with pq.ParquetFile(part) as file:
        groups = [file.read_row_group(i).drop_columns(["positive_slots"]) for i in range(file.num_row_groups)]
    with pq.ParquetWriter(part, groups[0].schema) as writer:
        for group in groups:
            writer.write_table(group)

    data, ranges, records = part.read_bytes(), row_group_ranges(part), record_ranges(part)
    digests = [hashlib.sha256(data[start : start + length]).hexdigest() for start, length in ranges]
    columns = {
        "byte_offset": [start for start, _ in ranges],
        "byte_length": [length for _, length in ranges],
        "sha256": digests,
        "footer_sha256": [sha256_outside(part, ranges)] * len(ranges),
        "record_offset": [start for start, _ in records],
        "record_length": [length for _, length in records],
    }
    return [pl.Series(name, values) for name, values in columns.items()]


def batches(shards: Path) -> list[tuple[list[str], list[str], bytes]]:
    """All batches of an epoch, as a training reads them."""
    num_batches = open_shards(shards).num_batches
    stream = iter(BatchStream(str(shards), seed=0))
    read = [next(stream) for _ in range(num_batches)]
    return [(batch.queries, batch.documents, np.packbits(batch.equivalent_BB).tobytes()) for batch in read]


@pytest.mark.parametrize("version", [1, 2])
def test_older_formats_are_reused_verified_inspected_and_trained_on(
    copied_run: Run, capsys: pytest.CaptureFixture[str], version: int, record_row: Record
) -> None:
    assert FORMAT_VERSION == 3  # a newer one: what that changed belongs into `make_older`
    manifest, workspace, shards = copied_run
    expected = batches(shards)
    make_older(workspace, shards, version)
    assert faults_in(workspace) == []
    capsys.readouterr()
    assert main(["run", str(manifest), "--workspace", str(workspace)]) == 0
    assert "steps run: 0, reused: 8" in capsys.readouterr().err
    assert main(["verify", str(workspace)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(shards), "--batch", "2"]) == 0
    assert "likely" in capsys.readouterr().out
    assert main(["inspect", str(shards), "--sort", "mask-rate"]) == 0
    assert "mostly masked" not in capsys.readouterr().out
    assert main(["inspect", str(shards), "--sort", "negatives"]) == 2
    assert f"of format version {version} and lack mean_negatives; sort by mask-rate" in capsys.readouterr().err
    assert main(["plan", str(manifest), "--workspace", str(workspace)]) == 0
    assert batches(shards) == expected
    record_row(19, f"format {version}: all 8 stages reused, verified, inspected, the same batches trained on")


def test_older_inputs_make_the_shards_that_new_ones_make(copied_run: Run) -> None:
    manifest, workspace, shards = copied_run
    new = {path.name: path.read_bytes() for path in (shards / "data").iterdir()}
    make_older(workspace, shards, 2)
    shutil.rmtree(shards)
    assert main(["run", str(manifest), "--workspace", str(workspace)]) == 0
    assert {path.name: path.read_bytes() for path in (shards / "data").iterdir()} == new


@pytest.mark.parametrize("stage", STAGES)
def test_a_newer_format_is_refused(
    copied_run: Run, capsys: pytest.CaptureFixture[str], stage: str, record_row: Record
) -> None:
    manifest, workspace, shards = copied_run
    (path,) = [path for path in iter_artifact_paths(workspace) if f"/{stage}/" in str(path)]

    def change(content: dict) -> None:
        content.update(format_version=FORMAT_VERSION + 1, files={"new": ["shape"]}, a_new_field=1)

    rewrite_manifest(path / MANIFEST, change)
    commands = [
        ["run", str(manifest), "--workspace", str(workspace)],
        ["plan", str(manifest), "--workspace", str(workspace)],
        ["verify", str(workspace)],
    ]
    for command in [*commands, *([["inspect", str(shards)]] if stage == "shards" else [])]:
        capsys.readouterr()
        assert main(command) == IntegrityError.exit_code == 4
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hardbatch: ")]
        assert line == (
            f"hardbatch: {path / MANIFEST}: format version {FORMAT_VERSION + 1}, this hardbatch reads up to "
            f"{FORMAT_VERSION}; use a newer hardbatch"
        )
    if stage == "shards":
        with pytest.raises(IntegrityError, match=f"format version {FORMAT_VERSION + 1}.*use a newer hardbatch"):
            open_shards(shards)
    record_row(
        19, f"format {FORMAT_VERSION + 1}: run, plan, verify, inspect, trainer refuse in one line with 4, 6 stages"
    )
