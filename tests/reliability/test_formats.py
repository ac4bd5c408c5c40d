"""Row 19: artifacts of the format before are read, of a newer one refused in one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hardbatch.pipeline.artifacts.artifact import FORMAT_VERSION, MANIFEST, iter_artifact_paths
from hardbatch.pipeline.artifacts.files import canonical_json, sha256_file
from hardbatch.pipeline.cli import main
from hardbatch.pipeline.errors import IntegrityError
from hardbatch.trainer.shards import open_shards
from hardbatch.trainer.stream import BatchStream
from tests.reliability.workspaces import faults_in, rewrite_manifest

Record = Callable[[int, str], None]
Run = tuple[Path, Path, Path]
STAGES = ("pairs", "vectors", "clusters", "hardness", "consistency", "batches", "shards")
NEW_IN_2 = ("footer_sha256", "record_offset", "record_length")


def make_older(workspace: Path, shards: Path) -> None:
    """The workspace as a hardbatch of format version 1 left it."""
    index = pl.read_parquet(shards / "index.parquet").drop(NEW_IN_2)
    index.write_parquet(shards / "index.parquet")
    data = {"sha256": sha256_file(shards / "index.parquet"), "bytes": (shards / "index.parquet").stat().st_size}
    for path in list(iter_artifact_paths(workspace)):
        rewrite_manifest(path / MANIFEST, lambda content: content.update(format_version=1))
    rewrite_manifest(shards / MANIFEST, lambda content: content["files"]["index.parquet"].update(data))
    record = shards / "units" / "index.json"
    content = json.loads(record.read_bytes())
    content["files"]["index.parquet"].update(data)
    record.write_bytes(canonical_json(content) + b"\n")


def batches(shards: Path) -> list[tuple[list[str], list[str], bytes]]:
    """All batches of an epoch, as a training reads them."""
    num_batches = open_shards(shards).num_batches
    stream = iter(BatchStream(str(shards), seed=0))
    read = [next(stream) for _ in range(num_batches)]
    return [(batch.queries, batch.documents, np.packbits(batch.equivalent_BB).tobytes()) for batch in read]


def test_the_format_before_is_reused_verified_and_trained_on(
    copied_run: Run, capsys: pytest.CaptureFixture[str], record_row: Record
) -> None:
    assert FORMAT_VERSION == 2  # a newer one: what that changed belongs into `make_older`
    manifest, workspace, shards = copied_run
    expected = batches(shards)
    make_older(workspace, shards)
    assert faults_in(workspace) == []
    capsys.readouterr()
    assert main(["run", str(manifest), "--workspace", str(workspace)]) == 0
    assert "steps run: 0, reused: 7" in capsys.readouterr().err
    assert main(["verify", str(workspace)]) == 0
    assert main(["inspect", str(shards), "--batch", "2"]) == 0
    assert main(["plan", str(manifest), "--workspace", str(workspace)]) == 0
    assert batches(shards) == expected
    record_row(19, "format 1: all 6 stages reused, verified, inspected, the same batches trained on")


def test_older_inputs_make_the_shards_that_new_ones_make(copied_run: Run) -> None:
    manifest, workspace, shards = copied_run
    new = {path.name: path.read_bytes() for path in (shards / "data").iterdir()}
    make_older(workspace, shards)
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
