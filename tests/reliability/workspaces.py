"""Tiny corpora for runs that are killed, and what must be true of a workspace whenever it is looked at."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hardbatch.pipeline.artifacts.artifact import iter_artifact_paths, verify_artifact
from hardbatch.pipeline.artifacts.files import DIGESTS, canonical_json, sha256_file
from tests.reliability.processes import tree
from tests.samples import LEXICAL, WORDS

BATCH_SIZE = 4

# Small units that gather the others: a run that continues after a kill commits them again.
REDONE_ON_RESUME = {"invalid", "index"}


def run_over(manifest: Path) -> list[object]:
    """`run` over a manifest: words that the path of a workspace completes."""
    return ["run", manifest, "--workspace"]


def write_corpus(folder: Path, domains: Mapping[str, int], *, batches_per_part: int = 2) -> Path:
    """A manifest below `folder` and its sources: so many pairs of each domain, small units; texts may repeat."""
    folder.mkdir(parents=True, exist_ok=True)
    text = 'corpus = "toy"\n'
    for name, num_pairs in domains.items():
        write_rows(folder / f"{name}.jsonl", num_pairs, seed=name)
        text += f'[[dataset]]\nname = "{name}"\nsource = "{name}.jsonl"\n'
    manifest = folder / "toy.toml"
    manifest.write_text(
        f'{text}[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\nunit_rows = 16\n'
        f"[pack]\nbatch_size = {BATCH_SIZE}\n[write]\nbatches_per_part = {batches_per_part}\n"
    )
    return manifest


def real_corpus(folder: Path, domains: Mapping[str, int | None], settings: str = "") -> list[object]:
    """`run` over domains of HARDBATCH_DATA, so many pairs of each: words that the path of a workspace completes."""
    if "HARDBATCH_DATA" not in os.environ:
        pytest.skip("needs real pairs: set HARDBATCH_DATA to a folder with train/*.parquet")
    text = 'corpus = "real"\n'
    for name, limit in domains.items():
        text += f'[[dataset]]\nname = "{name}"\nsource = "train/{name}.parquet"\n'
        text += f"limit = {limit}\n" if limit else ""
    manifest = folder / "real.toml"
    manifest.write_text(text + (settings if "[embed]" in settings else LEXICAL + settings))
    return ["run", manifest, "--data-root", os.environ["HARDBATCH_DATA"], "--workspace"]


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes what the manifest at `path` says, and its digest with it."""
    content = json.loads(path.read_bytes())
    change(content)
    del content["digest"]
    content["digest"] = hashlib.sha256(canonical_json(content)).hexdigest()
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_rows(path: Path, num_pairs: int, *, seed: str) -> None:
    draw = random.Random(seed)
    rows = []
    for i in range(num_pairs):
        words = draw.sample(WORDS, 4)
        query = f"where is the {words[0]} of {words[1]} {i if i % 5 else ''}"
        rows.append({"query": query, "document": f"the {words[0]} lies by {words[2]} and {words[3]} {i}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def content(workspace: Path) -> dict[str, bytes]:
    """{path: bytes} of all files of a workspace but its caches: hidden ones, as are locks and temporaries, included."""
    return {name: data for name, data in tree(workspace).items() if name != DIGESTS}


def assert_same(workspace: Path, expected: Mapping[str, bytes], seed: object = "") -> None:
    """The workspace holds these files, these bytes, and nothing else: no temporary, no lock."""
    found = content(workspace)
    assert sorted(found) == sorted(expected), seed
    assert [name for name in found if found[name] != expected[name]] == [], seed
    if (workspace / DIGESTS).exists():
        json.loads((workspace / DIGESTS).read_bytes())


def faults_in(workspace: Path) -> list[str]:
    """What a reader could take for complete and is not; none at any time, whatever was killed."""
    faults = [fault for path in iter_artifact_paths(workspace) for fault in verify_artifact(path)]
    for record in workspace.rglob("units/*.json"):
        for name, file in json.loads(record.read_bytes())["files"].items():
            path = record.parents[1] / name
            if not path.is_file() or sha256_file(path) != file["sha256"]:
                faults.append(f"{record}: committed without {name}")
    for path in workspace.rglob("*"):
        if not path.name.startswith(".") and path.is_file():
            try:
                _read_whole(path)
            except Exception as error:
                faults.append(f"{path}: visible, and not whole: {error!r}")
    for data in workspace.glob("*/shards/*/data"):
        if any(data.glob("*.parquet")):
            batches = pl.scan_parquet(data / "*.parquet").group_by("batch_id").len().collect()
            if batches["len"].n_unique() != 1:
                faults.append(f"{data}: batches of several sizes")
    return faults


def _read_whole(path: Path) -> None:
    if path.suffix == ".parquet":
        pq.ParquetFile(path).read()
    elif path.suffix == ".arrow":
        pa.ipc.open_file(path.read_bytes()).read_all()
    elif path.suffix == ".npy":
        np.load(path)
    elif path.suffix == ".json":
        json.loads(path.read_bytes())


def committed(workspace: Path) -> dict[Path, tuple[int, int]]:
    """{path: (inode, time of change)} of the records of all units, and of the files of those that still have them."""
    stamps = {}
    for record in workspace.rglob("units/*.json"):
        names = json.loads(record.read_bytes())["files"]
        for path in (record, *(record.parents[1] / name for name in names)):
            if path.exists():
                stat = path.stat()
                stamps[path] = (stat.st_ino, stat.st_mtime_ns)
    return stamps


def redone(before: Mapping[Path, tuple[int, int]], workspace: Path) -> list[str]:
    """The units that were committed `before` and have been committed again since; staged ones may be gone."""
    now = committed(workspace)
    changed = [path for path, stamp in before.items() if path in now and now[path] != stamp]
    return sorted({path.relative_to(workspace).as_posix() for path in changed if path.parent.name == "units"})


def hidden(workspace: Path) -> list[str]:
    """Temporaries and locks in a workspace."""
    return sorted(path.relative_to(workspace).as_posix() for path in workspace.rglob(".*") if path.name != DIGESTS)


def stamps(workspace: Path) -> dict[Path, tuple[int, ...]]:
    """Inode, size, times of content and of inode of everything in a workspace, folders and caches included."""
    found = {}
    for path in [workspace, *workspace.rglob("*")]:
        stat = os.lstat(path)
        found[path] = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return found
