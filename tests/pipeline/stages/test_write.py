"""Shards of a small corpus with repeated texts and hard negatives, recomputed from the source file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hardbatch.pipeline.artifacts.artifact import read_artifact, verify_artifact
from hardbatch.pipeline.artifacts.footer import end_of_file, read_head
from hardbatch.pipeline.errors import InputError
from hardbatch.pipeline.run import run_step
from hardbatch.pipeline.schemas import INDEX, SHARDS, SHARDS_WITH_NEGATIVES
from hardbatch.pipeline.stages import write
from tests.packings import join_packings
from tests.samples import WORDS

B = 8
TOPICS = WORDS[:12]
MANIFEST = f"""
corpus = "written"
[[dataset]]
name = "repeats"
source = "repeats.jsonl"
query_prompt = "search_query: "
document_prompt = "search_document: "
licence = "CC0-1.0"
columns = {{ query = "query", document = "document", negatives = "negatives" }}
[[dataset]]
name = "plain"
source = "plain.jsonl"
[write]
batches_per_part = 3
[pack]
batch_size = {B}
"""


def make_source(num_rows=90):
    """Pairs whose documents and queries repeat, some with hard negatives of every kind."""
    generator = np.random.default_rng(0)
    found = []
    for i in range(num_rows):
        topic, other = generator.choice(TOPICS, 2, replace=False)
        query = f"where is the {topic}" if i % 3 else f"tell me about {topic} and {other}"
        document = f"the {topic} lies by the {other} {i % 20}" if i % 4 else f"all there is about {topic}"
        row = {"query": query, "document": document}
        if i % 2:
            row["negatives"] = [f"nothing of the kind {i}", " ".join(reversed(document.split())), document]
        found.append(row)
    of_query = {}
    for row in found:
        of_query.setdefault(row["query"], []).append(row["document"])
    for row in found[1::4]:
        row["negatives"].append(of_query[row["query"]][0])  # another document of the same query: a known pair
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The shards of MANIFEST: plan, frames, source rows, and the vectors of both domains by text."""
    from hardbatch.pipeline.run import plan_corpus, run_step

    root = tmp_path_factory.mktemp("written")
    sources = {
        "repeats": make_source(),
        "plain": [{"query": f"q {t} {i}", "document": f"{t} is {i}"} for i, t in enumerate(TOPICS * 2)],
    }
    for name, rows in sources.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "corpus.toml").write_text(
        MANIFEST + '[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\nunit_rows = 16\n'
    )
    plan = plan_corpus(root / "corpus.toml", root / "workspace")
    for step in plan.steps:
        run_step(step)
    steps = {(step.stage, step.domain): step for step in plan.steps}
    return SimpleNamespace(
        plan=plan,
        shards=plan.shards,
        sources=sources,
        frame=pl.read_parquet(plan.shards / "data" / "*.parquet").sort("batch_id", "slot"),
        index=pl.read_parquet(plan.shards / "index.parquet"),
        pairs={name: pl.read_parquet(steps["pairs", name].path / "pairs.parquet") for name in sources},
        vectors={name: vectors_by_text(steps["pairs", name].path, steps["vectors", name].path) for name in sources},
        batches={name: pl.read_parquet(steps["batches", name].path / "batches.parquet") for name in sources},
        counts=read_artifact(plan.shards).manifest.counts,
    )


def vectors_by_text(pairs, vectors):
    """{side: {text: float64 vector}}, read without the pipeline's readers."""
    found = {}
    for side in ("queries", "documents"):
        texts = [
            text for file in sorted((pairs / "texts").glob(f"{side}-*.arrow")) for text in pl.read_ipc(file)["text"]
        ]
        rows = np.concatenate([np.load(file) for file in sorted((vectors / "vectors").glob(f"{side}-*.npy"))])
        found[side] = dict(zip(texts, rows.astype(np.float64), strict=True))
    return found


