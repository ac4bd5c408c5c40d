"""Row 22: what serves a run dies in the middle of it; artifacts stay valid, `down` leaves no process, runs resume."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hardbatch.pipeline.cli import main
from tests.flows.test_service import ROOT, free_port, pids_in, project, run, service  # noqa: F401
from tests.reliability.workspaces import content, faults_in, write_corpus

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc"),
]
Record = Callable[[int, str], None]
# The command of the process in which the worker runs a flow.
FLOW_RUN = "prefect.engine|prefect.flow_engine|flow-run execute"


def process_of(root: Path, role: str) -> int:
    """Return the id of the server, the worker, or the process of the flow run, which is not in the record."""
    if role != "run":
        record = json.loads((root / ".prefect" / "service.json").read_text())
        return int(record["pids"][role])
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in pids_in(root)}
    found = [pid for pid, command in commands.items() if re.search(FLOW_RUN, command)]
    assert len(found) == 1, commands
    return found[0]


def wait_for(ready: Callable[[], object], what: str, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, f"this did not happen: {what}"
        time.sleep(0.02)


def deploy(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    prefect = str(Path(sys.executable).with_name("prefect"))
    line = ["deployment", "run", "cluster-corpus/local", "-p", f"manifest={root / 'corpus' / 'toy.toml'}", *words]
    return run(root, [prefect, *line], {})


@pytest.mark.parametrize("victim", ["server", "worker", "run", "all three"])
def test_what_serves_a_run_is_killed(project: Path, tmp_path: Path, victim: str, record_row: Record) -> None:  # noqa: F811
    manifest = write_corpus(project / "corpus", {"alpha": 1_500, "beta": 400, "gamma": 1_500}, batches_per_part=1)
    assert main(["run", str(manifest), "--workspace", str(tmp_path / "clean")]) == 0
    workspace = project / "workspace"
    port = free_port()
    up = service(project, "up", port)
    assert up.returncode == 0, up.stderr
    assert deploy(project).returncode == 0
    wait_for(lambda: len(list(workspace.glob("toy/vectors/alpha/*/units/*.json"))) > 5, "units of vectors")
    victims = ["server", "worker", "run"] if victim == "all three" else [victim]
    for pid in [process_of(project, role) for role in victims]:
        os.kill(pid, signal.SIGKILL)
    time.sleep(1)
    assert not list(workspace.glob("toy/shards/*/manifest.json")), "the run ended before the kill"
    assert faults_in(workspace) == []
    down = service(project, "down", port)
    assert down.returncode == 0, down.stderr
    assert pids_in(project) == []
    assert faults_in(workspace) == []

    port = free_port()
    assert service(project, "up", port).returncode == 0
    again = deploy(project, "--watch")
    assert again.returncode == 0, again.stdout + (project / ".prefect" / "worker.log").read_text()
    assert service(project, "down", port).stdout == "down\n"
    assert pids_in(project) == []
    assert_same_artifacts(workspace, tmp_path / "clean")
    record_row(22, f"{victim} killed in a run: 0 faults, 0 processes after down, resumed, equal digests")


def assert_same_artifacts(workspace: Path, clean: Path) -> None:
    found, expected = content(workspace), content(clean)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.mark.parametrize("seconds", [0.5, 3.0, 6.0])
def test_up_is_killed(project: Path, seconds: float, record_row: Record) -> None:  # noqa: F811
    """`down` finds what was started even if `up` was killed before it recorded the process."""
    port = free_port()
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    variables |= {"HOME": str(project), "HARDBATCH_PREFECT_PORT": str(port)}
    command = [sys.executable, "-m", "hardbatch.flows.service", "up"]
    process = subprocess.Popen(command, cwd=project, env=variables, start_new_session=True)
    time.sleep(seconds)
    process.kill()
    process.wait()
    service(project, "down", port)
    assert pids_in(project) == []
    assert not (project / "prefect.toml").exists()
    up = service(project, "up", port)
    assert up.returncode == 0, up.stderr
    assert service(project, "down", port).stdout == "down\n"
    assert pids_in(project) == []
    record_row(22, "up killed while it starts, at 3 moments: 0 processes after down, up again")


def test_the_command_without_a_service_is_killed(tmp_path: Path, record_row: Record) -> None:
    """The flow runs in another process group; it ends too, and the next run resumes."""
    for package in ("hardbatch", "flows", "pipeline"):
        shutil.copytree(ROOT / package, tmp_path / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    manifest = write_corpus(tmp_path / "corpus", {"alpha": 1_500, "beta": 1_500}, batches_per_part=1)
    assert main(["run", str(manifest), "--workspace", str(tmp_path / "clean")]) == 0
    workspace = tmp_path / "workspace"
    command = [sys.executable, "-m", "hardbatch.flows.cluster_corpus", str(manifest), "--workspace", str(workspace)]
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        wait_for(lambda: len(list(workspace.glob("toy/vectors/alpha/*/units/*.json"))) > 5, "units of vectors")
        process.kill()
        process.wait()
    wait_for(lambda: pids_in(tmp_path) == [], "the end of what the killed command had started")
    assert not list(workspace.glob("toy/shards/*/manifest.json"))
    assert faults_in(workspace) == []
    assert subprocess.run(command, cwd=tmp_path, env=environment, timeout=600, check=False).returncode == 0
    assert_same_artifacts(workspace, tmp_path / "clean")
    record_row(22, "the command without a service killed: what it had started ends, the next run resumes")
