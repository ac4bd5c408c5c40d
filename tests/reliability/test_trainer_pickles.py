"""Row 20: pickles and code where a model is asked for."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hardbatch.pipeline.artifacts.artifact import MANIFEST, verify_artifact
from hardbatch.pipeline.artifacts.files import sha256_file
from hardbatch.trainer import evaluate, export
from hardbatch.trainer.checkpoint import find_checkpoint
from hardbatch.trainer.main import main
from tests.reliability.trainings import run_warm, words_of
from tests.reliability.workspaces import rewrite_manifest
from tests.trainer.test_evaluate import write_collection
from tests.trainer_models import save_model_folder, tiny_encoder

RecordRow = Callable[[int, str], None]


class Evil:
    """What a pickle can be: a command that runs as it is loaded."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._canary,)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that is there once a pickle or a module of a model was run."""
    return tmp_path / "canary"


@pytest.fixture
def evil(canary: Path, tmp_path: Path) -> bytes:
    """A pickle that makes the canary; checks that it does."""
    content = pickle.dumps({"weight": Evil(canary)})
    pickle.loads(content)  # noqa: S301 -- its own pickle: it must be one that runs
    canary.unlink()
    return content


def with_code(folder: Path, canary: Path, **keys: Any) -> Path:
    """Adds a module to the model in `folder`, named in its configuration and in that of its tokenizer."""
    code = f"open({str(canary)!r}, 'w')\nfrom transformers import BertConfig, BertModel\n"
    (folder / "evil.py").write_text(f"{code}class EvilConfig(BertConfig): pass\nclass EvilModel(BertModel): pass\n")
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel", "AutoTokenizer": ["evil.Evil", None]}
    for name, added in (("config.json", keys), ("tokenizer_config.json", {})):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, "auto_map": auto_map, **added}))
    return folder


def refusal(flags: dict[str, Any], capsys: pytest.CaptureFixture[str], *, command: Any = main) -> str:
    """The one line of a command that refuses."""
    code = command(words_of(flags))
    errors = capsys.readouterr().err
    assert code in (2, 4) and errors.startswith("trainer: ") and errors.count("\n") == 1, (code, errors)
    return errors


def test_pickles_are_never_loaded(
    flags: dict[str, Any],
    backbone: Path,
    canary: Path,
    evil: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_row: RecordRow,
) -> None:
    assert run_warm({**flags, "--epochs": 1}).code == 0
    trained = find_checkpoint(Path(flags["--output"]), "auto")[0]
    assert trained is not None
    number = 0

    def pickled(source: Path, *, replaced: str, by: str) -> Path:
        """A copy of `source` in which the pickle stands for one file; its manifest, if any, vouches for it."""
        nonlocal number
        number += 1
        folder = shutil.copytree(source, tmp_path / f"pickled{number}" / source.name)
        (folder / replaced).unlink()
        (folder / by).write_bytes(evil)
        if (folder / MANIFEST).exists():
            vouch(folder, replaced, by)
        return folder

    names = ("pytorch_model.bin", "model.pt", "model.bin", "model.safetensors")
    for name in names:
        start_from = pickled(trained, replaced="model.safetensors", by=name)
        refusal({**flags, "--output": tmp_path / "a", "--init-from": start_from}, capsys)
        refusal({**flags, "--output": tmp_path / "b", "--epochs": 1, "--resume": start_from}, capsys)
        other = pickled(backbone, replaced="model.safetensors", by=name)
        refusal({**flags, "--output": tmp_path / "c", "--backbone": other}, capsys)
        refusal({"--checkpoint": start_from, "--output": tmp_path / "d"}, capsys, command=export.main)
        refusal(
            {"--model": start_from, "--eval": write_collection(tmp_path / "collection")}, capsys, command=evaluate.main
        )
    for name in ("optimizer.pt", "optimizer.safetensors"):
        own = pickled(trained, replaced="optimizer.safetensors", by=name)
        refusal({**flags, "--output": tmp_path / "e", "--epochs": 1, "--resume": own}, capsys)
    assert not canary.exists()
    record_row(20, f"{5 * len(names) + 2} commands given a pickle for weights or moments: refused, nothing run")


def vouch(folder: Path, replaced: str, by: str) -> None:
    """Makes the manifest of a checkpoint say that `by` was written in place of `replaced`."""

    def change(content: dict[str, Any]) -> None:
        del content["files"][replaced]
        content["files"][by] = {"sha256": sha256_file(folder / by), "bytes": (folder / by).stat().st_size, "rows": None}

    rewrite_manifest(folder / MANIFEST, change)
    assert verify_artifact(folder) == []


def test_code_of_a_model_is_never_run(
    flags: dict[str, Any],
    backbone: Path,
    canary: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_row: RecordRow,
) -> None:
    """An unknown type is refused; a known one is built from the code of transformers, whatever its folder brings."""
    unknown = with_code(shutil.copytree(backbone, tmp_path / "unknown"), canary, model_type="unheard_of")
    assert "type 'unheard_of' is not supported" in refusal({**flags, "--backbone": unknown}, capsys)
    saved = save_model_folder(tmp_path / "saved", tiny_encoder("bert", 6, max_length_tokens=24))
    start_from = with_code(saved, canary, model_type="unheard_of")
    refusal({**flags, "--init-from": start_from}, capsys)
    refusal({"--checkpoint": start_from, "--output": tmp_path / "export"}, capsys, command=export.main)
    refusal({"--model": start_from, "--eval": write_collection(tmp_path / "collection")}, capsys, command=evaluate.main)
    known = with_code(shutil.copytree(backbone, tmp_path / "known"), canary)
    ended = run_warm({**flags, "--backbone": known, "--max-steps": 1})
    assert ended.code == 0, ended.errors
    assert not canary.exists()
    record_row(20, "code that a model's folder brings: refused with an unknown type, left alone with a known one")
