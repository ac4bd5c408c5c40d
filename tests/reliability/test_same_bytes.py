"""Row 9: the same bytes on one machine, whatever the number of threads, the blocks or the pieces of work."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hardbatch.pipeline.artifacts.artifact import Artifact, read_artifact
from hardbatch.pipeline.run import Plan, plan_corpus
from tests import models
from tests.reliability.processes import run, tree
from tests.reliability.workspaces import real_corpus

# how much is held or read at a time: none of it may be seen in a result
BLOCKS: dict[str, int] = {
    "hardbatch.pipeline.stages.ingest._UNIT_BYTES": 2**16,
    "hardbatch.pipeline.stages.ingest.STAGED_ROWS": 50,
    "hardbatch.pipeline.stages.assemble.STAGED_ROWS": 50,
    "hardbatch.pipeline.stages.embed._TEXTS_PER_READ": 64,
    "hardbatch.pipeline.artifacts.vectors._OPEN_FILES": 1,
    "hardbatch.pipeline.batching.points._VALUES_HELD": 0,  # points are read in each iteration
    "hardbatch.pipeline.batching.nearest._SCORES_HELD": 2**12,
    "hardbatch.pipeline.batching.nearest._ROWS": 64,
    "hardbatch.pipeline.batching.hardness._BLOCK_ROWS": 777,
    "hardbatch.pipeline.batching.refine._GAINS_HELD": 2**14,
    "hardbatch.pipeline.batching.neighbours._BLOCK_ROWS": 300,
}
_CHILD = """
import importlib, json, sys
for name, value in json.loads(sys.argv[1]).items():
    module, _, constant = name.rpartition(".")
    assert hasattr(importlib.import_module(module), constant), name
    setattr(importlib.import_module(module), constant, value)
from hardbatch.pipeline.cli import main
sys.exit(main(sys.argv[2:]))
"""
# every branch on little data: two levels, the graph tour, several packings, mixed remainders, several units and parts
_SETTINGS = """
[embed]
model = "lexical"
surrogate_model = "minilm"
max_length_tokens = 48
dtype = "float32"
unit_rows = 64
[cluster]
two_level_above = 4
[pack]
batch_size = 8
exact_tour_below = 4
num_packings = 2
remainder = "mix"
[hardness]
anchors = 100
[write]
batches_per_part = 5
"""


def make(
    manifest: Path,
    workspace: Path,
    *,
    threads: int = 1,
    blocks: Mapping[str, int] | None = None,
    settings: Sequence[str] = (),
    timeout_s: float = 170,
) -> Plan:
    """Runs a manifest in a process of its own, with so many threads and other constants."""
    words = [word for setting in settings for word in ("--set", setting)]
    data_root = os.environ.get("HARDBATCH_DATA", str(manifest.parent))
    words += ["--workspace", str(workspace), "--data-root", data_root]
    ended = run(
        [sys.executable, "-c", _CHILD, json.dumps(dict(blocks or {})), "run", manifest, *words],
        environment={"OMP_NUM_THREADS": str(threads)},
        timeout_s=timeout_s,
    )
    assert ended.code == 0, ended.errors
    return plan_corpus(manifest, workspace, data_root=Path(data_root), overrides=settings)


def differing(one: Plan, other: Plan) -> list[str]:
    """Names of the files of a corpus that are not the same in both workspaces; run logs aside."""
    left, right = tree(one.corpus), tree(other.corpus)
    assert len(left) > 20
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


@pytest.fixture(scope="module")
def python_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of real pairs that every machine has: functions of numpy and networkx."""
    models.require_minilm()
    if importlib.util.find_spec("networkx") is None:
        pytest.skip("needs the package networkx, which torch brings")
    datasets = "".join(
        f'[[dataset]]\nname = "{name}"\nsource = "python:{name}"\nlimit = {limit}\nholdout = 0.1\n'
        for name, limit in (("numpy", 90), ("networkx", 50))
    )
    manifest = tmp_path_factory.mktemp("row9") / "functions.toml"
    manifest.write_text(f'corpus = "functions"\n{datasets}{_SETTINGS}')
    return manifest


@pytest.fixture(scope="module")
def first(python_corpus: Path) -> Plan:
    """Its run with one thread."""
    return make(python_corpus, python_corpus.parent / "first")


@pytest.mark.parametrize(("threads", "blocks"), [(2, {}), (4, BLOCKS)], ids=["2 threads", "4 threads, other blocks"])
def test_threads_and_blocks_change_no_byte(
    python_corpus: Path,
    first: Plan,
    tmp_path: Path,
    record_row: Callable[[int, str], None],
    threads: int,
    blocks: dict[str, int],
) -> None:
    other = make(python_corpus, tmp_path / "w", threads=threads, blocks=blocks)
    assert differing(first, other) == []
    told = "2 threads" if not blocks else f"4 threads and {len(BLOCKS)} other block sizes"
    record_row(9, f"{told}: {len(tree(first.corpus))} files, 0 differ")


# the long half


