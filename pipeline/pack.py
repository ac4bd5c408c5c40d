"""pack: clusters → batches of exactly B pairs, and a ledger in which every pair is in one batch or left over.

Clusters are laid one after the other in the order of a greedy tour over their centroids. Within a cluster, pairs are
ordered from the previous centroid of the tour towards the next, so that a cut anywhere leaves like beside like. The
row of pairs is cut every B; what remains at its end, the far end of a greedy tour, is the remainder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schemas
from pipeline.artifact import ArtifactBuilder, read_artifact, write_unit
from pipeline.kmeans import Points
from pipeline.step import Built, Executor, Progress, Step
from pipeline.tour import greedy_tour
from pipeline.vectors import Array, FoldedPoints, load_pairs, open_vectors


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Places of points: `batches` (int64, number of batches × B) and the `remainder` (int64) that fills none."""

    batches: Array
    remainder: Array


def pack(points: Points, labels: Array, centroids: Array, *, batch_size: int, seed: int, exact_below: int) -> Packing:
    """Packs n points with `labels` (int, n) and `centroids` (k × D) into batches of `batch_size`.

    The tour starts at a random cluster drawn by `seed`. Every place 0..n-1 comes out exactly once.
    """
    if len(labels) == 0:
        return _cut(np.zeros(0, dtype=np.int64), batch_size)
    start = int(np.random.default_rng(seed).integers(len(centroids)))
    tour = greedy_tour(centroids, start, exact_below=exact_below)
    return _cut(lay_out(points, labels, centroids, tour), batch_size)


def pack_randomly(num_points: int, *, batch_size: int, seed: int) -> Packing:
    """Packs the places 0..num_points-1 in an order drawn by `seed`: what hard batches are compared with."""
    return _cut(np.random.default_rng(seed).permutation(num_points), batch_size)


def _cut(row: Array, batch_size: int) -> Packing:
    cut = len(row) // batch_size * batch_size
    return Packing(batches=row[:cut].reshape(-1, batch_size), remainder=row[cut:])


def lay_out(points: Points, labels: Array, centroids: Array, tour: Array) -> Array:
    """All places in the order of the tour; in a cluster along the line from the centroid before it to the next."""
    members = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[members], np.arange(len(centroids) + 1))
    norms = np.linalg.norm(centroids, axis=1, keepdims=True)
    unit = np.divide(centroids, norms, out=np.zeros_like(centroids), where=norms > 0).astype(np.float64)
    row = np.empty(len(labels), dtype=np.int64)
    filled = 0
    for i, cluster in enumerate(tour):
        places = members[starts[cluster] : starts[cluster + 1]]
        direction = unit[tour[min(i + 1, len(tour) - 1)]] - unit[tour[max(i - 1, 0)]]
        members_nD = points.take(places).astype(np.float64)
        if len(tour) == 1:
            direction = _widest(members_nD)
        along = np.einsum("nd,d->n", members_nD, direction)
        row[filled : filled + len(places)] = places[np.argsort(along, kind="stable")]
        filled += len(places)
    assert filled == len(row), "a cluster is missing from the tour"
    return row


def _widest(points_nD: Array) -> Array:
    """From the mean of the points to the one farthest from it: a line to lay them along where there is no other."""
    apart_nD = points_nD - points_nD.mean(0)
    return np.asarray(apart_nD[np.argmax(np.einsum("nd,nd->n", apart_nD, apart_nD))])


