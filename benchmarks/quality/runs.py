"""Trains and measures each (arm, seed) once, and keeps nDCG@10 of every query in a file of the workspace."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from arms import Arm
from b3 import groups_by_b3
from corpus import Sample, load_collections, make_shards, write_manifest
from masks import Masking, Surrogate, find_masking
from measure import ndcg_by_query
from torch import Tensor

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.planner import VERSIONS
from hardbatch.pipeline.run import Plan
from hardbatch.trainer.collection import Collection

Figures = Mapping[str, Array]  # collection → nDCG@10 of each query
Encode = Callable[[Sequence[str]], Tensor]  # texts → unit vectors


class Family(Protocol):
    """A kind of model and how it is trained. What `describe` returns enters the names of results."""

    sample: Sample

    def describe(self) -> dict[str, Any]: ...

    def train(self, plan: Plan, arm: Arm, masking: Masking, seed: int) -> Encode: ...


class Runs:
    """The runs of a family of models."""

    def __init__(self, family: Family, workspace: Path, data: Path) -> None:
        self._family, self._workspace, self._data = family, workspace, data
        self._manifest = write_manifest(family.sample, data, workspace / "data")
        self._plans: dict[str, Plan] = {}
        self._surrogate: Surrogate | None = None
        self._collections: dict[str, Collection] = {}

    def run(self, arm: Arm, seed: int) -> Figures:
        """Returns the figures of an arm. Trains a model if no earlier run has."""
        path = self._path(arm, seed)
        if not path.exists():
            clock = _Clock()
            plan = self._plan(arm)
            masking = self._masking(arm, plan)
            clock.lap("shards")
            encode = self._family.train(plan, arm, masking, seed)
            clock.lap("training")
            figures = {name: ndcg_by_query(encode, each) for name, each in self.collections(plan).items()}
            clock.lap("evaluation")
            self._keep(path, figures)
            mean = np.mean([values.mean() for values in figures.values()])
            print(f"{arm.name:<40} seed {seed}  mean {mean:.4f}  {clock}", flush=True)
        return dict(np.load(path))

    def kept(self, arm: Arm) -> list[Figures]:
        """The figures of all seeds that were run, from seed 0 on."""
        found: list[Figures] = []
        while (path := self._path(arm, len(found))).exists():
            found.append(dict(np.load(path)))
        return found

    def collections(self, plan: Plan) -> dict[str, Collection]:
        """What the models of the family are measured on."""
        if not self._collections:
            self._collections = load_collections(self._family.sample, plan, self._data)
        return self._collections

    def _plan(self, arm: Arm) -> Plan:
        name = json.dumps([arm.settings, arm.b3])
        if name not in self._plans:
            if arm.b3 is None:
                self._plans[name] = make_shards(self._manifest, self._workspace, arm.settings)
            else:
                skip, num_neighbours = arm.b3
                with groups_by_b3(skip, num_neighbours):
                    workspace = self._with_what_comes_before_packing(f"b3-{skip}-{num_neighbours}")
                    self._plans[name] = make_shards(self._manifest, workspace, arm.settings)
        return self._plans[name]

    def _with_what_comes_before_packing(self, name: str) -> Path:
        """A workspace of its own for batches and shards whose keys do not say how they were made."""
        corpus = self._family.sample.name
        (self._workspace / name / corpus).mkdir(parents=True, exist_ok=True)
        for stage in ("pairs", "answers", "vectors", "clusters", "hardness", "consistency"):
            link = self._workspace / name / corpus / stage
            if not link.exists():
                (self._workspace / corpus / stage).mkdir(parents=True, exist_ok=True)
                link.symlink_to((self._workspace / corpus / stage).resolve(), target_is_directory=True)
        return self._workspace / name

    def _masking(self, arm: Arm, plan: Plan) -> Masking:
        if self._surrogate is None:
            self._surrogate = Surrogate(plan)
        return find_masking(arm.masks, self._surrogate)

    def _path(self, arm: Arm, seed: int) -> Path:
        # The versions of the stages, so that a pipeline that makes other batches is measured as another one.
        what = [asdict(replace(arm, name="")), self._family.describe(), asdict(self._family.sample), VERSIONS]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        return self._workspace / "results" / f"{digest}-{seed}.npz"

    def _keep(self, path: Path, figures: Figures) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        with unfinished.open("wb") as file:
            np.savez_compressed(file, **figures)
        os.replace(unfinished, path)


class _Clock:
    """CPU seconds by part, in words."""

    def __init__(self) -> None:
        self._last = time.process_time()
        self._laps: list[str] = []

    def lap(self, name: str) -> None:
        now = time.process_time()
        self._laps.append(f"{name} {now - self._last:.0f} s")
        self._last = now

    def __str__(self) -> str:
        return ", ".join(self._laps)
