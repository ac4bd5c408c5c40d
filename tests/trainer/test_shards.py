"""trainer.shards, trainer.index: what is checked before step 1, what as a batch is read, and what a batch holds.

tests/reliability/test_shard_damage.py damages every kind of file.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hardbatch.pipeline.artifacts.artifact import MANIFEST
from hardbatch.pipeline.errors import ConfigError, IntegrityError
from hardbatch.pipeline.run import plan_corpus, run_step
from hardbatch.trainer.shards import Shards, open_shards
from tests.samples import LEXICAL, make_rows
from tests.trainer.shard_formats import make_version_1, rewrite_index, write_positive_slots

B = 4
MANIFEST_TEXT = """
corpus = "three"
[[dataset]]
name = "plain"
source = "plain.jsonl"
query_prompt = "search_query: "
document_prompt = "search_document: "
weight = 1.5
[[dataset]]
name = "hard"
source = "hard.jsonl"
columns = { negatives = "negatives" }
[[dataset]]
name = "few"
source = "few.jsonl"
[pack]
batch_size = 4
remainder = "mix"
[write]
batches_per_part = 3
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of the corpus, its shards): three domains and a mixed one, hard negatives, several parts. Read only."""
    folder = tmp_path_factory.mktemp("three")
    hard = [{**row, "negatives": [f"no {i}", f"nor {i}"][: i % 3]} for i, row in enumerate(make_rows(22, start=100))]
    for name, rows in {"plain": make_rows(42), "hard": hard, "few": make_rows(3, start=200)}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "three.toml").write_text(MANIFEST_TEXT + LEXICAL)
    plan = plan_corpus(folder / "three.toml", folder / "workspace")
    for step in plan.steps:
        run_step(step)
    return folder, plan.shards


@pytest.fixture
def shards(corpus: tuple[Path, Path], tmp_path: Path) -> Path:
    """The shards, copied, to be changed."""
    return shutil.copytree(corpus[1], tmp_path / "shards" / corpus[1].name)


@pytest.fixture(scope="module")
def opened(corpus: tuple[Path, Path]) -> Shards:
    return open_shards(corpus[1])


def flip(path: Path, place: int, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_what_the_shards_are(opened: Shards, corpus: tuple[Path, Path]) -> None:
    assert (opened.path, opened.key, opened.batch_size) == (corpus[1], corpus[1].name, B)
    assert opened.num_batches == 10 + 5 + 1
    assert opened.domains == ("hard", "mixed", "plain")
    assert opened.prompts["plain"] == ("search_query: ", "search_document: ")
    assert opened.weights == {"plain": 1.5, "hard": 1.0}
    assert opened.with_negatives
    assert len(opened.index.files) == 7


def test_the_order_takes_the_weights_of_the_shards_and_of_the_caller(opened: Shards) -> None:
    assert opened.order().epoch_length == 15 + 5 + 1
    assert opened.order(weights={"plain": 0.5, "mixed": 0}).epoch_length == 5 + 5
    with pytest.raises(ConfigError, match="no such domain"):
        opened.order(weights={"few": 1.0})  # has no batch of its own


def test_a_batch_holds_what_the_files_hold(opened: Shards, corpus: tuple[Path, Path]) -> None:
    frame = pl.read_parquet(corpus[1] / "data" / "*.parquet")
    index = pl.read_parquet(corpus[1] / "index.parquet")
    for row, described in enumerate(index.iter_rows(named=True)):
        rows = frame.filter(pl.col("batch_id") == described["batch_id"]).sort("slot")
        batch = opened.read_batch(row, position=40 + row)
        assert (batch.position, batch.batch_id, batch.domain) == (40 + row, described["batch_id"], described["domain"])
        assert batch.queries == rows["query"].to_list()
        assert batch.documents == rows["document"].to_list()
        assert batch.query_prompts == rows["query_prompt"].to_list()
        assert batch.document_prompts == rows["document_prompt"].to_list()
        assert batch.negatives == rows["negatives"].to_list()
        equivalent = rows["equivalent_slots"].to_list()
        assert batch.equivalent_BB.tolist() == [[j in slots for j in range(B)] for slots in equivalent]
    assert set(index["domain"]) == {"plain", "hard", "mixed"}


def test_shards_without_negatives_give_none(finished_run: tuple[Path, Path, Path]) -> None:
    shards = open_shards(str(finished_run[2]))
    assert not shards.with_negatives
    assert all(shards.read_batch(row, 0).negatives is None for row in range(shards.num_batches))


# folders that are no shards


def test_other_folders_are_told_apart(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    folder, shards = corpus
    workspace = folder / "workspace"
    pairs = next((workspace / "three" / "pairs" / "plain").iterdir())
    for given, message in {
        tmp_path / "nowhere": "no such folder",
        tmp_path: r"holds no shards; give the folder .*/shards/KEY",
        folder / "three.toml": "is a file",
        shards / "data": f"give the folder above: {shards}$",
        shards.parent: f"give this folder in it: {shards}$",
        shards.parent.parent: f"give this folder in it: {shards}$",
        workspace: f"give this folder in it: {shards}$",
        pairs: "holds pairs, not shards",
    }.items():
        with pytest.raises(ConfigError, match=message) as caught:
            open_shards(given)
        assert str(caught.value).startswith(str(given)) and "\n" not in str(caught.value)


def test_of_many_keys_a_few_are_named(shards: Path) -> None:
    for number in range(4):
        shutil.copytree(shards, shards.with_name(f"copy{number}"))
    with pytest.raises(ConfigError, match=r"one of these folders in it: [^,]*, [^,]*, [^,]*, \.\.\.$"):
        open_shards(shards.parent)


def test_incomplete_shards_are_refused(shards: Path) -> None:
    (shards / MANIFEST).unlink()
    with pytest.raises(IntegrityError, match="not complete; run the pipeline again"):
        open_shards(shards)


# damage


RENAMED = pl.col("file").replace


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (lambda index, name=name: index.with_columns(RENAMED("data/part-00000.parquet", name)), "differ on ")
            for name in ("../outside.parquet", "/etc/passwd", "data/part-99999.parquet")
        ),
        (
            lambda index: index.filter(pl.col("file") != "data/part-00003.parquet"),
            r"differ on data/part-00003\.parquet",
        ),
        (lambda index: index.drop("record_length"), r"index\.parquet: has no column record_length"),
    ],
    ids=["outside", "absolute", "missing", "incomplete", "without a column"],
)
def test_an_index_of_other_files_or_columns_is_refused(
    shards: Path, change: Callable[[pl.DataFrame], pl.DataFrame], message: str
) -> None:
    rewrite_index(shards, change(pl.read_parquet(shards / "index.parquet")))
    with pytest.raises(IntegrityError, match=message):
        open_shards(shards)


@pytest.mark.parametrize("fault", ["gone", "cut", "swapped"])
def test_damage_after_opening_is_found_as_a_batch_is_read(shards: Path, fault: str) -> None:
    opened = open_shards(shards)
    path = shards / "data" / "part-00000.parquet"
    if fault == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:200] if fault == "cut" else (shards / opened.index.files[1]).read_bytes())
    what = r"cannot be read: No such file or directory; delete" if fault == "gone" else "is not what was written"
    with pytest.raises(IntegrityError, match=rf"{re.escape(str(path))}: batch 0 \(row group 0\) {what}"):
        opened.read_batch(0, 0)


def test_a_row_group_of_another_batch_is_refused(shards: Path) -> None:
    """The bytes are those of the index, but the index is wrong about whose they are."""
    index = pl.read_parquet(shards / "index.parquet")
    rewrite_index(shards, index.with_columns(batch_id=pl.col("batch_id").reverse()))
    opened = open_shards(shards)
    with pytest.raises(IntegrityError, match="does not hold slots 0 to 3 of that batch"):
        opened.read_batch(0, 0)
    index = index.with_columns(pl.col("record_offset", "record_length").gather([1, 0, *range(2, len(index))]))
    rewrite_index(shards, index)
    with pytest.raises(IntegrityError, match=r"part-00000\.parquet: batch 0"):
        open_shards(shards).read_batch(0, 0)


# other formats


@pytest.mark.parametrize("version", [1, 2])
def test_shards_of_earlier_formats_are_read(opened: Shards, shards: Path, version: int) -> None:
    write_positive_slots(shards, None) if version == 2 else make_version_1(shards)
    old = open_shards(shards)
    assert not old.with_positives and old.index.same_answer_rates_I is None
    for row in range(opened.num_batches):
        found, expected = vars(old.read_batch(row, 3)), vars(opened.read_batch(row, 3))
        assert np.array_equal(found.pop("equivalent_BB"), expected.pop("equivalent_BB"))
        assert found.pop("positive_BB") is None
        del expected["positive_BB"]
        assert found == expected


def test_positive_slots_of_format_3(shards: Path) -> None:
    write_positive_slots(shards, [[2], [], [0, 3], [1]])
    opened = open_shards(shards)
    assert opened.with_positives and opened.index.same_answer_rates_I is not None
    assert opened.index.same_answer_rates_I.tolist() == [4 / 12] * opened.num_batches
    for row in range(opened.num_batches):
        positive_BB = opened.read_batch(row, 0).positive_BB
        assert positive_BB is not None
        assert np.argwhere(positive_BB).tolist() == [[0, 2], [2, 0], [2, 3], [3, 1]]


@pytest.mark.parametrize("place", [0, 300, -1, -8, -40, -700])
def test_damage_in_format_1_is_found_before_step_1(shards: Path, place: int) -> None:
    make_version_1(shards)
    flip(shards / "data" / "part-00002.parquet", place)
    with pytest.raises(IntegrityError, match=r"part-00002\.parquet: is not what was written"):
        open_shards(shards)
