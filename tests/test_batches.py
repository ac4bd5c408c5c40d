"""build_batches, pack_embeddings and false_negative_mask: what the pipeline does, in memory."""

from __future__ import annotations

import logging
import threading

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

import hardbatch
from hardbatch.trainer.stream import open_shards
from tests.models import require_minilm

SIZE = 16
FAQ = [
    ("How do I reset my password?", "Open settings, choose security, and press reset."),
    ("How do I reset my password", "Open settings, choose security, and press reset."),
    ("Where is my invoice?", "Invoices are listed below billing."),
]


def pairs(num_rows: int = 96) -> pl.DataFrame:
    """Pairs about a few topics, of which some share an answer, and rows that cannot be used."""
    rows = [(f"what is number {i} of topic {i % 7}", f"number {i - i % 3} lies in {i % 5}") for i in range(num_rows)]
    rows[10:10] = [("", "an empty query"), rows[3], (None, "no query"), ("the same", "the same"), *FAQ]
    return pl.DataFrame(rows, schema=["query", "document"], orient="row")


@pytest.mark.parametrize(("model", "group_size"), [("lexical", None), ("lexical", 16), ("minilm", 4)])
def test_it_makes_the_batches_and_masks_of_the_pipeline(tmp_path, write_manifest, model, group_size):
    if model == "minilm":
        require_minilm()
    frame = pairs()
    frame.write_parquet(tmp_path / "pairs.parquet")
    manifest = write_manifest(
        'corpus = "same"\n[[dataset]]\nname = "pairs"\nsource = "pairs.parquet"\n'
        f'[embed]\nmodel = "{model}"\nsurrogate_model = "{model}"\n'
        f"[pack]\nbatch_size = {SIZE}\nseed = 5\n"
        + (f"group_size = {group_size}\n" if group_size else "")
        + "[write]\nmargin = 0.01\n[ingest]\nmax_quarantined_fraction = 0.5\n"
    )
    shards = open_shards(hardbatch.run_corpus(manifest, workspace=tmp_path / "workspace"))

    batches = hardbatch.build_batches(frame, model=model, batch_size=SIZE, group_size=group_size, margin=0.01, seed=5)
    assert len(batches) == shards.num_batches == 6
    for number in range(len(batches)):
        written = shards.read_batch(number, 0)
        assert batches[number]["query"].to_list() == written.queries
        assert batches[number]["document"].to_list() == written.documents
        np.testing.assert_array_equal(batches.false_negatives(number), written.equivalent_BB)
        np.testing.assert_array_equal(batches.same_answers(number), written.positive_BB)
    assert any(batches.false_negatives(number).any() for number in range(len(batches)))

    index = pl.read_parquet(shards.path / "index.parquet")
    assert batches.mask_rate == pytest.approx(index["mask_rate"].mean(), abs=1e-6)
    assert batches.hardness == pytest.approx(index["hardness"].mean(), abs=1e-6)
    summary = shards.path / "manifest.json"
    share = pl.read_json(summary)["counts"][0]["domains"]["pairs"]["share"]
    assert batches.share == pytest.approx(share, abs=6e-5)  # it is given to 4 decimals


def test_every_row_is_in_one_batch_or_left_over_with_a_reason():
    frame = pairs()
    batches = hardbatch.build_batches(frame, model="lexical", batch_size=SIZE)
    assert {reason: rows.tolist() for reason, rows in batches.leftover.items() if reason != "remainder"} == {
        "empty": [10], "duplicate_pair": [11], "null": [12], "query_equals_document": [13],
    }  # fmt: skip
    found = np.concatenate([batches.indices.ravel(), *batches.leftover.values()])
    assert sorted(found.tolist()) == list(range(len(frame)))
    assert batches.indices.shape == (6, SIZE)
    assert repr(batches).startswith("Batches(6 batches of 16 pairs in groups of 8; hardness ")
    assert "1 empty, 1 duplicate_pair" in repr(batches)
    assert batches[1:3].equals(pl.concat([batches[1], batches[2]]))


