"""The counts of a corpus: from source rows to batches, how hard these are, and how far packings differ.

Shape letters: M batches of a packing, B slots of a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hardbatch.pipeline import schemas
from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.batching.hardness import Bounds
from hardbatch.pipeline.batching.negatives import measure_spread
from hardbatch.pipeline.errors import InputError
from hardbatch.pipeline.stages.figures import CLUSTER_SIZES, OWN_RANKS, DomainSummary, Hardness, Negatives, Summary
from hardbatch.pipeline.stages.warnings import no_vector_text, reasons_text
from hardbatch.pipeline.step import Step

_SOURCE_COUNTS = (
    "rows", "rows_filtered", "pairs", "held_out", "holdout_target", "quarantined", "texts_cut", "query_ids",
    "document_ids", "sorted_by", "files", "files_read", "files_without_pairs", "such_files", "negatives",
    "negatives_dropped", "negatives_unusable", "negatives_joined", "extra_rows_dropped", "extra_empty",
)  # fmt: skip
_ROLES = {"vectors": "embed.model", "surrogate": "embed.surrogate_model"}
_BLOCK_BATCHES = 1_024


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What a `batches` artifact counts: its packings, and the batches and leftover pairs of each of them."""

    batches: int
    leftover: dict[str, int]
    packings: int


def read_packed(path: Path) -> Packed:
    """The counts of the `batches` artifact at `path`."""
    counts = read_artifact(path).manifest.counts
    # Artifacts made before there could be several packings do not count them.
    return Packed(batches=counts["batches"], leftover=counts["leftover"], packings=counts.get("packings", 1))


def count_packings(packed: Mapping[str, Packed]) -> int:
    """The number of packings E, which is the same for every domain."""
    found = {counts.packings for counts in packed.values()}
    assert len(found) == 1, f"domains differ in their number of packings: {found}"
    return found.pop()


def summarise(
    step: Step,
    index: pa.Table,
    packed: Mapping[str, Packed],
    queries_by_masked: Mapping[str, Array],
    query_texts: Mapping[str, int],
    hard_negatives: Mapping[str, dict[str, int]],
) -> Summary:
    """Counts the corpus that `step` has written.

    Args:
        step: The step of the shards.
        index: Their index, a row per batch.
        packed: The counts of each domain's `batches`.
        queries_by_masked: By domain, the number of queries that have 0, 1, ..., B−1 masked slots.
        query_texts: By domain, the number of slots masked because their document is the text of the query.
        hard_negatives: By domain, what became of the hard negatives; empty if there are none.

    Returns:
        The counts. A domain's batches and leftover are those of each packing, its hardness and its negatives
        those of all packings.
    """
    num_packings = count_packings(packed)
    domains = {}
    for domain, counts in packed.items():
        is_mixed = domain == schemas.MIXED_DOMAIN
        source = {} if is_mixed else _source_counts(step, domain)
        if counts.batches == 0:
            domains[domain] = DomainSummary(batches=0, leftover=counts.leftover, source=source)
            continue

        bounds = None if is_mixed else Bounds(**_counts(step, f"hardness/{domain}"))
        rows = index.filter(pc.equal(index["domain"], domain))
        of_packing = [rows.filter(pc.equal(rows["packing"], packing)) for packing in range(num_packings)]
        several = num_packings > 1
        domains[domain] = DomainSummary(
            batches=counts.batches,
            leftover=counts.leftover,
            source=source,
            hardness=_hardness(rows, bounds),
            negatives=_negatives(rows, queries_by_masked[domain], query_texts[domain]),
            bounds=None if bounds is None else (bounds.random, bounds.knn),
            by_packing=tuple(_hardness(rows, bounds) for rows in of_packing) if several else (),
            shared_batch_mates=_shared_batch_mates(step, domain, num_packings) if several else None,
            hard_negatives=hard_negatives.get(domain),
        )
    return Summary(batch_size=step.config["batch_size"], batches=len(index), packings=num_packings, domains=domains)


def _counts(step: Step, name: str) -> dict[str, Any]:
    return read_artifact(step.inputs[name]).manifest.counts


def _source_counts(step: Step, domain: str) -> dict[str, Any]:
    pairs, clusters = read_artifact(step.inputs[f"pairs/{domain}"]).manifest, _counts(step, f"clusters/{domain}")
    found = {name: pairs.counts[name] for name in _SOURCE_COUNTS if name in pairs.counts}
    found["negatives_column"] = pairs.config.get("columns", {}).get("negatives")

    # The first functions of a Python package are what a limit is there for.
    if any(source["format"] != "python" for source in pairs.sources):
        found["limit"] = pairs.config.get("limit")

    # Artifacts of older versions do not know the sizes of their clusters.
    sizes = {name: clusters[name] for name in ("clusters", *CLUSTER_SIZES) if name in clusters}
    ranks = _counts(step, f"consistency/{domain}")["rank_percentiles"]
    own_rank = {name: ranks[percentile] for name, percentile in OWN_RANKS.items() if ranks}
    return found | sizes | own_rank | _model_counts(step, domain)


