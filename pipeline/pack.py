"""pack: clusters → batches of exactly B pairs, and a ledger in which every pair is in one batch or left over.

Clusters follow each other on a greedy tour over their centroids. Stretch by stretch of the tour, batches are filled
from its clusters (fill.py) and then trade pairs with near batches as long as Eq. 2 rises (refine.py). What fits no
batch of a stretch goes on to the next; what the last one leaves is the remainder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline import schemas
from pipeline.artifact import read_artifact
from pipeline.commit import ArtifactBuilder, write_unit
from pipeline.fill import fill_batches
from pipeline.memory import release_freed
from pipeline.refine import refine
from pipeline.step import Built, Executor, Progress, Step
from pipeline.tour import greedy_tour
from pipeline.vectors import Array, FoldedPoints, load_pairs, open_vectors

_STRETCH_VALUES = 2**26  # float32 values of d⊕q held of a stretch of the tour: 256 MiB
_STRETCH_SCORES = 2**26  # pairs of a stretch times its batches


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Places of points: `batches` (int64, number of batches × B) and the `remainder` (int64) that fills none."""

    batches: Array
    remainder: Array


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How to pack; fields as in `config.PackConfig`, `seed` of this packing."""

    batch_size: int
    seed: int = 0
    exact_tour_below: int = 8_192
    refine_rounds: int = 30
    refine_tolerance: float = 5e-4
    device: str = "cpu"


def pack(points: FoldedPoints, labels: Array, centroids: Array, settings: PackSettings) -> Packing:
    """Packs n points with `labels` (int, n) and `centroids` (k × D) into ⌊n/B⌋ batches.

    The tour starts at a random cluster drawn by the seed. Every place 0..n-1 comes out exactly once. Holds what the
    tour does, some 60 bytes a pair, and the vectors of a stretch of the tour, at most 256 MiB whatever n is.
    """
    if len(labels) == 0:
        return pack_randomly(0, batch_size=settings.batch_size, seed=settings.seed)
    start = int(np.random.default_rng(settings.seed).integers(len(centroids)))
    tour = greedy_tour(centroids, start, exact_below=settings.exact_tour_below)
    left = np.empty(0, dtype=np.int64)
    batches = [np.empty((0, settings.batch_size), dtype=np.int64)]
    for stretch in _stretches(labels, centroids, tour, settings.batch_size, 2 * points.dimension):
        places = np.concatenate([*stretch.members, left])
        release_freed()  # what filling and refining freed in small pieces: here, and where vectors are read again below
        folded = points.take(places)
        row = lay_out(folded, stretch)
        lengths = np.array([len(members) for members in stretch.members])
        filled, rest = fill_batches(folded, row, lengths, settings.batch_size)
        del folded
        release_freed()
        batched = places[filled]
        refined = refine(
            torch.from_numpy(points.joined(batched.ravel())),
            batched,
            rounds=settings.refine_rounds,
            tolerance=settings.refine_tolerance,
            device=settings.device,
        )
        batches.append(refined.batches)
        left = places[rest]
    return Packing(batches=np.concatenate(batches), remainder=left)


def pack_randomly(num_points: int, *, batch_size: int, seed: int) -> Packing:
    """Packs the places 0..num_points-1 in an order drawn by `seed`: what hard batches are compared with."""
    return _cut(np.random.default_rng(seed).permutation(num_points), batch_size)


def _cut(row: Array, batch_size: int) -> Packing:
    cut = len(row) // batch_size * batch_size
    return Packing(batches=row[:cut].reshape(-1, batch_size), remainder=row[cut:])


@dataclass(frozen=True, kw_only=True)
class _Stretch:
    """Clusters that follow each other on the tour: their members (places, int64), and the way on at each (k × D)."""

    members: list[Array]
    directions: Array


def _stretches(labels: Array, centroids: Array, tour: Array, batch_size: int, width: int) -> Iterator[_Stretch]:
    limit = int(min(_STRETCH_VALUES // width, (_STRETCH_SCORES * batch_size) ** 0.5))
    limit = -(-len(labels) // -(-len(labels) // max(limit, batch_size)))  # stretches of about the same length
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(len(centroids) + 1))
    norms = np.linalg.norm(centroids, axis=1, keepdims=True)
    unit = np.divide(centroids, norms, out=np.zeros_like(centroids), where=norms > 0)
    ways = unit[np.append(tour[1:], tour[-1])] - unit[np.append(tour[0], tour[:-1])]
    members: list[Array] = []
    directions: list[Array] = []
    held = 0
    for cluster, way in zip(tour, ways, strict=True):
        own = order[starts[cluster] : starts[cluster + 1]]
        for piece in np.array_split(own, max(1, -(-len(own) // limit))):  # one, or the cluster is larger than a stretch
            if members and held + len(piece) > limit:
                yield _Stretch(members=members, directions=np.stack(directions))
                members, directions, held = [], [], 0
            members.append(piece)
            held += len(piece)
            directions.append(way)
    yield _Stretch(members=members, directions=np.stack(directions))


def lay_out(points_mD: Array, stretch: _Stretch) -> Array:
    """The places in `points_mD` (rows: the members one after the other), each cluster along the way on the tour."""
    row = np.empty(sum(len(members) for members in stretch.members), dtype=np.int64)
    filled = 0
    for members, direction in zip(stretch.members, stretch.directions, strict=True):
        cluster = slice(filled, filled + len(members))
        if len(stretch.members) == 1:
            direction = _widest(points_mD[cluster])
        along = np.einsum("md,d->m", points_mD[cluster], direction, dtype=np.float64)
        row[cluster] = filled + np.argsort(along, kind="stable")
        filled += len(members)
    return row


def _widest(points_nD: Array) -> Array:
    """From the mean of the points to the one farthest from it: a line to lay them along where there is no other."""
    apart_nD = points_nD - points_nD.mean(0)
    return np.asarray(apart_nD[np.argmax(np.einsum("nd,nd->n", apart_nD, apart_nD))])


def build(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> Built:
    """Builds the `batches` artifact of one domain. Pairs without a vector of either model go to the ledger."""
    if not builder.committed("batches"):
        progress.start(f"pack {step.domain}", step.config["num_packings"])
        pairs = load_pairs(read_artifact(step.inputs["pairs"]))
        vectors = open_vectors(step.inputs["vectors"])
        invalid = vectors.invalid_pairs(pairs) | open_vectors(step.inputs["surrogate"]).invalid_pairs(pairs)
        table = pq.read_table(step.inputs["clusters"] / "clusters.parquet")
        usable = ~invalid[table["pair_id"].to_numpy()]
        pair_ids, labels = table["pair_id"].to_numpy()[usable], table["cluster_id"].to_numpy()[usable]
        points = FoldedPoints(vectors=vectors, pairs=pairs, pair_ids=pair_ids)
        centroids = np.load(step.inputs["clusters"] / "centroids.npy")
        moved = "mixed" if step.config["remainder"] == "mix" else "remainder"
        cluster_of = np.full(len(pairs), -1, dtype=np.int32)
        cluster_of[pair_ids] = labels
        rows, left = [], []
        settings = {**step.config, **step.local}  # the number of the GPU is not in the key, so not in the config
        for number in range(step.config["num_packings"]):
            packing = _pack_by(settings, points, labels, centroids, number)
            rows.append(_rows(step.domain, number, pair_ids[packing.batches], cluster_of))
            for ids, reason in ((pair_ids[packing.remainder], moved), (np.flatnonzero(invalid), "invalid_vector")):
                left.append(_leftover(step.domain, number, ids, cluster_of, reason))
            progress.advance(1)
        _write(builder, rows, left)
        progress.finish()
    return Built(units=["batches"], counts=builder.unit_record("batches").counts)


def _pack_by(config: dict[str, Any], points: FoldedPoints, labels: Array, centroids: Array, number: int) -> Packing:
    seed = config["seed"] + number
    if config["order"] == "random":
        return pack_randomly(len(labels), batch_size=config["batch_size"], seed=seed)
    fields = ("batch_size", "exact_tour_below", "refine_rounds", "refine_tolerance", "device")
    return pack(points, labels, centroids, PackSettings(seed=seed, **{name: config[name] for name in fields}))


def build_mixed(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> Built:
    """Builds the `batches` of domain `mixed`: the remainders of all domains, one after the other, cut again."""
    if not builder.committed("batches"):
        progress.start("pack mixed", 1)
        tables = [pq.read_table(step.inputs[f"batches/{name}"] / "leftover.parquet") for name in step.config["domains"]]
        every = pa.concat_tables(tables).unify_dictionaries()
        every = every.filter(pa.compute.equal(every["reason"], "mixed"))
        batch_size = step.config["batch_size"]
        rows, rests = [], []
        for number in range(step.config["num_packings"]):
            left = every.filter(pa.compute.equal(every["packing"], number))
            cut = len(left) // batch_size * batch_size
            columns = {name: left[name].slice(0, cut) for name in ("domain", "pair_id", "cluster_id")}
            rows.append(pa.table({**_places(number, cut // batch_size, batch_size), **columns}, schema=schemas.BATCHES))
            rest = left.slice(cut).drop_columns("reason").append_column("reason", _word("remainder", len(left) - cut))
            rests.append(rest.cast(schemas.LEFTOVER))
        _write(builder, rows, rests)
        progress.advance(1)
        progress.finish()
    return Built(units=["batches"], counts=builder.unit_record("batches").counts)


def _places(packing: int, num_batches: int, batch_size: int) -> dict[str, Array]:
    num_rows = num_batches * batch_size
    return {
        "packing": np.full(num_rows, packing, dtype=np.int32),
        "batch": np.repeat(np.arange(num_batches), batch_size),
        "slot": np.tile(np.arange(batch_size, dtype=np.int32), num_batches),
    }


def _rows(domain: str, packing: int, pair_ids: Array, cluster_of: Array) -> pa.Table:
    flat = pair_ids.ravel()
    columns = {"domain": _word(domain, len(flat)), "pair_id": flat, "cluster_id": cluster_of[flat]}
    return pa.table({**_places(packing, *pair_ids.shape), **columns}, schema=schemas.BATCHES)


def _word(word: str, num_rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(np.zeros(num_rows, dtype=np.int32), pa.array([word]))


def _leftover(domain: str, packing: int, pair_ids: Array, cluster_of: Array, reason: str) -> pa.Table:
    columns = {
        "packing": np.full(len(pair_ids), packing, dtype=np.int32),
        "domain": _word(domain, len(pair_ids)),
        "pair_id": pair_ids,
        "cluster_id": cluster_of[pair_ids],
        "reason": _word(reason, len(pair_ids)),
    }
    return pa.table(columns, schema=schemas.LEFTOVER)


def _write(builder: ArtifactBuilder, packings: list[pa.Table], leftover: list[pa.Table]) -> None:
    rows = pa.concat_tables(packings).unify_dictionaries()
    left = pa.concat_tables(leftover).unify_dictionaries()
    with write_unit(builder.path, "batches") as writer:
        for name, table in (("batches", rows), ("leftover", left)):
            path: Path = writer.add_file(f"{name}.parquet", rows=len(table))
            pq.write_table(table, path, compression="zstd", use_dictionary=["domain", "reason"])
        reasons = left["reason"].value_counts().to_pylist()
        writer.counts = {
            "packings": len(packings),
            "batches": len(packings[0]["batch"].unique()),
            "pairs": len(packings[0]),
            "leftover": {item["values"]: item["counts"] // len(packings) for item in reasons},
        }