def test_paraphrases_with_one_answer_are_false_negatives():
    frame = pl.DataFrame(FAQ, schema=["q", "d"], orient="row")
    batches = hardbatch.build_batches(frame, model="lexical", batch_size=3)
    order = batches.indices[0].tolist()
    first, second, other = (order.index(row) for row in range(3))
    mask = batches.same_answers(0)
    assert mask[first, second] and mask[second, first] and not mask[other].any() and not mask[first, other]


def test_all_kinds_of_datasets_give_the_same_batches():
    frame = pairs().filter(pl.col("query").is_not_null())
    expected = hardbatch.build_batches(frame, model="lexical", batch_size=SIZE).indices
    shuffled = datasets.Dataset(frame.reverse().to_arrow())
    given = [
        frame.lazy(),
        frame.to_pandas(),
        datasets.Dataset(frame.to_arrow()),
        shuffled.select(range(len(frame) - 1, -1, -1)),  # with an indices mapping
        (frame["query"].to_list(), frame["document"].to_list()),
        {"query": frame["query"].to_list(), "document": frame["document"].to_list()},
        frame.with_row_index().cast({"query": pl.Categorical}),
    ]
    for dataset in given:
        names = {"anchor_column_name": "query", "positive_column_name": "document"} if dataset is given[-1] else {}
        found = hardbatch.build_batches(dataset, model="lexical", batch_size=SIZE, **names)
        np.testing.assert_array_equal(found.indices, expected)


