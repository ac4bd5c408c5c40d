"""The Prefect flow `cluster-corpus`: one task per stage and domain, in the order of the plan.

Prefect schedules, retries and shows the tasks. The artifacts alone decide what is already done, so no result is
persisted or cached here. Tasks carry paths and digests, never data.

`python -m hardbatch.flows.cluster_corpus MANIFEST` runs the flow without a worker and needs no service.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed, Failed
from prefect.utilities.annotations import quote

from hardbatch.flows import service
from hardbatch.pipeline.artifacts.files import user_path
from hardbatch.pipeline.errors import ConfigError, HardbatchError
from hardbatch.pipeline.executors.choose import EXECUTORS, open_executor
from hardbatch.pipeline.reproducible import make_reproducible

if TYPE_CHECKING:
    from hardbatch.pipeline.runlog import RunLog
    from hardbatch.pipeline.step import Executor, Step

# What Prefect logs a failed task with, and what it logs the end of the flow's process with.
TASK_LOGGER, ENGINE_LOGGERS = "prefect.task_runs", ("prefect.flow_runs", "prefect.engine", "prefect.flow_engine")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SERVER_START_TIMEOUT_S = 300
GRACE_S = 20.0
SERVER_GRACE_S = 5.0


def _drop_traceback(record: logging.LogRecord) -> bool:
    """Leave out the traceback of an error that the user can fix, and a log line that has no other use."""
    if record.exc_info and isinstance(record.exc_info[1], HardbatchError):
        record.exc_info = None
        return record.name == TASK_LOGGER
    return True


for _name in (TASK_LOGGER, *ENGINE_LOGGERS):
    logging.getLogger(_name).addFilter(_drop_traceback)


@flow(name="cluster-corpus", persist_result=False)
def cluster_corpus(
    manifest: str,
    workspace: str = "workspace",
    data_root: str | None = None,
    overrides: list[str] | None = None,
    follow_links: bool = False,
    executor: str = "inline",
    workers: int | None = None,
    ray_address: str | None = None,
) -> str:
    """Turn the corpus of a manifest into shards.

    Relative paths start at the working directory, which is the project's root in a deployment.

    Args:
        manifest: Path of the manifest.
        workspace: Folder of the artifacts.
        data_root: Folder at which the manifest's local sources start; by default the manifest's own folder.
        overrides: Settings that replace those of the manifest, as strings `stage.field=value`.
        follow_links: Whether links below the data root may lead out of it.
        executor: Who does the work of the tasks: `inline`, `processes` or `ray`; see docs/scale.md.
        workers: The number of workers of the executor.
        ray_address: The address of a Ray cluster.

    Returns:
        The folder of the shards. The message of the run's state is `shards: FOLDER`.

    Raises:
        HardbatchError: If the manifest or its data is wrong, or a stage fails; the message says what to do, and is the
            message of the run's state.
    """
    # A state of our own has the plain message, which an exception would bury under a traceback. Prefect raises `data`.
    try:
        with open_executor(executor, workers, ray_address) as opened:
            shards = _make_shards(
                user_path(manifest),
                user_path(workspace).absolute(),
                user_path(data_root) if data_root else None,
                overrides or (),
                follow_links=follow_links,
                executor=opened,
            )
    except HardbatchError as error:
        get_run_logger().error("%s", error)
        return Failed(message=str(error), data=error)  # type: ignore[return-value]
    get_run_logger().info("shards: %s", shards)
    return Completed(message=f"shards: {shards}", data=str(shards))  # type: ignore[return-value]


def _make_shards(
    manifest: Path,
    workspace: Path,
    data_root: Path | None,
    overrides: Sequence[str],
    *,
    follow_links: bool,
    executor: Executor,
) -> Path:
    """Run the steps of a manifest as tasks and publish their summary; return the folder of the shards."""
    from hardbatch.pipeline.run import plan_corpus
    from hardbatch.pipeline.runlog import open_run_log
    from hardbatch.pipeline.views.html import report_html
    from hardbatch.pipeline.views.report import summary_markdown

    if not manifest.is_absolute() and not manifest.exists():
        raise ConfigError(f"{manifest}: no such manifest below {Path.cwd()}, where this runs; give an absolute path")
    plan = plan_corpus(manifest, workspace, data_root=data_root, overrides=overrides, follow_links=follow_links)
    with open_run_log(plan.corpus, manifest, overrides) as log:
        for step in plan.steps:
            run = complete_step.with_options(name=step.stage, task_run_name=f"{step.stage} of {step.domain}")
            run(step, log, quote(executor))  # type: ignore[call-overload]  # Prefect unquotes it

    page = plan.corpus / f"report-{plan.shards.name}.html"
    page.write_text(report_html(plan.shards), encoding="utf-8")
    text = f"{summary_markdown(plan.shards)}\nFigures, a map and batches to read: [{page}]({page.as_uri()})\n"
    create_markdown_artifact(text, key="cluster-corpus", description=str(plan.shards))
    return plan.shards


def is_worth_retrying(task: Any, task_run: TaskRun, state: State[Any]) -> bool:
    """Return whether a failed task met an I/O error that may pass, not a user's mistake or a full disk."""
    error = state.data
    if isinstance(error, HardbatchError):
        return error.is_transient
    if not isinstance(error, OSError):
        return False
    return error.errno not in (errno.ENOSPC, errno.EDQUOT)


