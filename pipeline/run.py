"""run: from a manifest to the steps that make its shards, and running them.

The key of every step follows from settings and digests alone, so the whole plan is known before anything
runs. A step whose artifact is complete is only looked up. Prefect flows, the command line and the Python API
all come through here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from hardbatch.pipeline.artifacts.artifact import diagnose_damage, find_artifact
from hardbatch.pipeline.artifacts.commit import clean_up_after_crash, open_builder
from hardbatch.pipeline.artifacts.files import DIGESTS, DigestCache, as_user_error, sweep_caches, user_path
from hardbatch.pipeline.config import load_manifest
from hardbatch.pipeline.errors import ConfigError
from hardbatch.pipeline.executors.choose import open_executor
from hardbatch.pipeline.planner import Planner
from hardbatch.pipeline.reproducible import make_reproducible
from hardbatch.pipeline.runlog import RunLog, open_run_log
from hardbatch.pipeline.schemas import MIXED_DOMAIN
from hardbatch.pipeline.step import Executor, InlineExecutor, Progress, Stage, Step, Unit
from hardbatch.pipeline.workspace import point_latest_at

_STAGES = {  # stage → the module and function that make it, imported only when the stage runs
    "pairs": ("hardbatch.pipeline.stages.ingest", "build"),
    "leaks": ("hardbatch.pipeline.stages.leaks", "build"),
    "answers": ("hardbatch.pipeline.stages.relate", "build"),
    "vectors": ("hardbatch.pipeline.stages.embed", "build"),
    "clusters": ("hardbatch.pipeline.stages.cluster", "build"),
    "hardness": ("hardbatch.pipeline.stages.measure", "build"),
    "consistency": ("hardbatch.pipeline.stages.consistency", "build"),
    "batches": ("hardbatch.pipeline.stages.pack", "build"),
    "mixed": ("hardbatch.pipeline.stages.pack", "build_mixed"),
    "shards": ("hardbatch.pipeline.stages.write", "build"),
}
_WITHOUT_UNITS = ("leaks", "answers", "clusters", "hardness", "batches")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The steps of a run. Inputs come before what needs them; the last step makes the shards."""

    steps: tuple[Step, ...]

    @property
    def shards(self) -> Path:
        """The folder of the shards artifact."""
        return self.steps[-1].path

    @property
    def corpus(self) -> Path:
        """The folder of the corpus, which holds all its artifacts."""
        return self.shards.parents[1]


def plan_corpus(
    manifest: Path,
    workspace: Path,
    *,
    data_root: Path | None = None,
    overrides: Sequence[str] = (),
    follow_links: bool = False,
) -> Plan:
    """Plans the steps from a manifest to its shards, and runs none of them.

    Reads the sources and the models once for their digests, which are cached in the workspace.

    Args:
        manifest: The TOML file that names the datasets.
        workspace: The folder that artifacts are written to.
        data_root: The folder that local paths start from; by default the manifest's own.
        overrides: Strings `stage.field=value` that replace settings of the manifest.
        follow_links: Whether links may lead out of the data root.

    Raises:
        ConfigError, InputError: The manifest, a setting or a source is wrong; the message says which.
    """
    make_reproducible()
    settings = load_manifest(user_path(manifest), overrides)
    workspace, root = user_path(workspace), user_path(data_root or manifest.parent)
    if not root.is_dir():
        raise ConfigError(f"--data-root {root}: no such folder")
    _require_writable(workspace)
    sweep_caches(workspace)
    digests = DigestCache(workspace / DIGESTS)
    steps = Planner(settings, workspace / settings.corpus, root, digests, follow_links).steps()
    digests.save()
    return Plan(steps=tuple(steps))


def run_corpus(
    manifest: Path | str,
    *,
    workspace: Path | str = "workspace",
    data_root: Path | str | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    progress: Progress | None = None,
    executor: str = "inline",
    workers: int | None = None,
    ray_address: str | None = None,
) -> Path:
    """Makes the shards of a manifest and returns their folder. Steps that are already complete are reused.

    Args:
        manifest: The TOML file that names the datasets; see docs/manifests.md.
        workspace: The folder that artifacts are written to.
        data_root: The folder that local paths start from; by default the manifest's own.
        overrides: Settings that replace those of the manifest, for example `{"pack.batch_size": 256}`, or strings
            `stage.field=value` as on the command line.
        progress: Shows how far each step is; by default nothing is shown.
        executor: Who runs the work: `inline` (this process), `processes` or `ray`; see docs/scale.md.
        workers: The number of workers of the executor.
        ray_address: The address of a Ray cluster.

    Raises:
        ConfigError, InputError: The manifest, a setting or a source is wrong; the message says which.
        LockedError: Another process is making one of the artifacts.
        NoSpaceError: The disk is full. What is committed stays, and the next run continues from there.
    """
    settings = _as_assignments(overrides)
    with open_executor(executor, workers, ray_address) as opened:
        plan = plan_corpus(
            Path(manifest),
            Path(workspace),
            data_root=Path(data_root) if data_root is not None else None,
            overrides=settings,
        )
        with open_run_log(plan.corpus, Path(manifest), settings) as log:
            run_steps(plan.steps, progress, log, opened)
    return plan.shards


