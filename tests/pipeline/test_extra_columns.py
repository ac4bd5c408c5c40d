"""Extra columns from the source to the shards, their readers and their views."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hardbatch import BatchStream
from hardbatch.pipeline.artifacts.artifact import read_artifact, verify_artifact
from hardbatch.pipeline.config import load_manifest
from hardbatch.pipeline.errors import ConfigError, InputError
from hardbatch.pipeline.run import plan_corpus, run_step
from hardbatch.pipeline.stages import assemble, ingest
from tests.samples import make_rows

Row = dict[str, Any]
Run = Callable[..., Any]
SETTINGS = "[pack]\nbatch_size = 8\n"


def scored(num_rows: int, start: int = 0) -> list[Row]:
    """Pairs with a teacher's score, and three negatives with a score each; some scores are missing."""
    rows = make_rows(num_rows, start)
    for i, row in enumerate(rows, start):
        row["score"] = None if i % 5 == 0 else i / 4
        row["neg"] = [f"negative {i} {place} of another kind" for place in range(3)]
        row["neg_scores"] = [i + place / 8 for place in range(3)]
        row["lang"] = ["de", "fr"][i % 2]
    return rows


def dataset(name: str, source: str, *lines: str) -> str:
    return "\n".join([f'[[dataset]]\nname = "{name}"\nsource = "{source}"', *lines, ""])


def read(shards: Path) -> pl.DataFrame:
    assert verify_artifact(shards) == []
    return pl.scan_parquet(shards / "data" / "*.parquet").collect()


