"""The local Prefect service, a server and a process worker: `python -m flows.service up|down|status`.

Everything lives in `.prefect/` of the project (database, logs, the record of the processes) and ends with `down`.
A process of the service is known by its pid and start time, its descent, or the token in its environment: a flow
run has a session of its own, and outlives a worker that was killed. While the service is up, `prefect.toml` in the
project's root tells Prefect's commands where the server is.
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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, HardbatchError, LockedError

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".prefect"
RECORD = HOME / "service.json"
SETTINGS = ROOT / "prefect.toml"
SETTINGS_MARK = "# Written by flows/service.py while the service is up; `make down` removes it.\n"
TOKEN = "HARDBATCH_SERVICE"
START_TIMEOUT_S = 120.0
GRACE_S = 20.0

Processes = dict[int, tuple[int, str]]
"""pid -> (pid of the parent, start time in a form that only compares equal)."""


def up() -> None:
    """Start server and worker and register the deployments of prefect.yaml; nothing if they are up."""
    record = _read_record()
    if all(_is_alive(record, role) for role in ("server", "worker")):
        print(f"already up: {record['url']}")
        return
    down()
    if SETTINGS.exists():
        raise ConfigError(f"{SETTINGS} is not of this service, which needs that name: move its settings elsewhere.")
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    record = {"url": url, "token": secrets.token_hex(8), "processes": {}}
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    try:
        server = ["server", "start", "--host", "127.0.0.1", "--port", str(port), "--analytics-off"]
        _start(record, "server", [*prefect, *server])
        _wait_until("server", lambda: _get(f"{url}/api/health") is True, record)
        worker = ["worker", "start", "--pool", "local", "--type", "process", "--install-policy", "never"]
        _start(record, "worker", [*prefect, *worker, "--name", record["token"]])
        _wait_until("worker", lambda: _has_worker(record), record)
        _deploy([*prefect, "deploy", "--all"], record)
        SETTINGS.write_text(f'{SETTINGS_MARK}home = "{HOME}"\n[api]\nurl = "{url}/api"\n', encoding="utf-8")
    except BaseException:
        down()
        raise
    print(f"up: {url}")


def down() -> bool:
    """End the service and the flow runs of its worker; False if there was nothing to end."""
    if SETTINGS.exists() and SETTINGS.read_text(encoding="utf-8").startswith(SETTINGS_MARK):
        SETTINGS.unlink()
    record = _read_record()
    if not record:
        return False
    found = [_end(record, role) for role in ("worker", "server")]  # the server last: it notes how runs ended
    RECORD.unlink()
    return any(found)


def status() -> bool:
    """Print what runs; False unless server and worker both do."""
    record = _read_record()
    alive = {role: _is_alive(record, role) for role in ("server", "worker")}
    for role, is_alive in alive.items():
        print(f"{role}: {'up, pid ' + str(record['processes'][role]['pid']) if is_alive else 'down'}")
    if all(alive.values()):
        print(record["url"])
    return all(alive.values())


def _start(record: dict[str, Any], role: str, command: list[str]) -> None:
    """Start `command` in a session of its own and enter it in the record, logging to .prefect/<role>.log."""
    _write_record(record)  # the token first: it finds the process should we die before the pid is noted
    with open(HOME / f"{role}.log", "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(record, role),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    started = _processes().get(process.pid, (0, "gone"))[1]
    record["processes"][role] = {"pid": process.pid, "started": started}
    _write_record(record)


def _deploy(command: list[str], record: dict[str, Any]) -> None:
    result = subprocess.run(
        command, cwd=ROOT, env=_environment(record, "server"), capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise ConfigError(f"prefect.yaml could not be deployed: {_last_line(result.stdout + result.stderr)}")


def _environment(record: dict[str, Any], role: str) -> dict[str, str]:
    """Ours without the caller's Prefect settings, which may point elsewhere, and without telemetry."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {
        **inherited,
        TOKEN: f"{record['token']}-{role}",
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"])),
        "DO_NOT_TRACK": "1",
        "PREFECT_HOME": str(HOME),
        "PREFECT_API_URL": f"{record['url']}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }


