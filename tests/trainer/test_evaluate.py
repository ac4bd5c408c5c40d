"""Metrics equal those computed by hand, and several ranks equal one; order, context, bad input, the command."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from hardbatch.pipeline.errors import InputError
from hardbatch.pipeline.run import Plan
from hardbatch.trainer import embed, evaluate, shelves
from hardbatch.trainer import search as search_module
from hardbatch.trainer.batch import Tokenizer, load_tokenizer
from hardbatch.trainer.collection import Collection, load_collection, load_documents
from hardbatch.trainer.context import ContextDocuments
from hardbatch.trainer.embed import Embedder
from hardbatch.trainer.evaluate import evaluate_retrieval
from hardbatch.trainer.export import export_model
from hardbatch.trainer.held_out import HeldOutLoss, held_out_loss
from hardbatch.trainer.loss import info_nce
from hardbatch.trainer.search import search
from tests.collections import write_beir, write_mteb
from tests.models import minilm_folder
from tests.reliability import warm
from tests.samples import make_rows
from tests.trainer_models import tiny_encoder

ROOT = Path(__file__).resolve().parents[2]
CONTEXT_SIZE = 4
BM25 = {"squad_dev": 0.851, "banking77": 0.636, "covid_qa": 0.653, "code_networkx": 0.472, "pubmedqa": 0.969}  # nDCG@10
OPTIONS = {"query_prompt": "search_query: ", "document_prompt": "search_document: ", "texts_per_chunk": 3}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(minilm_folder(), max_length_tokens=32)


def make_collection(num_documents: int = 12, num_queries: int = 6) -> Collection:
    """Query i is answered by document i and, a bit, by document i + 1."""
    documents = [f"{'long ' * (row % 5)}text {row} about {row * row} things" for row in range(num_documents)]
    rows = np.arange(num_queries)
    return Collection(
        name="tiny",
        documents=documents,
        queries=[f"what is {row}" for row in rows],
        query_rows=np.concatenate([rows, rows]),
        document_rows=np.concatenate([rows, rows + 1]),
        scores=np.concatenate([np.full(num_queries, 2), np.full(num_queries, 1)]),
    )


def write_collection(folder: Path, **tables: dict[str, list[Any]]) -> Path:
    """Two documents and two queries that fit together, or what `tables` gives instead."""
    content = {
        "corpus": {"doc_id": ["a", "b"], "text": ["first", "second"], "title": ["One", ""]},
        "queries": {"query_id": ["p", "q"], "text": ["which is one", "which is two"]},
        "qrels": {"query_id": ["p", "q"], "doc_id": ["a", "b"], "score": [1, 1]},
    } | tables
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns in content.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


class TestCollection:
    def test_titles_stand_before_texts(self, tmp_path: Path) -> None:
        collection = load_collection(write_collection(tmp_path / "small"))
        assert collection.name == "small"
        assert collection.documents == ["One first", "second"]
        assert collection.queries == ["which is one", "which is two"]
        assert collection.query_rows.tolist() == collection.document_rows.tolist() == [0, 1]
        assert collection.source == f'title + " " + text of {tmp_path / "small" / "corpus.parquet"}'

    def test_titles_may_be_absent_or_null_and_ids_integers(self, tmp_path: Path) -> None:
        corpus = {"doc_id": [7, 8], "text": ["first", "second"]}
        qrels = {"query_id": ["q", "p"], "doc_id": [8, 7], "score": [3, 0]}
        collection = load_collection(write_collection(tmp_path, corpus=corpus, qrels=qrels))
        assert collection.document_rows.tolist() == [1, 0] and collection.source.startswith("text of ")
        corpus["title"] = [None, "Two"]
        assert load_collection(write_collection(tmp_path, corpus=corpus, qrels=qrels)).documents == [
            "first",
            "Two second",
        ]

    @pytest.mark.parametrize(
        ("tables", "told"),
        [
            (
                {"corpus": {"doc_id": ["a", "b"], "body": ["x", "y"]}},
                r"corpus\.parquet: no column 'text'; it has: doc_id",
            ),
            ({"corpus": {"doc_id": ["a", "a"], "text": ["x", "y"]}}, r"corpus\.parquet: doc_id 'a' is in rows 0 and 1"),
            ({"corpus": {"doc_id": ["a", None], "text": ["x", "y"]}}, r"column 'doc_id' is null in row 1"),
            ({"corpus": {"doc_id": ["a", "b"], "text": ["x", None]}}, r"column 'text' is null in row 1"),
            ({"corpus": {"doc_id": ["a", "b"], "text": [1, 2]}}, r"column 'text' is int64, expected text"),
            ({"queries": {"query_id": ["p", "p"], "text": ["x", "y"]}}, r"queries\.parquet: query_id 'p' is in rows"),
            (
                {"queries": {"query_id": pa.array([], pa.string()), "text": pa.array([], pa.string())}},
                r"queries\.parquet: it has no rows",
            ),
            (
                {"qrels": {"query_id": ["p", "z"], "doc_id": ["a", "b"], "score": [1, 1]}},
                r"qrels\.parquet: query_id 'z' in row 1 is not in queries\.parquet",
            ),
            (
                {"qrels": {"query_id": ["p", "q"], "doc_id": ["a", "z"], "score": [1, 1]}},
                r"qrels\.parquet: doc_id 'z' in row 1 is not in corpus\.parquet",
            ),
            (
                {"qrels": {"query_id": ["p", "p"], "doc_id": ["a", "a"], "score": [1, 0]}},
                r"rows 0 and 1 judge the same document",
            ),
            ({"qrels": {"query_id": ["p"], "doc_id": ["a"], "score": [0]}}, r"no score is above 0"),
            ({"qrels": {"query_id": ["p"], "doc_id": ["a"], "score": [0.5]}}, r"'score' must hold whole numbers"),
            ({"qrels": {"query_id": ["p"], "doc_id": ["a"], "score": [None]}}, r"column 'score' is null in row 0"),
        ],
    )
    def test_bad_input_is_named(self, tmp_path: Path, tables: dict[str, Any], told: str) -> None:
        with pytest.raises(InputError, match=told):
            load_collection(write_collection(tmp_path, **tables))

    def test_a_holdout_is_searched_among_all_documents_of_its_domain(
        self, run_corpus: Callable[..., Plan], write_jsonl: Callable[..., Path], tmp_path: Path
    ) -> None:
        rows = [{"query": f"question {i}", "document": f"answer {i // 2}", "bad": [f"wrong {i}"]} for i in range(40)]
        write_jsonl("x.jsonl", rows)
        text = 'corpus = "c"\n[[dataset]]\nname = "n"\nsource = "x.jsonl"\nholdout = 0.2\ncolumns.negatives = "bad"\n'
        pairs = run_corpus(text, stages=("pairs",)).steps[0].path
        trained = pl.read_ipc(pairs / "texts" / "documents-00000.arrow")["text"].to_list()

        collection = load_collection(pairs / "holdout")
        assert collection.documents[: len(trained)] == trained == load_documents(pairs / "holdout")[: len(trained)]
        assert len(trained) == 16 + 32 and len(set(collection.documents)) == len(collection.documents) == 16 + 32 + 4
        assert "48 of them of training" in collection.source
        found = zip(collection.query_rows, collection.document_rows, strict=True)
        answers = {(collection.queries[query], collection.documents[document]) for query, document in found}
        assert len(answers) == 8 and answers < {(row["query"], row["document"]) for row in rows}

        for part in ("holdout", "texts"):
            shutil.copytree(pairs / part, tmp_path / "moved" / part)
        moved = load_collection(tmp_path / "moved" / "holdout")
        assert (moved.name, moved.documents) == (f"{tmp_path.name}_holdout", collection.documents)

    def test_a_holdout_without_the_training_documents_is_refused(
        self, run_corpus: Callable[..., Plan], write_jsonl: Callable[..., Path], tmp_path: Path
    ) -> None:
        write_jsonl("x.jsonl", make_rows(20))
        text = 'corpus = "c"\n[[dataset]]\nname = "n"\nsource = "x.jsonl"\nholdout = 0.2\n'
        pairs = run_corpus(text, stages=("pairs",)).steps[0].path
        shutil.copytree(pairs / "holdout", tmp_path / "alone" / "holdout")
        with pytest.raises(InputError, match=r"16 training documents, of which .*alone/texts has 0; copy the folder"):
            load_collection(tmp_path / "alone" / "holdout")
        (tmp_path / "alone" / "texts").mkdir()
        (tmp_path / "alone" / "texts" / "documents-00000.arrow").write_bytes(b"garbage")
        with pytest.raises(InputError, match="alone/texts: cannot be read as Arrow"):
            load_collection(tmp_path / "alone" / "holdout")

    def test_files_that_are_absent_or_broken_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"nowhere: no such folder; give a folder with corpus\.parquet"):
            load_collection(tmp_path / "nowhere")
        (write_collection(tmp_path) / "queries.parquet").write_bytes(b"PAR1 not really")
        with pytest.raises(InputError, match=r"queries\.parquet: cannot be read as Parquet"):
            load_collection(tmp_path)
        (write_collection(tmp_path) / "qrels.parquet").unlink()
        with pytest.raises(InputError, match=r"qrels\.parquet: no such file"):
            load_collection(tmp_path)


@pytest.mark.parametrize("write", [write_beir, write_mteb])
def test_folders_of_beir_and_mteb_are_collections(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    collection = load_collection(write(tmp_path / "nf"))
    assert collection.name == "nf" and collection.queries == [f"which is {i}?" for i in range(3)]
    assert collection.documents == ['One the "first" document', "the second", "Three the third"]
    judged = zip(collection.query_rows, collection.document_rows, collection.scores, strict=True)
    assert [tuple(map(int, row)) for row in judged] == [(0, 0, 1), (1, 1, 2), (1, 2, 1), (2, 0, 0)]
    assert load_documents(tmp_path / "nf") == collection.documents


def test_an_evaluation_reads_the_test_split(tmp_path: Path) -> None:
    write_beir(tmp_path / "nf", "dev", "test", "train")
    (tmp_path / "nf" / "qrels" / "train.tsv").write_text("nothing")
    assert load_collection(tmp_path / "nf").scores.tolist() == [1, 2, 1, 0]
    (tmp_path / "nf" / "qrels" / "test.tsv").unlink()
    with pytest.raises(InputError, match="has judgements of dev, train, but none called test"):
        load_collection(tmp_path / "nf")


class TestEmbedder:
    @pytest.mark.parametrize("pool_prompt", [True, False])
    @pytest.mark.parametrize("model_type", ["bert", "nomic_bert"])
    def test_rows_are_those_of_each_text_alone(self, tokenizer: Tokenizer, model_type: str, pool_prompt: bool) -> None:
        encoder = tiny_encoder(model_type, CONTEXT_SIZE, pool_prompt=pool_prompt)
        texts = make_collection().documents
        embedder = Embedder(encoder=encoder, tokenizer=tokenizer, document_prompt="a prompt: ", texts_per_chunk=5)
        alone = replace(embedder, texts_per_chunk=1)
        context = embedder.context(texts[:3])
        torch.testing.assert_close(context, torch.cat([alone.context([text]) for text in texts[:3]]))
        found = embedder.documents(texts, context)
        torch.testing.assert_close(found, torch.cat([alone.documents([text], context) for text in texts]))
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(texts)))
        assert not torch.allclose(found, embedder.documents(texts), atol=1e-4)

    def test_the_prompt_can_be_left_out_of_the_mean(self, tokenizer: Tokenizer) -> None:
        with_prompt, without = (
            Embedder(encoder=tiny_encoder(pool_prompt=pool), tokenizer=tokenizer, document_prompt="a prompt: ")
            for pool in (True, False)
        )
        assert not torch.allclose(with_prompt.documents(["text"]), without.documents(["text"]), atol=1e-4)
        bare = [replace(one, document_prompt="") for one in (with_prompt, without)]
        assert torch.equal(bare[0].documents(["text"]), bare[1].documents(["text"]))

    def test_the_encoder_is_as_before(self, tokenizer: Tokenizer) -> None:
        encoder = tiny_encoder().train()
        frozen = encoder.second_stage_model.backbone.embeddings
        frozen.eval()
        vectors = Embedder(encoder=encoder, tokenizer=tokenizer).documents(["text"])
        assert not vectors.requires_grad
        assert encoder.training and encoder.first_stage_model.training and not frozen.training

    def test_no_text_gives_no_row(self, tokenizer: Tokenizer) -> None:
        assert Embedder(encoder=tiny_encoder(), tokenizer=tokenizer).queries([]).shape == (0, 32)


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> list[str]:
    """The texts that `tokenizer` was given, prompts included."""
    seen: list[str] = []
    original = tokenizer.tokenize

    def tokenize(texts: Sequence[str], prompts: str = "") -> Any:
        seen.extend(prompts + text for text in texts)
        return original(texts, prompts)

    monkeypatch.setattr(tokenizer, "tokenize", tokenize)
    return seen


AsRank = Callable[[int, int], contextlib.AbstractContextManager[None]]


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> AsRank:
    """`with as_rank(rank, num_ranks)`: what this process computes as one rank of several, without the others."""

    @contextlib.contextmanager
    def pretend(rank: int, num_ranks: int) -> Iterator[None]:
        with monkeypatch.context() as patch:
            for module in (embed, search_module):
                patch.setattr(module, "ranks", lambda: (rank, num_ranks))
            patch.setattr(dist, "all_reduce", lambda tensor: None)
            yield

    return pretend


class TestSharing:
    @pytest.mark.parametrize(("num_texts", "num_ranks"), [(192, 3), (1, 2), (5, 3), (33, 2), (75, 2), (100, 3)])
    def test_ranks_share_shelves_and_then_chunks(
        self, tokenizer: Tokenizer, tokenised: list[str], as_rank: AsRank, num_texts: int, num_ranks: int
    ) -> None:
        """192 texts are six shelves, two for each of three ranks; the others leave shelves to share by chunk."""
        texts = make_collection(num_texts).documents
        embedder = Embedder(encoder=tiny_encoder(), tokenizer=tokenizer, texts_per_chunk=2)
        alone = embedder.documents(texts)
        assert sorted(tokenised) == sorted(texts)

        shares, parts, waits = [], [], []
        for rank in range(num_ranks):
            tokenised.clear()
            calls: list[int] = []
            count = partial(calls.append, 0)
            with as_rank(rank, num_ranks):
                parts.append(replace(embedder, kept=shelves.KeptShelves(), between_blocks=count).documents(texts))
            shares.append(list(tokenised))
            waits.append(len(calls))

        assert torch.equal(sum(parts), alone)
        assert torch.equal(sum(part.any(1).int() for part in parts), torch.ones(num_texts, dtype=torch.int32))
        assert len(set(waits)) == 1  # the ranks wait for each other there
        if num_texts == 192:
            assert [len(share) for share in shares] == [64, 64, 64]
            assert sorted(text for share in shares for text in share) == sorted(texts)

    def test_ranks_share_the_queries_of_a_search(self, as_rank: AsRank) -> None:
        generator = torch.Generator().manual_seed(0)
        queries = torch.randn(70, 8, generator=generator)
        documents = torch.randn(90, 8, generator=generator)
        alone = search(queries, documents, 10)
        parts = []
        for rank in range(2):
            with as_rank(rank, 2):
                parts.append(search(queries, documents, 10))

        assert torch.equal(parts[0] + parts[1], alone)
        searched = [int(part.any(1).sum()) for part in parts]
        assert sum(searched) == 70 and min(searched) >= 16

    def test_blocks_on_a_gpu_follow_its_free_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gibibyte = 2**30
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * gibibyte)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * gibibyte)
        queries = []
        for free in (0, 2 * gibibyte, 62 * gibibyte):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 * gibibyte))
            queries.append(search_module._queries_per_block(10_000, 2**22, torch.device("cuda")))
        assert queries == [4, 8, 128]


class TestKeptTokens:
    def test_a_collection_is_tokenised_once(self, tokenizer: Tokenizer, tokenised: list[str]) -> None:
        collection = make_collection()
        options = OPTIONS | {"seed": 0}
        without = evaluate_retrieval(tiny_encoder(), tokenizer, collection, with_context=False, **options)
        assert len(tokenised) == len(collection.documents) + len(collection.queries)

        evaluate_retrieval(tiny_encoder(), tokenizer, collection, with_context=True, **options)
        assert len(tokenised) == len(collection.documents) + len(collection.queries) + CONTEXT_SIZE
        tokenised.clear()

        again = evaluate_retrieval(tiny_encoder(), tokenizer, collection, with_context=False, **options)
        evaluate_retrieval(tiny_encoder(seed=1), tokenizer, collection, with_context=True, **options)
        assert tokenised == []
        assert again == without

    def test_other_texts_prompts_or_tokenizers_are_tokenised_anew(self, tokenizer: Tokenizer) -> None:
        kept = shelves.KeptShelves()
        texts = ["a river bank", "a stone"]
        first = kept.shelves("documents", texts, "", tokenizer, 8)
        assert kept.shelves("documents", list(texts), "", tokenizer, 8) is first
        assert kept.shelves("queries", texts, "", tokenizer, 8) is not first

        shorter = load_tokenizer(minilm_folder(), max_length_tokens=3)
        for changed in ((["a"], "", tokenizer, 8), (texts, "p: ", tokenizer, 8), (texts, "", shorter, 8)):
            found = kept.shelves("documents", *changed)
            assert found is not first
            expected = changed[2].tokenize([changed[0][row] for row in found.rows(0).tolist()], changed[1])
            assert found.tokens(0).ids.tolist() == expected.ids.tolist()
            first = kept.shelves("documents", texts, "", tokenizer, 8)

    def test_what_finds_no_room_is_tokenised_again(
        self, tokenizer: Tokenizer, tokenised: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shelves, "_KEPT_BYTES", 4 * 6)
        found = shelves.Shelves(["one two", "three"], "", tokenizer, 1)  # 4 and 3 tokens of 4 bytes
        for number in (0, 1, 0, 1):
            assert len(found.tokens(number)) == 1
        assert tokenised == ["one two", "three", "three"]


def test_a_training_without_evaluation_needs_no_ir_measures() -> None:
    code = "import sys; sys.modules['ir_measures'] = None; import hardbatch.trainer.loop"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


class TestSearch:
    def test_the_first_of_equals_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        generator = np.random.default_rng(0)
        queries = generator.integers(-2, 3, (40, 3)).astype(np.float32)
        documents = generator.integers(-2, 3, (300, 3)).astype(np.float32)
        documents[::7] *= -0.0
        expected = np.argsort(-(queries @ documents.T + 0.0), axis=1, kind="stable")[:, :100]
        for places in (1, 2_000, 2**25):
            monkeypatch.setattr(search_module, "_SCORES_PER_BLOCK", places)
            hits = search(torch.from_numpy(queries), torch.from_numpy(documents), 100)
            assert np.array_equal(hits.numpy(), expected)

    def test_a_small_corpus_is_ranked_whole(self) -> None:
        hits = search(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 1.0], [1.0, 0.0], [-1.0, 0.0]]), 100)
        assert hits.tolist() == [[1, 0, 2]]


class TestRetrieval:
    def test_figures_are_those_computed_by_hand(self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        # 12 documents in the order 0, 1, 2, ... for every query
        collection = Collection(
            name="by_hand",
            documents=[str(row) for row in range(12)],
            queries=["second", "two grades", "not relevant at all", "eleventh"],
            query_rows=np.array([0, 1, 1, 2, 3, 0]),
            document_rows=np.array([1, 2, 0, 5, 10, 0]),
            scores=np.array([1, 2, 1, 0, 1, -1]),
        )
        monkeypatch.setattr(Embedder, "queries", lambda self, texts, context: torch.ones(len(texts), 1))
        monkeypatch.setattr(Embedder, "documents", lambda self, texts, context: -torch.arange(12.0)[:, None])
        found = evaluate_retrieval(tiny_encoder(), tokenizer, collection, seed=0, with_context=False)
        second = 1 / math.log2(3)
        grades = (1 + 2 / math.log2(4)) / (2 + 1 / math.log2(3))
        assert found.ndcg_at_10 == pytest.approx((second + grades + 0) / 3)
        assert found.mrr_at_10 == pytest.approx((1 / 2 + 1 + 0) / 3)
        assert found.recall_at_100 == 1.0

    def test_the_context_is_drawn_by_seed(self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn: list[list[str]] = []
        embed = Embedder.context
        monkeypatch.setattr(
            Embedder, "context", lambda self, documents: drawn.append(list(documents)) or embed(self, documents)
        )
        collection = make_collection()
        for seed in (0, 0, 1):
            evaluate_retrieval(tiny_encoder(), tokenizer, collection, seed=seed, with_context=True, **OPTIONS)
        assert drawn[0] == drawn[1] != drawn[2]
        assert all(len(set(one)) == CONTEXT_SIZE and set(one) <= set(collection.documents) for one in drawn)
        drawn.clear()
        small = make_collection(3, 2)
        for with_context in (True, False):
            evaluate_retrieval(tiny_encoder(), tokenizer, small, seed=0, with_context=with_context, **OPTIONS)
        assert drawn == [list(small.documents)]

    def test_a_given_context_is_used(self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[Any] = []
        for name in ("queries", "documents"):
            monkeypatch.setattr(
                Embedder, name, lambda self, texts, context: given.append(context) or torch.ones(len(texts), 1)
            )
        context = torch.ones(2, 32)
        options = OPTIONS | {"seed": 0, "with_context": False, "default_context_MH": context}
        evaluate_retrieval(tiny_encoder(), tokenizer, make_collection(), **options)
        assert len(given) == 2 and all(one is context for one in given)

    def test_a_biencoder_has_no_context(self, tokenizer: Tokenizer) -> None:
        encoder, collection = tiny_encoder(context_size=0), make_collection()
        with_context, without = (
            evaluate_retrieval(encoder, tokenizer, collection, seed=0, with_context=one, **OPTIONS)
            for one in (True, False)
        )
        assert with_context == without

    def test_autocast_changes_little(self, tokenizer: Tokenizer) -> None:
        embedder = Embedder(encoder=tiny_encoder(), tokenizer=tokenizer)
        half = replace(embedder, precision=torch.bfloat16)
        texts = make_collection().documents
        cosine = (embedder.documents(texts) * half.documents(texts)).sum(1)
        assert half.documents(texts).dtype == torch.float32
        assert not torch.equal(embedder.documents(texts), half.documents(texts)) and cosine.min() > 0.999


class TestHeldOutLoss:
    @pytest.mark.parametrize("context_size", [0, CONTEXT_SIZE])
    def test_it_is_the_loss_of_training(self, tokenizer: Tokenizer, context_size: int) -> None:
        encoder = tiny_encoder(context_size=context_size)
        collection = replace(
            make_collection(6, 5),
            documents=["one", "same", "same", "three", "four", "five"],
            query_rows=np.arange(5),
            document_rows=np.arange(5),
            scores=np.ones(5, np.int64),
        )
        found = held_out_loss(encoder, tokenizer, collection, batch_size=8, seed=3, temperature=0.1, **OPTIONS)
        embedder = Embedder(encoder=encoder, tokenizer=tokenizer, **OPTIONS)
        equivalent = torch.eye(5, dtype=torch.bool)
        equivalent[1, 2] = equivalent[2, 1] = True  # the same text
        documents = collection.documents[:5]
        losses = []
        # one batch, in any order; of 5 documents 4 are the context
        for left_out in range(5) if context_size else [None]:
            context = None
            if left_out is not None:
                context = embedder.context([text for row, text in enumerate(documents) if row != left_out])
            loss = info_nce(
                embedder.queries(collection.queries, context),
                embedder.documents(documents, context),
                equivalent,
                temperature=0.1,
            )
            losses.append(float(loss.value))
        assert found.num_batches == 1
        assert min(abs(found.loss - loss) for loss in losses) < 1e-5
        unmasked = info_nce(
            embedder.queries(collection.queries),
            embedder.documents(documents),
            torch.zeros(5, 5, dtype=torch.bool),
            temperature=0.1,
        )
        assert abs(found.loss - float(unmasked.value)) > 1e-3

    def test_known_answers_are_no_negatives(self, tokenizer: Tokenizer) -> None:
        everything = np.arange(3)
        collection = Collection(
            name="all_relevant",
            documents=["one", "two", "three"],
            queries=["who", "what", "where"],
            query_rows=np.repeat(everything, 3),
            document_rows=np.tile(everything, 3),
            scores=np.ones(9, np.int64),
        )
        found = held_out_loss(tiny_encoder(), tokenizer, collection, batch_size=9, seed=0, temperature=0.02)
        assert found.loss == 0 and found.accuracy == 1

    def test_batches_are_drawn_by_seed_and_the_rest_is_left_out(self, tokenizer: Tokenizer) -> None:
        def loss(**changes: int) -> HeldOutLoss:
            settings: dict[str, Any] = {"batch_size": 5, "seed": 0, "temperature": 0.1} | changes
            return held_out_loss(tiny_encoder(), tokenizer, make_collection(), **settings, **OPTIONS)

        assert loss().num_batches == 2  # of 12 pairs
        assert loss() == loss() != loss(seed=1)
        assert loss(batch_size=12).num_batches == loss(batch_size=512).num_batches == 1
        assert loss(max_pairs=9).num_batches == loss(max_pairs=1).num_batches == 1

    def test_one_pair_is_refused(self, tokenizer: Tokenizer) -> None:
        collection = replace(make_collection(), scores=np.array([1] + [0] * 11))
        with pytest.raises(InputError, match="tiny: has one relevant pair, and a held-out loss needs two or more"):
            held_out_loss(tiny_encoder(), tokenizer, collection, batch_size=4, seed=0, temperature=0.1)


def all_figures(tokenizer: Tokenizer) -> tuple[Any, ...]:
    encoder, collection = tiny_encoder("nomic_bert"), make_collection(140, 20)
    retrieval = [
        evaluate_retrieval(encoder, tokenizer, collection, seed=5, with_context=one, **OPTIONS) for one in (False, True)
    ]
    held_out = held_out_loss(encoder, tokenizer, collection, batch_size=4, seed=5, temperature=0.1, **OPTIONS)
    embedder = Embedder(encoder=encoder, tokenizer=tokenizer, **OPTIONS)
    vectors = embedder.documents(collection.documents, embedder.context(collection.documents[:4]))
    return (*map(astuple, retrieval), astuple(held_out), vectors.tolist())


def rank_main(rank: int, num_ranks: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=num_ranks)
    found = all_figures(load_tokenizer(minilm_folder(), max_length_tokens=32))
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_several_ranks_give_the_figures_of_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    warm.run_ranks(rank_main, 2, str(tmp_path))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks: then nothing is rounded in another way
    alone = json.dumps(all_figures(tokenizer))
    torch.set_num_threads(num_threads)
    assert [(tmp_path / f"rank-{rank}.json").read_text() for rank in range(2)] == [alone, alone]


class TestCommand:
    @pytest.fixture(autouse=True)
    def _bm25(self) -> None:
        pytest.importorskip("bm25s", reason="needs the package bm25s: pip install bm25s")

    def table(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> list[list[str]]:
        """Runs the command. Returns the cells of the lines that it prints; a name is one cell."""
        assert evaluate.main(list(map(str, arguments))) == 0
        return [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]

    def test_each_context_of_our_model_stands_beside_bm25(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        encoder = tiny_encoder()
        prompts = {"query": "q: ", "document": "d: "}
        documents = ContextDocuments(documents=("one", "two"), origin="by hand")
        exported = export_model(encoder, minilm_folder(), tmp_path / "model", prompts=prompts, context=documents)
        collections = [write_collection(tmp_path / name) for name in ("first", "second")]
        arguments = [word for folder in collections for word in ("--collection", folder)]
        lines = self.table(capsys, "--model", exported, "--document-prompt", "", *arguments)
        names = [f"model, {context}" for context in ("context of the corpus", "default context", "no context")]
        for block, folder in ((lines[:6], collections[0]), (lines[6:], collections[1])):
            assert block[0] == [
                f'{folder.name}: 2 documents (title + " " + text of {folder}/corpus.parquet), 2 queries'
            ]
            assert block[1] == ["nDCG@10", "recall@100", "MRR@10"]
            assert [row[0] for row in block[2:]] == [*names, "BM25"]

        tokenizer = load_tokenizer(exported, max_length_tokens=48)
        vectors = Embedder(encoder=encoder, tokenizer=tokenizer).context(documents.documents)
        contexts = (
            {"with_context": True},
            {"with_context": False, "default_context_MH": vectors},
            {"with_context": False},
        )
        for row, context in zip(lines[2:5], contexts, strict=True):
            metrics = evaluate_retrieval(
                encoder, tokenizer, load_collection(collections[0]), seed=0, query_prompt="q: ", **context
            )
            assert row[1:] == [f"{value:.4f}" for value in astuple(metrics)]

    def test_any_sentence_transformers_model_is_measured(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The export of a biencoder is one: read as a stock model it has the metrics of our own code."""
        prompts = {"query": "q: ", "document": "d: "}
        own = export_model(tiny_encoder(context_size=0), minilm_folder(), tmp_path / "own", prompts=prompts)
        stock = shutil.copytree(own, tmp_path / "stock")
        content = json.loads((stock / "config.json").read_text())
        del content["hardbatch"]
        (stock / "config.json").write_text(json.dumps(content))
        corpus = {"doc_id": list(range(20)), "text": make_collection(20).documents}
        qrels = {"query_id": ["p", "q"], "doc_id": [3, 4], "score": [1, 1]}
        folder = write_collection(tmp_path / "small", corpus=corpus, qrels=qrels)
        lines = self.table(capsys, "--model", own, "--model", stock, "--collection", folder)
        assert [row[0] for row in lines[2:]] == ["own", "stock", "BM25"] and lines[2][1:] == lines[3][1:]
        assert self.table(capsys, "--model", "minilm", "--collection", folder)[2][0] == "minilm"

    @pytest.mark.parametrize(("name", "expected"), BM25.items())
    def test_bm25_has_its_known_metrics(self, name: str, expected: float) -> None:
        if "HARDBATCH_DATA" not in os.environ:
            pytest.skip("needs the folder of real data: set HARDBATCH_DATA")
        collection = load_collection(Path(os.environ["HARDBATCH_DATA"]) / "eval" / name)
        assert evaluate.evaluate_bm25(collection).ndcg_at_10 == pytest.approx(expected, abs=0.04)

    def test_mistakes_end_in_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = write_collection(tmp_path / "small")
        (tmp_path / "empty").mkdir()
        cases = [
            (2, "--model", tmp_path / "none", "--collection", folder),
            (2, "--model", tmp_path / "empty", "--collection", folder),
            (3, "--model", "minilm", "--collection", tmp_path / "none"),
            (2, "--model", "minilm", "--collection", folder, "--texts-per-chunk", 0),
        ]
        for expected, *arguments in cases:
            assert evaluate.main(list(map(str, arguments))) == expected
            printed = capsys.readouterr()
            assert printed.err.startswith("trainer: ") and printed.err.count("\n") == 1 and not printed.out