def write_source(folder: Path, format_: str, rows: list[Row]) -> str:
    path = folder / f"pairs.{format_}"
    if format_ == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif format_ == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["query", "document", "score", "lang"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    return path.name


@pytest.mark.parametrize("format_", ["jsonl", "parquet", "csv"])
def test_every_slot_has_the_values_of_its_row(tmp_path: Path, run_corpus: Run, format_: str) -> None:
    rows = scored(48)
    names = ["score", "lang"] if format_ == "csv" else ["score", "lang", "neg_scores"]
    source = write_source(tmp_path, format_, rows)
    plan = run_corpus('corpus = "c"\n' + dataset("n", source, f"extra_columns = {json.dumps(names)}") + SETTINGS)
    table = read(plan.shards)
    types = {"lang": pl.String, "neg_scores": pl.List(pl.Float64), "score": pl.Float64}
    assert {name: table.schema[name] for name in table.columns[-len(names) :]} == {n: types[n] for n in sorted(names)}
    expected = {row["query"]: [row[name] for name in names] for row in rows}
    assert len(table) == 48
    for row in table.iter_rows(named=True):
        assert [row[name] for name in names] == expected[row["query"]]


def test_scores_stay_with_their_negatives(tmp_path: Path, run_corpus: Run) -> None:
    rows = scored(48)
    for i, row in enumerate(rows):
        row["neg"][i % 3] = [None, "", row["document"], rows[(i + 1) % 48]["document"]][i % 4]
    write_source(tmp_path, "jsonl", rows)
    lines = 'columns = { negatives = "neg" }', 'extra_columns = ["neg_scores", "neg"]'
    plan = run_corpus('corpus = "c"\n' + dataset("n", "pairs.jsonl", *lines) + SETTINGS)
    table = read(plan.shards)
    assert table["negatives"].list.len().min() < 3  # some were dropped, so the lists of scores are longer
    for row in table.iter_rows(named=True):
        assert [row["neg"][place] for place in row["negative_places"]] == row["negatives"]


def test_the_margins_of_the_documentation(tmp_path: Path, write_jsonl: Callable[..., Path], run_corpus: Run) -> None:
    rows = [{**row, "pos_score": 100.0} for row in scored(48)]
    rows[4]["neg_scores"], rows[5]["neg"], rows[6]["neg"][1] = None, [], rows[6]["document"]
    write_jsonl("a.jsonl", [*rows, {**rows[7], "neg": ["a negative of another row"], "neg_scores": [-5.0]}])
    write_jsonl("b.jsonl", scored(8, 100))
    negatives = 'columns = { negatives = "neg" }'
    plan = run_corpus(
        'corpus = "c"\n'
        + dataset("a", "a.jsonl", negatives, 'extra_columns = ["pos_score", "neg_scores"]')
        + dataset("b", "b.jsonl", negatives)
        + SETTINGS
    )
    page = (Path(__file__).parents[2] / "docs" / "loaders.md").read_text()
    blocks = re.findall("```python\n(.*?)```", page, re.DOTALL)
    code = next(block for block in blocks if "negative_places" in block)
    found: dict[str, Any] = {"SHARDS": plan.shards}
    exec(code, found)  # noqa: S102 -- what a user copies from the page
    known = {
        (row["query"], text): 100.0 - score
        for row in rows
        for text, score in zip(row["neg"], row["neg_scores"] or (), strict=False)
    }
    triplets = found["triplets"]
    assert len(triplets) > 100 and "a negative of another row" not in triplets["negatives"]
    for query, _, negative, margin in triplets.iter_rows():
        assert known[query, negative] == margin


def test_of_equal_pairs_the_first_row_stays(tmp_path: Path, run_corpus: Run) -> None:
    rows = scored(24)
    again = [{**row, "score": -1.0, "neg": ["one more negative of it"]} for row in rows[:10]]
    write_source(tmp_path, "jsonl", [*rows, *again, *rows[10:12]])
    lines = 'columns = { negatives = "neg" }', 'extra_columns = ["score"]'
    plan = run_corpus('corpus = "c"\n' + dataset("n", "pairs.jsonl", *lines) + SETTINGS)
    counts = read_artifact(plan.steps[0].path).manifest.counts
    assert (counts["pairs"], counts["quarantined"], counts["extra_rows_dropped"]) == (24, {"duplicate_pair": 12}, 10)
    table = read(plan.shards)
    first = {row["query"]: row["score"] for row in rows}
    assert table["score"].to_list() == [first[query] for query in table["query"]]
    places = {row["query"]: row["negative_places"] for row in table.iter_rows(named=True)}
    assert {query: found[3:] for query, found in places.items()} == {
        row["query"]: [None] if i < 10 else [] for i, row in enumerate(rows)
    }
    card = (plan.shards / "README.md").read_text()
    assert "warning: n: 10 rows repeat a pair with other values in the extra columns" in card


def test_holdout_and_quarantine_keep_rows_and_values_together(tmp_path: Path, run_corpus: Run) -> None:
    rows = scored(60)
    rows[3]["document"], rows[7]["query"], rows[11] = None, "", dict(rows[12])
    write_source(tmp_path, "jsonl", rows)
    lines = 'extra_columns = ["score"]', "holdout = 0.2"
    text = 'corpus = "c"\n[ingest]\nmax_quarantined_fraction = 0.5\n' + dataset("n", "pairs.jsonl", *lines) + SETTINGS
    plan = run_corpus(text)
    artifact = read_artifact(plan.steps[0].path)
    counts = artifact.manifest.counts
    assert counts["rows"] == 60 == counts["pairs"] + counts["held_out"] + sum(counts["quarantined"].values())
    assert counts["held_out"] > 0
    values = pl.read_ipc(artifact.path / "extra" / "extra-00000.arrow")
    source_rows = pq.read_table(artifact.path / "pairs.parquet")["source_row"].to_pylist()
    assert values["score"].to_list() == [rows[row]["score"] for row in source_rows]


MIXED = SETTINGS + 'compose = "corpus"\ngroup_size = 2\n'


@pytest.mark.parametrize("pack", [SETTINGS, MIXED, SETTINGS + 'remainder = "mix"\n'])
def test_domains_with_other_columns_have_null_there(
    tmp_path: Path, write_jsonl: Callable[..., Path], run_corpus: Run, pack: str
) -> None:
    rows = {"a": scored(21), "b": scored(22, 100), "c": scored(23, 200)}
    for row in rows["b"]:
        row["score"] = round(row["score"] or 0)  # integers
    for name in rows:
        write_jsonl(f"{name}.jsonl", rows[name])
    plan = run_corpus(
        'corpus = "c"\n'
        + dataset("a", "a.jsonl", 'extra_columns = ["score"]')
        + dataset("b", "b.jsonl", 'extra_columns = { score = "score", language = "lang" }')
        + dataset("c", "c.jsonl")
        + pack
    )
    table = read(plan.shards)
    assert table.columns[-2:] == ["language", "score"] and table.schema["score"] == pl.Float64
    schemas = {str(pq.read_schema(path)) for path in (plan.shards / "data").iterdir()}
    assert len(schemas) == 1
    expected = {
        row["query"]: (row["lang"] if name == "b" else None, None if name == "c" else row["score"])
        for name in rows
        for row in rows[name]
    }
    assert set(table["domain"]) == {"a", "b", "c"}
    assert [(r["language"], r["score"]) for r in table.iter_rows(named=True)] == [expected[q] for q in table["query"]]


@pytest.mark.parametrize("first", ["a", "b"])
def test_two_types_of_a_name_are_refused_before_anything_is_embedded(
    tmp_path: Path, write_jsonl: Callable[..., Path], write_manifest: Callable[..., Path], first: str
) -> None:
    write_jsonl("a.jsonl", scored(16))
    write_jsonl("b.jsonl", [{**row, "score": "high"} for row in scored(16, 100)])
    text = 'corpus = "c"\n' + "".join(dataset(name, f"{name}.jsonl", 'extra_columns = ["score"]') for name in "ab")
    plan = plan_corpus(write_manifest(text), tmp_path / "workspace")
    pairs = sorted((step for step in plan.steps if step.stage == "pairs"), key=lambda step: step.domain != first)
    run_step(pairs[0])
    with pytest.raises(InputError, match=r"'score' is .* in dataset .*; give one of them another name"):
        run_step(pairs[1])
    assert all(step.stage == "pairs" for step in plan.steps[:2])

    # Once one of the two values is gone, the types agree, and the other artifact is reused.
    again = plan_corpus(
        write_manifest(text), tmp_path / "workspace", overrides=['dataset.b.extra_columns={ grade = "score" }']
    )
    for step in again.steps[:2]:
        run_step(step)


def test_a_column_without_values_is_warned_of_and_holds_text(
    tmp_path: Path, write_jsonl: Callable[..., Path], run_corpus: Run
) -> None:
    write_jsonl("a.jsonl", [{**row, "url": None, "tags": []} for row in make_rows(16)])
    plan = run_corpus('corpus = "c"\n' + dataset("a", "a.jsonl", 'extra_columns = ["url", "tags"]') + SETTINGS)
    table = read(plan.shards)
    assert (table.schema["url"], table.schema["tags"]) == (pl.String, pl.List(pl.String))
    assert table["url"].null_count() == 16 and table["tags"].to_list() == [[]] * 16
    assert "warning: a: no row has a value in the extra column 'url'" in (plan.shards / "README.md").read_text()


def test_files_blocks_and_a_kill_change_no_byte(
    tmp_path: Path, write_jsonl: Callable[..., Path], write_manifest: Callable[..., Path], monkeypatch: Any
) -> None:
    for i in range(4):
        write_jsonl(f"part-{i}.jsonl", scored(30, 30 * i))
    lines = 'columns = { negatives = "neg" }', 'extra_columns = ["score", "neg_scores", "lang"]', "holdout = 0.1"
    manifest = write_manifest('corpus = "c"\n' + dataset("a", "part-*.jsonl", *lines))

    def files_of(workspace: str) -> dict[str, str]:
        step = plan_corpus(manifest, tmp_path / workspace).steps[0]
        run_step(step)
        return {name: record.sha256 for name, record in read_artifact(step.path).manifest.files.items()}

    whole = files_of("whole")
    assert "extra/extra-00000.arrow" in whole
    for module in (assemble, ingest):
        monkeypatch.setattr(module, "STAGED_ROWS", 7)
    monkeypatch.setattr(ingest, "_UNIT_BYTES", 1)  # a unit for each file
    assert files_of("blocks") == whole

    step = plan_corpus(manifest, tmp_path / "killed").steps[0]
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "assemble", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_step(step)
    assert len(list((step.path / "staged").glob("*.parquet"))) == 8
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "read_rows", None)  # what was staged is not read again
        assert files_of("killed") == whole


