"""An export loads in sentence-transformers without this project and gives the trainer's own embeddings."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hardbatch.pipeline.errors import ConfigError, IntegrityError, NoSpaceError
from hardbatch.trainer import export
from hardbatch.trainer.batch import load_tokenizer
from hardbatch.trainer.collection import load_collection
from hardbatch.trainer.embed import Embedder
from hardbatch.trainer.evaluate import evaluate_retrieval
from hardbatch.trainer.export import export_model, open_model, read_prompts
from hardbatch.trainer.model import Encoder, load_encoder
from tests.models import minilm_folder
from tests.trainer_models import save_model_folder, tiny_encoder

CONTEXT_SIZE, WIDTH = 4, 32
PROMPTS = {"query": "search_query: ", "document": "search_document: "}
MINICORPUS = ["the first document", "a second, longer document of the corpus", ""]
TEXTS = ["short", "a text of several words", "words " * 100, "", "naïve café — 日本"]
ENCODERS = {
    "bert": {"model_type": "bert"},
    "nomic_bert": {"model_type": "nomic_bert"},
    "modernbert": {"model_type": "modernbert"},
    "prompt_left_out": {"model_type": "nomic_bert", "pool_prompt": False},
    "biencoder": {"model_type": "bert", "context_size": 0, "pool_prompt": False},
}

# what a user's process does, with sentence-transformers alone; with -I neither the folder nor PYTHONPATH are searched
ALONE = """
import json, re, sys
from pathlib import Path

for name in ("hardbatch", "trainer", "pipeline"):
    sys.modules[name] = None  # an installed copy cannot be imported either

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

folder = Path(sys.argv[1])
given = json.loads((folder / "given.json").read_text())
minicorpus, texts = given["minicorpus"], given["texts"]
found = {}

def embed(model, name):
    if name == "biencoder":
        found[name + "/query"] = model.encode(texts, prompt_name="query")
        return
    context = model.encode(minicorpus, prompt_name="document")
    found[name + "/context"] = context
    found[name + "/query"] = model.encode(texts, prompt_name="query", dataset_embeddings=context)
    found[name + "/document"] = model.encode(
        texts, prompt_name="document", dataset_embeddings=torch.from_numpy(context), batch_size=2
    )
    found[name + "/no_context"] = model.encode_query(texts, dataset_embeddings=np.empty((0, context.shape[1])))

for name in given["names"]:
    model = SentenceTransformer(str(folder / name), trust_remote_code=True, device="cpu")
    embed(model, name)
model.save(str(folder / "saved_again"))
again = SentenceTransformer(str(folder / "saved_again"), trust_remote_code=True, device="cpu")
found["saved_again"] = again.encode(texts, prompt_name="query")