@task(
    retries=3,
    retry_delay_seconds=[1, 10, 60],
    retry_condition_fn=is_worth_retrying,
    persist_result=False,
    cache_policy=NO_CACHE,
    log_prints=True,
)
def complete_step(step: Step, log: RunLog | None = None, executor: Executor | None = None) -> bool:
    """Complete the artifact of a step.

    Args:
        step: The step to run.
        log: The run log that receives the step's records.
        executor: Who runs the units; by default this process.

    Returns:
        False if the artifact was already complete.
    """
    from hardbatch.pipeline.progress import LineProgress
    from hardbatch.pipeline.run import run_step

    # `log_prints` turns what is printed to stdout into lines of the flow run's log.
    worked = run_step(step, LineProgress(sys.stdout), log, executor)
    get_run_logger().info("%s %s", "built" if worked else "already complete:", step.path)
    return worked


def main(argv: list[str] | None = None) -> int:
    """Run the flow without a worker and return the exit code (128 + number for a signal).

    The flow uses the server of the service if that is up, otherwise a temporary one, which Prefect starts as a child
    that outlives a killed flow. So the flow gets a process group of its own, and this process ends the whole group.
    If this process is killed, the flow ends its own group.
    """
    parser = argparse.ArgumentParser(prog="python -m hardbatch.flows.cluster_corpus", description="Run cluster-corpus.")
    parser.add_argument("manifest")
    parser.add_argument("--workspace", default="workspace")
    parser.add_argument("--data-root")
    parser.add_argument("--set", dest="overrides", metavar="STAGE.FIELD=VALUE", action="append")
    parser.add_argument("--follow-links", action="store_true")
    parser.add_argument("--executor", choices=EXECUTORS, default="inline")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--ray-address")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = argv if argv is not None else sys.argv[1:]
    options = vars(parser.parse_args(arguments))
    if options.pop("inside"):
        return _run_inside(options)

    running = service.find_service()
    given = os.environ.get("PREFECT_API_URL")
    if given and not service.answers(given.rstrip("/")):
        print(f"error: PREFECT_API_URL is {given}, but no Prefect server answers there; unset it", file=sys.stderr)
        return ConfigError.exit_code
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, for example, ignores SIGHUP
            signal.signal(number, _stop)

    # Prefect's own limit for the start of a temporary server is 20 s, which a busy machine exceeds.
    defaults = {
        "PREFECT_HOME": str(service.HOME / "embedded"),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(SERVER_START_TIMEOUT_S),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    if running:  # Prefect would find it by itself only from the project's root
        defaults |= {"PREFECT_API_URL": running.api_url}
    make_reproducible()
    environment = {**defaults, **os.environ}
    command = [sys.executable, "-m", "hardbatch.flows.cluster_corpus", "--inside", *arguments]
    leader = subprocess.Popen(  # noqa: S603 -- this very module, its arguments as a list
        command, env=environment, stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        return_code = leader.wait()
        return return_code if return_code >= 0 else 128 - return_code
    finally:
        _end_group(leader)


def _run_inside(options: dict[str, Any]) -> int:
    """Run the flow in this process; the last line that it prints is the folder of the shards."""
    threading.Thread(target=_end_with_starter, daemon=True).start()
    try:
        print(cluster_corpus(**options))
    except HardbatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _end_with_starter() -> None:
    """Kill this process and its group once the process that started it, and holds stdin's other end, is gone."""
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGKILL)


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _end_group(leader: subprocess.Popen[bytes]) -> None:
    """End the flow, then what is left of its group: SIGTERM first, and SIGKILL to what survives it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    # The flow ends before its server does, because it reports to the server how it ended.
    leader.terminate()
    with suppress(subprocess.TimeoutExpired):
        leader.wait(GRACE_S)

    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGTERM)
        deadline = time.monotonic() + SERVER_GRACE_S
        while time.monotonic() < deadline:
            time.sleep(0.1)
            os.killpg(leader.pid, 0)
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()


if __name__ == "__main__":
    sys.exit(main())