def test_many_pairs_take_several_files(
    tmp_path: Path, write_jsonl: Callable[..., Path], run_corpus: Run, monkeypatch: Any
) -> None:
    monkeypatch.setattr("hardbatch.pipeline.schemas.TEXT_ROWS_PER_FILE", 10)
    monkeypatch.setattr(assemble, "STAGED_ROWS", 4)
    rows = scored(48)
    write_jsonl("a.jsonl", rows)
    plan = run_corpus('corpus = "c"\n' + dataset("a", "a.jsonl", 'extra_columns = ["score"]') + SETTINGS)
    assert len(list((plan.steps[0].path / "extra").iterdir())) == 5
    table, expected = read(plan.shards), {row["query"]: row["score"] for row in rows}
    assert table["score"].to_list() == [expected[query] for query in table["query"]]


@pytest.fixture
def carried(tmp_path: Path, write_jsonl: Callable[..., Path], run_corpus: Run) -> Path:
    """Shards with extra columns, one of them of a name with a dot."""
    write_jsonl("a.jsonl", [{**row, "meta": {"lang": row.pop("lang")}} for row in scored(24)])
    lines = 'columns = { negatives = "neg" }', 'extra_columns = ["score", "neg_scores", "meta.lang"]'
    return Path(run_corpus('corpus = "c"\n' + dataset("a", "a.jsonl", *lines) + SETTINGS).shards)


