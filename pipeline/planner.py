"""planner: from settings to steps. The key of each step follows from settings and digests alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hardbatch.pipeline.artifacts.collection import corpus_files, queries_files
from hardbatch.pipeline.artifacts.files import DigestCache, content_key
from hardbatch.pipeline.config import CorpusManifest, Dataset, Reading
from hardbatch.pipeline.errors import ConfigError, InputError
from hardbatch.pipeline.models.resolve import ModelSpec, resolve_model
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
from hardbatch.pipeline.schemas import MIXED_DOMAIN
from hardbatch.pipeline.sources.files import list_source_files, local_path
from hardbatch.pipeline.sources.where import Where
from hardbatch.pipeline.step import Step

VERSIONS = {
    "pairs": 3,
    "leaks": 1,
    "answers": 3,
    "vectors": 1,
    "clusters": 4,
    "hardness": 1,
    "consistency": 1,
    "batches": 5,
    "shards": 6,
}


class Planner:
    """Collects the steps of a corpus; each is added after its inputs, so that their keys are known."""

    def __init__(
        self, settings: CorpusManifest, root: Path, data_root: Path, digests: DigestCache, follow_links: bool = False
    ) -> None:
        self._follow_links = follow_links
        self._settings = settings
        self._pack = settings.pack.with_group_size()
        self._root = root
        self._data_root = data_root
        self._digests = digests
        self._steps: list[Step] = []
        self._with_extra: dict[str, Path] = {}  # the pairs of each domain that has extra columns

    def steps(self) -> list[Step]:
        """All steps of the manifest."""
        settings = self._settings
        models = {
            role: resolve_model(settings.embed, role, self._data_root, self._digests)
            for role in ("cluster", "surrogate")
        }
        # All domains are read first, since what one holds out may not be trained on in another.
        pairs = {dataset.name: self._pairs(dataset) for dataset in settings.dataset}
        holdouts = {dataset.name: pairs[dataset.name] for dataset in settings.dataset if dataset.holdout}
        inputs: dict[str, Path] = {}
        for name in pairs:
            inputs.update(self._domain(name, pairs[name], holdouts, models))

        domains = [dataset.name for dataset in settings.dataset]  # a list, as their order numbers the batches
        shape = self._pack.model_dump(include={"batch_size", "group_size", "compose"})
        if self._pack.remainder == "mix" or self._pack.compose == "corpus":
            mixed = MixedSettings(**shape, seed=self._pack.seed, num_packings=self._pack.num_packings, domains=domains)
            needed = ("pairs/", "answers/", "batches/")
            packed = {name: path for name, path in inputs.items() if name.startswith(needed)}
            inputs[f"batches/{MIXED_DOMAIN}"] = self._add("batches", MIXED_DOMAIN, mixed.model_dump(), packed)

        described = set(DatasetOfShards.model_fields)
        datasets = {
            dataset.name: DatasetOfShards(**dataset.model_dump(include=described)) for dataset in settings.dataset
        }
        write = ShardsSettings(**settings.write.model_dump(), **shape, domains=domains, datasets=datasets)
        self._add("shards", settings.corpus, write.model_dump(), inputs)
        return self._steps

    def _domain(
        self, name: str, pairs: Path, holdouts: Mapping[str, Path], models: Mapping[str, ModelSpec]
    ) -> dict[str, Path]:
        """Adds the steps of a domain that follow on its pairs; returns the inputs that writing needs."""
        pack = self._pack
        others = {f"holdout/{other}": path for other, path in holdouts.items() if other != name}
        leaks = {"leaks": self._add("leaks", name, {}, {"pairs": pairs, **others})} if others else {}
        answers = self._add("answers", name, self._settings.answers.model_dump(), {"pairs": pairs})
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
        ranked = {"pairs": pairs, "vectors": vectors["surrogate"], "answers": answers}
        consistency = self._add("consistency", name, self._settings.consistency.model_dump(), ranked)
        packed = {**both, **leaks, "surrogate": vectors["surrogate"], "clusters": clusters, "answers": answers}
        if pack.weak_pair_rank is not None:
            packed["consistency"] = consistency
        cut = BatchesSettings(**pack.model_dump(), device=device)
        batches = self._add("batches", name, cut.model_dump(), packed, runtime=runs_on)
        return {
            **{f"leaks/{name}": path for path in leaks.values()},
            f"pairs/{name}": pairs,
            f"answers/{name}": answers,
            f"vectors/{name}": vectors["cluster"],
            f"surrogate/{name}": vectors["surrogate"],
            f"clusters/{name}": clusters,
            f"hardness/{name}": hardness,
            f"consistency/{name}": consistency,
            f"batches/{name}": batches,
        }

    def _cluster_settings(self, device: str) -> FoldedSettings | DoubledSettings:
        """The settings of the chosen method alone: a change of the other one's changes nothing."""
        settings = self._settings.cluster.resolved(self._pack).model_dump()
        if settings["method"] == "doubled":
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
        ingest = self._settings.ingest
        files = list_source_files(dataset, self._data_root, self._digests, follow_links=self._follow_links)
        if dataset.where is not None:
            Where(dataset.where)  # refuses what is not a condition before anything is read
        folders, digests = self._evaluation_folders()
        settings = PairsSettings(
            **{name: getattr(dataset, name) for name in Reading.model_fields},
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
        if not dataset.extra_columns:
            config = settings.model_dump(exclude={"extra_columns"})  # so keys are those of versions without it
            return self._add("pairs", dataset.name, config, {}, sources=sources, runtime=runtime)

        # Domains must agree on the types of extra columns, so each is compared with those that are there by then.
        runtime["domains"] = self._with_extra
        path = self._add("pairs", dataset.name, settings.model_dump(), {}, sources=sources, runtime=runtime)
        self._with_extra[dataset.name] = path
        return path

    def _evaluation_folders(self) -> tuple[dict[str, str], dict[str, str]]:
        """The folders of `ingest.decontaminate` by name, and the digests of their files."""
        setting = "ingest.decontaminate"
        folders, digests = {}, {}
        for name in self._settings.ingest.decontaminate:
            folder = local_path(name, self._data_root, setting, follow_links=self._follow_links)
            folders[name] = str(folder)
            try:
                paths = [*corpus_files(folder), *queries_files(folder)]
            except InputError as error:
                raise ConfigError(f"{setting}: {error}") from None
            for path in paths:
                part = f"{name}/{path.relative_to(folder).as_posix()}"
                digests[part] = self._digests.digest(
                    local_path(part, self._data_root, setting, follow_links=self._follow_links)
                )
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
        version = VERSIONS[stage]
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
