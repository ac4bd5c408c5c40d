"""flows.cluster_corpus, on real Prefect servers: a tiny corpus, retries, exit codes, no orphans."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.states import Failed
from prefect.testing.utilities import prefect_test_harness

from hardbatch.flows.cluster_corpus import (
    SERVER_START_TIMEOUT_S,
    cluster_corpus,
    complete_step,
    is_worth_retrying,
    main,
)
from hardbatch.flows.service import MARK, end
from hardbatch.pipeline.errors import ConfigError, InputError, NoSpaceError
from hardbatch.pipeline.runlog import read_log

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = """
corpus = "tiny"
[[dataset]]
name = "numbers"
source = "pairs.jsonl"
[embed]
model = "lexical"
surrogate_model = "lexical"
"""


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=SERVER_START_TIMEOUT_S):
        yield


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    pairs = [{"query": f"what is {i} of {i % 7}", "document": f"{i} is of {i % 7}"} for i in range(64)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    path = tmp_path / "tiny.toml"
    path.write_text(MANIFEST)
    return path


class DiskError(NoSpaceError, OSError):
    """A user's mistake that is also an OSError."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EIO, "broken"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (OSError(errno.ENOSPC, "full"), False),
        (OSError(errno.EDQUOT, "quota"), False),
        (DiskError("full"), False),
        (ValueError("bug"), False),
    ],
)
def test_only_io_errors_that_may_pass_are_worth_retrying(error: Exception, expected: bool) -> None:
    assert is_worth_retrying(complete_step, None, Failed(data=error)) is expected  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Logger 'prefect.task_runs' attempted to send logs")
@pytest.mark.parametrize(("number", "num_attempts"), [(errno.EIO, 2), (errno.ENOSPC, 1)])
def test_a_step_is_tried_again_after_an_io_error(
    server: None, monkeypatch: pytest.MonkeyPatch, number: int, num_attempts: int
) -> None:
    attempts = []

    def run_step(step: SimpleNamespace, *others: object) -> bool:
        attempts.append(step.path)
        if len(attempts) == 1:
            raise OSError(number, "first attempt")
        return True

    monkeypatch.setitem(sys.modules, "hardbatch.pipeline.run", SimpleNamespace(run_step=run_step))
    state = complete_step(SimpleNamespace(stage="embed", path="somewhere"), return_state=True)
    assert len(attempts) == num_attempts
    assert state.is_completed() is (number == errno.EIO)


def test_the_flow_writes_shards_and_a_summary(server: None, manifest: Path, tmp_path: Path) -> None:
    workspace = str(tmp_path / "workspace")
    shards = cluster_corpus(str(manifest), workspace, overrides=["pack.batch_size=8"])
    assert list((Path(shards) / "data").glob("*.parquet"))
    elsewhere = str(tmp_path / "processes")
    made = cluster_corpus(str(manifest), elsewhere, overrides=["pack.batch_size=8"], executor="processes", workers=2)
    assert Path(made).relative_to(elsewhere) == Path(shards).relative_to(workspace)
    digests = [json.loads(Path(folder, "manifest.json").read_bytes())["digest"] for folder in (made, shards)]
    assert digests[0] == digests[1]
    assert cluster_corpus(str(manifest), workspace, overrides=["pack.batch_size=8"]) == shards
    assert cluster_corpus(str(manifest), workspace, overrides=["pack.batch_size=16"]) != shards

    logs = sorted((tmp_path / "workspace" / "tiny" / "logs").iterdir())
    runs = [read_log(path) for path in logs]
    # The second run had nothing to do and wrote no log; the third one reused pairs, answers, vectors, consistency, and
    # the clusters, because the groups of both batch sizes are of 8.
    assert [len(run.steps) for run in runs] == [8, 3]
    assert [run.num_reused for run in runs] == [0, 5]
    assert all(run.ended is not None and run.ended["exit_code"] == 0 for run in runs)

    with get_client(sync_client=True) as client:
        names = {run.name for run in client.read_task_runs()}
        key = ArtifactFilter(key=ArtifactFilterKey(any_=["cluster-corpus"]))
        artifacts = client.read_artifacts(artifact_filter=key)
    assert {"pairs of numbers", "vectors of numbers", "batches of numbers", "shards of tiny"} <= names
    assert len(artifacts) == 4
    assert shards in {artifact.description for artifact in artifacts}
    assert all("|" in str(artifact.data) for artifact in artifacts)
    page = tmp_path / "workspace" / "tiny" / f"report-{Path(shards).name}.html"
    assert page.read_text().startswith("<!doctype html>")
    assert any(page.as_uri() in str(artifact.data) for artifact in artifacts)


def test_the_state_of_a_run_has_its_message(server: None, manifest: Path, tmp_path: Path) -> None:
    models = ["pack.batch_size=8"]
    done = cluster_corpus(str(manifest), str(tmp_path / "w"), overrides=models, return_state=True)
    assert done.is_completed() and done.message == f"shards: {done.result()}"

    failed = cluster_corpus(str(manifest), str(tmp_path / "w"), overrides=["pack.batch_size=65"], return_state=True)
    assert failed.is_failed() and failed.message.startswith("no domain fills a batch of 65 pairs")
    with pytest.raises(InputError, match="no domain fills a batch of 65"):
        cluster_corpus(str(manifest), str(tmp_path / "w"), overrides=["pack.batch_size=65"])


def test_links_out_of_the_data_root_are_followed_if_asked(server: None, manifest: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "pairs.jsonl").symlink_to(manifest.with_name("pairs.jsonl"))
    linked = shutil.copy(manifest, folder)
    where, overrides = str(tmp_path / "w"), ["pack.batch_size=8"]
    with pytest.raises(ConfigError, match=r"leads out of .* through a link"):
        cluster_corpus(str(linked), where, overrides=overrides)
    assert Path(cluster_corpus(str(linked), where, overrides=overrides, follow_links=True), "manifest.json").exists()


def test_a_relative_manifest_that_is_not_there_names_the_folder_of_the_run(server: None) -> None:
    with pytest.raises(ConfigError, match=f"no such manifest below {Path.cwd()}, where this runs"):
        cluster_corpus("none.toml")


def test_a_server_that_does_not_answer_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # no server listens at the port of `discard`
    assert main(["some.toml"]) == 2
    err = capsys.readouterr().err
    assert err == "error: PREFECT_API_URL is http://127.0.0.1:9/api, but no Prefect server answers there; unset it\n"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="orphans are found through /proc")
@pytest.mark.parametrize("number", [None, signal.SIGTERM])
def test_the_command_leaves_no_process(tmp_path: Path, number: int | None) -> None:
    # A copy of the project, so that a service of this one that happens to be up does not take the run.
    for package in ("hardbatch", "flows", "pipeline"):
        shutil.copytree(ROOT / package, tmp_path / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    mark = secrets.token_hex(8)
    command = [sys.executable, "-m", "hardbatch.flows.cluster_corpus", str(tmp_path / "none.toml")]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = {**inherited, MARK: mark, "PREFECT_HOME": str(tmp_path)}
    log = tmp_path / "log"
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output)
    try:
        if number is not None:
            while "temporary server" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            process.send_signal(number)
        return_code = process.wait(timeout=2 * SERVER_START_TIMEOUT_S)
    finally:
        left = end(mark)
    assert not left, log.read_text()
    if number is None:
        assert return_code == 2 and "none.toml" in log.read_text(), log.read_text()
    else:
        assert return_code == 128 + number, log.read_text()