def _model_counts(step: Step, domain: str) -> dict[str, Any]:
    """What the models made of the texts: shares that reach their maximum length, and reasons for lacking vectors."""
    cut, lacking = [], []
    paths = {step.inputs[f"{name}/{domain}"]: role for name, role in reversed(_ROLES.items())}
    for path, role in reversed(paths.items()):
        manifest = read_artifact(path).manifest
        counts = manifest.counts
        model = f"{role} '{manifest.config.get('name')}'"
        if limit := counts.get("max_length_tokens"):  # older artifacts and lexical vectors have none
            shares = {side: round(counts[f"{side}_cut"] / max(1, counts[side]), 4) for side in schemas.SIDES}
            cut.append({"model": model, "max_length_tokens": limit, **shares})
        reasons = {name: counts[name] for name in ("zero_vector", "nan_vector") if counts.get(name)}
        if reasons:
            lacking.append({"model": model, "reasons": reasons})
    return {"cut_for_models": cut, "no_vectors": lacking}


def _hardness(rows: pa.Table, bounds: Bounds | None) -> Hardness:
    """How hard the batches in `rows` of the index are; with shares if there are bounds to compare with."""
    hardness = float(np.mean(rows["hardness"].to_numpy()))
    within = rows["group_hardness"]

    # The mean over all unmasked negatives, so each batch weighs as much as it has of them.
    unmasked = 1 - rows["mask_rate"].to_numpy()
    masked_values = np.nan_to_num(rows["masked_hardness"].to_numpy().astype(np.float64))
    masked = float((masked_values * unmasked).sum() / unmasked.sum()) if unmasked.any() else None
    return Hardness(
        hardness=hardness,
        group_hardness=None if within.null_count else float(np.mean(within.to_numpy())),
        masked_hardness=masked,
        share=None if bounds is None else bounds.share(hardness),
        masked_share=None if bounds is None or masked is None else bounds.share(masked),
        mask_rate=float(np.mean(rows["mask_rate"].to_numpy())),
        surrogate_loss=float(np.mean(rows["surrogate_loss"].to_numpy())),
    )


def _negatives(rows: pa.Table, queries_by_masked_B: Array, num_query_texts: int) -> Negatives:
    """What masking leaves of the batches in `rows` of the index."""
    masked, certain = (float(np.mean(rows[name].to_numpy())) for name in ("mask_rate", "same_answer_rate"))
    num_masked = int(queries_by_masked_B @ np.arange(len(queries_by_masked_B)))
    same_answer = certain / masked if masked else None
    query_text = num_query_texts / num_masked if num_masked else None
    few, size = rows["queries_with_few_negatives"].to_numpy(), len(queries_by_masked_B)
    return Negatives(
        **asdict(measure_spread(queries_by_masked_B)),
        same_answer_share=same_answer,
        query_text_share=query_text,
        likely_share=None if same_answer is None or query_text is None else max(0.0, 1 - same_answer - query_text),
        mostly_masked_batches=int((2 * few > size).sum()),
    )


def shared_batch_mates(first_MB: Array, second_MB: Array) -> float | None:
    """The fraction of a pair's B−1 batch-mates in one packing that are its batch-mates in another one too.

    If c pairs of a batch of the first packing are in one batch of the second, each of them shares c−1 batch-mates
    there: Σ c(c−1) / (n·(B−1)) over the n pairs that are in a batch of both. Needs 4 bytes of memory for each number
    up to the largest one.

    Example: batches {0, 1, 2} and {3, 4, 5} against {0, 1, 3} and {2, 4, 5}. Pairs 0 and 1 stay together, and so do
    4 and 5, so the cells have c = 2, 1, 1, 2 and the result is (2 + 0 + 0 + 2) / (6 · 2) = 1/3.

    Args:
        first_MB: The pairs of each batch of one packing, as integers from 0, each at most once.
        second_MB: The same for another packing; the number of batches may differ.

    Returns:
        The mean over those n pairs, or None if there are none.
    """
    num_batches, batch_size = first_MB.shape
    batch_of = np.zeros(int(first_MB.max(initial=0)) + 1, dtype=np.int32)  # in the first, from 1; 0: in none
    batch_of[first_MB] = np.arange(1, num_batches + 1, dtype=np.int32)[:, None]

    num_pairs = num_shared = 0
    for start in range(0, len(second_MB), _BLOCK_BATCHES):
        # Sorted within each batch of the second, so that pairs of one batch of the first are next to each other.
        block = second_MB[start : start + _BLOCK_BATCHES]
        found = np.sort(np.where(block < len(batch_of), batch_of[np.minimum(block, len(batch_of) - 1)], 0), axis=1)

        # The lengths of the runs of equal numbers are the c of the cells.
        begins = np.ones(found.shape, dtype=bool)
        begins[:, 1:] = found[:, 1:] != found[:, :-1]
        starts = np.flatnonzero(begins)
        together = np.diff(starts, append=found.size)[found.ravel()[starts] > 0]
        num_pairs += int(together.sum())
        num_shared += int((together * (together - 1)).sum())
    return num_shared / (num_pairs * (batch_size - 1)) if num_pairs else None