def test_one_row_group_is_one_batch(written):
    next_batch = 0
    for path in sorted((written.shards / "data").iterdir()):
        file = pq.ParquetFile(path)
        assert 1 <= file.num_row_groups <= 3
        assert file.schema_arrow.equals(SHARDS_WITH_NEGATIVES)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            assert table["batch_id"].to_pylist() == [next_batch] * B
            assert table["slot"].to_pylist() == list(range(B))
            next_batch += 1
    assert next_batch == len(written.index) == written.counts["batches"] > 6


def test_parts_are_full_but_the_last_of_a_domain(written):
    groups = written.index.group_by("domain", "file", maintain_order=True).len()
    for domain in ("repeats", "plain"):
        sizes = groups.filter(pl.col("domain") == domain)["len"].to_list()
        assert all(size == 3 for size in sizes[:-1])
    assert groups["file"].to_list() == [f"data/part-{i:05d}.parquet" for i in range(len(groups))]


def test_polars_reads_them_as_they_are(written):
    counts = pl.scan_parquet(str(written.shards / "data" / "*.parquet")).group_by("batch_id").len().collect()
    assert set(counts["len"].to_list()) == {B}
    assert sorted(counts["batch_id"].to_list()) == list(range(written.counts["batches"]))


def test_statistics_only_where_they_help(written):
    for path in (written.shards / "data").iterdir():
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            columns = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
            assert {c.path_in_schema for c in columns if c.is_stats_set} == {"batch_id", "pair_id"}


def test_only_texts_are_compressed_and_numbers_are_packed(written):
    for path in (written.shards / "data").iterdir():
        metadata = pq.read_metadata(path)
        columns = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
        packed = {c.path_in_schema for c in columns if "DELTA_BINARY_PACKED" in c.encodings}
        assert packed == {c.path_in_schema for c in columns if c.physical_type in ("INT32", "INT64")}
        compressed = {c.path_in_schema for c in columns if c.compression == "ZSTD"}
        assert compressed == {"query", "document", "negatives.list.element"}


def test_the_record_of_each_batch_is_that_of_its_row_group(written):
    for row in written.index.iter_rows(named=True):
        path = written.shards / row["file"]
        data = path.read_bytes()
        record = data[row["record_offset"] : row["record_offset"] + row["record_length"]]
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + end_of_file(read_head(path), record)))
        table = pq.ParquetFile(path, metadata=metadata).read_row_group(0)
        assert set(table["batch_id"].to_pylist()) == {row["batch_id"]}


def test_index_has_a_row_per_batch(written):
    assert pq.read_schema(written.shards / "index.parquet").equals(INDEX)
    assert written.index["batch_id"].to_list() == list(range(written.counts["batches"]))
    for row in written.index.iter_rows(named=True):
        table = pq.ParquetFile(written.shards / row["file"]).read_row_group(row["row_group"])
        assert set(table["batch_id"].to_pylist()) == {row["batch_id"]}
        assert set(table["domain"].to_pylist()) == {row["domain"]}


def test_byte_ranges_hold_the_whole_row_group_and_nothing_else(written):
    for (name,), rows in written.index.group_by("file"):
        path = written.shards / name
        data, metadata = path.read_bytes(), pq.read_metadata(path)
        end = 4  # after the magic bytes
        for row in rows.sort("row_group").iter_rows(named=True):
            start, stop = row["byte_offset"], row["byte_offset"] + row["byte_length"]
            assert hashlib.sha256(data[start:stop]).hexdigest() == row["sha256"]
            assert start >= end
            end = stop
            group = metadata.row_group(row["row_group"])
            for i in range(group.num_columns):
                column = group.column(i)
                first = min(p for p in (column.dictionary_page_offset, column.data_page_offset) if p)
                assert start <= first and first + column.total_compressed_size <= stop
        assert end <= len(data)


