"""stages.embed: units, resuming, rows without a vector, one artifact for two roles."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import polars as pl
import pytest

from hardbatch.pipeline.artifacts import vectors as vectors_module
from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.artifacts.vectors import Texts, load_pairs, open_vectors
from hardbatch.pipeline.models.encoders import SentenceEncoder
from hardbatch.pipeline.run import plan_corpus, run_step
from hardbatch.pipeline.schemas import SIDES
from hardbatch.pipeline.stages import embed
from tests import models

DATASET = 'corpus = "c"\n[[dataset]]\nname = "d"\nsource = "pairs.jsonl"\n[pack]\nbatch_size = 8\n'


def embedding(model, surrogate=None, **settings):
    lines = [f'model = "{model}"', f'surrogate_model = "{surrogate or model}"', 'device = "cpu"', 'dtype = "float32"']
    return "[embed]\n" + "\n".join([*lines, *(f"{name} = {value!r}" for name, value in settings.items())]) + "\n"


@pytest.fixture(scope="module")
def folder_of_gtr(tmp_path_factory):
    models.require_minilm()
    return models.save_gtr(tmp_path_factory.mktemp("models") / "tiny-gtr")


@pytest.fixture
def gtr(folder_of_gtr, tmp_path):
    """The GTR-shaped model, by its name below the data root."""
    (tmp_path / "gtr").symlink_to(folder_of_gtr)
    return "gtr"


@pytest.fixture
def poisoned(folder_of_gtr, tmp_path):
    """A model that gives NaN for every text with the word poison, by its name below the data root."""
    models.poison(folder_of_gtr, tmp_path / "poisoned", "poison")
    return "poisoned"


@pytest.fixture
def loaded(monkeypatch):
    """Names of the models that were loaded, in order."""
    names, inner = [], embed.open_encoder

    def record(spec, *arguments):
        names.append(spec.name)
        return inner(spec, *arguments)

    embed._cached_encoder.cache_clear()
    monkeypatch.setattr(embed, "open_encoder", record)
    return names


@pytest.fixture
def embed_rows(run_corpus, write_jsonl):
    """`embed_rows(rows, settings)`: embeds the texts of these pairs; returns the step."""

    def run(rows, settings):
        write_jsonl("pairs.jsonl", rows)
        (step,) = steps_of(run_corpus(DATASET + settings, stages=("pairs", "vectors")), "vectors")[:1]
        return step

    return run


def steps_of(plan, stage):
    return [step for step in plan.steps if step.stage == stage]


def all_vectors(path, side):
    files = sorted((path / "vectors").glob(f"{side}-*.npy"))
    return np.concatenate([np.load(file) for file in files])


def bytes_of(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("num_rows", [15, 16, 17, 32, 33])
def test_units_cover_every_text_once(embed_rows, rows, num_rows):
    step = embed_rows(rows(num_rows), embedding("lexical", unit_rows=16))
    artifact = read_artifact(step.path)
    sizes = [len(np.load(file)) for file in artifact.files("vectors") if file.name.startswith("queries")]
    assert sizes == [16] * (num_rows // 16) + [num_rows % 16] * (num_rows % 16 > 0)
    assert artifact.manifest.counts["queries"] == artifact.manifest.counts["documents"] == num_rows
    vectors = open_vectors(step.path)
    for side in SIDES:
        whole = all_vectors(step.path, side)
        assert whole.dtype == np.float16 and whole.shape == (num_rows, artifact.manifest.counts["dimension"])
        order = np.random.default_rng(0).permutation(num_rows)
        assert np.array_equal(getattr(vectors, side).take(order), whole[order].astype(np.float32))


def test_unit_size_changes_no_vector(embed_rows, rows, gtr):
    steps = [embed_rows(rows(50), embedding(gtr, unit_rows=unit_rows)) for unit_rows in (16, 17, 50, 8_192)]
    assert len({step.path for step in steps}) == 4
    for side in SIDES:
        assert len({all_vectors(step.path, side).tobytes() for step in steps}) == 1


def test_vectors_are_of_the_distinct_texts_in_their_order_with_their_prompts(embed_rows, rows, gtr, folder_of_gtr):
    from sentence_transformers import SentenceTransformer

    texts = [{**row, "document": "one text for many"} if i % 2 == 0 else row for i, row in enumerate(rows(20))]
    step = embed_rows(texts, embedding(gtr, query_prompt="ask: ", document_prompt="tell: ", unit_rows=16))
    assert (step.config["query_prompt"], step.config["document_prompt"]) == ("ask: ", "tell: ")
    plain = SentenceTransformer(str(folder_of_gtr), device="cpu")
    for side, prompt, num_texts in (("queries", "ask: ", 20), ("documents", "tell: ", 11)):
        distinct = Texts(read_artifact(step.inputs["pairs"]), side).take(np.arange(num_texts))
        found = all_vectors(step.path, side).astype(np.float32)
        assert len(found) == num_texts
        expected = plain.encode(distinct, prompt=prompt, normalize_embeddings=True)
        assert ((found * expected).sum(1) > 0.9995).all()  # float16


def test_only_missing_units_are_computed_again(embed_rows, rows, gtr, monkeypatch):
    step = embed_rows(rows(80), embedding(gtr, unit_rows=16))
    before = bytes_of(step.path)
    for name in ("manifest.json", "units/queries-0000001.json", "units/invalid.json"):
        (step.path / name).unlink()
    (step.path / "vectors" / "documents-0000003.npy").write_bytes(b"cut")  # its record is there, its file is not whole
    done, inner = [], embed._EmbeddingWorker.commit

    def commit(worker, unit, prepared):
        done.append(unit.name)
        inner(worker, unit, prepared)

    monkeypatch.setattr(embed._EmbeddingWorker, "commit", commit)
    assert run_step(step)
    assert done == ["queries-0000001", "documents-0000003"]
    assert bytes_of(step.path) == before


def test_no_model_is_loaded_if_all_units_are_there(embed_rows, rows, gtr, loaded):
    step = embed_rows(rows(20), embedding(gtr))
    assert loaded == ["tiny-gtr"]
    embed._cached_encoder.cache_clear()
    (step.path / "manifest.json").unlink()
    assert run_step(step)
    assert loaded == ["tiny-gtr"]


def test_nan_and_zero_vectors_leave_with_their_pairs(run_corpus, write_jsonl, rows, poisoned):
    texts = rows(40)
    texts[3]["query"] += " poison"
    texts[17]["document"] += " poison"
    texts[20]["document"] = texts[17]["document"]
    write_jsonl("pairs.jsonl", texts)
    plan = run_corpus(DATASET + embedding(poisoned, unit_rows=16))
    (step,) = steps_of(plan, "vectors")
    counts = read_artifact(step.path).manifest.counts
    assert (counts["nan_vector"], counts["zero_vector"]) == (2, 0)
    queries, documents = (
        pl.read_parquet(step.path / f"invalid-{side}.parquet").rows() for side in ("queries", "documents")
    )
    assert queries == [(3, "nan_vector")] and documents == [(17, "nan_vector")]
    assert np.isfinite(all_vectors(step.path, "queries")).all()
    (packed,) = steps_of(plan, "batches")
    left = pl.read_parquet(packed.path / "leftover.parquet")
    assert left.filter(pl.col("reason") == "invalid_vector")["pair_id"].to_list() == [3, 17, 20]
    pairs = load_pairs(read_artifact(step.inputs["pairs"]))
    assert np.flatnonzero(open_vectors(step.path).invalid_pairs(pairs)).tolist() == [3, 17, 20]
    batches = pl.read_parquet(packed.path / "batches.parquet")["pair_id"].to_list()
    assert sorted([*batches, *left["pair_id"].to_list()]) == list(range(40))
    assert not {3, 17, 20} & set(pl.read_parquet(plan.shards / "data" / "*.parquet")["pair_id"].to_list())


def test_pairs_without_a_surrogate_vector_leave_too(run_corpus, write_jsonl, rows, gtr):
    texts = rows(30)
    texts[5]["document"] = "?"  # the lexical surrogate finds no word in it, the model does
    write_jsonl("pairs.jsonl", texts)
    plan = run_corpus(DATASET + embedding(gtr, "lexical"))
    (packed,) = steps_of(plan, "batches")
    left = pl.read_parquet(packed.path / "leftover.parquet")
    assert left.filter(pl.col("reason") == "invalid_vector")["pair_id"].to_list() == [5]
    assert len(left) == 30 - 24
    (clusters,) = steps_of(plan, "clusters")
    assert 5 in pl.read_parquet(clusters.path / "clusters.parquet")["pair_id"].to_list()


def test_rows_that_come_out_nan_or_zero():
    vectors = np.eye(4, dtype=np.float32)
    vectors[1, 2] = np.nan
    vectors[2] = 0
    vectors[3, 0] = np.inf
    assert embed._invalid_rows(vectors, 100) == [(101, "nan_vector"), (102, "zero_vector"), (103, "nan_vector")]
    assert not vectors[1:].any() and vectors[0, 0] == 1


@pytest.mark.parametrize(
    ("settings", "num_artifacts"),
    [
        ({}, 1),
        ({"query_prompt": "q: ", "surrogate_query_prompt": "q: "}, 1),
        ({"surrogate_query_prompt": "q: "}, 2),
        ({"document_prompt": "d: "}, 2),
        ({"surrogate": "lexical"}, 2),
    ],
)
def test_one_artifact_serves_both_roles_where_they_agree(run_corpus, write_jsonl, rows, gtr, settings, num_artifacts):
    write_jsonl("pairs.jsonl", rows(16))
    plan = run_corpus(DATASET + embedding(gtr, **settings))
    assert len(steps_of(plan, "vectors")) == num_artifacts
    assert len(list((plan.shards.parent.parent / "vectors" / "d").iterdir())) == num_artifacts
    shards = plan.steps[-1]
    assert (shards.inputs["vectors/d"] == shards.inputs["surrogate/d"]) == (num_artifacts == 1)


def test_a_model_is_loaded_once_for_all_domains(write_jsonl, write_manifest, rows, gtr, loaded, tmp_path):
    names = ("one", "two", "three")
    for number, name in enumerate(names):
        write_jsonl(f"{name}.jsonl", rows(16, start=100 * number))
    datasets = "".join(f'[[dataset]]\nname = "{name}"\nsource = "{name}.jsonl"\n' for name in names)
    manifest = write_manifest('corpus = "c"\n' + datasets + "[pack]\nbatch_size = 8\n" + embedding(gtr, "minilm"))
    for step in plan_corpus(manifest, tmp_path / "workspace").steps:
        run_step(step)
    assert Counter(loaded) == {"tiny-gtr": 1, "minilm": 1}


def test_progress_counts_tokens_so_that_long_documents_weigh_more_than_short_queries():
    class Numbered:
        def __init__(self, length):
            self.length = length

        def take(self, rows):
            return ["x" * self.length for _ in rows]

    assert (
        embed._estimate_tokens(Numbered(20), 0, 1_000, None) == 7_000
    )  # a token has about 4 characters; 2 for the ends
    assert embed._estimate_tokens(Numbered(4_000), 0, 1_000, 48) == 48_000  # longer texts are cut at the maximum length
    assert embed._estimate_tokens(Numbered(0), 7, 8, 48) == 2


# known texts


@pytest.fixture
def encoded(monkeypatch):
    """The number of texts of each call of the encoder."""
    numbers, inner = [], SentenceEncoder.encode

    def record(encoder, tokens):
        numbers.append(len(tokens))
        return inner(encoder, tokens)

    monkeypatch.setattr(SentenceEncoder, "encode", record)
    return numbers


def test_only_new_texts_are_encoded_and_the_bytes_are_the_same(embed_rows, rows, gtr, encoded):
    settings = embedding(gtr, unit_rows=16)
    more = [*rows(20, start=500), *rows(60), {"query": "one more", "document": rows(1)[0]["document"]}]
    fresh = embed_rows(more, settings)
    expected = bytes_of(fresh.path)
    shutil.rmtree(fresh.path)

    first = embed_rows(rows(60), settings)
    encoded.clear()
    grown = embed_rows(more, settings)
    assert grown.path == fresh.path != first.path
    assert sum(encoded) == 20 + 1 + 20  # queries, documents
    assert bytes_of(grown.path) == expected


@pytest.mark.parametrize(("change", "expected"), [("prompt", 62 + 2), ("damage", 62 + 2), ("pairs", 62 + 62)])
def test_vectors_that_may_differ_are_not_reused(embed_rows, rows, gtr, encoded, change, expected):
    """Of 31 queries and documents that are embedded with a prompt and, as the surrogate, without."""
    first = embed_rows(rows(30), embedding(gtr, unit_rows=16, query_prompt="ask: "))
    if change == "damage":
        (file,) = (first.path / "vectors").glob("queries-0000001.npy")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    if change == "pairs":
        shutil.rmtree(first.inputs["pairs"])
    encoded.clear()
    prompt = "tell: " if change == "prompt" else "ask: "
    embed_rows(rows(31), embedding(gtr, unit_rows=16, query_prompt=prompt))
    assert sum(encoded) == expected


def test_texts_without_a_vector_are_encoded_again(embed_rows, poisoned, rows, encoded):
    bad = [{"query": "this is poison", "document": "fine"}]
    embed_rows([*rows(20), *bad], embedding(poisoned, unit_rows=16))
    encoded.clear()
    step = embed_rows([*bad, *rows(20)], embedding(poisoned, unit_rows=16))
    assert sum(encoded) == 1
    assert read_artifact(step.path).manifest.counts["nan_vector"] == 1


def test_texts_of_one_digest_are_told_apart(embed_rows, rows, gtr, encoded, monkeypatch):
    embed_rows(rows(20), embedding(gtr, unit_rows=16))
    encoded.clear()
    monkeypatch.setattr(vectors_module, "_digests", lambda texts: np.array([len(text) for text in texts], np.uint64))
    with_same = embed_rows(rows(25), embedding(gtr, unit_rows=16))
    assert sum(encoded) > 10
    found = [all_vectors(with_same.path, side) for side in SIDES]
    monkeypatch.undo()
    shutil.rmtree(with_same.path.parent)
    again = embed_rows(rows(25), embedding(gtr, unit_rows=16))
    assert all(np.array_equal(one, all_vectors(again.path, side)) for one, side in zip(found, SIDES, strict=True))


def test_lexical_vectors_are_not_reused(embed_rows, rows):
    """They depend on all texts of the domain."""
    embed_rows(rows(20), embedding("lexical"))
    grown = embed_rows(rows(40), embedding("lexical"))
    found = all_vectors(grown.path, "queries")
    shutil.rmtree(grown.path.parent)
    assert np.array_equal(found, all_vectors(embed_rows(rows(40), embedding("lexical")).path, "queries"))