def _wait_until(role: str, is_ready: Callable[[], bool], record: dict[str, Any]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_ready():
        if not _is_alive(record, role) or time.monotonic() > deadline:
            log = HOME / f"{role}.log"
            last = _last_line(log.read_text(encoding="utf-8", errors="replace"))
            raise ConfigError(f"the Prefect {role} did not start: {last} (all of it: {log})")
        time.sleep(0.2)


def _get(url: str, body: object = None) -> Any:
    """The JSON that the server answers, None if it does not."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as response:
            return json.load(response)
    except (OSError, ValueError):
        return None


def _has_worker(record: dict[str, Any]) -> bool:
    workers = _get(f"{record['url']}/api/work_pools/local/workers/filter", {}) or []
    return any(worker["name"] == record["token"] for worker in workers)


def _free_port() -> int:
    given = os.environ.get("HARDBATCH_PREFECT_PORT", "4200")
    if not given.isdecimal() or not 0 < int(given) < 65536:
        raise ConfigError(f"HARDBATCH_PREFECT_PORT is {given!r}: give a port from 1 to 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(given)))
        except OSError as error:
            raise ConfigError(
                f"port {given} cannot be used ({error.strerror}): set HARDBATCH_PREFECT_PORT to a free one."
            ) from None
    return int(given)


def _end(record: dict[str, Any], role: str) -> bool:
    """End the process of `role` and all that it started: TERM, and KILL after `GRACE_S` seconds."""
    known: dict[int, str] = {}
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_S
        signalled: set[int] = set()
        while family := _family(record, role, known):
            known |= family
            for pid in family.keys() - signalled:
                signalled.add(pid)
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
    return bool(known)


def _family(record: dict[str, Any], role: str, known: dict[int, str]) -> dict[int, str]:
    """pid -> start time of the living processes of `role`, `known` ones among them."""
    living = _processes()
    mark = f"\0{TOKEN}={record['token']}-{role}\0".encode()
    family = {pid for pid, (_, started) in living.items() if known.get(pid) == started or _carries(pid, mark)}
    if _is_alive(record, role):
        family.add(record["processes"][role]["pid"])
    while children := {pid for pid, (parent, _) in living.items() if parent in family} - family:
        family |= children
    return {pid: living[pid][1] for pid in family if pid in living}


def _carries(pid: int, mark: bytes) -> bool:
    """Whether the environment of a process holds `mark`; False where the system does not tell."""
    try:
        return mark in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _is_alive(record: dict[str, Any], role: str) -> bool:
    entry = record.get("processes", {}).get(role)
    return entry is not None and _processes().get(entry["pid"], (0, ""))[1] == entry["started"]


def _processes() -> Processes:
    """All living processes (no zombies), from `ps`, which Linux and macOS have."""
    command = ["ps", "-A", "-o", "pid=,ppid=,stat=,lstart="]
    listing = subprocess.run(command, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, check=True)
    fields = (line.split(maxsplit=3) for line in listing.stdout.splitlines())
    return {int(pid): (int(parent), started) for pid, parent, state, started in fields if state[0] != "Z"}


def _read_record() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def _write_record(record: dict[str, Any]) -> None:
    temporary = RECORD.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    temporary.replace(RECORD)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


@contextmanager
def _alone() -> Iterator[None]:
    """No second `up` or `down` of this project at the same time."""
    HOME.mkdir(exist_ok=True)
    with open(HOME / "service.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError("another `up` or `down` of this project is at work: wait for it.") from None
        yield


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code; `status` returns 1 unless all is up."""
    parser = argparse.ArgumentParser(prog="python -m flows.service", description="The local Prefect service.")
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
