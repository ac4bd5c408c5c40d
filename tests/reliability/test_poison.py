"""Row 17: every kind of poison ends in a clear line or in a run that accounts for every row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hardbatch.pipeline.errors import HardbatchError, InputError
from hardbatch.pipeline.run import Plan, plan_corpus, run_step
from tests import models
from tests.reliability import poison

KINDS = {kind.name: kind for kind in poison.all_kinds()}
QUICK = poison.quick_kinds()
SOAK = [kind for kind in KINDS.values() if kind not in QUICK]
Record = Callable[[int, str], None]


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.soak) for kind in SOAK)], ids=str)
def test_every_kind_ends_as_it_must(tmp_path: Path, kind: poison.Kind, record_row: Record) -> None:
    if "tiny_model" in kind.write.__qualname__:
        models.require_minilm()
    outcome = poison.run(kind, tmp_path / "kind")
    assert not outcome.faults, outcome.errors
    done = sum(kind.code == 0 for kind in KINDS.values())
    record_row(17, f"{len(KINDS)} kinds of poison: {done} complete with all rows accounted for, others end in a line")


def test_the_judge_finds_what_is_wrong(tmp_path: Path, finished_run: tuple[Path, Path, Path]) -> None:
    """Runs that lose a row, print a traceback or signs that do not print are recognised."""
    kind = KINDS["an empty file"]
    tracebacks = poison.judge(kind, 1, "Traceback (most recent call last):\n", tmp_path)
    assert tracebacks.faults[:2] == ("exit code 1, expected 3", "a traceback")
    raw = poison.judge(kind, 3, "hardbatch: pairs.jsonl: the file is empty \x1b[31m\n", tmp_path)
    assert raw.faults == ("signs that do not print",)
    lossy = poison.Kind(name="one row more", write=lambda folder: None, rows=49, no_vector=1)
    assert list(poison.account(lossy, finished_run[2])) == [
        "49 rows in, 48 pairs + 0 quarantined + 0 held out",
        "0 pairs without a vector, expected 1",
    ]


# a file that does not stay as it was planned with


@pytest.fixture
def plan(write_jsonl: Callable[..., Path], write_manifest: Callable[..., Path], tmp_path: Path) -> Callable[[], Plan]:
    """`plan()`: the plan over a good file pairs.jsonl."""
    write_jsonl("pairs.jsonl", poison.pairs(20_000))
    manifest = write_manifest('corpus = "c"\n[[dataset]]\nname = "n"\nsource = "pairs.jsonl"\n[pack]\nbatch_size = 8\n')
    return lambda: plan_corpus(manifest, tmp_path / "workspace")


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"query": "one", "document": "more"}\n')


def exchange(path: Path) -> None:
    changed = path.read_bytes().replace(b"number 1 ", b"number I ")
    path.with_name("new").write_bytes(changed)
    path.with_name("new").replace(path)


@pytest.mark.parametrize("change", [append, exchange, Path.unlink])
def test_a_file_that_changes_after_it_was_planned_with(
    tmp_path: Path, plan: Any, change: Callable[[Path], Any]
) -> None:
    planned = plan()
    change(tmp_path / "pairs.jsonl")
    with pytest.raises(InputError, match=r"pairs\.jsonl: (was changed while it was read|cannot be read any more)"):
        run_step(planned.steps[0])
    assert not (planned.steps[0].path / "manifest.json").exists()
    if (tmp_path / "pairs.jsonl").exists():
        again = plan()
        assert again.steps[0].path != planned.steps[0].path
        assert run_step(again.steps[0])


def test_a_file_that_grows_while_it_is_read(tmp_path: Path, plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hardbatch.pipeline.stages import ingest

    planned = plan()
    inner = ingest.clean_row

    def clean_row(raw: Any, limit: int) -> Any:
        if raw.row == 15_000:
            append(tmp_path / "pairs.jsonl")
        return inner(raw, limit)

    monkeypatch.setattr(ingest, "clean_row", clean_row)
    with pytest.raises(HardbatchError, match=r"pairs\.jsonl: was changed while it was read"):
        run_step(planned.steps[0])
