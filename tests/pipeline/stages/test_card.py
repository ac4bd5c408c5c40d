"""stages.card: how other people's tools find the batches. The figures in it are tested with what computes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from hardbatch.pipeline import schemas
from hardbatch.trainer.shards import Shards, open_shards
from tests.samples import make_rows

MANIFEST = """
corpus = "parts"
[[dataset]]
name = "numbers"
source = "pairs.jsonl"
[pack]
batch_size = 8
[write]
batches_per_part = 2
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Shards of 9 batches of 8 in 5 part files."""
    from hardbatch.pipeline.run import run_corpus

    folder = tmp_path_factory.mktemp("card")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(72)))
    (folder / "parts.toml").write_text(MANIFEST)
    models = {"embed.model": "lexical", "embed.surrogate_model": "lexical"}
    return open_shards(run_corpus(folder / "parts.toml", workspace=folder / "w", overrides=models))


def test_each_configuration_names_files_with_the_same_columns(shards: Shards) -> None:
    configs = {
        item["config_name"]: item["data_files"] for item in DatasetCard.load(shards.path / "README.md").data.configs
    }
    expected = {"default": schemas.SHARDS, "index": schemas.INDEX}
    assert list(configs) == list(expected)
    for name, data_files in configs.items():
        (split,) = data_files
        files = sorted(shards.path.glob(split["path"]))
        assert split["split"] == "train" and len(files) == (5 if name == "default" else 1)
        assert all(pq.read_schema(file).names == expected[name].names for file in files)


def test_the_card_follows_its_front_matter(shards: Shards) -> None:
    card = DatasetCard.load(shards.path / "README.md")
    assert card.text.lstrip().startswith("# parts: batches of 8 pairs\n")


# with `datasets`, where it is installed


def ids_of(batches: Iterable[dict[str, Any]]) -> list[int]:
    """The ids of batches, each of which must be whole and in the order of its slots."""
    found = []
    for batch in batches:
        assert list(batch["slot"]) == list(range(8)) and len(set(batch["batch_id"])) == 1
        found.append(batch["batch_id"][0])
    return found


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    module = pytest.importorskip("datasets", minversion="5.0", reason="batch(by_column=) needs datasets 5")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return module


@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset_reads_whole_batches(datasets: Any, shards: Shards, streaming: bool) -> None:
    rows = datasets.load_dataset(str(shards.path), split="train", streaming=streaming)
    assert ids_of(rows.batch(by_column="batch_id")) == list(range(9))
    index = datasets.load_dataset(str(shards.path), "index", split="train", streaming=streaming)
    assert [row["batch_id"] for row in index] == list(range(9))


@pytest.mark.parametrize("taken", [0, 1, 2, 5, 9])
def test_a_stream_of_batches_resumes_at_the_next_whole_one(datasets: Any, shards: Shards, taken: int) -> None:
    def open_stream() -> Any:
        return datasets.load_dataset(str(shards.path), split="train", streaming=True).batch(by_column="batch_id")

    stream = open_stream()
    assert ids_of(islice(iter(stream), taken)) == list(range(taken))
    state = json.loads(json.dumps(stream.state_dict()))
    again = open_stream()
    again.load_state_dict(state)
    assert ids_of(again) == list(range(taken, 9))


def test_batches_stay_whole_when_shuffled_and_shared_by_ranks(datasets: Any, shards: Shards) -> None:
    rows = datasets.load_dataset(str(shards.path), split="train", streaming=True)
    batches = rows.batch(by_column="batch_id")
    assert sorted(ids_of(batches.shuffle(seed=0, buffer_size=4))) == list(range(9))
    from datasets.distributed import split_dataset_by_node

    of_ranks = [ids_of(split_dataset_by_node(batches, rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(id_ for ids in of_ranks for id_ in ids) == list(range(9))
