"""Trains and measures each (arm, seed) once, and keeps nDCG@10 of every query in a file of the workspace."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from arms import Arm
from corpus import Sample, load_collections, make_shards, write_manifest
from groups import groups_made_by
from masks import Masking, Surrogate, find_masking
from measure import Search, ndcg_by_query, references

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.planner import VERSIONS
from hardbatch.pipeline.run import Plan
from hardbatch.trainer.collection import Collection

VARIANTS = ("context of training", "no context")  # other ways to search with the same model

Figures = Mapping[str, Array]  # collection → nDCG@10 of each query


class Family(Protocol):
    """A kind of model and how it is trained. What `describe` returns enters the names of results."""

    sample: Sample
    max_length: int

    def describe(self) -> dict[str, Any]: ...

    def train(self, plans: Sequence[Plan], arm: Arm, masking: Masking, seed: int) -> Mapping[str, Search]: ...


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
            plan = self.plan(arm)
            clock.lap("shards")
            searches = self.train(arm, seed)
            clock.lap("training")
            for variant, search in reversed(searches.items()):  # the model itself comes last: then all is kept
                figures = self._measure(search, plan)
                self._keep(self._path(arm, seed, variant), figures)
            clock.lap("evaluation")
            mean = np.mean([values.mean() for values in figures.values()])
            print(f"{arm.name:<40} seed {seed}  mean {mean:.4f}  {clock}", flush=True)
        return dict(np.load(path))

    def train(self, arm: Arm, seed: int) -> Mapping[str, Search]:
        """Trains a model, and returns the ways to search with it."""
        plan = self.plan(arm)
        plans = [plan, self.plan(replace(arm, settings=arm.settings | arm.later))] if arm.later else [plan]
        return self._family.train(plans, arm, self._masking(arm, plan), seed)

    def kept(self, arm: Arm) -> dict[str, list[Figures]]:
        """The figures of all seeds that were run, from seed 0 on, for each way to search with the model."""
        found: dict[str, list[Figures]] = {}
        for variant in ("", *VARIANTS):
            seeds: list[Figures] = []
            while (path := self._path(arm, len(seeds), variant)).exists():
                seeds.append(dict(np.load(path)))
            if seeds:
                found[f"{arm.name}, {variant}" if variant else arm.name] = seeds
        return found

    def references(self, arm: Arm) -> dict[str, Figures]:
        """The figures of what is not trained here: BM25 and MiniLM as published."""
        found = {}
        for name, search in references(self._family.max_length).items():
            path = self._path(Arm(name=""), 0, name)
            if not path.exists():
                self._keep(path, self._measure(search, self.plan(arm)))
            found[name] = dict(np.load(path))
        return found

    def _measure(self, search: Search, plan: Plan) -> Figures:
        return {name: ndcg_by_query(search, each) for name, each in self.collections(plan).items()}

    def collections(self, plan: Plan) -> dict[str, Collection]:
        """What the models of the family are measured on."""
        if not self._collections:
            self._collections = load_collections(self._family.sample, plan, self._data)
        return self._collections

    def plan(self, arm: Arm) -> Plan:
        """The shards of an arm, which are made if there are none."""
        name = json.dumps([arm.settings, arm.groups])
        if name not in self._plans:
            if arm.groups == "":
                self._plans[name] = make_shards(self._manifest, self._workspace, arm.settings)
            else:
                with groups_made_by(arm.groups):
                    workspace = self._with_what_comes_before_packing(arm.groups)
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

    def _path(self, arm: Arm, seed: int, variant: str = "") -> Path:
        # The versions of the stages, so that a pipeline that makes other batches is measured as another one.
        what = [_given(replace(arm, name="")), self._family.describe(), _given(self._family.sample), VERSIONS]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        name = "-".join([digest, str(seed), *variant.split()])
        return self._workspace / "results" / f"{name}.npz"

    def _keep(self, path: Path, figures: Figures) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        with unfinished.open("wb") as file:
            np.savez_compressed(file, **figures)
        os.replace(unfinished, path)


def _given(settings: Any) -> dict[str, Any]:
    """The fields that are not left at their defaults. A field that is new does not change what was measured before."""
    empty = {field.name: field.default_factory() for field in fields(settings) if callable(field.default_factory)}
    defaults = {field.name: field.default for field in fields(settings)} | empty
    return {name: value for name, value in asdict(settings).items() if value != defaults[name]}


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
