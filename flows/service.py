"""The local Prefect service, a server and a process worker: `python -m hardbatch.flows.service up|down|status`.

Everything it keeps is in the project's `.prefect/`: the database, the logs and the record of the service. While the
service is up, `prefect.toml` in the project's root tells Prefect's commands where the server is.

Prefect starts each flow run in a session of its own, and a killed parent leaves no other link to its children. So the
processes carry a random mark in their environment, which their children inherit, and `down` ends all that carry it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hardbatch.pipeline.artifacts.files import write_file_atomic
from hardbatch.pipeline.errors import ConfigError, HardbatchError, LockedError

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".prefect"
RECORD = HOME / "service.json"
SETTINGS = ROOT / "prefect.toml"
SETTINGS_MARK = "# Written by flows/service.py while the service is up; `make down` removes it.\n"
MARK = "HARDBATCH_PROCESS"
START_TIMEOUT_S = 300.0
GRACE_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Service:
    """The service that was started last.

    Attributes:
        url: Address of the server.
        token: Random text that is part of the mark of its processes.
        pids: Process ids of the server and the worker, by role. A process counts only while it also carries the mark,
            because the system may have given its id to another one.
    """

    url: str
    token: str
    pids: dict[str, int] = field(default_factory=dict)

    @property
    def api_url(self) -> str:
        """What `PREFECT_API_URL` must be for Prefect's commands to find the server from any folder."""
        return f"{self.url}/api"

    def mark(self, role: str) -> str:
        return f"{self.token}-{role}"

    def is_alive(self, role: str) -> bool:
        return self.pids.get(role) in processes_marked(self.mark(role))


def up() -> None:
    """Start server and worker and register the deployments of prefect.yaml, unless both are alive."""
    if (service := _read_record()) and service.is_alive("server") and service.is_alive("worker"):
        print(f"already up: {service.url}\n{_how_to_use(service)}")
        return

    down()
    if SETTINGS.exists():
        raise ConfigError(f"{SETTINGS} does not belong to this service, which needs that name: move it away.")
    port = _free_port()
    service = Service(url=f"http://127.0.0.1:{port}", token=secrets.token_hex(8))

    try:
        server = ["server", "start", "--host", "127.0.0.1", "--port", str(port), "--analytics-off"]
        _start(service, "server", server, is_ready=lambda: answers(service.api_url))
        worker = ["worker", "start", "--pool", "local", "--type", "process", "--install-policy", "never"]
        _start(service, "worker", [*worker, "--name", service.token], is_ready=lambda: _has_worker(service))
        _deploy(service)

        settings = f"home = {json.dumps(str(HOME))}\n[api]\nurl = {json.dumps(service.api_url)}\n"
        write_file_atomic(SETTINGS, (SETTINGS_MARK + settings).encode())
    except BaseException:
        down()
        raise
    print(f"up: {service.url}\n{_how_to_use(service)}")


def down() -> bool:
    """End the service and the flow runs of its worker; return False if none of it was alive."""
    _remove_settings()
    if (service := _read_record()) is None:
        return False

    # The flow runs end first and the server last, because the runs report to the server how they ended, and the
    # worker reports for those that cannot.
    runs = service.pids.get("worker") is not None and end(service.mark("worker"), spare=service.pids["worker"])
    ended = [runs, end(service.mark("worker")), end(service.mark("server"))]
    RECORD.unlink()
    return any(ended)


def status() -> bool:
    """Print what is alive; return whether server and worker both are."""
    service = _read_record()
    alive = [role for role in ("server", "worker") if service and service.is_alive(role)]
    for role in ("server", "worker"):
        print(f"{role}: {'up' if role in alive else 'down'}")
    if service and alive:
        print(service.url)
    return len(alive) == 2


def find_service() -> Service | None:
    """Return the service if its server is alive; otherwise remove the settings that point to it.

    They are left by a server that died without `down`, for example at a reboot.
    """
    service = _read_record()
    if service is None or not service.is_alive("server"):
        _remove_settings()
        return None
    return service


def answers(api_url: str) -> bool:
    """Return whether a Prefect server answers at an API's address."""
    return _ask(f"{api_url}/health") is True


def processes_marked(mark: str) -> set[int]:
    """Return the ids of the living processes with `mark` in their environment; a zombie has no environment."""
    entry = f"{MARK}={mark}"
    if not Path("/proc/self/environ").exists():  # macOS, where ps shows the environment after the command
        command = ["ps", "-A", "-E", "-ww", "-o", "pid=,command="]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
        return {int(line.split()[0]) for line in listing.splitlines() if entry in line.split()}

    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended, or belongs to somebody else
            if entry.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.add(int(process.name))
    return found


def end(mark: str, *, spare: int | None = None) -> bool:
    """End the processes with `mark`: SIGTERM to each, and SIGKILL to those that live `GRACE_S` later.

    Args:
        mark: The mark that `processes_marked` looks for.
        spare: Id of a process that is left alone.

    Returns:
        Whether there was a process to end.
    """
    found: set[int] = set()
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_S
        signalled: set[int] = set()
        while time.monotonic() < deadline:
            living = processes_marked(mark) - {spare}
            found |= living
            if not living and not any(map(_is_exiting, found)):
                break
            for pid in living - signalled:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            signalled |= living
            time.sleep(0.1)
    return bool(found)