def test_a_stream_hands_them_out(carried: Path) -> None:
    table = read(carried)
    for batch in BatchStream(carried, stop=3):
        of_batch = table.filter(pl.col("batch_id") == batch.batch_id)
        assert set(batch.extra) == {"negative_places", "score", "neg_scores", "meta.lang"}
        for name, values in batch.extra.items():
            assert values == of_batch[name].to_list()


def test_a_stream_of_shards_without_them_has_none(finished_run: tuple[Path, Path, Path]) -> None:
    assert next(iter(BatchStream(finished_run[2]))).extra == {}


def test_inspect_and_the_data_card_show_them(carried: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = cli("inspect", carried, "--batch", "0")
    row = read(carried).filter(pl.col("batch_id") == 0).row(0, named=True)
    assert code == 0
    for line in (f"meta.lang: {row['meta.lang']}", f"score: {json.dumps(row['score'])}", "neg_scores: ["):
        assert f"      {line}" in out
    card = (carried / "README.md").read_text()
    assert "| `neg_scores` | extra column of the source: list of number |" in card
    assert "| `negative_places` | " in card


def test_texts_are_compressed_and_numbers_are_not(carried: Path) -> None:
    group = pq.read_metadata(carried / "data" / "part-00000.parquet").row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i).compression for i in range(group.num_columns)}
    assert columns["meta.lang"] == "ZSTD" and columns["neg_scores.list.element"] == "UNCOMPRESSED"


def test_an_override_sets_them(small_manifest: Path) -> None:
    found = load_manifest(small_manifest, ['dataset.numbers.extra_columns=["b", "a.x"]']).dataset[0]
    assert list(found.extra_columns.items()) == [("a.x", "a.x"), ("b", "b")]
    found = load_manifest(small_manifest, ["dataset.numbers.extra_columns.teacher=score"]).dataset[0]
    assert found.extra_columns == {"teacher": "score"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('["query_id"]', "the shards have a column 'query_id' of their own; .*= { source_query_id = \"query_id\" }"),
        ('["negative_places"]', "the shards have a column 'negative_places' of their own"),
        ('["a", "a"]', "names the column 'a' twice"),
        ('["neg_*"]', "'neg_\\*' cannot be the name of a column"),
        ('[""]', "'' cannot be the name of a column"),
        ("score", "give a list of columns, for example extra_columns = \\['score'\\]"),
        ("[[1]]", "extra_columns"),
        ("[0]", "extra_columns"),
    ],
)
def test_names_that_cannot_be_are_refused(small_manifest: Path, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_manifest(small_manifest, [f"dataset.numbers.extra_columns={value}"])


def test_keys_do_not_depend_on_the_order_of_the_names(
    tmp_path: Path, write_jsonl: Callable[..., Path], write_manifest: Callable[..., Path]
) -> None:
    write_jsonl("a.jsonl", scored(16))
    keys = [
        plan_corpus(
            write_manifest('corpus = "c"\n' + dataset("a", "a.jsonl", f"extra_columns = {names}")), tmp_path / "w"
        ).steps[0].key
        for names in ('["score", "lang"]', '["lang", "score"]', "[]", '["lang"]')
    ]  # fmt: skip
    assert keys[0] == keys[1] and len(set(keys)) == 3
    without = plan_corpus(write_manifest('corpus = "c"\n' + dataset("a", "a.jsonl")), tmp_path / "w").steps[0]
    assert without.key == keys[2] and "extra_columns" not in without.config