def test_digests_of_the_index_cover_every_byte(written):
    for (name,), rows in written.index.group_by("file"):
        data = (written.shards / name).read_bytes()
        inside = np.zeros(len(data), dtype=bool)
        for row in rows.iter_rows(named=True):
            inside[row["byte_offset"] : row["byte_offset"] + row["byte_length"]] = True
        others = bytes(byte for byte, covered in zip(data, inside, strict=True) if not covered)
        assert others.startswith(b"PAR1") and others.endswith(b"PAR1")
        assert set(rows["footer_sha256"]) == {hashlib.sha256(others).hexdigest()}


def test_texts_are_those_of_the_source_row(written):
    assert set(written.frame["domain"]) == {"repeats", "plain"}
    for row in written.frame.iter_rows(named=True):
        pair = written.pairs[row["domain"]].row(row["pair_id"], named=True)
        source = written.sources[row["domain"]][pair["source_row"]]
        assert (row["query"], row["document"]) == (source["query"], source["document"])
        assert (row["query_id"], row["document_id"]) == (pair["query_row"], pair["document_row"])
        prompts = ("search_query: ", "search_document: ") if row["domain"] == "repeats" else ("", "")
        assert (row["query_prompt"], row["document_prompt"]) == prompts


def test_batches_are_those_that_were_packed(written):
    for domain, batches in written.batches.items():
        first = written.frame.filter(pl.col("domain") == domain)["batch_id"].min()
        packed = batches.select(pl.col("batch") + first, "slot", "pair_id", "cluster_id")
        found = written.frame.filter(pl.col("domain") == domain).select("batch_id", "slot", "pair_id", "cluster_id")
        assert found.rows() == packed.sort("batch", "slot").rows()
    assert written.frame.select("domain", "pair_id").is_unique().all()


def test_equivalent_slots_are_those_of_the_definition(written):
    num_masked = {"known": 0, "equal": 0, "surrogate": 0}
    for (domain, _), batch in written.frame.group_by("domain", "batch_id", maintain_order=True):
        known = {(row["query"], row["document"]) for row in written.sources[domain]}
        vectors = written.vectors[domain]
        queries, documents = batch["query"].to_list(), batch["document"].to_list()
        scores = np.array([[vectors["queries"][q] @ vectors["documents"][d] for d in documents] for q in queries])
        for i, slots in enumerate(batch["equivalent_slots"].to_list()):
            assert slots == sorted(set(slots)) and i not in slots
            for j in set(range(B)) - {i}:
                is_known, is_equal = (queries[i], documents[j]) in known, documents[i] == documents[j]
                gap = scores[i, j] - scores[i, i]
                num_masked["known"] += is_known
                num_masked["equal"] += is_equal
                num_masked["surrogate"] += gap > 1e-6
                if is_known or is_equal or gap > 1e-6:
                    assert j in slots
                elif gap < -1e-6:
                    assert j not in slots
    assert all(count > 0 for count in num_masked.values())


def test_figures_of_the_index(written):
    for row in written.index.iter_rows(named=True):
        batch = written.frame.filter(pl.col("batch_id") == row["batch_id"])
        vectors = written.vectors[row["domain"]]
        queries = np.array([vectors["queries"][text] for text in batch["query"]])
        documents = np.array([vectors["documents"][text] for text in batch["document"]])
        similar = (documents @ queries.T + queries @ documents.T) / 2
        slots = batch["equivalent_slots"].to_list()
        masked = np.array([[j in slots[i] for j in range(B)] for i in range(B)])
        others = ~np.eye(B, dtype=bool)
        assert row["hardness"] == pytest.approx(similar[others].mean(), abs=2e-6)
        assert row["mask_rate"] == pytest.approx(masked[others].mean(), abs=2e-6)
        if (others & ~masked).any():
            assert row["masked_hardness"] == pytest.approx(similar[others & ~masked].mean(), abs=2e-6)
        else:
            assert row["masked_hardness"] is None


