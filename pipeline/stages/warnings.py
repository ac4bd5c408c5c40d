"""What a person should know about shards before training on them: one line for each thing, with its number.

The summary of a run, `hardbatch inspect`, the data card and the run log have these lines. Each function
below returns lines without the domain's name, about one thing that may have gone wrong without an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hardbatch.pipeline.schemas import SIDES
from hardbatch.pipeline.stages.figures import DomainSummary, Summary

_NOTABLE_SHARE = 0.05  # of texts that are cut, of pairs without a vector, and of copies of held-out texts
_ID_SHARE = 0.9
_LEAST_ROWS = 10  # fewer show no habit
_LATER_REASONS = ("duplicate_pair", "held_out_copy")  # of rows that staging kept
_NO_VECTOR = {
    "zero_vector": "zero_vector: the model finds no word in them; check these texts, or set another model",
    "nan_vector": "nan_vector: its numbers overflow; set embed.dtype to float32",
}
_ABSENT = ("null", "empty")  # a place without a hard negative, rather than one that cannot be used
REMOVED = {
    "known": "same answers",
    "equivalent": "likely answers",
    "no_vector": "without a vector",
    "held_out": "held out by another domain",
}


def corpus_warnings(summary: Summary) -> list[str]:
    """The warnings of all domains; those of older shards lack what was not counted then."""
    lines = [line for name, domain in summary.domains.items() for line in domain_warnings(name, domain, summary)]
    return [*lines, *(f"warning: {line}" for line in _cut_texts(summary))]


def domain_warnings(name: str, domain: DomainSummary, summary: Summary) -> list[str]:
    """The warnings of one domain, each a line that begins with `warning: NAME`."""
    lines = [*_negatives(domain, summary), *_removed_negatives(domain)]
    source = domain.source
    if "rows" in source:  # batches that mix domains have no source of their own
        lines += [
            *_rows(source),
            *_held_out(domain, summary),
            *_texts(source),
            *_files(source),
            *_given_negatives(source),
            *_extra_columns(source),
            *_vectors(domain),
        ]
        if source["pairs"] > 0 and domain.batches == 0 and not domain.leftover.get("mixed"):
            lines.append(
                f"its {source['pairs']:,} pairs do not fill a batch of {summary.batch_size}, so training has none of "
                "them; add data, lower pack.batch_size, or set pack.remainder to mix"
            )
    return [f"warning: {name}: {line}" for line in lines]


def reasons_text(counts: Mapping[str, int]) -> str:
    """Numbers by reason, the largest first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {count:,}" for reason, count in ordered if count)


def _rows(source: Mapping[str, Any]) -> Iterator[str]:
    quarantined, num_rows = source["quarantined"], source["rows"]
    num_quarantined = sum(quarantined.values())
    if source["pairs"] == 0:
        yield f"no pair was left of {num_rows:,} rows ({reasons_text(quarantined)})"
        return

    # Rows that repeat a pair are as they should be if each has another hard negative.
    if source.get("negatives_joined"):
        num_quarantined -= quarantined.get("duplicate_pair", 0)
    if 2 * num_quarantined > num_rows:
        yield f"{num_quarantined:,} of {num_rows:,} rows are in quarantine ({reasons_text(quarantined)})"


def _held_out(domain: DomainSummary, summary: Summary) -> Iterator[str]:
    source = domain.source

    # A handful of copies is left out, and counted among the reasons, but it is not worth a line of its own.
    num_held_out = sum(other.source.get("held_out", 0) for other in summary.domains.values())
    notable = _NOTABLE_SHARE * min(source["pairs"], num_held_out)
    if source["held_out"] < source["holdout_target"] / 2:
        yield (
            f"{source['held_out']:,} of {source['holdout_target']:,} pairs could be held out: "
            "shared texts, hard negatives included, tie the others together"
        )
    if (copies := source["quarantined"].get("held_out_copy", 0)) > notable:
        yield f"{copies:,} pairs have a near-copy of a held-out text and are in quarantine (held_out_copy)"
    if (leaking := domain.leftover.get("held_out_elsewhere", 0)) > notable:
        yield (
            f"{leaking:,} of {source['pairs']:,} pairs have a text that another domain holds out, or a near-copy of "
            "it, and are in no batch (held_out_elsewhere)"
        )


def _texts(source: Mapping[str, Any]) -> Iterator[str]:
    checked = source["rows"] - sum(
        count for reason, count in source["quarantined"].items() if reason not in _LATER_REASONS
    )
    for side in ("query", "document"):
        num_ids = source.get(f"{side}_ids", 0)
        if checked >= _LEAST_ROWS and num_ids >= _ID_SHARE * checked:
            plural = "queries" if side == "query" else "documents"
            yield (
                f"{num_ids:,} of {checked:,} {plural} look like ids, not texts; map columns.{side} to the column "
                "with the texts, or join them to the ids first"
            )
    if source["texts_cut"] > _NOTABLE_SHARE * source["rows"]:
        yield f"{source['texts_cut']:,} texts are cut at ingest.max_characters; raise it to keep them whole"