def build(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> Built:
    """Builds the `batches` artifact of one domain. Pairs without a vector of either model go to the ledger."""
    if not builder.committed("batches"):
        progress.start(f"pack {step.domain}", 1)
        pairs = load_pairs(read_artifact(step.inputs["pairs"]))
        vectors = open_vectors(step.inputs["vectors"])
        invalid = vectors.invalid_pairs(pairs) | open_vectors(step.inputs["surrogate"]).invalid_pairs(pairs)
        table = pq.read_table(step.inputs["clusters"] / "clusters.parquet")
        usable = ~invalid[table["pair_id"].to_numpy()]
        pair_ids, labels = table["pair_id"].to_numpy()[usable], table["cluster_id"].to_numpy()[usable]
        drawn = {"batch_size": step.config["batch_size"], "seed": step.config["seed"]}
        if step.config["order"] == "random":
            packing = pack_randomly(len(pair_ids), **drawn)
        else:
            points = FoldedPoints(vectors=vectors, pairs=pairs, pair_ids=pair_ids)
            centroids = np.load(step.inputs["clusters"] / "centroids.npy")
            packing = pack(points, labels, centroids, exact_below=step.config["exact_tour_below"], **drawn)
        moved = "mixed" if step.config["remainder"] == "mix" else "remainder"
        placed = np.concatenate([packing.batches.ravel(), packing.remainder])
        left = [(pair_ids[packing.remainder], moved), (np.flatnonzero(invalid), "invalid_vector")]
        cluster_of = np.full(len(pairs), -1, dtype=np.int32)
        cluster_of[pair_ids[placed]] = labels[placed]
        rows = _rows(step.domain, pair_ids[packing.batches], cluster_of)
        _write(builder, rows, [_leftover(step.domain, ids, cluster_of, reason) for ids, reason in left])
        progress.advance(1)
        progress.finish()
    return Built(units=["batches"], counts=builder.unit_record("batches").counts)


def build_mixed(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> Built:
    """Builds the `batches` of domain `mixed`: the remainders of all domains, one after the other, cut again."""
    if not builder.committed("batches"):
        progress.start("pack mixed", 1)
        tables = [pq.read_table(step.inputs[f"batches/{name}"] / "leftover.parquet") for name in step.config["domains"]]
        left = pa.concat_tables(tables).unify_dictionaries()
        left = left.filter(pa.compute.equal(left["reason"], "mixed"))
        batch_size = step.config["batch_size"]
        cut = len(left) // batch_size * batch_size
        columns = {name: left[name].slice(0, cut) for name in ("domain", "pair_id", "cluster_id")}
        rows = pa.table({**_places(cut // batch_size, batch_size), **columns}, schema=schemas.BATCHES)
        rest = left.slice(cut).drop_columns("reason").append_column("reason", _word("remainder", len(left) - cut))
        _write(builder, rows, [rest.cast(schemas.LEFTOVER)])
        progress.advance(1)
        progress.finish()
    return Built(units=["batches"], counts=builder.unit_record("batches").counts)


def _places(num_batches: int, batch_size: int) -> dict[str, Array]:
    num_rows = num_batches * batch_size
    return {
        "packing": np.zeros(num_rows, dtype=np.int32),
        "batch": np.repeat(np.arange(num_batches), batch_size),
        "slot": np.tile(np.arange(batch_size, dtype=np.int32), num_batches),
    }


def _rows(domain: str, pair_ids: Array, cluster_of: Array) -> pa.Table:
    flat = pair_ids.ravel()
    columns = {"domain": _word(domain, len(flat)), "pair_id": flat, "cluster_id": cluster_of[flat]}
    return pa.table({**_places(*pair_ids.shape), **columns}, schema=schemas.BATCHES)


def _word(word: str, num_rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(np.zeros(num_rows, dtype=np.int32), pa.array([word]))


def _leftover(domain: str, pair_ids: Array, cluster_of: Array, reason: str) -> pa.Table:
    columns = {
        "packing": np.zeros(len(pair_ids), dtype=np.int32),
        "domain": _word(domain, len(pair_ids)),
        "pair_id": pair_ids,
        "cluster_id": cluster_of[pair_ids],
        "reason": _word(reason, len(pair_ids)),
    }
    return pa.table(columns, schema=schemas.LEFTOVER)


def _write(builder: ArtifactBuilder, rows: pa.Table, leftover: list[pa.Table]) -> None:
    left = pa.concat_tables(leftover).unify_dictionaries()
    with write_unit(builder.path, "batches") as writer:
        for name, table in (("batches", rows), ("leftover", left)):
            path: Path = writer.add_file(f"{name}.parquet", rows=len(table))
            pq.write_table(table, path, compression="zstd", use_dictionary=["domain", "reason"])
        counts = left["reason"].value_counts().to_pylist()
        writer.counts = {
            "batches": len(rows["batch"].unique()),
            "pairs": len(rows),
            "leftover": {item["values"]: item["counts"] for item in counts},
        }
