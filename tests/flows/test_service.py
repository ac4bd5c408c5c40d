"""flows.service, on a copy of the project and real servers: up, a deployment run, down, and no process left."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hardbatch.flows.service import MARK, Service, end, processes_marked

pytestmark = pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks for processes in /proc")
ROOT = Path(__file__).resolve().parents[2]
MANIFEST = """
corpus = "tiny"
[[dataset]]
name = "numbers"
source = "pairs.jsonl"
[embed]
model = "lexical"
surrogate_model = "lexical"
[pack]
batch_size = 8
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A copy of the project with a tiny corpus, in a folder with a space; its service is ended afterwards."""
    root = tmp_path / "a clone"
    for package in ("hardbatch", "flows", "pipeline"):
        shutil.copytree(ROOT / package, root / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prefect.yaml", root)
    pairs = [{"query": f"what is {i} of {i % 7}", "document": f"{i} is of {i % 7}"} for i in range(64)]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    (root / "tiny.toml").write_text(MANIFEST)
    yield root
    service(root, "down", free_port())
    assert pids_in(root) == []


def service(root: Path, command: str, port: int) -> subprocess.CompletedProcess[str]:
    return run(root, [sys.executable, "-m", "hardbatch.flows.service", command], {"HARDBATCH_PREFECT_PORT": str(port)})


def run(root: Path, command: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `command` in `root` as a user's shell would, without any Prefect setting in the environment."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = {**inherited, "HOME": str(root), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pids_in(root: Path) -> list[int]:
    """Return the processes whose working directory or command line is in `root`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            if str(root) in command or str((process / "cwd").readlink()).startswith(str(root)):
                found.append(int(process.name))
        except OSError:
            continue  # the process has ended, or belongs to somebody else
    return found


def test_up_run_down(project: Path) -> None:
    port = free_port()
    first = service(project, "up", port)
    lines = first.stdout.splitlines()
    assert (first.returncode, lines[0]) == (0, f"up: http://127.0.0.1:{port}"), first.stderr
    assert f"export PREFECT_API_URL=http://127.0.0.1:{port}/api" in lines
    before = pids_in(project)
    assert service(project, "up", port).stdout.splitlines() == [f"already {lines[0]}", *lines[1:]]
    assert pids_in(project) == before and len(before) >= 2
    assert service(project, "status", port).returncode == 0

    prefect = [str(Path(sys.executable).with_name("prefect"))]
    line = ["deployment", "run", "cluster-corpus/local", "-p", "manifest=tiny.toml", "--watch"]
    result = run(project, prefect + line, {})
    log = (project / ".prefect" / "worker.log").read_text()
    assert result.returncode == 0, result.stdout + log
    (shards,) = (project / "workspace").glob("tiny/shards/*")
    assert list(shards.glob("data/part-00000.parquet")), log
    assert f"shards: {shards}" in unwrapped(result.stdout)

    failed = run(project, [*prefect, *line[:-2], "manifest=none.toml", "--watch"], {})
    assert failed.returncode == 1 and "Traceback" not in failed.stdout
    assert f"none.toml: no such manifest below {project}, where this runs" in unwrapped(failed.stdout)

    ask_from_another_folder(project, port)

    assert service(project, "down", port).stdout == "down\n"
    assert pids_in(project) == []
    assert not (project / "prefect.toml").exists()
    assert service(project, "status", port).returncode == 1
    assert service(project, "down", port).stdout == "was not up\n"


def unwrapped(text: str) -> str:
    """What Prefect prints, without the line breaks that it puts at the width of the terminal."""
    return " ".join(text.split())


