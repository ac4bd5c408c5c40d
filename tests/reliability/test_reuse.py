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
from hardbatch.pipeline.models import encoders
from hardbatch.pipeline.models import resolve as pipeline_models
from tests import models
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
    folder = shutil.copytree(finished_run[0].parent, tmp_path / "copy")
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
OF_DOMAIN = ("pairs", "vectors", "clusters", "hardness", "batches")
AFTER = {  # what a new version of a stage makes anew, by what needs what
    "pairs": {"pairs", "vectors", "clusters", "hardness", "batches", "shards"},
    "vectors": {"vectors", "clusters", "hardness", "batches", "shards"},
    "clusters": {"clusters", "batches", "shards"},
    "hardness": {"hardness", "shards"},
    "batches": {"batches", "shards"},
    "shards": {"shards"},
}


def steps(stages: set[str], domains: tuple[str, ...]) -> set[Step]:
    found = {(stage, domain) for stage in stages - {"shards"} for domain in domains}
    return found | ({("shards", "toy")} if "shards" in stages else set())


@pytest.fixture(autouse=True)
def small_lexical_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose projection is drawn in no time."""
    for module in (encoders, pipeline_models):
        monkeypatch.setattr(module, "LEXICAL_FEATURES", 1_024)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The folder of a corpus of two domains, alpha of two files, whose run is done."""
    manifest = write_corpus(tmp_path / "corpus", {"alpha": 30, "beta": 22})
    write_rows(manifest.parent / "alpha-2.jsonl", 14, seed="more")
    manifest.write_text(manifest.read_text().replace('"alpha.jsonl"', '"alpha*.jsonl"'))
    assert main(["run", str(manifest), "--workspace", str(tmp_path / "workspace")]) == 0
    return manifest.parent


def predicted(manifest: Path, workspace: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> set[Step]:
    capsys.readouterr()
    assert main(["plan", str(manifest), "--workspace", str(workspace), *words]) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    marked = [(row[0], row[1], row[2]) for row in rows if len(row) == 3 and row[2] in ("run", "reuse")]
    assert {stage for stage, _, _ in marked} == {*OF_DOMAIN, "shards"}
    return {(stage, domain) for stage, domain, mark in marked if mark == "run"}


def assert_recomputed(corpus: Path, capsys: pytest.CaptureFixture[str], expected: set[Step], *settings: str) -> None:
    """What `plan` predicts is what the run then makes, and what it should be; the rest is left as it is."""
    manifest, workspace = corpus / "toy.toml", corpus.parent / "workspace"
    words = [word for setting in settings for word in ("--set", setting)]
    before = {path: stamp for path, stamp in stamps(workspace / "toy").items() if path.is_file()}
    told = predicted(manifest, workspace, words, capsys)
    assert main(["run", str(manifest), "--workspace", str(workspace), *words]) == 0
    after = stamps(workspace / "toy")
    assert {path: after[path] for path in before} == before
    new = [path for path in after if path.name == "manifest.json" and path not in before]
    contents = [json.loads(path.read_bytes()) for path in new]
    made = {(content["stage"], content["domain"]) for content in contents}
    assert len(made) == len(new)
    assert told == made == expected
    assert predicted(manifest, workspace, words, capsys) == set()
    assert faults_in(workspace) == []


def test_one_changed_file(corpus: Path, capsys: pytest.CaptureFixture[str], record_row: Record) -> None:
    write_rows(corpus / "alpha-2.jsonl", 14, seed="others")
    assert_recomputed(corpus, capsys, steps(AFTER["pairs"], ("alpha",)))
    record_row(
        6, "one file, one domain (changed, new, gone), the packing seed, six stage versions: as predicted by plan"
    )


def test_one_changed_domain(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (corpus / "toy.toml").read_text()
    (corpus / "toy.toml").write_text(text.replace('source = "beta.jsonl"\n', 'source = "beta.jsonl"\nlimit = 16\n'))
    assert_recomputed(corpus, capsys, steps(AFTER["pairs"], ("beta",)))


def test_a_new_domain(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(corpus / "gamma.jsonl", 20, seed="gamma")
    text = (corpus / "toy.toml").read_text()
    new = '[[dataset]]\nname = "gamma"\nsource = "gamma.jsonl"\n'
    (corpus / "toy.toml").write_text(text.replace("[embed]", new + "[embed]"))
    assert_recomputed(corpus, capsys, steps(AFTER["pairs"], ("gamma",)))


def test_a_domain_that_is_gone(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (corpus / "toy.toml").read_text()
    gone = '[[dataset]]\nname = "beta"\nsource = "beta.jsonl"\n'
    assert gone in text
    (corpus / "toy.toml").write_text(text.replace(gone, ""))
    assert_recomputed(corpus, capsys, {("shards", "toy")})


def test_another_packing_seed(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_recomputed(corpus, capsys, steps(AFTER["batches"], ("alpha", "beta")), "pack.seed=1")


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
    write_rows(corpus / "alpha-2.jsonl", 14, seed="others")
    assert_recomputed(corpus, capsys, steps(AFTER["pairs"], ("alpha",)))
    (corpus / "alpha-2.jsonl").write_bytes(first)
    assert_recomputed(corpus, capsys, set())
