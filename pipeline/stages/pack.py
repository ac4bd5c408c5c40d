"""pack: clusters → batches of exactly B pairs, and a table of the pairs that are left over, with the reason.

If batches are composed of all domains, a domain packs no batches itself. Its groups, one after another, are
the pairs with the reason `mixed`, which `build_mixed` draws from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.answers import Answers, load_answers
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.commit import ArtifactBuilder, write_unit
from hardbatch.pipeline.artifacts.consistency import load_consistency
from hardbatch.pipeline.artifacts.leaks import load_leaks
from hardbatch.pipeline.artifacts.vectors import FoldedPoints, load_pairs, open_vectors
from hardbatch.pipeline.batching.compose import compose
from hardbatch.pipeline.batching.consistency import weak_pairs
from hardbatch.pipeline.batching.pack import PackSettings, make_groups, pack
from hardbatch.pipeline.batching.points import InMemory
from hardbatch.pipeline.batching.spread import CappedClasses, always_allowed
from hardbatch.pipeline.step import Executor, Progress, StageResult, Step


def build(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> StageResult:
    """Builds the `batches` artifact of one domain.

    Pairs that lack a vector of either model are left over, those with a text that another domain holds out, and
    weak pairs if `weak_pair_rank` is set.
    """
    if not builder.committed("batches"):
        progress.start(f"pack {step.domain}", step.config["num_packings"])
        pairs = load_pairs(read_artifact(step.inputs["pairs"]))
        vectors = open_vectors(step.inputs["vectors"])
        invalid = vectors.invalid_pairs(pairs) | open_vectors(step.inputs["surrogate"]).invalid_pairs(pairs)

        leaking = load_leaks(step.inputs.get("leaks")).pairs(pairs) & ~invalid
        weak = np.zeros(len(pairs), dtype=bool)
        if (limit := step.config["weak_pair_rank"]) is not None:
            weak = weak_pairs(load_consistency(step.inputs["consistency"]).rank, limit) & ~(invalid | leaking)

        # Clusters have the pairs with a vector of the clustering model; the others that are left over go now.
        left_over = {"invalid_vector": invalid, "held_out_elsewhere": leaking, "weak_pair": weak}
        table = pq.read_table(step.inputs["clusters"] / "clusters.parquet")
        usable = ~(invalid | leaking | weak)[table["pair_id"].to_numpy()]
        pair_ids, labels = table["pair_id"].to_numpy()[usable], table["cluster_id"].to_numpy()[usable]
        cluster_of = np.full(len(pairs), -1, dtype=np.int32)
        cluster_of[pair_ids] = labels
        points = FoldedPoints(vectors=vectors, pairs=pairs, pair_ids=pair_ids)
        classes = _classes(load_answers(step.inputs["answers"], pairs))[pair_ids]
        centroids = np.load(step.inputs["clusters"] / "centroids.npy")

        # The index of the GPU is in `runtime`, because keys are made of `config`.
        settings = {**step.config, **step.runtime}
        rows, left, crowding = [], [], 0
        for number in range(step.config["num_packings"]):
            batches, rest = _pack_by(settings, points, labels, centroids, classes, number)
            crowding += _crowding_pairs(classes, batches)
            rows.append(_rows(step.domain, number, pair_ids[batches], cluster_of))
            for reason, of_reason in rest.items():
                left.append(_leftover(step.domain, number, pair_ids[of_reason], cluster_of, reason))
            for reason, is_left in left_over.items():
                left.append(_leftover(step.domain, number, np.flatnonzero(is_left), cluster_of, reason))
            progress.advance(1)
        _write(builder, rows, left, {"crowding_pairs": crowding})
        progress.finish()
    return StageResult(units=["batches"], counts=builder.unit_record("batches").counts)


def _classes(answers: Answers) -> Array:
    """The query class and the document class of each pair (int64, n × 2): pairs of one class share an answer."""
    pairs = answers.pairs
    return np.stack([answers.query_class[pairs.query_row], answers.document_class[pairs.document_row]], axis=1)


def _crowding_pairs(classes: Array, batches: Array) -> int:
    """The pairs of a packing beyond what their batches may hold of a class, if classes are spread over all of them."""
    num_batches, batch_size = batches.shape
    capped = CappedClasses.of(classes, num_batches, always_allowed(batch_size))
    return 0 if capped is None else capped.at(batches).num_crowding()


def _pack_by(
    config: dict[str, Any], points: FoldedPoints, labels: Array, centroids: Array, classes: Array, number: int
) -> tuple[Array, dict[str, Array]]:
    """Makes one of the packings, each with a seed of its own.

    Returns:
        The batches (int64, M × B), and by reason the pairs that are in none, by index.
    """
    fields = ("batch_size", "group_size", "exact_tour_below", "refine_rounds", "refine_tolerance", "device")
    settings = PackSettings(seed=config["seed"] + number, **{name: config[name] for name in fields})
    if config["compose"] == "corpus":
        groups, left = make_groups(points, labels, centroids, settings, classes)
        no_batches = np.empty((0, settings.batch_size), dtype=np.int64)
        return no_batches, {"mixed": groups.ravel(), "remainder": left}

    packing = pack(points, labels, centroids, settings, classes)
    reason = "mixed" if config["remainder"] == "mix" else "remainder"
    return packing.batches, {reason: packing.remainder}


def build_mixed(step: Step, builder: ArtifactBuilder, executor: Executor, progress: Progress) -> StageResult:
    """Builds the `batches` of domain `mixed`.

    They are drawn from the groups of all domains. If the domains pack batches themselves, what is left over
    of one domain after another is cut into batches instead.
    """
    if not builder.committed("batches"):
        progress.start("pack mixed", 1)
        config = step.config
        tables = [pq.read_table(step.inputs[f"batches/{name}"] / "leftover.parquet") for name in config["domains"]]
        every = pa.concat_tables(tables).unify_dictionaries()
        every = every.filter(pa.compute.equal(every["reason"], "mixed"))

        rows, rests, crowding = [], [], 0
        for number in range(config["num_packings"]):
            mixed = every.filter(pa.compute.equal(every["packing"], number))
            if config["compose"] == "corpus":
                classes = _classes_of_corpus(step, mixed)
                batches, left = _compose(config, classes, number)
                crowding += _crowding_pairs(classes, batches)
            else:
                cut = len(mixed) // config["batch_size"] * config["batch_size"]
                batches, left = np.split(np.arange(len(mixed)), [cut])

            drawn = mixed.take(batches.ravel())
            slots = _slots(number, batches.size // config["batch_size"], config["batch_size"])
            columns = {name: drawn[name] for name in ("domain", "pair_id", "cluster_id")}
            rows.append(pa.table({**slots, **columns}, schema=schemas.BATCHES))
            rest = mixed.take(left).drop_columns("reason").append_column("reason", _word("remainder", len(left)))
            rests.append(rest.cast(schemas.LEFTOVER))
        _write(builder, rows, rests, {"crowding_pairs": crowding} if config["compose"] == "corpus" else {})
        progress.advance(1)
        progress.finish()
    return StageResult(units=["batches"], counts=builder.unit_record("batches").counts)


def _classes_of_corpus(step: Step, table: pa.Table) -> Array:
    """The query class and the document class of each pair of `table` (int64, n × 2), told apart by domain."""
    domain, pair_id = table["domain"].to_numpy(), table["pair_id"].to_numpy()
    classes = np.empty((len(table), 2), dtype=np.int64)
    num_classes = 0
    for name in step.config["domains"]:
        pairs = load_pairs(read_artifact(step.inputs[f"pairs/{name}"]))
        of_domain = _classes(load_answers(step.inputs[f"answers/{name}"], pairs)) + num_classes
        classes[domain == name] = of_domain[pair_id[domain == name]]
        num_classes = int(of_domain.max(initial=num_classes - 1)) + 1
    return classes


def _compose(config: dict[str, Any], classes: Array, number: int) -> tuple[Array, Array]:
    """Draws batches from the groups of all domains; each group is consecutive rows of `classes`."""
    groups = np.arange(len(classes)).reshape(-1, config["group_size"])

    # Domains may have any number of dimensions. For single pairs that part, any batch suits as well as another.
    points = InMemory(np.zeros((len(classes), 1), dtype=np.float32))
    return compose(points, groups, classes, batch_size=config["batch_size"], seed=config["seed"] + number)


def _slots(packing: int, num_batches: int, batch_size: int) -> dict[str, Array]:
    """The columns that name every slot of a packing, batch by batch."""
    num_rows = num_batches * batch_size
    return {
        "packing": np.full(num_rows, packing, dtype=np.int32),
        "batch": np.repeat(np.arange(num_batches), batch_size),
        "slot": np.tile(np.arange(batch_size, dtype=np.int32), num_batches),
    }


def _rows(domain: str, packing: int, pair_ids: Array, cluster_of: Array) -> pa.Table:
    flat = pair_ids.ravel()
    columns = {"domain": _word(domain, len(flat)), "pair_id": flat, "cluster_id": cluster_of[flat]}
    return pa.table({**_slots(packing, *pair_ids.shape), **columns}, schema=schemas.BATCHES)


def _word(word: str, num_rows: int) -> pa.DictionaryArray:
    """A column with the same word in each row."""
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


def _write(
    builder: ArtifactBuilder, packings: list[pa.Table], leftover: list[pa.Table], counts: dict[str, int]
) -> None:
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
            **counts,
        }
