"""run: from a manifest to the steps that make its shards, and doing them.

The key of every step follows from settings and digests alone, so the whole plan is known before anything runs. A step
whose artifact is complete is a look-up. Prefect flows and the command line both come through here.
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
from typing import Any

from hardbatch.pipeline.artifacts.artifact import diagnose_damage, find_artifact
from hardbatch.pipeline.artifacts.commit import clean_up_after_crash, open_builder
from hardbatch.pipeline.artifacts.files import DIGESTS, DigestCache, as_user_error, content_key, sweep_caches
from hardbatch.pipeline.config import CorpusManifest, Dataset, load_manifest
from hardbatch.pipeline.errors import ConfigError
from hardbatch.pipeline.rates import record_step
from hardbatch.pipeline.runlog import RunLog, open_run_log
from hardbatch.pipeline.schemas import MIXED_DOMAIN
from hardbatch.pipeline.step import InlineExecutor, Progress, Stage, Step

_STAGES = {  # stage → the module and function that build it; imported only when the stage runs
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
    """The steps of a run, inputs before what needs them; the last one makes the shards."""

    steps: tuple[Step, ...]

    @property
    def shards(self) -> Path:
        """The folder of the shards artifact."""
        return self.steps[-1].path

    @property
    def corpus(self) -> Path:
        """The folder of the corpus, below which all its artifacts lie."""
        return self.shards.parents[1]


def plan_corpus(
    manifest: Path, workspace: Path, *, data_root: Path | None = None, overrides: Sequence[str] = ()
) -> Plan:
    """The steps from the manifest at `manifest` to its shards below `workspace`.

    Reads the digests of the sources and the models, cached in the workspace; runs nothing. `overrides` are
    strings `stage.field=value`. Raises ConfigError or InputError, naming what is wrong.
    """
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
    """Overrides as strings `stage.field=value`, each value written as TOML."""
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [f"{name}={json.dumps(value, ensure_ascii=False, default=str)}" for name, value in overrides.items()]


def run_step(step: Step, progress: Progress | None = None, log: RunLog | None = None) -> bool:
    """Makes the artifact of a step; returns False where it was complete already and nothing was done.

    Raises LockedError where another process is making it, NoSpaceError where the disk is full; committed units stay
    and the next run goes on from them. What a step took that was built from nothing is kept for `plan`.
    """
    log = log or RunLog()
    if find_artifact(step.path) is not None:
        clean_up_after_crash(step.path)
        log.reused(step)
        return False
    from hardbatch.pipeline.progress import SilentProgress

    module, function = _STAGES["mixed" if (step.stage, step.domain) == ("batches", MIXED_DOMAIN) else step.stage]
    stage: Stage = getattr(import_module(module), function)
    damaged = diagnose_damage(step.inputs.values())
    with log.step(step) as records, _user_errors(), open_builder(step.path) as builder, damaged:
        if find_artifact(step.path) is not None:  # finished by another process while we came to the lock
            log.reused(step)
            return False
        committed = {path.stem for path in (step.path / "units").glob("*.json")}
        if not committed:
            _load_libraries(step)
        records.begin(committed)
        started = time.monotonic()
        built = stage(step, builder, records.units_by(InlineExecutor()), progress or SilentProgress())
        records.committed(built.units)
        artifact = builder.finish(
            units=built.units,
            stage=step.stage,
            stage_version=step.stage_version,
            domain=step.domain,
            key=step.key,
            config=step.config,
            inputs={name: path.name for name, path in step.inputs.items()},
            sources=step.sources,
            counts=built.counts,
            produced_with=built.produced_with,
        )
        records.finish(artifact)
        if not committed:
            record_step(step, artifact, time.monotonic() - started)
    return True


@contextmanager
def _user_errors() -> Iterator[None]:
    """Tells an OSError of its body that the user can mend as what it means."""
    try:
        yield
    except OSError as error:
        told = as_user_error(error)
        if told is None:
            raise
        raise told from None


def _load_libraries(step: Step) -> None:
    """Loads what embedding loads late, before the step's clock starts: it is paid once a run, whatever the rows."""
    if step.stage == "vectors":
        is_lexical = step.config["name"] == "lexical"
        import_module("sklearn.feature_extraction.text" if is_lexical else "sentence_transformers")


