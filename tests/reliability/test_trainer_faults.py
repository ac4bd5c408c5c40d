"""Rows 15 and 20: a training on a full disk; pickles and code where a model is asked for."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reliability.processes import tree
from reliability.trainings import export_of, figures_of, run, run_fork
from trainer_models import save_model_folder, tiny_encoder

from pipeline.artifact import MANIFEST, verify_artifact
from pipeline.files import sha256_file
from trainer import evaluate, export
from trainer.checkpoint import find_checkpoint
from trainer.main import main

RecordRow = Callable[[int, str], None]
MIB = 2**20

# -- row 15 ------------------------------------------------------------------------------------------------------------


class Disk:
    """A small tmpfs at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path))

    def resize(self, num_bytes: int) -> None:
        """Makes it large enough for `num_bytes`, or too small for one byte more."""
        self._mount("-o", f"remount,size={num_bytes}", str(self.path))

    @property
    def used(self) -> int:
        """Bytes that are taken, in whole pages."""
        stat = os.statvfs(self.path)
        return (stat.f_blocks - stat.f_bfree) * stat.f_frsize

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=True)

    @staticmethod
    def _mount(*words: str) -> None:
        done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounts a small tmpfs, which takes root: {done.stderr.strip()}")


@pytest.fixture
def disk_at() -> Iterator[Callable[[Path], Disk]]:
    """`disk_at(path)`: a small disk, gone after the test."""
    disks: list[Disk] = []

    def mount(path: Path) -> Disk:
        disks.append(Disk(path))
        return disks[-1]

    yield mount
    for disk in disks:
        disk.unmount()


def run_unbroken(flags: dict[str, Any], tmp_path: Path, ranks: int = 1) -> dict[str, Any]:
    """A training that has room, run to its end; its flags."""
    unbroken = {**flags, "--output": tmp_path / "unbroken"}
    code, errors = end_of(unbroken, tmp_path, ranks)
    assert code == 0, errors
    return unbroken


def end_of(flags: dict[str, Any], tmp_path: Path, ranks: int) -> tuple[int, str]:
    """Exit code and messages of a training of one rank, in a fork, or of several."""
    ended = run_fork(flags, tmp_path / "log") if ranks == 1 else run(flags, ranks=ranks)
    return ended.code, ended.errors


