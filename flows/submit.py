"""Ask the Prefect service for a run from any folder: `python -m hardbatch.flows.submit MANIFEST`.

The worker runs the flow in the project's root, so paths are made absolute here. The command waits for the run to end;
its last line is the folder of the shards, or the message of what went wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from hardbatch.flows import service
from hardbatch.pipeline.artifacts.files import user_path
from hardbatch.pipeline.errors import ConfigError, HardbatchError, printable
from hardbatch.pipeline.executors.choose import EXECUTORS

DEPLOYMENT = "cluster-corpus/local"
_SECONDS_BETWEEN_LOOKS = 1.0


def main(argv: list[str] | None = None) -> int:
    """Ask for a run, wait for it, and return the exit code: 1 if the run fails, 130 if the wait is interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m hardbatch.flows.submit", description="Ask the Prefect service for a run, and wait for its end."
    )
    parser.add_argument("manifest", type=user_path)
    parser.add_argument("--workspace", type=user_path, default=Path("workspace"))
    parser.add_argument("--data-root", type=user_path)
    parser.add_argument("--set", dest="overrides", metavar="STAGE.FIELD=VALUE", action="append", default=[])
    parser.add_argument("--follow-links", action="store_true")
    parser.add_argument("--executor", choices=EXECUTORS, default="inline")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--ray-address")
    options = parser.parse_args(argv)
    parameters = {
        "manifest": str(options.manifest.absolute()),
        "workspace": str(options.workspace.absolute()),
        "data_root": options.data_root and str(options.data_root.absolute()),
        "overrides": options.overrides,
        "follow_links": options.follow_links,
        "executor": options.executor,
        "workers": options.workers,
        "ray_address": options.ray_address,
    }
    try:
        # Prefect reads its settings when it is imported.
        os.environ["PREFECT_API_URL"] = _find_server()
        os.environ.setdefault("PREFECT_HOME", str(service.HOME))
        state = _wait_for_run(parameters)
    except HardbatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("no longer waiting; the run continues", file=sys.stderr)
        return 130

    message = state.message or ""
    if state.is_completed():
        print(message.removeprefix("shards: "))
        return 0
    for line in (message or f"the run ended in state {state.name}").split("\n"):
        print(f"error: {printable(line)}", file=sys.stderr)
    return 1


def _find_server() -> str:
    """Return the address of the API: that of PREFECT_API_URL if it is set, otherwise that of the service.

    Raises:
        ConfigError: If no server answers there.
    """
    running = service.find_service()
    given = os.environ.get("PREFECT_API_URL")
    if given is None and running is None:
        raise ConfigError(
            f"the Prefect service is not up; start it with `make up` in {service.ROOT}, or run without it: "
            "hardbatch run MANIFEST"
        )
    url = given or (running.api_url if running else "")
    if not service.answers(url.rstrip("/")):
        own = (
            f"the service of {service.ROOT} is at {running.api_url}" if running else f"run `make up` in {service.ROOT}"
        )
        where = f"PREFECT_API_URL is {url}, but" if given else f"{url}:"
        raise ConfigError(f"{where} no Prefect server answers there; unset PREFECT_API_URL: {own}")
    return url


def _wait_for_run(parameters: dict[str, Any]) -> Any:
    """Ask for a run and wait for it; return its last state. Each new state is a line of standard error.

    Raises:
        ConfigError: If the server does not know the deployment.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            raise ConfigError(
                f"the server at {client.api_url} does not know {DEPLOYMENT}; unset PREFECT_API_URL to use the service "
                f"of {service.ROOT}, or register it there: prefect deploy --all"
            ) from None
        run = client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
        print(f"run {run.name}: {str(client.api_url).removesuffix('/api/')}/runs/flow-run/{run.id}", file=sys.stderr)

        shown = None
        while True:
            state = client.read_flow_run(run.id).state
            if state is not None and state.name != shown:
                shown = state.name
                late = ": is a worker running? `make up` starts one" if shown == "Late" else ""
                print(f"{shown}{late}", file=sys.stderr)
            if state is not None and state.is_final():
                return state
            time.sleep(_SECONDS_BETWEEN_LOOKS)


if __name__ == "__main__":
    sys.exit(main())
