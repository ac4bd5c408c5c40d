"""run: from a manifest to the steps that make its shards, and running them.

The key of every step follows from settings and digests alone, so the whole plan is known before anything
runs. A step whose artifact is complete is only looked up. Prefect flows, the command line and the Python API
all come through here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hardbatch.pipeline.artifacts.artifact import diagnose_damage, find_artifact
from hardbatch.pipeline.artifacts.commit import clean_up_after_crash, open_builder
from hardbatch.pipeline.artifacts.files import DIGESTS, DigestCache, as_user_error, content_key, sweep_caches
from hardbatch.pipeline.config import CorpusManifest, Dataset, load_manifest
from hardbatch.pipeline.errors import ConfigError
from hardbatch.pipeline.reproducible import make_reproducible
from hardbatch.pipeline.resolved import (
    BatchesSettings,
    DatasetOfShards,
    DoubledSettings,
    FoldedSettings,
    HardnessSettings,
    MixedSettings,
    PairsSettings,
    ShardsSettings,
)
from hardbatch.pipeline.runlog import RunLog, open_run_log
from hardbatch.pipeline.schemas import MIXED_DOMAIN
from hardbatch.pipeline.step import InlineExecutor, Progress, Stage, Step

if TYPE_CHECKING:
    from hardbatch.pipeline.models.resolve import ModelSpec

_STAGES = {  # stage → the module and function that make it, imported only when the stage runs
    "pairs": ("hardbatch.pipeline.stages.ingest", "build"),
    "vectors": ("hardbatch.pipeline.stages.embed", "build"),
    "clusters": ("hardbatch.pipeline.stages.cluster", "build"),
    "hardness": ("hardbatch.pipeline.stages.measure", "build"),
    "batches": ("hardbatch.pipeline.stages.pack", "build"),
    "mixed": ("hardbatch.pipeline.stages.pack", "build_mixed"),
    "shards": ("hardbatch.pipeline.stages.write", "build"),
}
_VERSIONS = {"pairs": 2, "vectors": 1, "clusters": 4, "hardness": 1, "batches": 4, "shards": 2}
_ITERATIONS = {"folded": 10, "doubled": 100}


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
    manifest: Path, workspace: Path, *, data_root: Path | None = None, overrides: Sequence[str] = ()
) -> Plan:
    """Plans the steps from a manifest to its shards, and runs none of them.

    Reads the sources and the models once for their digests, which are cached in the workspace.

    Args:
        manifest: The TOML file that names the datasets.
        workspace: The folder that artifacts are written to.
        data_root: The folder that local paths start from; by default the manifest's own.
        overrides: Strings `stage.field=value` that replace settings of the manifest.

    Raises:
        ConfigError, InputError: The manifest, a setting or a source is wrong; the message says which.
    """
    make_reproducible()
    settings = load_manifest(manifest, overrides)
    root = data_root or manifest.parent
    if not root.is_dir():
        raise ConfigError(f"--data-root {root}: no such folder")
    _require_writable(workspace)
    sweep_caches(workspace)
    digests = DigestCache(workspace / DIGESTS)
    steps = _Planner(settings, workspace / settings.corpus, root, digests).steps()
    digests.save()
    return Plan(steps=tuple(steps))


def run_corpus(
    manifest: Path | str,
    *,
    workspace: Path | str = "workspace",
    data_root: Path | str | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Makes the shards of a manifest and returns their folder. Steps that are already complete are reused.

    Args:
        manifest: The TOML file that names the datasets; see docs/manifests.md.
        workspace: The folder that artifacts are written to.
        data_root: The folder that local paths start from; by default the manifest's own.
        overrides: Settings that replace those of the manifest, for example `{"pack.batch_size": 256}`, or strings
            `stage.field=value` as on the command line.
        progress: Shows how far each step is; by default nothing is shown.

    Raises:
        ConfigError, InputError: The manifest, a setting or a source is wrong; the message says which.
        LockedError: Another process is making one of the artifacts.
        NoSpaceError: The disk is full. What is committed stays, and the next run continues from there.
    """
    settings = _as_assignments(overrides)
    plan = plan_corpus(
        Path(manifest),
        Path(workspace),
        data_root=Path(data_root) if data_root is not None else None,
        overrides=settings,
    )

    with open_run_log(plan.corpus, Path(manifest), settings) as log:
        for step in plan.steps:
            run_step(step, progress, log)
    return plan.shards