class _Planner:
    def __init__(self, settings: CorpusManifest, root: Path, data_root: Path, digests: DigestCache) -> None:
        self._settings = settings
        self._root = root
        self._data_root = data_root
        self._digests = digests
        self._steps: list[Step] = []

    def steps(self) -> list[Step]:
        from hardbatch.pipeline.models.resolve import resolve_model

        embed = self._settings.embed
        models = {role: resolve_model(embed, role, self._data_root, self._digests) for role in ("cluster", "surrogate")}
        inputs: dict[str, Path] = {}
        for dataset in self._settings.dataset:
            inputs.update(self._domain(dataset, {role: asdict(model) for role, model in models.items()}))
        pack = self._settings.pack
        names = [dataset.name for dataset in self._settings.dataset]  # in a list: their order numbers the batches
        if pack.remainder == "mix":
            packed = {name: path for name, path in inputs.items() if name.startswith("batches/")}
            mix = {"batch_size": pack.batch_size, "num_packings": pack.num_packings, "domains": names}
            mixed = self._add("batches", MIXED_DOMAIN, mix, packed)
            inputs[f"batches/{MIXED_DOMAIN}"] = mixed
        datasets = {
            dataset.name: dataset.model_dump(include={"query_prompt", "document_prompt", "licence", "weight"})
            for dataset in self._settings.dataset
        }
        write = {
            **self._settings.write.model_dump(),
            "batch_size": pack.batch_size,
            "domains": names,
            "datasets": datasets,
        }
        self._add("shards", self._settings.corpus, write, inputs)
        return self._steps

    def _domain(self, dataset: Dataset, models: dict[str, dict[str, Any]]) -> dict[str, Path]:
        """Adds the steps of a domain; returns the inputs that writing needs."""
        settings = self._settings
        name = dataset.name
        pairs = self._pairs(dataset)
        vectors = {}
        for role, model in models.items():
            config = {field: value for field, value in model.items() if field not in ("location", "runs_on")}
            config["unit_rows"] = settings.embed.unit_rows
            runtime = {"model": model["location"], "device": model["runs_on"]}
            vectors[role] = self._add("vectors", name, config, {"pairs": pairs}, runtime=runtime)

        # K-Means and refinement follow the clustering model to its GPU. Keys hold the type of the device
        # alone, so that an artifact made on one GPU is found by a run on another.
        on_gpu = models["cluster"]["device"] == "cuda"
        device = "cuda" if on_gpu else "cpu"
        runs_on = {"device": models["cluster"]["runs_on"] if on_gpu else "cpu"}

        cluster = settings.cluster.model_dump()
        cluster["cluster_size"] = cluster["cluster_size"] or settings.pack.batch_size
        cluster["iterations"] = cluster["iterations"] or _ITERATIONS[cluster["method"]]
        if cluster["method"] == "doubled":
            cluster["backend"] = _faiss_backend()
        else:
            cluster["device"] = device
        others = ("tolerance", "balance", "two_level_above") if cluster["method"] == "doubled" else ("restarts",)
        for field in others:
            del cluster[field]  # the other method's: a change of it changes nothing
        both = {"pairs": pairs, "vectors": vectors["cluster"]}
        clusters = self._add("clusters", name, cluster, both, runtime=runs_on)
        measure = {**settings.hardness.model_dump(), "batch_size": settings.pack.batch_size}
        hardness = self._add("hardness", name, measure, both)
        packed = {**both, "surrogate": vectors["surrogate"], "clusters": clusters}
        batches = self._add("batches", name, {**settings.pack.model_dump(), "device": device}, packed, runtime=runs_on)
        return {
            f"pairs/{name}": pairs,
            f"vectors/{name}": vectors["cluster"],
            f"surrogate/{name}": vectors["surrogate"],
            f"clusters/{name}": clusters,
            f"hardness/{name}": hardness,
            f"batches/{name}": batches,
        }

    def _pairs(self, dataset: Dataset) -> Path:
        from hardbatch.pipeline.sources.files import list_source_files, local_path

        ingest = self._settings.ingest
        files = list_source_files(dataset, self._data_root, self._digests)
        config: dict[str, Any] = {
            "columns": dataset.columns.model_dump(),
            "limit": dataset.limit,
            "holdout": dataset.holdout,
            "holdout_seed": ingest.holdout_seed if dataset.holdout else None,
            "max_characters": ingest.max_characters,
            "decontaminate": ingest.decontaminate,
        }
        runtime: dict[str, Any] = {
            "files": {file.name: file.location for file in files},
            "modified_ns": {file.name: file.modified_ns for file in files},
            "decontaminate": {},
            "max_quarantined_fraction": ingest.max_quarantined_fraction,
            "num_pairs": dataset.num_pairs,
        }
        texts = {}
        for name in ingest.decontaminate:
            folder = local_path(name, self._data_root, "ingest.decontaminate")
            if not (folder / "corpus.parquet").is_file() or not (folder / "queries.parquet").is_file():
                raise ConfigError(f"ingest.decontaminate: {folder} has no corpus.parquet and queries.parquet")
            runtime["decontaminate"][name] = str(folder)
            for part in ("corpus", "queries"):
                path = local_path(f"{name}/{part}.parquet", self._data_root, "ingest.decontaminate")
                texts[f"{name}/{part}"] = self._digests.digest(path)
        config["decontaminate_sha256"] = texts
        sources = tuple(
            {"name": file.name, "format": file.format, "bytes": file.num_bytes, "sha256": file.sha256} for file in files
        )
        return self._add("pairs", dataset.name, config, {}, sources=sources, runtime=runtime)

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