def test_negatives_serve_their_query_and_are_no_answers(written):
    known = {}
    for row in written.sources["repeats"]:
        known.setdefault(row["query"], set()).add(row["document"])
    vectors = written.vectors["repeats"]
    counts = {"known": 0, "equivalent": 0, "kept": 0}
    for row in written.frame.iter_rows(named=True):
        if row["domain"] == "plain":
            assert row["negatives"] == []
            continue
        pair = written.pairs["repeats"].row(row["pair_id"], named=True)
        expected = []
        for negative in written.sources["repeats"][pair["source_row"]].get("negatives", []):
            query = vectors["queries"][row["query"]]
            if negative in known[row["query"]]:
                counts["known"] += 1
            elif query @ vectors["documents"][negative] >= query @ vectors["documents"][row["document"]]:
                counts["equivalent"] += 1
            else:
                counts["kept"] += 1
                expected.append(negative)
        assert row["negatives"] == expected
    assert counts["known"] > 10 and counts["equivalent"] > 10 and counts["kept"] > 10
    assert written.counts["negatives_removed_known"] == counts["known"]
    assert written.counts["negatives_removed_equivalent"] == counts["equivalent"]
    assert written.counts["negatives_kept"] == counts["kept"]


def test_summary_of_the_corpus(written):
    assert (written.counts["batch_size"], written.counts["packings"]) == (B, 1)
    for domain, source in written.sources.items():
        figures = written.counts["domains"][domain]
        rows = written.index.filter(pl.col("domain") == domain)
        assert figures["rows"] == len(source)
        assert figures["pairs"] == figures["batches"] * B + sum(figures["leftover"].values())
        assert figures["rows"] == figures["pairs"] + figures["held_out"] + sum(figures["quarantined"].values())
        assert figures["batches"] == len(rows)
        assert figures["hardness"] == pytest.approx(rows["hardness"].mean(), abs=1e-4)
        assert figures["mask_rate"] == pytest.approx(rows["mask_rate"].mean(), abs=1e-4)
        spread = figures["hardness_knn"] - figures["hardness_random"]
        assert figures["share"] == pytest.approx((figures["hardness"] - figures["hardness_random"]) / spread, abs=2e-3)
    assert written.counts["domains"]["repeats"]["mask_rate"] > 0


def test_data_card_and_digests(written):
    card = (written.shards / "README.md").read_text()
    assert "CC0-1.0" in card and "not stated" in card and "`negatives`" in card
    assert f"batches of {B} pairs" in card
    assert verify_artifact(written.shards) == []
    assert {path.suffix for path in (written.shards / "data").iterdir()} == {".parquet"}


def test_without_negatives_there_is_no_such_column(run_corpus, small_manifest):
    plan = run_corpus(small_manifest.read_text())
    (part,) = (plan.shards / "data").iterdir()
    assert pq.read_schema(part).equals(SHARDS)
    assert "`negatives`" not in (plan.shards / "README.md").read_text()


def test_a_larger_margin_masks_more(run_corpus, small_manifest):
    text = small_manifest.read_text()
    rates = []
    for margin in (0.0, 0.2, 2.0):
        plan = run_corpus(text, overrides=[f"write.margin={margin}"])
        rates.append(read_artifact(plan.shards).manifest.counts["domains"]["numbers"]["mask_rate"])
    assert rates[0] < rates[1] < rates[2] == 1.0
    assert read_artifact(plan.shards).manifest.counts["domains"]["numbers"]["masked_share"] is None
    index = pl.read_parquet(plan.shards / "index.parquet")
    assert index["masked_hardness"].null_count() == len(index)


def test_a_negative_without_a_vector_is_not_surely_no_answer(run_corpus, write_jsonl, rows):
    write_jsonl("pairs.jsonl", [{**row, "negatives": ["?"]} for row in rows(16)])
    plan = run_corpus(
        'corpus = "c"\n[[dataset]]\nname = "d"\nsource = "pairs.jsonl"\ncolumns = { negatives = "negatives" }\n'
        "[pack]\nbatch_size = 8\n"
    )
    shards = pl.read_parquet(plan.shards / "data" / "*.parquet")
    assert shards["negatives"].to_list() == [[]] * 16