@pytest.mark.parametrize(
    ("dataset", "options", "error", "message"),
    [
        ("pairs.csv", {}, TypeError, "dataset is a str; give a datasets.Dataset, a polars or pandas frame"),
        ((["a"], ["b", "c"]), {}, ValueError, "two lists must be of the same length, given 1 and 2"),
        ({"train": pd.DataFrame()}, {}, ValueError, "two columns, given train"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"a": []})), {}, TypeError, r"dataset\['train'\]"),
        (pairs(), {"anchor_column_name": "question"}, ValueError, "no column 'question'; its columns are"),
        (pairs().with_row_index(), {}, ValueError, "column 'index' holds UInt32, not texts"),
        (pairs(), {"batch_size": 200}, ValueError, "99 of 103 rows can be used .*, which do not fill a batch of 200"),
        (pairs(), {"batch_size": 16, "group_size": 5}, ValueError, "^group_size: must divide pack.batch_size, 16, "),
        (pairs(), {"batch_size": 1}, ValueError, "^batch_size: input should be greater than or equal to 2, given 1$"),
        ([("a", "b")] * 9, {}, TypeError, r"dataset is a list; .* a list of pairs by tuple\(zip\(\*pairs\)\)"),
        (pairs(), {"model": 3}, TypeError, "a model is a SentenceTransformer or a name, given a int"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(dataset, options, error, message):
    with pytest.raises(error, match=message):
        hardbatch.build_batches(dataset, **{"model": "lexical", **options})


def test_what_is_not_a_text_among_texts_is_left_over():
    frame = pairs().drop_nulls()
    queries = [float("nan"), 3, *frame["query"][2:]]
    table = pd.DataFrame({"query": queries, "document": frame["document"]}, dtype=object)
    for dataset in ((queries, frame["document"]), (table["query"], table["document"]), table):
        batches = hardbatch.build_batches(dataset, model="lexical", batch_size=np.int64(SIZE))
        assert batches.leftover["null"].tolist() == [0, 1]


def test_a_useless_result_is_warned_of(caplog):
    same = [f"question {i} about the river" for i in range(64)]
    with caplog.at_level(logging.WARNING):
        batches = hardbatch.build_batches((same, ["the one answer to all"] * 64), model="lexical", batch_size=8)
    assert batches.mask_rate == 1
    assert "100 % of the slots are masked" in caplog.text
    with caplog.at_level(logging.WARNING):
        hardbatch.build_batches(pl.concat([pairs(), pairs()]), model="lexical", batch_size=SIZE)
    assert "duplicate_pair" in caplog.text and "% of the rows are in a batch" in caplog.text
    assert "hard negatives are not used" not in caplog.text
    with caplog.at_level(logging.WARNING):
        hardbatch.build_batches(pairs().with_columns(negative=pl.lit("another text")), model="lexical", batch_size=SIZE)
    assert "hard negatives are not used here (columns negative)" in caplog.text


def test_a_sentence_transformer_embeds_with_its_own_prompts():
    """A model whose query prompt changes its vectors changes the batches; a guide judges, but does not cluster."""
    require_minilm()
    from sentence_transformers import SentenceTransformer

    from tests.models import minilm_folder

    model = SentenceTransformer(str(minilm_folder()), device="cpu")
    frame = pairs()
    by_name = hardbatch.build_batches(frame, model="minilm", batch_size=SIZE)
    by_model = hardbatch.build_batches(frame, model=model, batch_size=SIZE)
    assert by_model.hardness == pytest.approx(by_name.hardness, abs=0.01)
    guided = hardbatch.build_batches(frame, model="lexical", guide=model, batch_size=SIZE)
    unguided = hardbatch.build_batches(frame, model="lexical", batch_size=SIZE)
    np.testing.assert_array_equal(guided.indices, unguided.indices)
    assert guided.floor == pytest.approx(by_model.floor, abs=1e-6) != unguided.floor
    asked = hardbatch.build_batches(frame, model=model, batch_size=SIZE, query_prompt="the weather of ")
    assert asked.hardness != by_model.hardness


def test_another_thread_may_build_batches():
    found = []
    thread = threading.Thread(
        target=lambda: found.append(hardbatch.build_batches(pairs(), model="lexical", batch_size=SIZE))
    )
    thread.start()
    thread.join()
    expected = hardbatch.build_batches(pairs(), model="lexical", batch_size=SIZE)
    np.testing.assert_array_equal(found[0].indices, expected.indices)


def test_a_dataset_in_the_order_of_batches(tmp_path):
    batches = hardbatch.build_batches(pairs(), model="lexical", batch_size=SIZE)
    dataset = batches.to_dataset()
    assert dataset.column_names == ["query", "document", "label"]
    assert dataset["query"][SIZE : 2 * SIZE] == batches[1]["query"].to_list()
    assert list(dataset["label"]) == list(range(96))

    batches.save_to_disk(tmp_path / "saved")
    saved = datasets.load_from_disk(str(tmp_path / "saved")).to_polars()
    assert saved["batch_id"].to_list() == [i // SIZE for i in range(96)]
    assert saved["slot"].to_list() == [i % SIZE for i in range(96)]
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    for slot, masked in enumerate(saved["equivalent_slots"][2 * SIZE : 3 * SIZE]):
        mask[slot, masked.to_list()] = True
    np.testing.assert_array_equal(mask, batches.false_negatives(2))


def vectors(num_pairs=128, seed=0):
    """Queries and documents around 8 directions."""
    generator = np.random.default_rng(seed)
    topics = generator.standard_normal((8, 12))[np.arange(num_pairs) % 8]
    return [topics + 0.3 * generator.standard_normal((num_pairs, 12)) for _ in range(2)]


def test_embeddings_are_packed_by_likeness():
    queries, documents = vectors()
    packing = hardbatch.pack_embeddings(queries, torch.from_numpy(documents) * 7, 16, group_size=16)
    assert sorted([*packing.batches.ravel(), *packing.remainder]) == list(range(128))
    topics = packing.batches % 8
    assert np.mean(topics == topics[:, :1]) > 0.9
    random = hardbatch.pack_embeddings(queries, documents, 16, group_size=1).batches % 8
    assert np.mean(random == random[:, :1]) < 0.4
    again = hardbatch.pack_embeddings(queries, documents, 16, group_size=16, seed=1)
    assert (again.batches != packing.batches).any()


def test_pairs_of_one_answer_class_are_spread():
    queries, documents = vectors()
    classes = np.stack([np.arange(128) + 1_000, np.arange(128) % 8], axis=1)  # the documents of a topic are one answer
    packing = hardbatch.pack_embeddings(queries, documents, 16, group_size=16, answer_classes=classes)
    most = max(np.bincount(batch % 8).max() for batch in packing.batches)
    assert most == 2  # 16 pairs of a class in 8 batches


def test_embeddings_may_be_tensors_or_columns_of_lists_and_classes_strings():
    queries, documents = (side.astype(np.float32) for side in vectors())
    expected = hardbatch.pack_embeddings(queries, documents, 16).batches
    as_column = pl.Series(queries.tolist(), dtype=pl.List(pl.Float32))
    for given in (torch.tensor(queries, requires_grad=True), as_column, as_column.to_pandas()):
        np.testing.assert_array_equal(hardbatch.pack_embeddings(given, documents, 16).batches, expected)
    half = torch.tensor(queries).bfloat16()
    np.testing.assert_array_equal(
        hardbatch.pack_embeddings(half, documents, 16).batches,
        hardbatch.pack_embeddings(half.float(), documents, 16).batches,
    )

    classes = np.stack([np.arange(128), np.arange(128) % 8], axis=1)
    by_number, by_name = (
        hardbatch.pack_embeddings(queries, documents, 16, answer_classes=given).batches
        for given in (classes, [[f"{query:03}", f"{document}"] for query, document in classes])
    )
    np.testing.assert_array_equal(by_name, by_number)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, d: (q[:-1], d, 16), r"the same shape, given \(127, 12\) and \(128, 12\)"),
        (lambda q, d: (q[0], d, 16), r"query_embeddings must have a row .*, given the shape \(12,\)"),
        (lambda q, d: (q * (np.arange(128) != 5)[:, None], d, 16), "1 of 128 rows are zero or .* the first is row 5"),
        (lambda q, d: (q, d, 129), "128 pairs do not fill a batch of 129"),
        (lambda q, d: (q, d, 1), "^batch_size: input should be greater than or equal to 2, given 1$"),
        (lambda q, d: (["a text"] * 128, d, 16), "query_embeddings must have a row of D numbers .* 'a text'"),
    ],
)  # fmt: skip
def test_embeddings_that_cannot_be_packed_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        hardbatch.pack_embeddings(*change(*vectors()))
    with pytest.raises(ValueError, match="a row of 2 for each pair"):
        hardbatch.pack_embeddings(*vectors(), 16, answer_classes=np.zeros(128))