def ask_from_another_folder(project: Path, port: int) -> None:
    """Asks for runs from a folder of data, while the service is up: one that works, and some that cannot."""
    folder = project.parent / "data"
    folder.mkdir()
    shutil.copy(project / "tiny.toml", folder)
    (folder / "pairs.jsonl").symlink_to(project / "pairs.jsonl")
    api = {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    for variables in ({}, api):
        found = submit(folder, project, "tiny.toml", "--workspace", "made", "--follow-links", **variables)
        assert found.returncode == 0, found.stderr
        assert Path(found.stdout.splitlines()[-1]).parent == folder / "made" / "tiny" / "shards"

    wrong = submit(folder, project, "tiny.toml", "--set", "pack.sed=1")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.splitlines()[-1].startswith("error: --set: pack.sed: unknown key; did you mean 'seed'?")
    elsewhere = submit(folder, project, "tiny.toml", PREFECT_API_URL=f"http://127.0.0.1:{free_port()}/api")
    assert elsewhere.returncode == 2 and elsewhere.stderr.count("\n") == 1
    assert f"unset PREFECT_API_URL: the service of {project} is at {api['PREFECT_API_URL']}" in elsewhere.stderr


def submit(folder: Path, project: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Asks for a run from `folder`, with the package of the project."""
    command = [sys.executable, "-m", "hardbatch.flows.submit", *words]
    return run(folder, command, {"PYTHONPATH": str(project), **variables})


def test_a_run_without_a_service_is_answered_with_how_to_start_it(project: Path) -> None:
    found = submit(project.parent, project, "tiny.toml")
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert f"start it with `make up` in {project}, or run without it: hardbatch run MANIFEST" in found.stderr


def test_a_taken_port_is_refused(project: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = service(project, "up", port)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and f"port {port}" in result.stderr
    assert pids_in(project) == []


def test_a_server_that_dies_at_start(project: Path) -> None:
    (project / ".prefect" / "prefect.db").mkdir(parents=True)
    result = service(project, "up", free_port())
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "server did not start" in result.stderr
    assert pids_in(project) == []
    assert not (project / "prefect.toml").exists()


def test_nothing_is_left_up_when_deploying_fails(project: Path) -> None:
    deployments = project / "prefect.yaml"
    deployments.write_text(deployments.read_text().replace(":cluster_corpus", ":no_such_flow"))
    result = service(project, "up", free_port())
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "no_such_flow" in result.stderr
    assert pids_in(project) == []
    assert not (project / "prefect.toml").exists()


def test_settings_of_the_user_are_kept(project: Path) -> None:
    settings = project / "prefect.toml"
    settings.write_text("[logging]\nlevel = 'DEBUG'\n")
    result = service(project, "up", free_port())
    assert result.returncode == 2 and "prefect.toml" in result.stderr
    service(project, "down", free_port())
    assert settings.read_text() == "[logging]\nlevel = 'DEBUG'\n"


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark whose processes are ended afterwards."""
    mark = f"{secrets.token_hex(8)}-worker"
    yield mark
    end(mark)


def start_marked(mark: str, ready: Path, *, ignores_sigterm: bool = False) -> subprocess.Popen[bytes]:
    """Start a process with `mark` that runs until it is ended, and wait until it has started."""
    code = "import pathlib, signal, sys, time\n"
    code += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if ignores_sigterm else ""
    code += "pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, str(ready)], env={**os.environ, MARK: mark})
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.01)
    return process


def test_one_process_can_be_spared(mark: str, tmp_path: Path) -> None:
    leader, run = (start_marked(mark, tmp_path / name) for name in ("leader", "run"))
    assert processes_marked(mark) == {leader.pid, run.pid}
    assert end(mark, spare=leader.pid)
    assert run.wait() < 0 and leader.poll() is None
    assert end(mark) and leader.wait() < 0
    assert not end(mark)


def test_term_is_followed_by_kill(mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hardbatch.flows.service.GRACE_S", 0.5)
    stubborn = start_marked(mark, tmp_path / "ready", ignores_sigterm=True)
    assert end(mark)
    assert stubborn.wait() == -signal.SIGKILL


def test_a_stranger_with_the_recorded_pid_is_not_the_worker(mark: str, tmp_path: Path) -> None:
    stranger = start_marked("another mark", tmp_path / "ready")
    try:
        recorded = Service(url="", token=mark.removesuffix("-worker"), pids={"worker": stranger.pid})
        assert not recorded.is_alive("worker")
        assert not end(mark)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