def _as_assignments(overrides: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Writes overrides as strings `stage.field=value`, each value as TOML."""
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [f"{name}={json.dumps(value, ensure_ascii=False, default=str)}" for name, value in overrides.items()]


def run_steps(
    steps: Sequence[Step], progress: Progress | None = None, log: RunLog | None = None, executor: Executor | None = None
) -> int:
    """Makes the artifacts of steps, in the order of what they need, and returns how many were not complete.

    With workers, the steps of several domains that have no units run at the same time, a step on each worker.

    Raises:
        HardbatchError: See `run_step`.
    """
    log, executor = log or RunLog(), executor or InlineExecutor()
    if isinstance(executor, InlineExecutor):
        return sum(run_step(step, progress, log, executor) for step in steps)

    num_made = 0
    waiting = {step.path: step for step in steps}
    while waiting:
        ready = [step for step in waiting.values() if not waiting.keys() & set(step.inputs.values())]
        together: dict[str, list[Step]] = {}  # by device
        for step in ready:
            if step.stage in _WITHOUT_UNITS and find_artifact(step.path) is None:
                together.setdefault(step.runtime.get("device", "cpu"), []).append(step)

        made: set[Path] = set()
        for device, group in together.items():
            if len(group) > 1:  # a step that is alone has all cores in this process
                _run_together(group, progress, log, executor, device)
                made |= {step.path for step in group}
        num_made += len(made) + sum(run_step(step, progress, log, executor) for step in ready if step.path not in made)
        for step in ready:
            del waiting[step.path]
    return num_made


def _run_together(
    steps: Sequence[Step], progress: Progress | None, log: RunLog, executor: Executor, device: str
) -> None:
    """Runs steps as units, so that each is made whole by one worker."""
    from hardbatch.pipeline.progress import SilentProgress

    log.begin()  # here, so that the workers find the file and only append to it
    units = [
        Unit(name=f"{step.stage} of {step.domain}", start=number, stop=number + 1) for number, step in enumerate(steps)
    ]
    progress = progress or SilentProgress()
    progress.start(f"{', '.join(dict.fromkeys(step.stage for step in steps))}, steps", len(units))
    try:
        executor.run(_WholeSteps(steps=tuple(steps), log=log), units, progress, device)
    finally:
        progress.finish()


@dataclass(frozen=True, kw_only=True)
class _WholeSteps:
    """A work whose units are steps; the unit `start` is a step's number."""

    steps: tuple[Step, ...]
    log: RunLog

    def open(self) -> _WholeSteps:
        return self

    def prepare(self, unit: Unit) -> None:
        return None

    def commit(self, unit: Unit, prepared: None) -> None:
        run_step(self.steps[unit.start], log=self.log)


def run_step(
    step: Step, progress: Progress | None = None, log: RunLog | None = None, executor: Executor | None = None
) -> bool:
    """Makes the artifact of a step, unless it is complete already; by default in this process.

    Committed units of an earlier run are kept, and the step continues from them. Complete shards become those that
    the link `latest` of the corpus leads to.

    Returns:
        False if the artifact was complete and nothing was done.

    Raises:
        LockedError: Another process is making the artifact.
        NoSpaceError: The disk is full.
    """
    worked = _complete(step, progress, log or RunLog(), executor or InlineExecutor())
    if step.stage == "shards":
        point_latest_at(step.path)
    return worked


def _complete(step: Step, progress: Progress | None, log: RunLog, executor: Executor) -> bool:
    if find_artifact(step.path) is not None:
        clean_up_after_crash(step.path)
        log.reused(step)
        return False
    from hardbatch.pipeline.progress import SilentProgress

    module, function = _STAGES["mixed" if (step.stage, step.domain) == ("batches", MIXED_DOMAIN) else step.stage]
    stage: Stage = getattr(import_module(module), function)
    with _user_errors(), open_builder(step.path) as builder:
        # Another process may have completed the artifact while this one waited for the lock.
        if find_artifact(step.path) is not None:
            log.reused(step)
            return False

        log.begin()
        started = time.monotonic()
        units_before = len(list((step.path / "units").glob("*.json")))
        try:
            with diagnose_damage(step.inputs.values()):
                result = stage(step, builder, executor, progress or SilentProgress())
                artifact = builder.finish(
                    units=result.units,
                    stage=step.stage,
                    stage_version=step.stage_version,
                    domain=step.domain,
                    key=step.key,
                    config=step.config,
                    inputs={name: path.name for name, path in step.inputs.items()},
                    sources=step.sources,
                    counts=result.counts,
                    produced_with=result.produced_with,
                )
        except BaseException as error:
            log.failed(step, error, seconds=time.monotonic() - started)
            raise
        seconds = time.monotonic() - started
        log.finished(step, artifact, seconds=seconds, units_before=units_before, warnings=result.warnings)
    return True


@contextmanager
def _user_errors() -> Iterator[None]:
    """Raises an OSError of its body that the user can fix, such as a full disk, as what it means."""
    try:
        yield
    except OSError as error:
        user_error = as_user_error(error)
        if user_error is None:
            raise
        raise user_error from None


def _require_writable(workspace: Path) -> None:
    try:
        workspace.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--workspace {workspace}: cannot be made: {error.strerror}; choose another folder") from None
    if not os.access(workspace, os.W_OK | os.X_OK):
        raise ConfigError(f"--workspace {workspace}: cannot be written; choose another folder")