def _cut_texts(summary: Summary) -> Iterator[str]:
    """A line for each model and limit, as domains usually share them."""
    shares: dict[tuple[str, int], dict[str, list[str]]] = {}
    for name, domain in summary.domains.items():
        for cut in domain.source.get("cut_for_models", ()):
            for side in SIDES:
                if cut[side] >= _NOTABLE_SHARE:
                    found = shares.setdefault((cut["model"], cut["max_length_tokens"]), {})
                    found.setdefault(side, []).append(f"{name} ({cut[side]:.0%})")
    for (model, limit), found in shares.items():
        texts = " and ".join(f"{side} of {', '.join(domains)}" for side, domains in found.items())
        yield (
            f"{model} reads {limit:,} tokens of a text and cuts {texts}; clusters and masks do not see the rest; "
            "raise embed.max_length_tokens, or set a model that reads more"
        )


def _files(source: Mapping[str, Any]) -> Iterator[str]:
    num_files, num_read = source.get("files", 0), source.get("files_read", 0)
    without = source.get("files_without_pairs", 0)
    is_package = any(name.startswith("python:") for name in source.get("such_files", ()))
    if without > (_NOTABLE_SHARE * num_read if is_package else 0):  # some modules have no docstring to read
        more = ", ..." if without > len(source["such_files"]) else ""
        yield (
            f"{without:,} of {num_read:,} files gave no pair: {', '.join(source['such_files'])}{more}; they have no "
            "rows, or all of them are in quarantine"
        )
    if source.get("limit") and num_read < num_files:
        yield f"limit = {source['limit']} was reached in file {num_read:,} of {num_files:,}; the others were not read"
    if source.get("limit") and source.get("sorted_by"):
        yield (
            f"limit = {source['limit']} reads the first rows of a source that is sorted or grouped by "
            f"{' and '.join(source['sorted_by'])}: they do not represent it; shuffle the source, or draw rows at random"
        )


def _given_negatives(source: Mapping[str, Any]) -> Iterator[str]:
    column, num_usable = source.get("negatives_column"), source.get("negatives", 0)
    unusable = source.get("negatives_unusable", {})
    lost = {reason: count for reason, count in unusable.items() if reason not in _ABSENT}
    num_lost = sum(lost.values())
    if num_lost > num_usable:
        which = "none" if num_usable == 0 else f"only {num_usable:,}"
        yield (
            f"{which} of {num_usable + num_lost:,} hard negatives of column '{column}' can be used "
            f"({reasons_text(lost)}); it must hold a list of texts, or one text"
        )
    elif column and num_usable == 0:
        yield f"no row has a hard negative in column '{column}': its cells are empty, or repeat the row's own document"


def _extra_columns(source: Mapping[str, Any]) -> Iterator[str]:
    for name in source.get("extra_empty", ()):
        yield f"no row has a value in the extra column '{name}'"
    if dropped := source.get("extra_rows_dropped"):
        yield (
            f"{dropped:,} rows repeat a pair with other values in the extra columns, and the first row stays; "
            "to keep all values, write one row for each pair, with lists"
        )


def _removed_negatives(domain: DomainSummary) -> Iterator[str]:
    found = domain.hard_negatives or {}
    removed = {text: found.get(f"negatives_removed_{name}", 0) for name, text in REMOVED.items()}
    num_kept, num_removed = found.get("negatives_kept", 0), sum(removed.values())
    if num_removed > num_kept:
        reasons = ", ".join(f"{count:,} {text}" for text, count in removed.items() if count)
        yield f"{num_removed:,} of {num_kept + num_removed:,} hard negatives are left out of the shards ({reasons})"


def _vectors(domain: DomainSummary) -> Iterator[str]:
    num_pairs, invalid = domain.source["pairs"], domain.leftover.get("invalid_vector", 0)
    if num_pairs and invalid >= _NOTABLE_SHARE * num_pairs:
        which = "none" if invalid == num_pairs else f"only {num_pairs - invalid:,}"
        yield f"{which} of {num_pairs:,} pairs can be used, as {no_vector_text(domain.source.get('no_vectors', ()))}"


def no_vector_text(found: Sequence[Mapping[str, Any]]) -> str:
    """Which models gave no vectors for texts, why, and what to do about it."""
    models = "; ".join(f"{item['model']}: {reasons_text(item['reasons'])}" for item in found)
    reasons = [text for reason, text in _NO_VECTOR.items() if any(item["reasons"].get(reason) for item in found)]
    return f"texts have no vector ({models}); {'; '.join(reasons)}"


def _negatives(domain: DomainSummary, summary: Summary) -> Iterator[str]:
    """What masking leaves of the batches; see docs/negatives.md."""
    found = domain.negatives
    num_weak, num_pairs = domain.leftover.get("weak_pair", 0), domain.source.get("pairs", 0)
    if 2 * num_weak > num_pairs:
        yield (
            f"pack.weak_pair_rank leaves out {num_weak:,} of {num_pairs:,} pairs, more than half: "
            "the surrogate ranks their own document beyond it for their query; set a higher rank, or another "
            "embed.surrogate_model that knows these texts"
        )
    if found is not None and found.without:
        yield (
            f"{found.without:,} of {found.queries:,} queries have no negative in their batch and "
            "teach nothing; hardbatch inspect --sort negatives lists their batches"
        )
    if found is not None and found.mostly_masked_batches:
        num_batches = domain.batches * summary.packings
        yield (
            f"{found.mostly_masked_batches:,} of {num_batches:,} batches are mostly masked "
            f"({_percent(found.same_answer_share)} of the masks are same answers, {_percent(found.likely_share)} "
            "likely ones); "
            "hardbatch inspect --sort mask-rate lists them"
        )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
