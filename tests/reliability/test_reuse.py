"""Rows 5 and 6: a rerun with nothing changed touches nothing; a change recomputes what `plan` said it would."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hardbatch.pipeline import planner
from hardbatch.pipeline.cli import main
from tests import models
from tests.reliability import warm
from tests.reliability.processes import run
from tests.reliability.workspaces import faults_in, stamps, write_corpus, write_rows

Record = Callable[[int, str], None]
HEAVY = ("torch", "sklearn", "transformers", "sentence_transformers", "safetensors", "faiss", "scipy")
# a run that notes which files Python opens, makes, moves or removes, and which libraries it has loaded at the end
WATCHED = f"""
import json, os, sys
workspace, command = sys.argv[1], sys.argv[2:]
written, opened = [], []
def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        opened.append(str(path))
        if str(path).startswith(workspace) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            written.append(str(path))
    elif event in ("os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.utime", "os.chmod"):
        if any(str(argument).startswith(workspace) for argument in arguments):
            written.append(event)
sys.addaudithook(watch)
from hardbatch.pipeline.cli import main
code = main(command)
loaded = [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps({{"code": code, "written": written, "opened": opened, "loaded": loaded}}))
"""


def rerun_watched(manifest: Path, workspace: Path, settings: list[str]) -> dict[str, list[str]]:
    """Runs again, with every stamp of the workspace as it was before; what the run opened, wrote and loaded."""
    words = ["run", manifest, "--workspace", workspace, *(word for each in settings for word in ("--set", each))]
    before = stamps(workspace)
    ended = run([sys.executable, "-c", WATCHED, workspace, *words])
    assert ended.code == 0, ended.errors
    assert stamps(workspace) == before
    told: dict[str, list[str]] = json.loads(ended.output.splitlines()[-1])
    assert told["code"] == 0 and "steps run: 0, reused: " in ended.errors
    return told


def assert_nothing_done(told: dict[str, list[str]], sources: Path, libraries: Sequence[str] = ()) -> None:
    assert told["loaded"] == [*libraries] and told["written"] == []
    assert any(path.endswith("manifest.json") for path in told["opened"])  # the watch sees what is opened
    assert [path for path in told["opened"] if path.endswith((".safetensors", ".bin", ".jsonl"))] == [], sources


def test_a_rerun_opens_nothing_for_writing_and_loads_no_model(
    finished_run: tuple[Path, Path, Path], tmp_path: Path, record_row: Record
) -> None:
    folder = shutil.copytree(finished_run[0].parent, tmp_path / "copy", symlinks=True)
    manifest, workspace = folder / finished_run[0].name, folder / "workspace"
    assert main(["plan", str(manifest), "--workspace", str(workspace)]) == 0  # the digests of the copy
    assert_nothing_done(rerun_watched(manifest, workspace, []), folder)
    record_row(5, "a rerun: no library of models loaded, no byte written, every inode and time as before")


@pytest.mark.soak
def test_a_rerun_reads_no_weights(tmp_path: Path, record_row: Record) -> None:
    models.require_minilm()
    models.save_gtr(tmp_path / "tiny-gtr")
    manifest = write_corpus(tmp_path / "corpus", {"alpha": 1_200, "beta": 60})
    settings = [f"embed.model={tmp_path / 'tiny-gtr'}", "embed.surrogate_model=minilm"]
    words = [word for each in settings for word in ("--set", each)]
    assert main(["run", str(manifest), "--workspace", str(tmp_path / "workspace"), *words]) == 0
    told = rerun_watched(manifest, tmp_path / "workspace", settings)
    assert_nothing_done(told, tmp_path, ["torch"])  # it says which device and dtype "auto" is; no library of models
    record_row(5, "a rerun with two real models: weights not opened, no byte written")


# row 6

Step = tuple[str, str]
OF_DOMAIN = ("pairs", "answers", "vectors", "clusters", "hardness", "consistency", "batches")
AFTER = {  # the stages that a new version of a stage recomputes
    "pairs": {"pairs", "answers", "vectors", "clusters", "hardness", "consistency", "batches", "shards"},
    "answers": {"answers", "consistency", "batches", "shards"},
    "vectors": {"vectors", "clusters", "hardness", "consistency", "batches", "shards"},
    "clusters": {"clusters", "batches", "shards"},
    "hardness": {"hardness", "shards"},
    "consistency": {"consistency", "shards"},
    "batches": {"batches", "shards"},
    "shards": {"shards"},
}


def steps(stages: set[str], domains: tuple[str, ...]) -> set[Step]:
    found = {(stage, domain) for stage in stages - {"shards"} for domain in domains}
    return found | ({("shards", "toy")} if "shards" in stages else set())


@pytest.fixture(autouse=True)
def small_lexical_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose projection is drawn in no time."""
    for name, value in warm.SMALL_MODEL.items():
        monkeypatch.setattr(name, value)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The folder of a corpus of two domains, alpha of two files, whose run is done."""
    manifest = write_corpus(tmp_path / "corpus", {"alpha": 30, "beta": 22})
    write_rows(manifest.parent / "alpha-2.jsonl", 14, seed="more")
    manifest.write_text(manifest.read_text().replace('"alpha.jsonl"', '"alpha*.jsonl"'))
    assert main(["run", str(manifest), "--workspace", str(tmp_path / "workspace")]) == 0
    return manifest.parent


def predicted(manifest: Path, workspace: Path, capsys: pytest.CaptureFixture[str]) -> set[Step]:
    """The steps that `plan` would run."""
    capsys.readouterr()
    assert main(["plan", str(manifest), "--workspace", str(workspace)]) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    marked = [(row[0], row[1], row[2]) for row in rows if len(row) == 3 and row[2] in ("run", "reuse")]
    assert {stage for stage, _, _ in marked} == {*OF_DOMAIN, "shards"}
    return {(stage, domain) for stage, domain, mark in marked if mark == "run"}


def assert_recomputed(corpus: Path, capsys: pytest.CaptureFixture[str], expected: set[Step]) -> None:
    """What `plan` predicts is what the run then makes, and what it should be; the rest is left as it is."""
    manifest, workspace = corpus / "toy.toml", corpus.parent / "workspace"
    before = {path: stamp for path, stamp in stamps(workspace / "toy").items() if path.is_file()}
    announced = predicted(manifest, workspace, capsys)
    assert main(["run", str(manifest), "--workspace", str(workspace)]) == 0
    after = stamps(workspace / "toy")
    assert {path: after[path] for path in before} == before
    new = [path for path in after if path.name == "manifest.json" and path not in before]
    contents = [json.loads(path.read_bytes()) for path in new]
    made = {(content["stage"], content["domain"]) for content in contents}
    assert len(made) == len(new)
    assert announced == made == expected
    assert predicted(manifest, workspace, capsys) == set()
    assert faults_in(workspace) == []


def edit(corpus: Path, old: str, new: str) -> None:
    """Changes the manifest."""
    text = (corpus / "toy.toml").read_text()
    assert old in text
    (corpus / "toy.toml").write_text(text.replace(old, new))


def change_file(corpus: Path) -> None:
    write_rows(corpus / "alpha-2.jsonl", 14, seed="others")


def add_domain(corpus: Path) -> None:
    write_rows(corpus / "gamma.jsonl", 20, seed="gamma")
    edit(corpus, "[embed]", '[[dataset]]\nname = "gamma"\nsource = "gamma.jsonl"\n[embed]')


BETA = 'source = "beta.jsonl"\n'


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_file, steps(AFTER["pairs"], ("alpha",))),
        (lambda corpus: edit(corpus, BETA, f"{BETA}limit = 16\n"), steps(AFTER["pairs"], ("beta",))),
        (add_domain, steps(AFTER["pairs"], ("gamma",))),
        (lambda corpus: edit(corpus, f'[[dataset]]\nname = "beta"\n{BETA}', ""), {("shards", "toy")}),
        (lambda corpus: edit(corpus, "[pack]\n", "[pack]\nseed = 1\n"), steps(AFTER["batches"], ("alpha", "beta"))),
    ],
    ids=["a changed file", "a changed domain", "a new domain", "a domain that is gone", "another packing seed"],
)
def test_a_change(
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    expected: set[Step],
    record_row: Record,
) -> None:
    change(corpus)
    assert_recomputed(corpus, capsys, expected)
    record_row(
        6, "one file, one domain (changed, new, gone), the packing seed, eight stage versions: as predicted by plan"
    )


@pytest.mark.parametrize("stage", AFTER)
def test_another_version_of_a_stage(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setitem(planner.VERSIONS, stage, planner.VERSIONS[stage] + 1)
    assert_recomputed(corpus, capsys, steps(AFTER[stage], ("alpha", "beta")))


def test_a_domain_of_a_corpus_that_is_changed_back_is_a_look_up(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = (corpus / "alpha-2.jsonl").read_bytes()
    change_file(corpus)
    assert_recomputed(corpus, capsys, steps(AFTER["pairs"], ("alpha",)))
    (corpus / "alpha-2.jsonl").write_bytes(first)
    assert_recomputed(corpus, capsys, set())
