"""stages.write: shards of two tiny domains and two packings, against the definitions."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hardbatch.pipeline.artifacts.artifact import verify_artifact
from hardbatch.pipeline.artifacts.footer import end_of_file, read_head
from hardbatch.pipeline.errors import InputError
from hardbatch.pipeline.run import Plan
from hardbatch.pipeline.schemas import INDEX, SHARDS, SHARDS_WITH_NEGATIVES
from hardbatch.pipeline.stages import write
from tests.artifacts import NO_VECTOR, Domain, Packing, Written, own_scores, run_write, vector_of, write_corpus

B = 4
ORDER = ("repeats", "plain", "mixed")


def make_repeats(num_pairs: int = 42) -> Domain:
    """Pairs whose queries and documents repeat; every second one has hard negatives of every kind."""
    pairs = [(f"query {i % 9}", f"document {i * 5 % 14}") for i in range(num_pairs)]
    negatives = [
        [f"nothing of the kind {i}", f"document {(i + 9) * 5 % 14}", NO_VECTOR, f"other {i}"] if i % 2 else []
        for i in range(num_pairs)
    ]
    return Domain(pairs=pairs, negatives=negatives, query_prompt="search_query: ", licence="CC0-1.0")


PLAIN = Domain(pairs=[("query 3", "an answer")] + [(f"plain {i}", f"text {i}") for i in range(13)])
DOMAINS = {"repeats": make_repeats(), "plain": PLAIN}


def make_packing(seed: int) -> Packing:
    """Ten and three batches of the domains, and one of what is left of both; pair 3 of `repeats` is always left."""
    shuffled = np.random.default_rng(seed).permutation(np.delete(np.arange(42), 3))
    orders = {"repeats": [*shuffled, 3], "plain": np.roll(np.arange(14), seed - 2)}
    slots = {name: [(name, int(pair)) for pair in order] for name, order in orders.items()}
    cut = {name: [some[i : i + B] for i in range(0, len(some) - B + 1, B)] for name, some in slots.items()}
    return {**cut, "mixed": [[slots["plain"][-1], slots["repeats"][-2], slots["plain"][-2], slots["repeats"][-1]]]}


PACKINGS = [make_packing(seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_corpus(tmp_path_factory.mktemp("written"), DOMAINS, PACKINGS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Written]:
    """Shards of each packing alone."""
    return [write_corpus(tmp_path_factory.mktemp("alone"), DOMAINS, [packing]) for packing in PACKINGS]


def batches_of(written: Written) -> Iterator[tuple[dict[str, Any], pl.DataFrame]]:
    """The row of the index and the slots of each batch."""
    for row in written.index.iter_rows(named=True):
        yield row, written.frame.filter(pl.col("batch_id") == row["batch_id"])


# files


def test_one_row_group_is_one_batch(written: Written) -> None:
    assert pq.read_schema(written.path / "index.parquet").equals(INDEX)
    for row in written.index.iter_rows(named=True):
        file = pq.ParquetFile(written.path / row["file"])
        assert file.schema_arrow.equals(SHARDS_WITH_NEGATIVES)
        table = file.read_row_group(row["row_group"])
        assert table["batch_id"].to_pylist() == [row["batch_id"]] * B
        assert table["slot"].to_pylist() == list(range(B))
        assert row["domain"] == "mixed" or set(table["domain"].to_pylist()) == {row["domain"]}
    assert written.index["batch_id"].to_list() == list(range(28))
    assert written.counts["batches"] * B == len(written.frame)


def test_parts_are_full_but_the_last_of_a_domain_in_a_packing(written: Written) -> None:
    parts = written.index.group_by("packing", "domain", "file", maintain_order=True).len()
    assert parts.rows() == [
        (packing, domain, f"data/part-{5 * packing + i:05d}.parquet", size)
        for packing in (0, 1)
        for i, (domain, size) in enumerate([("repeats", 4), ("repeats", 4), ("repeats", 2), ("plain", 3), ("mixed", 1)])
    ]
    assert sorted(path.name for path in (written.path / "data").iterdir()) == [
        f"part-{i:05d}.parquet" for i in range(10)
    ]


def test_encodings_compression_and_statistics_only_where_they_help(written: Written) -> None:
    for path in (written.path / "data").iterdir():
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            columns = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
            assert {c.path_in_schema for c in columns if c.is_stats_set} == {"batch_id", "pair_id"}
            packed = {c.path_in_schema for c in columns if "DELTA_BINARY_PACKED" in c.encodings}
            assert packed == {c.path_in_schema for c in columns if c.physical_type in ("INT32", "INT64")}
            compressed = {c.path_in_schema for c in columns if c.compression == "ZSTD"}
            assert compressed == {"query", "document", "negatives.list.element"}


def test_the_record_of_each_batch_is_that_of_its_row_group(written: Written) -> None:
    for row in written.index.iter_rows(named=True):
        path = written.path / row["file"]
        record = path.read_bytes()[row["record_offset"] :][: row["record_length"]]
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + end_of_file(read_head(path), record)))
        table = pq.ParquetFile(path, metadata=metadata).read_row_group(0)
        assert set(table["batch_id"].to_pylist()) == {row["batch_id"]}


def test_digests_of_the_index_cover_every_byte_once(written: Written) -> None:
    for (name,), rows in written.index.group_by("file"):
        data, metadata = (written.path / name).read_bytes(), pq.read_metadata(written.path / name)
        others, end = b"", 0
        for row in rows.sort("row_group").iter_rows(named=True):
            start, stop = row["byte_offset"], row["byte_offset"] + row["byte_length"]
            assert hashlib.sha256(data[start:stop]).hexdigest() == row["sha256"]
            assert start >= end
            others, end = others + data[end:start], stop
            group = metadata.row_group(row["row_group"])
            for column in (group.column(i) for i in range(group.num_columns)):
                first = min(p for p in (column.dictionary_page_offset, column.data_page_offset) if p)
                assert start <= first and first + column.total_compressed_size <= stop
        others += data[end:]
        assert others.startswith(b"PAR1") and others.endswith(b"PAR1")
        assert set(rows["footer_sha256"]) == {hashlib.sha256(others).hexdigest()}


def test_a_domain_without_hard_negatives_has_no_such_column(tmp_path: Path) -> None:
    shards = write_corpus(tmp_path, {"plain": PLAIN}, [{"plain": PACKINGS[0]["plain"]}])
    assert pq.read_schema(shards.path / "data" / "part-00000.parquet").equals(SHARDS)
    assert "`negatives`" not in (shards.path / "README.md").read_text()


# rows


def test_batches_are_those_that_were_packed_with_the_texts_of_their_pairs(written: Written) -> None:
    packed = [slots for packing in PACKINGS for domain in ORDER for slots in packing[domain]]
    found = written.frame.select("domain", "pair_id").rows()
    assert found == [slot for slots in packed for slot in slots]
    for row in written.frame.iter_rows(named=True):
        domain = DOMAINS[row["domain"]]
        assert (row["query"], row["document"]) == domain.pairs[row["pair_id"]]
        assert domain.texts("queries")[row["query_id"]] == row["query"]
        assert domain.texts("documents")[row["document_id"]] == row["document"]
        assert (row["query_prompt"], row["document_prompt"]) == (domain.query_prompt, "")
        assert row["cluster_id"] == row["pair_id"] % 5


FLOORS = {name: float(np.quantile(own_scores(domain), 0.25)) for name, domain in DOMAINS.items()}


def score(query: str, document: str) -> float:
    """The surrogate's score of a document for a query."""
    query_D, document_D = (vector_of(text, "surrogate").astype(np.float64) for text in (query, document))
    return float(query_D @ document_D)