def out_of_space(flags: dict[str, Any], tmp_path: Path, ranks: int = 1) -> str:
    """The one line with which a training leaves that has no space; torchrun's own code is 1 whatever its ranks say."""
    code, errors = end_of({**flags, "--resume": "auto"}, tmp_path, ranks)
    told = [line for line in errors.splitlines() if line.startswith("trainer: ")]
    assert (code == 6 if ranks == 1 else code) and len(told) == 1 and "no space left" in told[0], errors
    if ranks == 1:
        assert "Traceback" not in errors and "Exception" not in errors, errors
    return told[0]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_no_room_for_a_checkpoint_and_for_the_export(
    flags: dict[str, Any],
    disk_at: Callable[[Path], Disk],
    tmp_path: Path,
    ranks: int,
    record_row: RecordRow,
) -> None:
    flags |= {"--epochs": 2 * ranks}
    unbroken = run_unbroken(flags, tmp_path, ranks)
    size = sum(len(content) for content in tree(sorted((tmp_path / "unbroken" / "checkpoints").iterdir())[-1]).values())
    disk = disk_at(tmp_path / "disk")
    flags |= {"--output": disk.path / "out", "--keep-last": 1}
    disk.resize(size + size // 2)
    assert "no space left while writing" in out_of_space(flags, tmp_path, ranks)
    output = Path(flags["--output"])
    checkpoint, told = find_checkpoint(output, "auto")
    assert checkpoint is not None and told == [] and verify_artifact(checkpoint) == []
    assert checkpoint.name == "step-00000002" and list(output.rglob("*.tmp")) == []
    disk.resize(2 * size + size // 8)  # for two checkpoints, not for the export beside them
    errors = out_of_space({**flags, "--keep-last": 2, "--save-every": 1_000}, tmp_path, ranks)
    assert "export" in errors and not (output / "export").exists()
    disk.resize(4 * size)
    code, errors = end_of({**flags, "--resume": "auto"}, tmp_path, ranks)
    assert code == 0, errors
    assert figures_of(flags) == figures_of(unbroken) and export_of(flags) == export_of(unbroken)
    record_row(
        15,
        f"{ranks} rank{'s' * (ranks > 1)}: no room for a checkpoint, then none for the export: exit code 6, the "
        "checkpoint before whole; with room on to the same figures and export",
    )


@pytest.mark.parametrize("full", ["log.jsonl", pytest.param("tensorboard", marks=pytest.mark.soak)])
def test_no_room_for_the_log(
    flags: dict[str, Any],
    disk_at: Callable[[Path], Disk],
    tmp_path: Path,
    full: str,
    record_row: RecordRow,
) -> None:
    """What is written of a line is dropped when the training goes on."""
    flags |= {"--epochs": 4}
    unbroken = run_unbroken(flags, tmp_path)
    disk, output = disk_at(tmp_path / "disk"), Path(flags["--output"])
    output.mkdir()
    (disk.path / "folder").mkdir()
    (output / full).symlink_to(disk.path / ("folder" if full == "tensorboard" else "file"))
    disk.resize(4096)  # some lines
    out_of_space(flags, tmp_path)
    lost = figures_of(unbroken)[len(figures_of(flags)) :]
    assert lost, "it left before its end"
    disk.resize(MIB)
    code, errors = end_of({**flags, "--resume": "auto"}, tmp_path, 1)
    assert code == 0, errors
    assert figures_of(flags) == figures_of(unbroken) and export_of(flags) == export_of(unbroken)
    record_row(15, f"no room for {full}: exit code 6, one line; with room on to the same figures and export")


def test_an_earlier_export_stays_where_there_is_no_room_for_another(
    flags: dict[str, Any], disk_at: Callable[[Path], Disk], tmp_path: Path
) -> None:
    unbroken = run_unbroken(flags, tmp_path)
    disk = disk_at(tmp_path / "disk")
    words = {"--checkpoint": find_checkpoint(unbroken["--output"], "auto")[0], "--output": disk.path / "export"}
    assert run_fork(words, tmp_path / "log", program="trainer.export").code == 0
    before = tree(disk.path)
    disk.resize(disk.used + MIB)
    ended = run_fork(words, tmp_path / "log", program="trainer.export")
    assert ended.code == 6 and ended.errors.startswith("trainer: no space left"), ended.errors
    assert tree(disk.path) == before


# -- row 20 ------------------------------------------------------------------------------------------------------------


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
    pickle.loads(content)
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
    code = command([str(word) for pair in flags.items() for word in pair if word != ""])
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
    assert run_fork({**flags, "--epochs": 1}, tmp_path / "log").code == 0
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
        refusal({"--model": start_from, "--eval": collection(tmp_path)}, capsys, command=evaluate.main)
    for name in ("optimizer.pt", "optimizer.safetensors"):
        own = pickled(trained, replaced="optimizer.safetensors", by=name)
        refusal({**flags, "--output": tmp_path / "e", "--epochs": 1, "--resume": own}, capsys)
    assert not canary.exists()
    record_row(20, f"{5 * len(names) + 2} commands given a pickle for weights or moments: refused, nothing run")


def collection(tmp_path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "collection"
    folder.mkdir(exist_ok=True)
    for name, columns in (
        ("corpus", {"doc_id": ["1"], "text": ["one"]}),
        ("queries", {"query_id": ["1"], "text": ["one"]}),
        ("qrels", {"query_id": ["1"], "doc_id": ["1"], "score": [1]}),
    ):
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


def vouch(folder: Path, replaced: str, by: str) -> None:
    """Makes the manifest of a checkpoint say that `by` was written in place of `replaced`."""
    import hashlib

    from pipeline.files import canonical_json

    content = json.loads((folder / MANIFEST).read_text())
    del content["digest"], content["files"][replaced]
    content["files"][by] = {"sha256": sha256_file(folder / by), "bytes": (folder / by).stat().st_size, "rows": None}
    content["digest"] = hashlib.sha256(canonical_json(content)).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
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
    assert "config.json cannot be read" in refusal({**flags, "--backbone": unknown}, capsys)
    saved = save_model_folder(tmp_path / "saved", tiny_encoder("bert", 6, max_length_tokens=24))
    start_from = with_code(saved, canary, model_type="unheard_of")
    refusal({**flags, "--init-from": start_from}, capsys)
    refusal({"--checkpoint": start_from, "--output": tmp_path / "export"}, capsys, command=export.main)
    refusal({"--model": start_from, "--eval": collection(tmp_path)}, capsys, command=evaluate.main)
    known = with_code(shutil.copytree(backbone, tmp_path / "known"), canary)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    code = main([str(word) for pair in ({**flags, "--backbone": known, "--max-steps": 1}).items() for word in pair])
    torch.set_num_threads(threads)
    assert code == 0, capsys.readouterr().err
    assert not canary.exists()
    record_row(20, "code that a model's folder brings: refused with an unknown type, left alone with a known one")
