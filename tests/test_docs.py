"""The README and docs/ say what the code does."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING
from pathlib import Path

import pytest

from benchmarks import demo, hardness_picture
from hardbatch.pipeline import schemas
from hardbatch.pipeline.config import CorpusManifest, Dataset, load_manifest
from hardbatch.pipeline.stages import ingest
from hardbatch.trainer.config import setting_defaults
from tests.reliability import poison

ROOT = Path(__file__).resolve().parents[1]
TABLES = {
    name: Dataset if name == "dataset" else field.annotation
    for name, field in CorpusManifest.model_fields.items()
    if name != "corpus"
}


@pytest.mark.parametrize("name", TABLES)
def test_every_setting_is_documented_with_its_default(name: str) -> None:
    heading = "[[dataset]]" if name == "dataset" else f"[{name}]"
    section = (ROOT / "docs" / "manifests.md").read_text().split(f"## `{heading}`")[1].split("\n## ")[0]
    documented = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", section, flags=re.M))
    assert list(documented) == list(TABLES[name].model_fields)
    for key, field in TABLES[name].model_fields.items():
        if field.is_required():
            assert documented[key] == "required"
        elif key not in ("columns", "csv") and field.default is not None:
            assert documented[key] == f"`{json.dumps(field.default)}`"


def test_every_reason_and_column_is_documented() -> None:
    text = (ROOT / "docs" / "artifacts.md").read_text()
    reasons = (*ingest.BROKEN_REASONS, "query_equals_document", "duplicate_pair", "contaminated")
    for word in (*reasons, *schemas.SHARDS_WITH_NEGATIVES.names, *schemas.PAIRS_WITH_NEGATIVES.names):
        assert re.search(rf"\b{word}\b", text), f"{word} is missing in docs/artifacts.md"


def test_every_kind_of_bad_input_is_documented() -> None:
    table = (ROOT / "docs" / "bad_inputs.md").read_text()
    documented = re.findall(r"^\| (.*?) \| \d \|", table, flags=re.M)
    assert documented == [kind.name for kind in poison.all_kinds()]


@pytest.mark.parametrize("path", sorted((ROOT / "data_manifests").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_manifests_are_valid(path: Path) -> None:
    assert load_manifest(path).corpus


def test_the_manifest_of_the_paper_has_its_29_datasets() -> None:
    datasets = load_manifest(ROOT / "data_manifests" / "nomic_unsupervised.toml").dataset
    assert len(datasets) == 29
    assert sum(dataset.num_pairs or 0 for dataset in datasets) == 234_553_344  # Table 5
    for dataset in datasets:
        assert dataset.query_prompt.endswith(": ") and dataset.document_prompt.endswith(": ")


def test_the_readme_names_every_folder() -> None:
    tree = (ROOT / "README.md").read_text().split("## Folders")[1]
    packages = [path.parent for name in ("pipeline", "trainer", "flows") for path in (ROOT / name).rglob("__init__.py")]
    for folder in (
        *packages,
        *(ROOT / name for name in ("hardbatch", "data_manifests", "tests", "benchmarks", "docs")),
    ):
        assert f"{folder.name}/" in tree, f"{folder} is missing in the README's list of folders"


def test_the_readme_names_modules_that_exist() -> None:
    tree = (ROOT / "README.md").read_text().split("## Folders")[1]
    modules = {
        path.name for name in ("hardbatch", "pipeline", "trainer", "flows") for path in (ROOT / name).rglob("*.py")
    }
    for name in re.findall(r"\b\w+\.py\b", tree):
        assert name in modules, f"{name} is in the README's list of folders, but not in the project"


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_exist(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), f"{path.name} links to {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.M)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}
            assert heading in anchors, f"{path.name} links to {target}"


def test_the_readmes_picture_shows_the_figures_of_batching_md() -> None:
    drawn = hardness_picture.draw(hardness_picture.read_figures((ROOT / "docs" / "batching.md").read_text()))
    assert (ROOT / "docs" / "hardness.svg").read_text() == drawn


def test_the_demo_compares_models_that_read_as_many_tokens() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"--max-length (\d+)", makefile)) == {str(demo.MAX_LENGTH_TOKENS)}


def test_every_flag_of_the_trainer_is_documented_with_its_default() -> None:
    table = (ROOT / "docs" / "training.md").read_text().split("## Every flag")[1]
    documented = dict(re.findall(r"^\| `--([a-z-]+)` \| ([^|]*) \|", table, flags=re.M))
    assert list(documented) == [name.replace("_", "-") for name in setting_defaults()]
    for name, default in setting_defaults().items():
        shown = documented[name.replace("_", "-")]
        if default is MISSING:
            assert shown == "required"
        elif default in (None, ()):
            assert shown == ""
        else:
            assert shown.strip("`").lower() == str(default).lower()