# the lines of the README, as they stand
corpus, questions = texts, texts[:2]
readme = (folder / "nomic_bert" / "README.md").read_text()
exec(re.search("```python\\n(.*?)```", readme, re.S)[1].replace('"nomic_bert"', repr(str(folder / "nomic_bert"))))
found["readme"] = scores.numpy()
np.savez(folder / "found.npz", **found)
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of exports, one for each of ENCODERS."""
    folder = tmp_path_factory.mktemp("exports")
    for name in ENCODERS:
        export_model(make(name), minilm_folder(), folder / name, prompts=PROMPTS)
    return folder


def make(name: str) -> Encoder:
    return tiny_encoder(max_length_tokens=24, **ENCODERS[name])  # type: ignore[arg-type]


def embedder(name: str) -> Embedder:
    tokenizer = load_tokenizer(minilm_folder(), max_length_tokens=24)
    prompts = {"query_prompt": PROMPTS["query"], "document_prompt": PROMPTS["document"]}
    return Embedder(encoder=make(name), tokenizer=tokenizer, **prompts)


def sentence_transformer(encoder: Encoder) -> Any:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer

    from hardbatch.trainer.sentence_module import ContextualModule

    module = ContextualModule(encoder, AutoTokenizer.from_pretrained(minilm_folder()))
    return SentenceTransformer(modules=[module], device="cpu", prompts=PROMPTS)


def test_a_process_without_this_project_gets_the_trainers_embeddings(exports: Path) -> None:
    given = {"names": list(ENCODERS), "minicorpus": MINICORPUS, "texts": TEXTS}
    (exports / "given.json").write_text(json.dumps(given))
    (exports / "alone.py").write_text(ALONE)
    environment = os.environ | {"HF_HOME": str(exports / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-I", str(exports / "alone.py"), str(exports)],
        capture_output=True,
        text=True,
        cwd=exports,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    found = np.load(exports / "found.npz")

    def assert_equal(name: str, expected: torch.Tensor) -> None:
        np.testing.assert_allclose(found[name], expected.numpy(), rtol=0, atol=1e-5, err_msg=name)

    for name in ENCODERS:
        own = embedder(name)
        if name == "biencoder":
            assert_equal(f"{name}/query", own.queries(TEXTS))
            continue
        context = own.context(MINICORPUS)
        assert_equal(f"{name}/context", context)
        assert_equal(f"{name}/query", own.queries(TEXTS, context))
        assert_equal(f"{name}/document", own.documents(TEXTS, context))
        assert_equal(f"{name}/no_context", own.queries(TEXTS))
        assert np.abs(found[f"{name}/query"] - found[f"{name}/no_context"]).max() > 1e-4
    np.testing.assert_array_equal(found["saved_again"], found["biencoder/query"])
    own = embedder("nomic_bert")
    context = own.context(MINICORPUS)
    assert_equal("readme", own.queries(TEXTS[:2], context) @ own.documents(TEXTS, context).T)


def test_an_export_is_a_model_folder_of_ours_too(exports: Path) -> None:
    encoder, tokenizer = open_model(exports / "modernbert", "--model")
    assert tokenizer.max_length_tokens == 24 and not encoder.training
    for name, tensor in make("modernbert").state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor)
        assert tensor.dtype == torch.float32
    assert read_prompts(exports / "modernbert") == PROMPTS
    assert json.loads((exports / "bert" / "config.json").read_text())["transductive_corpus_size"] == CONTEXT_SIZE


def test_users_of_cde_find_their_names() -> None:
    module = sentence_transformer(tiny_encoder())[0]
    assert module.first_stage_model is module.encoder.first_stage_model
    assert module.second_stage_model is module.encoder.second_stage_model
    assert module.transductive_corpus_size == CONTEXT_SIZE
    model = sentence_transformer(tiny_encoder())
    assert model.get_model_kwargs() == ["dataset_embeddings"]
    assert model.get_embedding_dimension() == WIDTH


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (np.zeros((5, WIDTH)), "5 context documents, this model reads at most 4: draw 4 documents"),
        (torch.zeros(2, WIDTH + 1), r"dataset_embeddings is 2 × 33, it must be at most 4 × 32: give what encode"),
        (np.zeros(WIDTH), r"dataset_embeddings is 32, it must be"),
        ([[0.0] * WIDTH], r"dataset_embeddings is a list, it must be a tensor or an array"),
    ],
)
def test_a_context_that_does_not_fit_is_refused(given: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        sentence_transformer(tiny_encoder()).encode("text", dataset_embeddings=given)


def test_a_biencoder_takes_an_empty_context_alone() -> None:
    model = sentence_transformer(tiny_encoder(context_size=0))
    plain = model.encode("text")
    assert np.array_equal(plain, model.encode("text", dataset_embeddings=torch.empty(0, WIDTH)))
    with pytest.raises(ValueError, match="reads no context"):
        model.encode("text", dataset_embeddings=torch.zeros(1, WIDTH))


def test_longer_texts_are_cut_where_the_user_says() -> None:
    model = sentence_transformer(tiny_encoder())
    long = "one two three four five six seven eight nine ten"
    assert model.max_seq_length == 48
    whole = model.encode(long, dataset_embeddings=torch.empty(0))
    model.max_seq_length = 6
    assert np.array_equal(
        model.encode(long, dataset_embeddings=torch.empty(0)),
        model.encode("one two three four", dataset_embeddings=torch.empty(0)),
    )
    assert not np.allclose(whole, model.encode(long, dataset_embeddings=torch.empty(0)))


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "below" / "export"
    export_model(tiny_encoder(seed=0), minilm_folder(), output, prompts=PROMPTS)
    (output / "left_over").touch()
    export_model(tiny_encoder(seed=1), minilm_folder(), output, prompts=PROMPTS, trained_on="three pairs")
    assert not (output / "left_over").exists()
    assert list(output.parent.iterdir()) == [output]
    assert "Trained on three pairs." in (output / "README.md").read_text()
    expected = tiny_encoder(seed=1).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_encoder(output).state_dict().items())

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    export_model(tiny_encoder(), minilm_folder(), foreign, prompts=PROMPTS)  # an empty folder is nobody's
    for content in ("config.json", "modules.json"):
        (foreign / content).unlink()
        with pytest.raises(ConfigError, match="foreign: is there, and is no earlier export; give a new folder"):
            export_model(tiny_encoder(), minilm_folder(), foreign, prompts=PROMPTS)
        assert (foreign / "README.md").exists()
        (foreign / "config.json").write_text(json.dumps({"model_type": "bert"}))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), Exception("No space left on device (os error 28)")]
)
def test_a_full_disk_leaves_the_earlier_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    export_model(tiny_encoder(), minilm_folder(), tmp_path / "export", prompts=PROMPTS)
    before = (tmp_path / "export" / "config.json").stat().st_ino

    def full(source: Path, target: Path) -> None:
        raise error

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(NoSpaceError, match="no space left"):
        export_model(tiny_encoder(), minilm_folder(), tmp_path / "export", prompts=PROMPTS)
    assert list(tmp_path.iterdir()) == [tmp_path / "export"]
    assert (tmp_path / "export" / "config.json").stat().st_ino == before


class TestCommand:
    def test_prompts_are_those_of_the_training_or_given(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        checkpoint = save_model_folder(tmp_path / "checkpoint", tiny_encoder(), prompts=PROMPTS | {"other": "o: "})
        arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "export"), "--query-prompt", "q: "]
        assert export.main(arguments) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'export'}\n"
        saved = json.loads((tmp_path / "export" / "config_sentence_transformers.json").read_text())
        assert saved["prompts"] == {"query": "q: ", "document": "search_document: ", "other": "o: "}

    def test_mistakes_end_in_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def run(checkpoint: Path, output: Path) -> tuple[int, str]:
            code = export.main(["--checkpoint", str(checkpoint), "--output", str(output)])
            (line,) = capsys.readouterr().err.splitlines()
            return code, line

        checkpoint = save_model_folder(tmp_path / "checkpoint", tiny_encoder())
        code, line = run(tmp_path / "none", tmp_path / "export")
        assert code == 2 and re.search(r"--checkpoint .*none: no config\.json there; give the folder of one", line)
        code, line = run(minilm_folder(), tmp_path / "export")
        assert code == 2 and "not the configuration of a trained model" in line
        code, line = run(checkpoint, checkpoint)
        assert code == 2 and "is no earlier export" in line
        code, line = run(checkpoint, checkpoint / "config.json" / "export")
        assert code == 2 and "config.json" in line
        (checkpoint / "model.safetensors").write_bytes(b"torn")
        code, line = run(checkpoint, tmp_path / "export")
        assert code == 4 and "model.safetensors: damaged" in line
        assert not (tmp_path / "export").exists()

    def test_a_damaged_state_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "state.json").write_text("{")
        with pytest.raises(IntegrityError, match=r"state\.json: cannot be read"):
            read_prompts(tmp_path)


def test_mtebs_wrapper_for_cde_gives_our_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mteb", reason="needs mteb, the benchmark: pip install mteb")
    import mteb
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.model_implementations.cde_models import CDEWrapper

    size = 16
    documents = [f"document {row} about {row * row} things" for row in range(size)]
    queries = [f"which one has {row * row} things" for row in range(size)]
    ids = [f"id-{row}" for row in range(size)]

    class Tiny(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="HardbatchTiny",
            description="as many documents as the context holds, so that every draw is the same context",
            reference=None,
            dataset={"path": "none", "revision": "none"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

        def load_data(self, **options: Any) -> None:
            split = {
                "corpus": Dataset.from_dict({"id": ids, "text": documents, "title": [""] * len(ids)}),
                "queries": Dataset.from_dict({"id": ids, "text": queries}),
                "relevant_docs": {identifier: {identifier: 1} for identifier in ids},
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

        def convert_v1_dataset_format_to_v2(self, num_proc: int | None = None) -> None:
            """The wrapper calls it without an argument."""

    tasks = importlib.import_module("mteb.get_tasks")  # the attribute of that name is a function
    monkeypatch.setitem(tasks._TASKS_REGISTRY, "HardbatchTiny", Tiny)
    encoder = tiny_encoder("nomic_bert", size)
    folder = export_model(encoder, minilm_folder(), tmp_path / "export", prompts=PROMPTS)
    model = CDEWrapper(str(folder), device="cpu", trust_remote_code=True)
    assert model.max_sentences == size
    result = mteb.evaluate(model, Tiny(), cache=None, encode_kwargs={"batch_size": 2})
    scores = result.task_results[0].scores["test"][0]

    for name, columns in {
        "corpus": {"doc_id": ids, "text": documents},
        "queries": {"query_id": ids, "text": queries},
        "qrels": {"query_id": ids, "doc_id": ids, "score": [1] * len(ids)},
    }.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    own = evaluate_retrieval(
        encoder,
        load_tokenizer(minilm_folder(), max_length_tokens=48),
        load_collection(tmp_path),
        seed=0,
        with_context=True,
        query_prompt=PROMPTS["query"],
        document_prompt=PROMPTS["document"],
    )
    assert scores["ndcg_at_10"] == pytest.approx(own.ndcg_at_10, abs=1e-5)
    assert scores["mrr_at_10"] == pytest.approx(own.mrr_at_10, abs=1e-5)
    assert 0 < own.ndcg_at_10 < 1