def test_the_mask_of_a_batch_by_its_definition():
    queries, documents = vectors(24)
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (queries, documents)]
    scores = unit[0] @ unit[1].T
    own = np.diag(scores)
    same = np.zeros((24, 24), dtype=bool)
    same[2, 5] = same[5, 2] = True
    expected = (scores >= own[:, None] - 0.05) & (scores >= 0.2) & ~same
    np.fill_diagonal(expected, False)
    found = hardbatch.false_negative_mask(queries, documents, same_answer=same, margin=0.05, floor=0.2, max_likely=1.0)
    np.testing.assert_array_equal(found, expected | same)

    by_median = hardbatch.false_negative_mask(queries, documents, max_likely=1.0)
    by_hand = (scores >= own[:, None]) & (scores >= np.median(own)) & ~np.eye(24, dtype=bool)
    np.testing.assert_array_equal(by_median, by_hand)
    assert hardbatch.false_negative_mask(queries, documents, margin=1, floor=-1).sum(1).max() == 6  # a quarter
    with pytest.raises(ValueError, match=r"same_answer must be 24 × 24, given the shape \(3, 3\)"):
        hardbatch.false_negative_mask(queries, documents, same_answer=same[:3, :3])
    with pytest.raises(ValueError, match="likely_rule"):
        hardbatch.false_negative_mask(queries, documents, likely_rule="both")
