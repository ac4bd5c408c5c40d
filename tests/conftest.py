"""Fixtures that several test files share: tiny corpora, their manifests, and runs from manifest to shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hardbatch.pipeline.cli import main
from hardbatch.pipeline.reproducible import make_reproducible
from hardbatch.pipeline.run import Plan, plan_corpus, run_step
from tests.samples import LEXICAL, make_rows

Row = Mapping[str, Any]

make_reproducible()


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    """`rows(n, start=0)`: n distinct pairs."""
    return make_rows


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Iterable[Row]], Path]:
    """`write_jsonl(name, rows)`: a JSON Lines file below tmp_path."""

    def write(name: str, rows: Iterable[Row]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_manifest(tmp_path: Path) -> Callable[..., Path]:
    """`write_manifest(text, name="corpus.toml")`: a manifest below tmp_path; lexical models unless it has [embed]."""

    def write(text: str, name: str = "corpus.toml") -> Path:
        path = tmp_path / name
        path.write_text(text if "[embed]" in text else text + LEXICAL, encoding="utf-8")
        return path

    return write


@pytest.fixture
def small_manifest(write_jsonl: Callable[..., Path], write_manifest: Callable[..., Path]) -> Path:
    """The manifest of a corpus of one domain, 48 pairs in batches of 8."""
    write_jsonl("pairs.jsonl", make_rows(48))
    return write_manifest(
        'corpus = "small"\n[[dataset]]\nname = "numbers"\nsource = "pairs.jsonl"\n[pack]\nbatch_size = 8\n'
    )


@pytest.fixture
def run_corpus(tmp_path: Path, write_manifest: Callable[..., Path]) -> Callable[..., Plan]:
    """`run_corpus(manifest_text, overrides=(), workspace=None, stages=None)`: runs in this process, returns the plan.

    `stages` limits the run to some stages, for example ("pairs",). The workspace is tmp_path/"workspace".
    """

    def run(
        text: str,
        *,
        overrides: Sequence[str] = (),
        workspace: Path | None = None,
        stages: Sequence[str] | None = None,
    ) -> Plan:
        plan = plan_corpus(write_manifest(text), workspace or tmp_path / "workspace", overrides=overrides)
        for step in plan.steps:
            if stages is None or step.stage in stages:
                run_step(step)
        return plan

    return run


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`cli(*arguments)`: (exit code, stdout, stderr) of the command in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:  # as argparse raises it
            code = int(exit_.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(manifest, workspace, shards) of a finished run: 48 pairs, 6 batches of 8. Read only: copy what you change."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(48)))
    manifest = folder / "small.toml"
    manifest.write_text(
        'corpus = "small"\n[[dataset]]\nname = "numbers"\nsource = "pairs.jsonl"\n[pack]\nbatch_size = 8\n' + LEXICAL
    )
    plan = plan_corpus(manifest, folder / "workspace")
    for step in plan.steps:
        run_step(step)
    return manifest, folder / "workspace", plan.shards


@pytest.fixture
def copied_run(finished_run: tuple[Path, Path, Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    """The finished run, copied, to be changed."""
    manifest, _, shards = finished_run
    folder = shutil.copytree(manifest.parent, tmp_path / "copy", symlinks=True)
    return folder / manifest.name, folder / "workspace", folder / shards.relative_to(manifest.parent)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Ends a run with the figures that tests recorded by row (see tests/reliability/conftest.py)."""
    found: dict[int, list[str]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, figure in getattr(report, "user_properties", ()):
                if name.startswith("reliability row "):
                    found.setdefault(int(name.rsplit(" ", 1)[1]), []).append(str(figure))
    if found:
        terminalreporter.section("reliability")
        terminalreporter.write_line("| row | seen |\n|---|---|")
        for row, figures in sorted(found.items()):
            terminalreporter.write_line(f"| {row} | {'; '.join(dict.fromkeys(figures))} |")