def test_a_domain_is_opened_once_for_all_its_parts(run_corpus, small_manifest, monkeypatch):
    opened, inner = [], write._Domain

    def open_domain(inputs, name):
        opened.append(name)
        return inner(inputs, name)

    monkeypatch.setattr(write, "_Domain", open_domain)
    plan = run_corpus(small_manifest.read_text(), overrides=["write.batches_per_part=1"])
    assert len(list((plan.shards / "data").iterdir())) == 6
    assert opened == ["numbers"]


def test_a_pair_of_the_same_query_in_another_domain_is_known(run_corpus, write_jsonl):
    """In a mixed batch slot j may hold the very query of slot i: its document answers both."""
    write_jsonl("one.jsonl", [{"query": "river bank", "document": "river bank river bank"}])
    write_jsonl("two.jsonl", [{"query": "river bank", "document": "some other words altogether"}])
    plan = run_corpus(
        'corpus = "c"\n[[dataset]]\nname = "one"\nsource = "one.jsonl"\n'
        '[[dataset]]\nname = "two"\nsource = "two.jsonl"\n'
        '[pack]\nbatch_size = 2\nremainder = "mix"\n'
    )
    shards = pl.read_parquet(plan.shards / "data" / "*.parquet").sort("slot")
    assert shards["domain"].to_list() == ["one", "two"]
    assert shards["equivalent_slots"].to_list() == [[1], [0]]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Shards of two packings, both domains with a remainder that is mixed; the runs of each packing alone."""
    from hardbatch.pipeline.run import plan_corpus, run_step

    root = tmp_path_factory.mktemp("several")
    for name, rows in (("repeats", make_source()), ("plain", make_source(45)[::-1])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = root / "corpus.toml"
    manifest.write_text(MANIFEST + 'remainder = "mix"\n[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\n')
    plans = [plan_corpus(manifest, root / "workspace", overrides=[f"pack.order={o}"]) for o in ("tour", "random")]
    for plan in plans:
        for step in plan.steps:
            run_step(step)
    step = join_packings(plans)
    run_step(step)
    return SimpleNamespace(
        step=step,
        plans=plans,
        frame=pl.read_parquet(step.path / "data" / "*.parquet").sort("batch_id", "slot"),
        index=pl.read_parquet(step.path / "index.parquet"),
    )


def test_packings_come_one_after_the_other_each_with_its_domains(several):
    index = several.index
    assert index["batch_id"].to_list() == list(range(len(index)))
    assert index["packing"].to_list() == sorted(index["packing"].to_list())
    orders = [index.filter(pl.col("packing") == packing)["domain"].to_list() for packing in (0, 1)]
    assert orders[0] == orders[1] and set(orders[0]) == {"repeats", "plain", "mixed"}
    assert all(len(rows) == 1 for _, rows in index.select("file", "packing", "domain").unique().group_by("file"))
    assert sorted(path.name for path in (several.step.path / "data").iterdir()) == [
        f"part-{i:05d}.parquet" for i in range(index["file"].n_unique())
    ]


def test_each_packing_is_written_as_if_it_were_alone(several):
    """What was packed, and the figures of it; of packing 0 even the bytes of its part files."""
    for packing, plan in enumerate(several.plans):
        alone = pl.read_parquet(plan.shards / "data" / "*.parquet").sort("batch_id", "slot")
        index = pl.read_parquet(plan.shards / "index.parquet")
        of_packing = several.index.filter(pl.col("packing") == packing)
        first = of_packing["batch_id"][0]
        assert first == packing * len(index)
        found = several.frame.filter(pl.col("batch_id").is_in(of_packing["batch_id"].to_list()))
        assert found.with_columns(pl.col("batch_id") - first).equals(alone)
        figures = ["domain", "row_group", "hardness", "masked_hardness", "mask_rate", "surrogate_loss"]
        assert of_packing.select(figures).equals(index.select(figures))
    alone, together = several.plans[0].shards / "data", several.step.path / "data"
    assert all((together / path.name).read_bytes() == path.read_bytes() for path in alone.iterdir())
    assert len(list(alone.iterdir())) * 2 == len(list(together.iterdir()))


def test_the_packings_differ(several):
    for domain in ("repeats", "plain"):
        assert read_artifact(several.step.path).manifest.counts["domains"][domain]["shared_batch_mates"] < 0.9


def test_a_unit_reads_its_packing_only(several, tmp_path, monkeypatch):
    read, inner = [], write._read_batches

    def read_batches(path, packing, batch_size):
        batches, domains = inner(path, packing, batch_size)
        read.append((path.parent.name, packing, len(batches)))
        return batches, domains

    monkeypatch.setattr(write, "_read_batches", read_batches)
    run_step(replace(several.step, path=tmp_path / "again"))
    counts = read_artifact(several.step.path).manifest.counts["domains"]
    expected = [(name, p, counts[name]["batches"]) for p in (0, 1) for name in ("repeats", "plain", "mixed")]
    assert read == expected
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (several.step.path / "manifest.json").read_bytes()


def test_hard_negatives_are_counted_over_all_packings(several):
    kept = [read_artifact(plan.shards).manifest.counts["negatives_kept"] for plan in several.plans]
    assert read_artifact(several.step.path).manifest.counts["negatives_kept"] == sum(kept) > 0


def test_the_data_card_tells_of_packings(several):
    card = (several.step.path / "README.md").read_text()
    assert "2 packings" in card and "| batches of each packing |" in card and "| shared batch-mates |" in card
    alone = (several.plans[0].shards / "README.md").read_text()
    assert "packings" not in alone and "| batches |" in alone
    figures = read_artifact(several.step.path).manifest.counts["domains"]["plain"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("|")]
    place = next(i for i, row in enumerate(rows) if row[:2] == ["plain", "all"])
    assert rows[place][2] == f"{figures['hardness']:.3f}"
    assert [row[:3] for row in rows[place + 1 : place + 3]] == [
        ["", str(packing), f"{part['hardness']:.3f}"] for packing, part in enumerate(figures["by_packing"])
    ]


def test_no_full_batch_is_refused_and_nothing_is_complete(run_corpus, small_manifest, tmp_path):
    with pytest.raises(InputError, match="no domain fills a batch of 64 pairs") as caught:
        run_corpus(small_manifest.read_text(), overrides=["pack.batch_size=64"])
    assert "numbers 48" in str(caught.value) and "lower pack.batch_size" in str(caught.value)
    assert caught.value.exit_code == 3
    assert not list((tmp_path / "workspace" / "small" / "shards").glob("*/manifest.json"))


def test_a_domain_that_fills_no_batch_does_not_stop_the_others(run_corpus, write_jsonl, rows):
    write_jsonl("large.jsonl", rows(20))
    write_jsonl("small.jsonl", rows(5))
    write_jsonl("none.jsonl", [{"query": "the same", "document": "the same"}] * 9)
    datasets = "".join(f'[[dataset]]\nname = "{n}"\nsource = "{n}.jsonl"\n' for n in ("none", "small", "large"))
    plan = run_corpus('corpus = "c"\n' + datasets + "[pack]\nbatch_size = 8\n")
    counts = read_artifact(plan.shards).manifest.counts
    assert {name: figures["batches"] for name, figures in counts["domains"].items()} == {
        "none": 0,
        "small": 0,
        "large": 2,
    }
    assert counts["domains"]["small"]["leftover"] == {"remainder": 5}
    assert counts["domains"]["none"]["pairs"] == 0
    assert pl.read_parquet(plan.shards / "index.parquet")["batch_id"].to_list() == [0, 1]