_LARGE: dict[str, tuple[dict[str, int | None], str]] = {  # pairs of each domain, settings
    # k = 315 and less, in two levels, on the graph tour
    "two levels": (
        {"medical": 68_000, "stackexchange": 68_000},
        "[cluster]\ntwo_level_above = 16\n[pack]\nexact_tour_below = 16\nnum_packings = 2\n",
    ),
    # k = 8,500: two levels and the graph tour by cells, as they are by default
    "as shipped": ({"reddit": 68_000}, "[pack]\nbatch_size = 8\nrefine_rounds = 3\n"),
    "one level": (
        {"medical": 68_000, "science_acl": 68_000},
        '[pack]\nremainder = "mix"\n[cluster]\nbalance = 0.0\n',
    ),
    "doubled": (
        {"stackexchange": 68_000, "science_acl": 68_000},
        '[cluster]\nmethod = "doubled"\niterations = 10\n',
    ),
    **{
        f"MiniLM in {dtype}": (
            dict.fromkeys(("medical", "code_python", "intents_clinc"), 120),
            f'[embed]\ndtype = "{dtype}"\nmax_length_tokens = 96\n[pack]\nbatch_size = 16\n',
        )
        for dtype in ("float32", "bfloat16")
    },
}


@pytest.mark.soak
@pytest.mark.parametrize("name", _LARGE)
def test_threads_change_no_byte_of_real_domains(
    name: str, tmp_path: Path, record_row: Callable[[int, str], None]
) -> None:
    if name == "doubled":
        pytest.importorskip("faiss", reason="doubled needs FAISS: pip install 'hardbatch[cpu]'")
    if name.startswith("MiniLM"):
        models.require_minilm()
    manifest = real_manifest(tmp_path, *_LARGE[name])
    plans = {threads: make(manifest, tmp_path / str(threads), threads=threads, timeout_s=900) for threads in (1, 2, 4)}
    found = {threads: differing(plans[1], plan) for threads, plan in plans.items()}
    files = len(tree(plans[1].corpus))
    record_row(9, f"{name}: 1, 2, 4 threads, {files} files, {sum(map(len, found.values()))} differ")
    assert found == {1: [], 2: [], 4: []}


@pytest.mark.soak
def test_each_other_block_size_changes_no_byte(tmp_path: Path, record_row: Callable[[int, str], None]) -> None:
    manifest = real_manifest(tmp_path, *_LARGE["two levels"])
    plan = make(manifest, tmp_path / "as-shipped")
    found = {name: differing(plan, make(manifest, tmp_path / name, blocks={name: BLOCKS[name]})) for name in BLOCKS}
    differ = [name for name, files in found.items() if files]
    record_row(9, f"{len(BLOCKS)} other block sizes, each alone, {len(tree(plan.corpus))} files: {len(differ)} differ")
    assert differ == []


@pytest.mark.soak
@pytest.mark.parametrize(("model", "limit"), [("lexical", None), ("minilm", 200)])
def test_other_pieces_of_work_give_the_same_rows(
    model: str, limit: int | None, tmp_path: Path, record_row: Callable[[int, str], None]
) -> None:
    """Other `embed.unit_rows` and `write.batches_per_part` make other files; what is in them is the same."""
    if model == "minilm":
        models.require_minilm()
    settings = f'[embed]\nmodel = "{model}"\nsurrogate_model = "{model}"\nmax_length_tokens = 96\n'
    manifest = real_manifest(tmp_path, {"stackexchange": limit, "medical": limit}, settings)
    rows = []
    for unit_rows in (8_192, 100, 37):
        pieces = [f"embed.unit_rows={unit_rows}", f"write.batches_per_part={unit_rows // 10}"]
        rows.append(rows_of(make(manifest, tmp_path / str(unit_rows), settings=pieces, timeout_s=900)))
    differ = [name for name in rows[0] if any(other[name] != rows[0][name] for other in rows[1:])]
    record_row(9, f"{model}: 3 sizes of units and parts, {len(rows[0])} tables, {len(differ)} differ")
    assert differ == []


def real_manifest(folder: Path, domains: Mapping[str, int | None], settings: str) -> Path:
    return Path(str(real_corpus(folder, domains, settings)[1]))


def rows_of(plan: Plan) -> dict[str, bytes | pq.FileMetaData | list]:
    """What is in the artifacts, whatever files it is cut into."""
    found: dict[str, object] = {}
    for step in plan.steps:
        artifact = read_artifact(step.path)
        where = f"{step.stage} of {step.domain}"
        if step.stage == "vectors":
            for side in ("queries", "documents"):
                found[f"{where}, {side}"] = _joined(artifact, side)
        elif step.stage in ("clusters", "batches"):
            found[where] = (step.path / f"{step.stage}.parquet").read_bytes()
        elif step.stage == "shards":
            parts = [pq.read_table(path) for path in artifact.files("data")]
            for domain in sorted({str(part["domain"][0]) for part in parts}):
                of_domain = [part for part in parts if str(part["domain"][0]) == domain]
                found[f"{where}, {domain}"] = [row for part in of_domain for row in part.to_pylist()]
    return found


def _joined(artifact: Artifact, side: str) -> bytes:
    paths = [path for path in artifact.files("vectors") if path.name.startswith(side + "-")]
    return np.concatenate([np.load(path) for path in paths]).tobytes()