def _as_assignments(overrides: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Writes overrides as strings `stage.field=value`, each value as TOML."""
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [f"{name}={json.dumps(value, ensure_ascii=False, default=str)}" for name, value in overrides.items()]


def run_step(step: Step, progress: Progress | None = None, log: RunLog | None = None) -> bool:
    """Makes the artifact of a step, unless it is complete already.

    Committed units of an earlier run are kept, and the step continues from them.

    Returns:
        False if the artifact was complete and nothing was done.

    Raises:
        LockedError: Another process is making the artifact.
        NoSpaceError: The disk is full.
    """
    log = log or RunLog()
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
                result = stage(step, builder, InlineExecutor(), progress or SilentProgress())
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
        log.finished(step, artifact, seconds=time.monotonic() - started, units_before=units_before)
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


class _Planner:
    """Collects the steps of a corpus; each is added after its inputs, so that their keys are known."""

    def __init__(self, settings: CorpusManifest, root: Path, data_root: Path, digests: DigestCache) -> None:
        self._settings = settings
        self._root = root
        self._data_root = data_root
        self._digests = digests
        self._steps: list[Step] = []

    def steps(self) -> list[Step]:
        """All steps of the manifest."""
        from hardbatch.pipeline.models.resolve import resolve_model

        settings = self._settings
        models = {
            role: resolve_model(settings.embed, role, self._data_root, self._digests)
            for role in ("cluster", "surrogate")
        }
        inputs: dict[str, Path] = {}
        for dataset in settings.dataset:
            inputs.update(self._domain(dataset, models))

        domains = [dataset.name for dataset in settings.dataset]  # a list, as their order numbers the batches
        size = settings.pack.batch_size
        if settings.pack.remainder == "mix":
            mixed = MixedSettings(batch_size=size, num_packings=settings.pack.num_packings, domains=domains)
            packed = {name: path for name, path in inputs.items() if name.startswith("batches/")}
            inputs[f"batches/{MIXED_DOMAIN}"] = self._add("batches", MIXED_DOMAIN, mixed.model_dump(), packed)

        described = set(DatasetOfShards.model_fields)
        datasets = {
            dataset.name: DatasetOfShards(**dataset.model_dump(include=described)) for dataset in settings.dataset
        }
        write = ShardsSettings(**settings.write.model_dump(), batch_size=size, domains=domains, datasets=datasets)
        self._add("shards", settings.corpus, write.model_dump(), inputs)
        return self._steps

    def _domain(self, dataset: Dataset, models: Mapping[str, ModelSpec]) -> dict[str, Path]:
        """Adds the steps of a domain; returns the inputs that writing needs."""
        name = dataset.name
        pack = self._settings.pack
        pairs = self._pairs(dataset)
        vectors = {role: self._vectors(name, model, pairs) for role, model in models.items()}
        both = {"pairs": pairs, "vectors": vectors["cluster"]}

        # K-Means and refinement follow the clustering model to its GPU. Keys hold the type of the device
        # alone, so that an artifact made on one GPU is found by a run on another.
        on_gpu = models["cluster"].device == "cuda"
        device = "cuda" if on_gpu else "cpu"
        runs_on = {"device": models["cluster"].runs_on if on_gpu else "cpu"}

        cluster = self._cluster_settings(device).model_dump()
        clusters = self._add("clusters", name, cluster, both, runtime=runs_on)
        measure = HardnessSettings(**self._settings.hardness.model_dump(), batch_size=pack.batch_size)
        hardness = self._add("hardness", name, measure.model_dump(), both)
        packed = {**both, "surrogate": vectors["surrogate"], "clusters": clusters}
        cut = BatchesSettings(**pack.model_dump(), device=device)
        batches = self._add("batches", name, cut.model_dump(), packed, runtime=runs_on)
        return {
            f"pairs/{name}": pairs,
            f"vectors/{name}": vectors["cluster"],
            f"surrogate/{name}": vectors["surrogate"],
            f"clusters/{name}": clusters,
            f"hardness/{name}": hardness,
            f"batches/{name}": batches,
        }

    def _cluster_settings(self, device: str) -> FoldedSettings | DoubledSettings:
        """The settings of the chosen method alone: a change of the other one's changes nothing."""
        given = self._settings.cluster
        settings = given.model_dump()
        settings["cluster_size"] = given.cluster_size or self._settings.pack.batch_size
        settings["iterations"] = given.iterations or _ITERATIONS[given.method]
        if given.method == "doubled":
            return DoubledSettings(**settings, backend=_faiss_backend())
        return FoldedSettings(**settings, device=device)

    def _vectors(self, domain: str, model: ModelSpec, pairs: Path) -> Path:
        """Adds the step that embeds a domain; all of the model's spec enters the key but what is of this machine."""
        config = asdict(model)
        runtime = {"model": config.pop("location"), "device": config.pop("runs_on")}
        config["unit_rows"] = self._settings.embed.unit_rows
        return self._add("vectors", domain, config, {"pairs": pairs}, runtime=runtime)

    def _pairs(self, dataset: Dataset) -> Path:
        """Adds the step that reads a dataset."""
        from hardbatch.pipeline.sources.files import list_source_files

        ingest = self._settings.ingest
        files = list_source_files(dataset, self._data_root, self._digests)
        folders, digests = self._evaluation_folders()
        settings = PairsSettings(
            columns=dataset.columns,
            limit=dataset.limit,
            holdout=dataset.holdout,
            holdout_seed=ingest.holdout_seed if dataset.holdout else None,
            max_characters=ingest.max_characters,
            decontaminate=ingest.decontaminate,
            decontaminate_sha256=digests,
        )
        runtime = {
            "files": {file.name: file.location for file in files},
            "modified_ns": {file.name: file.modified_ns for file in files},
            "decontaminate": folders,
            "max_quarantined_fraction": ingest.max_quarantined_fraction,
            "num_pairs": dataset.num_pairs,
        }
        sources = tuple(
            {"name": file.name, "format": file.format, "bytes": file.num_bytes, "sha256": file.sha256} for file in files
        )
        return self._add("pairs", dataset.name, settings.model_dump(), {}, sources=sources, runtime=runtime)

    def _evaluation_folders(self) -> tuple[dict[str, str], dict[str, str]]:
        """The folders of `ingest.decontaminate` by name, and the digests of their files."""
        from hardbatch.pipeline.sources.files import local_path

        setting = "ingest.decontaminate"
        folders, digests = {}, {}
        for name in self._settings.ingest.decontaminate:
            folder = local_path(name, self._data_root, setting)
            if not (folder / "corpus.parquet").is_file() or not (folder / "queries.parquet").is_file():
                raise ConfigError(f"{setting}: {folder} has no corpus.parquet and queries.parquet")
            folders[name] = str(folder)
            for part in ("corpus", "queries"):
                path = local_path(f"{name}/{part}.parquet", self._data_root, setting)
                digests[f"{name}/{part}"] = self._digests.digest(path)
        return folders, digests

    def _add(
        self,
        stage: str,
        domain: str,
        config: dict[str, Any],
        inputs: dict[str, Path],
        *,
        sources: tuple[dict[str, Any], ...] = (),
        runtime: dict[str, Any] | None = None,
    ) -> Path:
        """Adds a step and returns the folder of its artifact."""
        version = _VERSIONS[stage]
        keys = {name: path.name for name, path in inputs.items()}
        key = content_key(stage=stage, version=version, domain=domain, config=config, inputs=keys, sources=sources)
        folder = self._root / stage if stage == "shards" else self._root / stage / domain
        step = Step(
            stage=stage,
            stage_version=version,
            domain=domain,
            key=key,
            path=folder / key,
            config=config,
            inputs=inputs,
            sources=sources,
            runtime=runtime or {},
        )
        if all(known.path != step.path for known in self._steps):  # one vectors artifact may serve both roles
            self._steps.append(step)
        return step.path


def _faiss_backend() -> str:
    if importlib.util.find_spec("faiss") is None:
        raise ConfigError("cluster.method: 'doubled' needs FAISS: pip install faiss-cpu, or use 'folded'")
    import faiss

    return "faiss-gpu" if faiss.get_num_gpus() > 0 else "faiss-cpu"


def _require_writable(workspace: Path) -> None:
    try:
        workspace.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--workspace {workspace}: cannot be made: {error.strerror}; choose another folder") from None
    if not os.access(workspace, os.W_OK | os.X_OK):
        raise ConfigError(f"--workspace {workspace}: cannot be written; choose another folder")
