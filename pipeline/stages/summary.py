"""The counts of a corpus: of each domain, from source rows to batches, its hardness, and how its packings differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.batching.hardness import Bounds
from hardbatch.pipeline.errors import InputError
from hardbatch.pipeline.stages.card import CLUSTER_SIZES
from hardbatch.pipeline.step import Step

_READ_COUNTS = ("rows", "pairs", "held_out", "holdout_target", "quarantined", "texts_cut", "negatives_dropped")
_BLOCK_BATCHES = 1_024


def count_packings(packed: dict[str, dict[str, Any]]) -> int:
    """E, from the counts of each domain's `batches`; those made before there were several do not say 1."""
    found = {counts.get("packings", 1) for counts in packed.values()}
    assert len(found) == 1, f"domains differ in their number of packings: {found}"
    return int(found.pop())


def summarise(step: Step, index: pa.Table, packed: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Counts of the corpus, and of each domain: from source rows to batches, and its hardness.

    A domain's batches and leftover are those of each packing, its hardness that of all packings together. Where there
    are several, `by_packing` has the hardness of each, and `shared_batch_mates` says how much they have in common.
    """
    num_packings = count_packings(packed)
    summary: dict[str, Any] = {
        "batch_size": step.config["batch_size"],
        "batches": len(index),
        "packings": num_packings,
        "domains": {},
    }
    for domain, counts in packed.items():
        rows = index.filter(pa.compute.equal(index["domain"], domain))
        figures: dict[str, Any] = {"batches": counts["batches"], "leftover": counts["leftover"]}
        bounds = None
        if domain != schemas.MIXED_DOMAIN:
            read = read_artifact(step.inputs[f"pairs/{domain}"]).manifest.counts
            figures.update({name: read[name] for name in _READ_COUNTS})
            clusters = read_artifact(step.inputs[f"clusters/{domain}"]).manifest.counts
            figures.update({name: clusters[name] for name in ("clusters", *CLUSTER_SIZES) if name in clusters})
            if counts["batches"]:
                bounds = Bounds(**read_artifact(step.inputs[f"hardness/{domain}"]).manifest.counts)
        if counts["batches"]:
            figures.update(_hardness(rows, bounds))
            if bounds is not None:
                figures["hardness_random"], figures["hardness_knn"] = bounds.random, bounds.knn
        if counts["batches"] and num_packings > 1:
            figures["shared_batch_mates"] = _shared_batch_mates(step, domain, num_packings)
            figures["by_packing"] = [
                _hardness(rows.filter(pa.compute.equal(rows["packing"], packing)), bounds)
                for packing in range(num_packings)
            ]
        summary["domains"][domain] = figures
    return summary


def _hardness(rows: pa.Table, bounds: Bounds | None) -> dict[str, float | None]:
    """Figures of the batches in `rows` of the index; shares where there are bounds to compare with."""
    hardness = float(np.mean(rows["hardness"].to_numpy()))
    unmasked = 1 - rows["mask_rate"].to_numpy()
    masked_values = np.nan_to_num(rows["masked_hardness"].to_numpy().astype(np.float64))
    masked = float((masked_values * unmasked).sum() / unmasked.sum()) if unmasked.any() else None
    figures: dict[str, float | None] = {
        "hardness": hardness,
        "masked_hardness": masked,
        "mask_rate": float(np.mean(rows["mask_rate"].to_numpy())),
        "surrogate_loss": float(np.mean(rows["surrogate_loss"].to_numpy())),
    }
    if bounds is not None:
        figures["share"] = bounds.share(hardness)
        figures["masked_share"] = None if masked is None else bounds.share(masked)
    return {name: None if value is None else round(value, 4) for name, value in figures.items()}


def shared_batch_mates(first_MB: Array, second_MB: Array) -> float | None:
    """The fraction of a pair's B−1 batch-mates in one packing that are its batch-mates in another one too.

    The mean over the pairs that are in a batch of both; None where there is none. `first_MB` and `second_MB` are the
    pairs of M batches each, as integers from 0, none twice. Where c pairs of a batch of the first lie in one batch of
    the second, each of them shares c−1 mates: Σ c(c−1) / (n·(B−1)). Memory: 4 bytes for each number up to the largest.
    """
    num_batches, batch_size = first_MB.shape
    batch_of = np.zeros(int(first_MB.max(initial=0)) + 1, dtype=np.int32)  # in the first, from 1; 0: in none
    batch_of[first_MB] = np.arange(1, num_batches + 1, dtype=np.int32)[:, None]
    num_pairs = num_shared = 0
    for start in range(0, len(second_MB), _BLOCK_BATCHES):
        block = second_MB[start : start + _BLOCK_BATCHES]
        found = np.sort(np.where(block < len(batch_of), batch_of[np.minimum(block, len(batch_of) - 1)], 0), axis=1)
        begins = np.ones(found.shape, dtype=bool)
        begins[:, 1:] = found[:, 1:] != found[:, :-1]
        starts = np.flatnonzero(begins)
        together = np.diff(starts, append=found.size)[found.ravel()[starts] > 0]  # c of each cell
        num_pairs += int(together.sum())
        num_shared += int((together * (together - 1)).sum())
    return num_shared / (num_pairs * (batch_size - 1)) if num_pairs else None


def _shared_batch_mates(step: Step, domain: str, num_packings: int) -> float | None:
    """The mean over all pairs of packings; two of them are held at a time."""
    found = []
    for first in range(num_packings - 1):
        first_MB = _pair_numbers(step, domain, first)
        for second in range(first + 1, num_packings):
            found.append(shared_batch_mates(first_MB, _pair_numbers(step, domain, second)))
    shares = [share for share in found if share is not None]
    return round(float(np.mean(shares)), 4) if shares else None


def _pair_numbers(step: Step, domain: str, packing: int) -> Array:
    """Numbers that tell the pairs of a packing apart, by batch and slot."""
    columns = ["pair_id", "domain"] if domain == schemas.MIXED_DOMAIN else ["pair_id"]
    path = step.inputs[f"batches/{domain}"] / "batches.parquet"
    table = pq.read_table(path, columns=columns, filters=[("packing", "==", packing)])
    numbers: Array = table["pair_id"].to_numpy()
    if domain == schemas.MIXED_DOMAIN:  # pairs of all domains, one domain after the other
        names = step.config["domains"]
        sizes = [read_artifact(step.inputs[f"pairs/{name}"]).manifest.counts["pairs"] for name in names]
        starts = dict(zip(names, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        numbers = numbers + np.array([starts[name] for name in table["domain"].to_pylist()])
    return numbers.reshape(-1, step.config["batch_size"])


def refuse_empty(step: Step, counts: dict[str, dict[str, Any]]) -> None:
    """Raises InputError: no domain fills a batch, and what to change."""
    size = step.config["batch_size"]
    left = {
        domain: sum(count["leftover"].values()) for domain, count in counts.items() if domain in step.config["domains"]
    }
    found = ", ".join(f"{domain} {number}" for domain, number in left.items())
    mix = " or set pack.remainder to mix" if schemas.MIXED_DOMAIN not in counts and sum(left.values()) >= size else ""
    raise InputError(
        f"no domain fills a batch of {size} pairs (pairs that came through: {found}); lower pack.batch_size, "
        f"add data{',' + mix if mix else ''}"
    )
