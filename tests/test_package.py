"""hardbatch: its public names, what importing it loads, and that no module is loaded under two names."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hardbatch
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ["torch", "transformers", "polars", "pyarrow", "numpy", "pydantic", "prefect"]


def python(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=cwd, check=False)


def test_importing_it_is_light() -> None:
    code = f"import sys, hardbatch; dir(hardbatch); print([name for name in {HEAVY} if name in sys.modules])"
    assert python("-c", code, cwd=ROOT).stdout == "[]\n"


@pytest.mark.parametrize("name", hardbatch.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(hardbatch, name) is not None
    assert name in dir(hardbatch)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hardbatch.nothing  # noqa: B018


@pytest.mark.parametrize("package", ["pipeline", "trainer", "flows"])
def test_the_old_import_names_are_refused(package: str) -> None:
    ended = python("-c", f"import {package}", cwd=ROOT)
    assert ended.stderr.splitlines()[-1] == f"ImportError: import hardbatch.{package}, not {package}"


def test_the_trainer_as_a_file_loads_this_package_alone(tmp_path: Path) -> None:
    """From a folder with a `trainer.py` of the user's own."""
    (tmp_path / "trainer.py").write_text("raise SystemExit('the wrong trainer')")
    code = (
        "import json, runpy, sys; sys.argv = ['main.py', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'trainer' / 'main.py')!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(json.dumps({name: module.__file__ for name, module in sys.modules.items()\n"
        "    if name.split('.')[0] in ('hardbatch', 'pipeline', 'trainer', 'flows')}))"
    )
    ended = python("-c", code, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    loaded = json.loads(ended.stdout.splitlines()[-1])
    assert "hardbatch.trainer.config" in loaded
    assert all(name.startswith("hardbatch") for name in loaded)
    assert all(Path(file).resolve().is_relative_to(ROOT) for file in loaded.values())


def test_run_corpus_and_its_shards(tmp_path: Path, small_manifest: Path) -> None:
    shards = hardbatch.run_corpus(small_manifest, workspace=tmp_path / "workspace", overrides={"pack.batch_size": 12})
    assert read_artifact(shards).manifest.stage == "shards"
    again = hardbatch.run_corpus(
        str(small_manifest), workspace=tmp_path / "workspace", overrides=["pack.batch_size=12"]
    )
    assert again == shards

    loaded = hardbatch.load_shards(str(shards))
    assert (loaded.num_batches, loaded.batch_size) == (4, 12)
    batches = hardbatch.BatchStream(loaded, seed=0, stop=4)
    assert sorted(batch.batch_id for batch in batches) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pack.batch_size": -1}, "pack.batch_size"),
        ({"pack.group_size": "so-so"}, "pack.group_size"),
        ({"pack": 1}, "stage.field"),
    ],
)
def test_a_wrong_override_is_named(
    tmp_path: Path, small_manifest: Path, overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        hardbatch.run_corpus(small_manifest, workspace=tmp_path / "workspace", overrides=overrides)


def test_values_of_overrides_are_written_as_toml(
    tmp_path: Path, write_manifest: Callable[..., Path], write_jsonl: Callable[..., Path]
) -> None:
    from hardbatch.pipeline.config import load_manifest
    from hardbatch.pipeline.run import _as_assignments

    manifest = write_manifest('corpus = "c"\n[[dataset]]\nname = "d"\nsource = "pairs.jsonl"\n')
    given = {"cluster.method": "doubled", "pack.refine_tolerance": 1e-3, "ingest.decontaminate": ['a "b"', "c"]}
    settings = load_manifest(manifest, _as_assignments(given))
    assert (settings.cluster.method, settings.pack.refine_tolerance) == ("doubled", 1e-3)
    assert list(settings.ingest.decontaminate) == ['a "b"', "c"]