def _is_exiting(pid: int) -> bool:
    """Return whether a process that has lost its environment still holds its files and ports, for a moment."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _start(service: Service, role: str, arguments: list[str], *, is_ready: Callable[[], bool]) -> None:
    """Start a Prefect command in the background, record it, and wait until it is ready."""
    # The record is written before the start, so that `down` finds the process even if this one dies right after it.
    _write_record(service)
    log = HOME / f"{role}.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(  # noqa: S603 -- Prefect's own command, its arguments as a list
            [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
            cwd=ROOT,
            env=_environment(service) | {MARK: service.mark(role)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service.pids[role] = process.pid
    _write_record(service)

    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            said = _last_line(log.read_text(encoding="utf-8", errors="replace"))
            raise ConfigError(f"the Prefect {role} did not start: {said} (more in {log})")
        time.sleep(0.2)


def _deploy(service: Service) -> None:
    """Register the deployments of prefect.yaml."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    result = subprocess.run(  # noqa: S603 -- Prefect's own command, its arguments as a list
        command, cwd=ROOT, env=_environment(service), capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise ConfigError(f"prefect.yaml could not be deployed: {_last_line(result.stdout + result.stderr)}")


def _environment(service: Service) -> dict[str, str]:
    """Return the caller's environment without its Prefect settings, which may point elsewhere, and no telemetry."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return inherited | {
        "DO_NOT_TRACK": "1",
        "NO_PROXY": ",".join([*filter(None, [os.environ.get("NO_PROXY")]), "127.0.0.1"]),
        "PREFECT_HOME": str(HOME),
        "PREFECT_API_URL": service.api_url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # So that `--watch` shows the lines of a run, with the message of a failed one and the folder of a finished one.
        "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "true",
        "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": "true",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }


def _how_to_use(service: Service) -> str:
    """Return lines that say how to ask for a run from another folder than the project's root."""
    return "\n".join(
        [
            "to use Prefect's commands outside this folder, with absolute paths:",
            f"export PREFECT_API_URL={service.api_url}",
            f"to ask for a run from any folder: {sys.executable} -m hardbatch.flows.submit MANIFEST",
        ]
    )


def _ask(url: str, body: object = None) -> Any:
    """Return the JSON that the server answers, or None if it does not."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=data, headers=headers)  # noqa: S310 -- our own server's address
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with without_proxy.open(request, timeout=5) as response:
            return json.load(response)
    except (OSError, ValueError):
        return None


def _has_worker(service: Service) -> bool:
    """Return whether the worker has reported to the server."""
    workers = _ask(f"{service.url}/api/work_pools/local/workers/filter", {}) or []
    return any(worker["name"] == service.token for worker in workers)


def _free_port() -> int:
    """Return the port of the server, or raise ConfigError if it cannot be used."""
    given = os.environ.get("HARDBATCH_PREFECT_PORT", "4200")
    if not given.isdecimal() or not 0 < int(given) < 65536:
        raise ConfigError(f"HARDBATCH_PREFECT_PORT is {given!r}: give a port from 1 to 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(given)))
        except OSError as error:
            advice = "set HARDBATCH_PREFECT_PORT to a free one."
            raise ConfigError(f"port {given} cannot be used ({error.strerror}): {advice}") from None
    return int(given)


def _remove_settings() -> None:
    """Remove our prefect.toml and what an `up` left that was killed while it wrote the file."""
    for leftover in ROOT.glob(f".{SETTINGS.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    if SETTINGS.exists() and SETTINGS.read_text(encoding="utf-8").startswith(SETTINGS_MARK):
        SETTINGS.unlink()


def _read_record() -> Service | None:
    if not RECORD.exists():
        return None
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    return Service(url=record["url"], token=record["token"], pids=record.get("pids", {}))


def _write_record(service: Service) -> None:
    write_file_atomic(RECORD, json.dumps(asdict(service), indent=1).encode())


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() not in ("", "Server stopped!")]
    return lines[-1] if lines else "it said nothing"


@contextmanager
def _alone() -> Iterator[None]:
    """Refuse a second `up` or `down` of this project at the same time."""
    HOME.mkdir(exist_ok=True)
    with open(HOME / "service.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError("another `up` or `down` of this project is running: wait for it.") from None
        yield


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code; `status` returns 1 unless server and worker are both up."""
    parser = argparse.ArgumentParser(prog="python -m hardbatch.flows.service", description="The local Prefect service.")
    parser.add_argument("command", choices=("up", "down", "status"))
    command = parser.parse_args(argv).command
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    try:
        if command == "status":
            return 0 if status() else 1
        with _alone():
            if command == "up":
                up()
            else:
                print("down" if down() else "was not up")
        return 0
    except HardbatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