def _shared_batch_mates(step: Step, domain: str, num_packings: int) -> float | None:
    """The mean over all pairs of packings; two packings are in memory at a time."""
    found = [
        shared_batch_mates(_pair_numbers(step, domain, first), _pair_numbers(step, domain, second))
        for first, second in combinations(range(num_packings), 2)
    ]
    shares = [share for share in found if share is not None]
    return round(float(np.mean(shares)), 4) if shares else None


def _pair_numbers(step: Step, domain: str, packing: int) -> Array:
    """Numbers that tell the pairs of a packing apart, by batch and slot."""
    is_mixed = domain == schemas.MIXED_DOMAIN
    path = step.inputs[f"batches/{domain}"] / "batches.parquet"
    columns = ["pair_id"] + ["domain"] * is_mixed
    table = pq.read_table(path, columns=columns, filters=[("packing", "==", packing)])
    numbers: Array = table["pair_id"].to_numpy()

    # Ids are given per domain: those of a domain are moved behind all of the domains before it.
    if is_mixed:
        names = step.config["domains"]
        sizes = [_counts(step, f"pairs/{name}")["pairs"] for name in names]
        starts = dict(zip(names, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        numbers = numbers + np.array([starts[name] for name in table["domain"].to_pylist()])
    return numbers.reshape(-1, step.config["batch_size"])


def refuse_empty(step: Step, packed: Mapping[str, Packed]) -> None:
    """Raises InputError, which says that no domain fills a batch, why, and what to change."""
    size, domains = step.config["batch_size"], step.config["domains"]
    left = {domain: sum(packed[domain].leftover.values()) for domain in domains}
    found = ", ".join(_came_through(step, domain, number) for domain, number in left.items())
    invalid, elsewhere, weak = (
        sum(packed[domain].leftover.get(reason, 0) for domain in domains)
        for reason in ("invalid_vector", "held_out_elsewhere", "weak_pair")
    )
    causes = []
    if not any(left.values()):
        causes.append(_advice_on_rows(_counts(step, f"pairs/{domain}")["quarantined"] for domain in domains))
    if invalid:
        models = {item["model"]: item for domain in domains for item in _model_counts(step, domain)["no_vectors"]}
        causes.append(f"{invalid} of these cannot be used, as {no_vector_text(list(models.values()))}")
    if elsewhere:
        causes.append(f"{elsewhere} of these have a text that another domain holds out; lower its holdout")
    if weak:
        causes.append(f"raise pack.weak_pair_rank, which leaves out {weak} of these")
    if invalid < sum(left.values()):
        mix = schemas.MIXED_DOMAIN not in packed and sum(left.values()) >= size
        causes.append(f"lower pack.batch_size, add data{', or set pack.remainder to mix' if mix else ''}")
    raise InputError(f"no domain fills a batch of {size} pairs (pairs that came through: {found}); {'; '.join(causes)}")


def _advice_on_rows(quarantined: Iterable[Mapping[str, int]]) -> str:
    """What to do if every row of every domain is in quarantine, by the most frequent reason."""
    total = sum((Counter(counts) for counts in quarantined), Counter[str]())
    reasons = [reason for reason, _ in total.most_common(1)]
    if reasons == ["contaminated"]:
        return "these rows have texts of the evaluations in ingest.decontaminate; give other data, or leave these out"
    if reasons == ["query_equals_document"]:
        return "columns.query and columns.document have the same texts; name two different columns"
    return "fix the source, or name other columns"


def _came_through(step: Step, domain: str, num_pairs: int) -> str:
    """The pairs of a domain, or if there are none, what became of its rows."""
    if num_pairs:
        return f"{domain} {num_pairs}"
    counts = _counts(step, f"pairs/{domain}")
    return f"{domain} 0 of {counts['rows']} rows: {reasons_text(counts['quarantined'])}"