def is_likely(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the symmetric score of two pairs reaches the mean of their own scores and both floors."""
    symmetric = (score(row["query"], other["document"]) + score(other["query"], row["document"])) / 2
    own = (score(row["query"], row["document"]) + score(other["query"], other["document"])) / 2
    return symmetric >= max(own, FLOORS[row["domain"]], FLOORS[other["domain"]])


def test_positive_and_equivalent_slots_are_those_of_the_definition(written: Written) -> None:
    seen = Counter[str]()
    for _, batch in batches_of(written):
        rows = batch.rows(named=True)
        for i, row in enumerate(rows):
            reasons = [
                {
                    "known": row["domain"] == other["domain"]
                    and (row["query"], other["document"]) in DOMAINS[row["domain"]].pairs,
                    "same document": row["document"] == other["document"],
                    "same query in another domain": row["query"] == other["query"] and row["domain"] != other["domain"],
                    "surrogate": is_likely(row, other),
                }
                for other in rows
            ]
            others = [j for j in range(B) if j != i]
            assert row["equivalent_slots"] == [j for j in others if any(reasons[j].values())]
            certain = [j for j in others if any(holds for name, holds in reasons[j].items() if name != "surrogate")]
            assert row["positive_slots"] == certain
            seen.update(name for j in range(B) if j != i for name, holds in reasons[j].items() if holds)
    assert len(seen) == 4


def test_hardness_of_the_index(written: Written) -> None:
    others = ~np.eye(B, dtype=bool)
    num_all_masked = 0
    for row, batch in batches_of(written):
        queries, documents = (
            np.array([vector_of(text, "vectors") for text in batch[side]], dtype=np.float64)
            for side in ("query", "document")
        )
        similar = (documents @ queries.T + queries @ documents.T) / 2
        masked = np.array([[j in slots for j in range(B)] for slots in batch["equivalent_slots"]])
        assert row["hardness"] == pytest.approx(similar[others].mean(), abs=2e-6)
        assert row["mask_rate"] == pytest.approx(masked[others].mean(), abs=2e-6)
        if row["domain"] == "mixed":
            assert row["group_hardness"] is None
        else:
            in_groups = similar[[0, 1, 2, 3], [1, 0, 3, 2]].mean()  # groups of two
            assert row["group_hardness"] == pytest.approx(in_groups, abs=2e-6)
        if (others & ~masked).any():
            assert row["masked_hardness"] == pytest.approx(similar[others & ~masked].mean(), abs=2e-6)
        else:
            num_all_masked += 1
            assert row["masked_hardness"] is None
    assert num_all_masked < len(written.index)


def test_negatives_of_the_index_and_of_the_summary_are_those_of_the_masks(written: Written) -> None:
    """Effective negatives, by batch and by domain, counted again from the columns of masks."""
    columns = ("same_answer_rate", "mean_negatives", "min_negatives")
    columns += ("queries_without_negatives", "queries_with_few_negatives")
    rows, masked = dict[str, list[Any]](), dict[str, list[int]]()
    for row, batch in batches_of(written):
        num_masked = [len(slots) for slots in batch["equivalent_slots"]]
        kept = [B - 1 - number for number in num_masked]
        certain = sum(len(slots) for slots in batch["positive_slots"]) / (B * (B - 1))
        few = sum(number < (B - 1) / 2 for number in kept)
        expected = [certain, sum(kept) / B, min(kept), kept.count(0), few]
        assert [row[name] for name in columns] == pytest.approx(expected, abs=2e-6)
        rows.setdefault(row["domain"], []).append(row)
        masked.setdefault(row["domain"], []).extend(num_masked)

    for domain, counts in written.counts["domains"].items():
        found, numbers = counts["effective_negatives"], sorted(masked[domain], reverse=True)
        assert found["queries"] == len(numbers) == B * len(rows[domain])
        assert found["mean"] == pytest.approx(B - 1 - np.mean(numbers), abs=1e-4)
        assert found["q05"] == B - 1 - numbers[math.ceil(len(numbers) / 20) - 1]
        assert found["without"] == numbers.count(B - 1)
        top = sum(numbers[: math.ceil(len(numbers) / 10)])
        assert found["concentration"] == pytest.approx(top / sum(numbers), abs=1e-4)
        certain = sum(row["same_answer_rate"] for row in rows[domain]) / sum(row["mask_rate"] for row in rows[domain])
        assert found["same_answer_share"] == pytest.approx(certain, abs=1e-4)
        assert found["likely_share"] == pytest.approx(1 - certain, abs=1e-4) and found["query_text_share"] == 0
        mostly = [row for row in rows[domain] if row["queries_with_few_negatives"] > B / 2]
        assert found["mostly_masked_batches"] == len(mostly)
    assert written.index["queries_with_few_negatives"].max() > 0


def test_documents_that_are_the_text_of_a_query_are_a_reason_of_their_own(tmp_path: Path) -> None:
    """They are not counted as likely, nor if they are certain answers besides."""
    pairs = [("query 1", "document 1"), ("query 2", "Query  1"), ("query 3", "query 3"), ("query 3", "document 4")]
    pairs += [(f"plain {i}", f"text {i}") for i in range(4)]
    packing = {"d": [[("d", i) for i in range(B)], [("d", i) for i in range(B, 2 * B)]]}
    shards = write_corpus(tmp_path, {"d": Domain(pairs=pairs)}, [packing], max_likely=0.0)

    # Slot 1 has the text of query 0; slots 2 and 3 answer one query, and slot 2 is also its text.
    assert shards.frame["equivalent_slots"].to_list()[:B] == [[1], [], [3], [2]]
    found = shards.counts["domains"]["d"]["effective_negatives"]
    shares = [found[f"{reason}_share"] for reason in ("same_answer", "query_text", "likely")]
    assert shares == pytest.approx([2 / 3, 1 / 3, 0.0], abs=1e-4)


def test_negatives_serve_their_query_and_are_not_answers(written: Written) -> None:
    counts = Counter[str]()
    for row in written.frame.iter_rows(named=True):
        domain = DOMAINS[row["domain"]]
        expected = []
        for negative in domain.negatives[row["pair_id"]] if domain.negatives else []:
            if negative == NO_VECTOR:  # it may be an answer
                counts["removed_no_vector"] += 1
            elif (row["query"], negative) in domain.pairs:
                counts["removed_known"] += 1
            elif score(row["query"], negative) >= max(score(row["query"], row["document"]), FLOORS[row["domain"]]):
                counts["removed_equivalent"] += 1
            else:
                counts["kept"] += 1
                expected.append(negative)
        assert row["negatives"] == expected
    assert len(counts) == 4 and min(counts.values()) > 10
    assert {f"negatives_{name}": count for name, count in counts.items()}.items() <= written.counts.items()


def test_a_larger_margin_masks_more(tmp_path: Path) -> None:
    def masked(margin: float) -> Written:
        packings = [{"plain": PACKINGS[0]["plain"]}]
        return write_corpus(tmp_path / str(margin), {"plain": PLAIN}, packings, margin=margin, floor_quantile=0.0)

    domains = [masked(margin).counts["domains"]["plain"] for margin in (0.0, 0.2, 2.0)]
    assert domains[0]["mask_rate"] < domains[1]["mask_rate"] < domains[2]["mask_rate"] == 1.0
    assert domains[2]["masked_share"] is None and domains[2]["masked_hardness"] is None
    assert masked(3.0).index["masked_hardness"].null_count() == 3

    # Three batches without any negative are warned of, with their number, in the data card.
    found = domains[2]["effective_negatives"]
    assert (found["mean"], found["without"], found["mostly_masked_batches"]) == (0.0, 12, 3)
    card = (tmp_path / "2.0" / "shards" / "key" / "README.md").read_text()
    assert "plain: 12 of 12 queries have no negative in their batch and teach nothing" in card
    assert "plain: 3 of 3 batches are mostly masked (0% of the masks are same answers" in card


# packings


def test_each_packing_is_written_as_if_it_were_alone(written: Written, alone: list[Written]) -> None:
    """The rows and the hardness of each packing; of packing 0 even the bytes of its part files."""
    for packing, shards in enumerate(alone):
        of_packing = written.index.filter(pl.col("packing") == packing)
        first = packing * len(shards.index)
        assert of_packing["batch_id"].to_list() == list(range(first, first + len(shards.index)))
        found = written.frame.filter(pl.col("batch_id").is_in(of_packing["batch_id"].to_list()))
        assert found.with_columns(pl.col("batch_id") - first).equals(shards.frame)
        names = ["domain", "row_group", "hardness", "masked_hardness", "mask_rate", "surrogate_loss"]
        assert of_packing.select(names).equals(shards.index.select(names))
    parts = list((alone[0].path / "data").iterdir())
    assert len(parts) == 5
    assert all((written.path / "data" / path.name).read_bytes() == path.read_bytes() for path in parts)
    assert written.counts["negatives_kept"] == sum(shards.counts["negatives_kept"] for shards in alone)


def test_domains_are_opened_once_and_each_packing_is_read_alone(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, read, open_domain, read_packing = [], [], write.OpenDomain, write.read_packing

    def record_domain(name: str, *arguments: Any) -> Any:
        opened.append(name)
        return open_domain(name, *arguments)

    def record_packing(path: Path, domain: str, number: int, batch_size: int) -> Any:
        packing = read_packing(path, domain, number, batch_size)
        read.append((domain, number, len(packing.pair_id_MB)))
        return packing

    monkeypatch.setattr(write, "OpenDomain", record_domain)
    monkeypatch.setattr(write, "read_packing", record_packing)
    run_write(replace(written.step, path=tmp_path / "again"))
    assert read == [(domain, p, len(PACKINGS[p][domain])) for p in (0, 1) for domain in ORDER]
    assert opened == ["repeats", "plain", "repeats"] * 2  # one at a time, and both for mixed batches
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (written.path / "manifest.json").read_bytes()


# summary


def test_the_data_card_shows_datasets_and_packings(written: Written, alone: list[Written]) -> None:
    assert verify_artifact(written.path) == []
    card = (written.path / "README.md").read_text()
    assert "| repeats | 42 | 10 | CC0-1.0 |" in card and "| plain | 14 | 3 | not stated |" in card
    assert f"batches of {B} pairs" in card and "`negatives`" in card
    assert "2 packings" in card and "| batches of each packing |" in card and "| shared batch-mates |" in card
    of_one = (alone[0].path / "README.md").read_text()
    assert "packings" not in of_one and "| batches |" in of_one

    counts = written.counts["domains"]["plain"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("|")]
    start = next(i for i, row in enumerate(rows) if row[:2] == ["plain", "all"])
    assert [row[:3] for row in rows[start : start + 3]] == [
        ["plain", "all", f"{counts['hardness']:.3f}"],
        *(["", str(packing), f"{part['hardness']:.3f}"] for packing, part in enumerate(counts["by_packing"])),
    ]


def test_no_full_batch_is_refused_and_nothing_is_complete(
    run_corpus: Callable[..., Plan], small_manifest: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no domain fills a batch of 64 pairs") as caught:
        run_corpus(small_manifest.read_text(), overrides=["pack.batch_size=64"])
    assert "numbers 48" in str(caught.value) and "lower pack.batch_size" in str(caught.value)
    assert caught.value.exit_code == 3
    assert not list((tmp_path / "workspace" / "small" / "shards").glob("*/manifest.json"))


def test_the_text_of_a_query_is_no_negative_of_it(tmp_path: Path) -> None:
    """Neither in the batch nor among its hard negatives. It does not become a positive either."""
    pairs = [(f"question {i}", f"answer {i}") for i in range(6)] + [("another one", "Question  1")]
    domain = Domain(pairs=pairs, negatives=[[], ["question 1", "unlike all"], *[[]] * 5])
    batches = [[("d", pair) for pair in (6, 1, 2, 3)]]
    shards = write_corpus(tmp_path, {"d": domain}, [{"d": batches}], max_likely=0.0, floor_quantile=0.99)
    assert shards.frame["equivalent_slots"].to_list() == [[], [0], [], []]
    assert shards.frame["positive_slots"].to_list() == [[]] * 4
    assert "question 1" not in shards.frame["negatives"].to_list()[1]
