"""The whole pipeline, checked from outside: `check_shards.py` recounts and remasks shards from their sources."""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl
import pytest

from hardbatch.pipeline.run import run_corpus
from hardbatch.trainer.shards import open_shards
from tests.check_shards import check
from tests.samples import LEXICAL

SETTINGS = f'{LEXICAL}[pack]\nbatch_size = 16\nremainder = "mix"\n'


def make_shards(folder: Path, datasets: str, data_root: Path, *overrides: str) -> Path:
    manifest = folder / "manifest.toml"
    manifest.write_text(f'corpus = "checked"\n{SETTINGS}{datasets}')
    return run_corpus(manifest, workspace=folder / "workspace", data_root=data_root, overrides=overrides)


@pytest.fixture
def repeating(tmp_path: Path) -> Path:
    """Two domains of pairs in which queries and documents repeat, with rows that ingest must refuse."""
    for name in ("one", "two"):
        rows = [(f"{name} question {i % 150}", f"{name} answer {i % 170} about topic {i % 9}") for i in range(300)]
        table = pl.DataFrame(rows + rows[:5] + [("", "x"), ("same", "same")], ["query", "document"], orient="row")
        table.write_parquet(tmp_path / f"{name}.parquet")
    return tmp_path


def test_shards_of_repeating_texts(repeating: Path) -> None:
    datasets = "".join(
        f'[[dataset]]\nname = "{name}"\nsource = "{name}.parquet"\nholdout = {holdout}\n'
        for name, holdout in (("one", 0.1), ("two", 0.0))
    )
    figures = check(make_shards(repeating, datasets, repeating), repeating)
    assert figures["one"]["rows"] == figures["two"]["rows"] == 307
    assert figures["one"]["quarantined"] == figures["two"]["quarantined"] == 7
    assert figures["two"]["held_out"] == 0
    assert min(figure["mask_rate"] for figure in figures.values()) > 0


@pytest.fixture
def several(repeating: Path) -> Path:
    """Shards of three packings of both domains, remainders mixed."""
    datasets = "".join(f'[[dataset]]\nname = "{name}"\nsource = "{name}.parquet"\n' for name in ("one", "two"))
    return make_shards(repeating, datasets, repeating, "pack.num_packings=3")


def test_every_packing_holds_every_pair_or_counts_it_as_leftover(several: Path, repeating: Path) -> None:
    for packing in range(3):
        figures = check(several, repeating, packing)
        assert figures["one"]["rows"] == figures["two"]["rows"] == 307
        assert all(figure["mask_rate"] > 0 for figure in figures.values())


def test_the_trainer_reads_packing_e_mod_the_number_of_packings_in_epoch_e(several: Path) -> None:
    shards = open_shards(several)
    order = shards.order(seed=3)
    assert (order.num_packings, order.epoch_length) == (3, shards.num_batches // 3)
    packing_of = dict(pl.read_parquet(several / "index.parquet").select("batch_id", "packing").iter_rows())
    queries = []
    for epoch in range(4):
        positions = range(epoch * order.epoch_length, (epoch + 1) * order.epoch_length)
        batches = [shards.read_batch(order.batch_at(position), position) for position in positions]
        assert {packing_of[batch.batch_id] for batch in batches} == {epoch % 3}
        assert len({batch.batch_id for batch in batches}) == order.epoch_length
        queries.append({tuple(batch.queries) for batch in batches})
    assert queries[0] == queries[3]
    assert queries[0] != queries[1] != queries[2] != queries[0]


def test_the_check_finds_a_wrong_mask(repeating: Path) -> None:
    shards = make_shards(repeating, '[[dataset]]\nname = "one"\nsource = "one.parquet"\n', repeating)
    part = shards / "data" / "part-00000.parquet"
    rows = pl.read_parquet(part)
    nothing = pl.Series([[]] * len(rows), dtype=pl.List(pl.UInt16))
    rows.with_columns(equivalent_slots=nothing).write_parquet(part)
    with pytest.raises(AssertionError, match="masked wrongly"):
        check(shards, repeating)


def test_shards_of_real_pairs(tmp_path: Path) -> None:
    if "HARDBATCH_DATA" not in os.environ:
        pytest.skip("HARDBATCH_DATA is unset: it names a folder of real pairs, train/<domain>.parquet")
    domains = ("medical", "stackexchange", "intents_clinc")
    datasets = "".join(
        f'[[dataset]]\nname = "{name}"\nsource = "train/{name}.parquet"\nlimit = 700\n' for name in domains
    )
    data = Path(os.environ["HARDBATCH_DATA"])
    figures = check(make_shards(tmp_path, datasets, data), data)
    assert all(figure["rows"] == 700 for figure in figures.values())
    assert all(figure["mask_rate"] > 0 for figure in figures.values() if figure["repeated_texts"])
