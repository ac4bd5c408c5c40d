"""stages.warnings: what goes wrong without an error is named with its number, and a sound corpus has no warning."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from hardbatch.pipeline.errors import InputError
from hardbatch.pipeline.run import run_corpus as run_with_log
from hardbatch.pipeline.stages import warnings
from hardbatch.pipeline.stages.warnings import reasons_text
from hardbatch.pipeline.views.log import log_text
from hardbatch.pipeline.views.report import batches_text, summary_markdown, summary_text
from tests.models import require_minilm
from tests.samples import LEXICAL, WORDS

Row = Mapping[str, Any]
Warn = Callable[..., list[str]]


def make_pair(number: int, **columns: Any) -> dict[str, Any]:
    """A pair of words that share some, as in a sound corpus; `number` draws them."""
    size = len(WORDS)
    words = [WORDS[(number * step + step) % size] for step in (1, 3, 5, 7, 11)]
    return {
        "query": f"{words[0]} {words[1]} near {words[2]} {number}",
        "document": f"The {words[1]} of {words[2]} is {words[3]} {words[4]}, part {number}.",
        **columns,
    }


@pytest.fixture
def warn(tmp_path: Path, run_corpus: Callable[..., Any], write_jsonl: Callable[..., Path]) -> Warn:
    """`warn(rows, *lines)`: the warnings of a run over one dataset `d` of these rows, or over files by name."""

    def warn(rows: Iterable[Row] | Mapping[str, Iterable[Row]], *lines: str, embed: str = LEXICAL) -> list[str]:
        files = rows if isinstance(rows, Mapping) else {"d.jsonl": rows}
        for name, content in files.items():
            write_jsonl(name, content)
        source = json.dumps(list(files))
        text = "\n".join(['corpus = "c"', "[[dataset]]", 'name = "d"', f"source = {source}", *lines, ""])
        plan = run_corpus(f"{text}[pack]\nbatch_size = 4\n[ingest]\nmax_quarantined_fraction = 1.0\n{embed}")
        found = [line for line in summary_text(plan.shards).splitlines() if line.startswith("warning")]
        for others in (summary_markdown(plan.shards), (plan.shards / "README.md").read_text()):
            assert all(line in others for line in found)
        return [line.removeprefix("warning: d: ") for line in found if "negative in their batch" not in line]

    return warn


def test_a_sound_corpus_has_no_warning(warn: Warn) -> None:
    rows = [make_pair(i, bad=[make_pair(i + 50)["document"]]) for i in range(40)]
    assert warn(rows, 'columns.negatives = "bad"', "limit = 30", "holdout = 0.1") == []


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (["one \0", "two \0"], "none of 80 hard negatives of column 'bad' can be used (nul_character 80)"),
        ([], "no row has a hard negative in column 'bad'"),
        ([None, ""], "no row has a hard negative in column 'bad'"),
        (
            ["one \0", 3, "a good one"],
            "only 40 of 120 hard negatives of column 'bad' can be used (nul_character 40, wr",
        ),
        ([3, "a good one", "another one"], None),
    ],
)
def test_lost_hard_negatives(warn: Warn, bad: list[Any], expected: str | None) -> None:
    found = warn([make_pair(i, bad=bad) for i in range(40)], 'columns.negatives = "bad"')
    assert [line[: len(expected or "")] for line in found] == ([expected] if expected else [])


def test_hard_negatives_that_are_answers(warn: Warn) -> None:
    """Each has the document of its row once more, in capitals."""
    rows = [make_pair(i, bad=[make_pair(i)["document"].upper()]) for i in range(40)]
    (line,) = warn(rows, 'columns.negatives = "bad"')
    assert line == "40 of 40 hard negatives are left out of the shards (40 same answers)"


def test_one_row_for_each_negative_is_as_it_should_be(warn: Warn, tmp_path: Path) -> None:
    rows = [make_pair(i, bad=f"{WORDS[j]} only {i}") for i in range(20) for j in range(3)]
    assert warn(rows, 'columns.negatives = "bad"') == []
    shards = next((tmp_path / "workspace" / "c" / "shards").glob("*"))
    assert "; 40 come from rows that repeat a pair" in summary_text(shards)
    assert "d: quarantined: duplicate_pair 40" in summary_text(shards)


def test_most_rows_in_quarantine(warn: Warn) -> None:
    rows = [*(make_pair(i) for i in range(20)), *[make_pair(0)] * 15, *[{"query": "", "document": "x"}] * 10]
    assert warn(rows) == ["25 of 45 rows are in quarantine (duplicate_pair 15, empty 10)"]


def test_texts_that_look_like_ids(warn: Warn) -> None:
    rows = [make_pair(i) | {"query": f"MED-{i * 37 % 41}"} for i in range(39)]
    (line,) = warn([*rows, make_pair(90), *rows[:2]])  # the duplicates are rows that have been looked at too
    assert line.startswith("41 of 42 queries look like ids, not texts; map columns.query to")


def test_files_that_gave_no_pair(warn: Warn) -> None:
    rows = [make_pair(i) for i in range(20)]
    files = {"a.jsonl": rows, "b.jsonl": rows[:5], "c.jsonl": [{"query": "x", "document": "x"}]}
    assert warn(files) == [
        "2 of 3 files gave no pair: b.jsonl, c.jsonl; they have no rows, or all of them are in quarantine"
    ]


def test_modules_without_docstrings_are_as_they_should_be() -> None:
    def lines(num_without: int, name: str) -> list[str]:
        counts = {"files": 73, "files_read": 73, "files_without_pairs": num_without, "such_files": [name]}
        return list(warnings._files(counts))

    assert lines(3, "python:numpy/x.py") == []
    assert lines(4, "python:numpy/x.py")[0].startswith("4 of 73 files gave no pair: python:numpy/x.py, ...; they")
    assert lines(1, "x.jsonl")[0].startswith("1 of 73 files gave no pair: x.jsonl; they")


def test_a_limit_that_reads_what_represents_nothing(warn: Warn) -> None:
    rows = sorted((make_pair(i) for i in range(40)), key=lambda row: row["document"])
    found = warn({"a.jsonl": rows, "b.jsonl": [make_pair(i) for i in range(50, 60)]}, "limit = 30")
    assert found[0] == "limit = 30 was reached in file 1 of 2; the others were not read"
    assert found[1].startswith("limit = 30 reads the first rows of a source that is sorted or grouped by document")
    assert len(found) == 2


def test_texts_that_the_model_cuts(warn: Warn) -> None:
    require_minilm()
    rows = [make_pair(i) for i in range(40)]
    for row in rows[:10]:
        row["document"] += " and more of it" * 10
    (line,) = warn(rows, embed="[embed]\nmax_length_tokens = 32\n")
    assert line.startswith("warning: embed.model 'minilm' reads 32 tokens of a text and cuts documents of d (25%); cl")
    assert warn(rows, embed="[embed]\nmax_length_tokens = 128\n") == []


def test_pairs_without_a_vector(warn: Warn) -> None:
    wordless = [{"query": "?" * i, "document": "!" * i} for i in range(1, 6)]
    (line,) = warn([*wordless, *(make_pair(i) for i in range(15))])
    assert line.startswith(
        "only 15 of 20 pairs can be used, as texts have no vector (embed.model 'lexical': zero_vector 10)"
    )
    with pytest.raises(InputError, match=r"came through: d 5\); 5 of these cannot be used.*zero_vector 10") as caught:
        warn(wordless)
    assert "pack.batch_size" not in str(caught.value)


def test_what_is_held_out(run_corpus: Callable[..., Any], write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    """Texts of one domain that occur in the other and, by case, in itself; the same lines in all places."""
    rows = [make_pair(i) for i in range(40)]
    write_jsonl(
        "a.jsonl",
        [*rows, *({**row, "query": row["query"].upper()} | {"document": f"x {i} y"} for i, row in enumerate(rows))],
    )
    write_jsonl("b.jsonl", rows)
    manifest = tmp_path / "c.toml"
    manifest.write_text(
        'corpus = "c"\n[[dataset]]\nname = "a"\nsource = "a.jsonl"\nholdout = 0.1\n'
        f'[[dataset]]\nname = "b"\nsource = "b.jsonl"\n[pack]\nbatch_size = 4\n{LEXICAL}'
    )
    shards = run_with_log(manifest, workspace=tmp_path / "workspace")
    expected = [
        "warning: a: 8 pairs have a near-copy of a held-out text and are in quarantine (held_out_copy)",
        "warning: b: 8 of 40 pairs have a text that another domain holds out, or a near-copy of it, and are in",
    ]
    for text in (summary_text(shards), batches_text(shards), log_text(tmp_path / "workspace")):
        lines = [line for line in text.splitlines() if "held" in line and line.startswith("warning")]
        assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
    assert "b: left over: held_out_elsewhere 8" in summary_text(shards)


def test_a_cut_text_is_counted_and_many_are_warned_of(warn: Warn, tmp_path: Path) -> None:
    long = " again" * 7_000
    rows = [make_pair(i) for i in range(40)]
    rows[7]["document"] += long
    assert warn(rows) == []
    shards = next((tmp_path / "workspace" / "c" / "shards").glob("*"))
    assert "d: cut: at ingest.max_characters 1" in summary_text(shards)
    (line,) = warn([row | {"query": row["query"] + long} for row in rows[:3]] + rows[10:])
    assert line.startswith("3 texts are cut at ingest.max_characters; raise it")


def test_one_copy_of_many_held_out_texts_is_counted(
    run_corpus: Callable[..., Any], write_jsonl: Callable[..., Path]
) -> None:
    write_jsonl("a.jsonl", [make_pair(i) for i in range(120)])
    write_jsonl("b.jsonl", [make_pair(i) for i in range(200, 240)])
    text = "".join(f'[[dataset]]\nname = "{name}"\nsource = "{name}.jsonl"\nholdout = 0.3\n' for name in "ab")
    text = f'corpus = "c"\n{text}[pack]\nbatch_size = 4\n{LEXICAL}'
    plan = run_corpus(text)
    held_out = pl.read_parquet(next(step.path for step in plan.steps if step.domain == "a") / "holdout/queries.parquet")
    copy = {"query": held_out["text"][0], "document": "somewhere else"}
    write_jsonl("b.jsonl", [*(make_pair(i) for i in range(200, 240)), copy])
    shown = summary_text(run_corpus(text, overrides=["dataset.b.holdout=0"]).shards)
    assert "b: left over: held_out_elsewhere 1" in shown and "warning: b" not in shown


def test_reasons_come_with_the_largest_first() -> None:
    assert reasons_text({"b": 1, "a": 1, "c": 2_000, "d": 0}) == "c 2,000, a 1, b 1"
