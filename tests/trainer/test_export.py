"""An export loads in sentence-transformers without this project and gives the trainer's own embeddings."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hardbatch.pipeline.errors import ConfigError, IntegrityError, NoSpaceError
from hardbatch.trainer import export
from hardbatch.trainer.batch import load_tokenizer
from hardbatch.trainer.context import ContextDocuments, read_documents
from hardbatch.trainer.embed import Embedder
from hardbatch.trainer.export import export_model, open_model, read_prompts
from hardbatch.trainer.model import Encoder, load_encoder
from hardbatch.trainer.replace import replace_folder
from tests.models import minilm_folder
from tests.trainer_models import save_model_folder, save_tokenizer, tiny_encoder

CONTEXT_SIZE, WIDTH = 4, 32
PROMPTS = {"query": "search_query: ", "document": "search_document: "}
MINICORPUS = ["the first document", "a second, longer document of the corpus", ""]
OTHERS = ("documents", "of the shards")
TEXTS = ["short", "a text of several words", "words " * 100, "", "naïve café — 日本"]
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert"},
    "nomic_bert": {"model_type": "nomic_bert"},
    "modernbert": {"model_type": "modernbert"},
    "distilbert": {"model_type": "distilbert"},
    "roberta": {"model_type": "roberta"},
    "xlm-roberta": {"model_type": "xlm-roberta"},
    "shared": {"model_type": "bert", "context_attention": "shared"},
    "shared_modernbert": {"model_type": "modernbert", "context_attention": "shared", "pool_prompt": False},
    "shared_xlm-roberta": {"model_type": "xlm-roberta", "context_attention": "shared"},
    "prompt_left_out": {"model_type": "nomic_bert", "pool_prompt": False},
    "biencoder": {"model_type": "bert", "context_size": 0},
    "biencoder_mpnet": {"model_type": "mpnet", "context_size": 0},
    "biencoder_xlm-roberta": {"model_type": "xlm-roberta", "context_size": 0, "pool_prompt": False},
    "biencoder_prompt_left_out": {"model_type": "nomic_bert", "context_size": 0, "pool_prompt": False},
}

# A user's process, with sentence-transformers alone. With -I neither the folder nor PYTHONPATH are searched.
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
corpus, questions = texts, texts[:2]
found = {}

for name in given["names"]:
    stock = name.startswith("biencoder")
    model = SentenceTransformer(str(folder / name), trust_remote_code=not stock, device="cpu")
    found[name + "/query"] = model.encode(texts, prompt_name="query")
    found[name + "/document"] = model.encode(texts, prompt_name="document", batch_size=2)
    if not stock:
        context = model.encode(minicorpus, prompt_name="document", first_stage=True)
        found[name + "/context"] = context
        found[name + "/explicit"] = model.encode(
            texts, prompt_name="query", dataset_embeddings=torch.from_numpy(context)
        )
        found[name + "/no_context"] = model.encode_query(texts, dataset_embeddings=context[:0])
        model[0].convention = "cde"
        found[name + "/cde"] = model.encode(minicorpus, prompt_name="document")
    model.save(str(folder / "again" / name))
    again = SentenceTransformer(str(folder / "again" / name), trust_remote_code=not stock, device="cpu")
    found[name + "/again"] = again.encode(texts, prompt_name="query")

    # the lines of the README, as they stand
    readme = (folder / name / "README.md").read_text()
    for number, block in enumerate(re.findall("```python\\n(.*?)```", readme, re.S)):
        exec(block.replace(f'"{name}"', repr(str(folder / name))))
        found[f"{name}/readme_{number}"] = scores.numpy()
np.savez(folder / "found.npz", **found)
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of exports, one for each of ENCODERS."""
    folder = tmp_path_factory.mktemp("exports")
    for name, encoder in ENCODERS.items():
        tokenizer = save_tokenizer(folder / "tokenizers" / name, encoder["model_type"])
        context = ContextDocuments(documents=OTHERS, origin="written by hand")
        export_model(make(name), tokenizer, folder / name, prompts=PROMPTS, context=context)
    return folder


def make(name: str) -> Encoder:
    return tiny_encoder(max_length_tokens=24, **ENCODERS[name])


def embedder(exports: Path, name: str) -> Embedder:
    tokenizer = load_tokenizer(exports / "tokenizers" / name, max_length_tokens=24)
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
        np.testing.assert_allclose(found[name], expected.numpy(), rtol=0, atol=1e-6, err_msg=name)

    for name in ENCODERS:
        own = embedder(exports, name)
        contextual = own.encoder.config.context_size > 0
        default = own.context(OTHERS) if contextual else None
        assert_equal(f"{name}/query", own.queries(TEXTS, default))
        assert_equal(f"{name}/document", own.documents(TEXTS, default))
        assert_equal(f"{name}/readme_0", own.queries(TEXTS[:2], default) @ own.documents(TEXTS, default).T)
        if not contextual:
            np.testing.assert_array_equal(found[f"{name}/again"], found[f"{name}/query"])
            assert not list((exports / name).rglob("*.py")), "a biencoder brings no code"
            continue
        context = own.context(MINICORPUS)
        assert_equal(f"{name}/context", context)
        assert_equal(f"{name}/explicit", own.queries(TEXTS, context))
        assert_equal(f"{name}/no_context", own.queries(TEXTS))
        assert_equal(f"{name}/cde", context)
        assert found[f"{name}/again"].shape == (len(TEXTS), WIDTH)
        assert_equal(f"{name}/readme_1", own.queries(TEXTS[:2], context) @ own.documents(TEXTS, context).T)
        for one, other in (("query", "explicit"), ("query", "no_context"), ("explicit", "no_context")):
            assert np.abs(found[f"{name}/{one}"] - found[f"{name}/{other}"]).max() > 1e-4


@pytest.mark.parametrize("name", ["modernbert", "biencoder"])
def test_an_export_is_a_model_folder_of_ours_too(exports: Path, name: str) -> None:
    encoder, tokenizer = open_model(exports / name, "--model")
    assert tokenizer.max_length_tokens == 24 and not encoder.training
    expected = make(name)
    assert encoder.config == expected.config
    for key, tensor in expected.state_dict().items():
        assert torch.equal(encoder.state_dict()[key], tensor) and tensor.dtype == torch.float32
    assert read_prompts(exports / name) == PROMPTS


def test_the_default_context_can_be_read_by_people(exports: Path) -> None:
    content = json.loads((exports / "bert" / "context.json").read_text())
    assert content == {"convention": "default", "origin": "written by hand", "documents": list(OTHERS)}
    assert "2 documents (written by hand)" in (exports / "bert" / "README.md").read_text()
    assert read_documents(exports / "bert").documents == OTHERS


def test_an_export_of_before_has_the_convention_of_cde(exports: Path, tmp_path: Path) -> None:
    from hardbatch.trainer.sentence_module import ContextualModule

    folder = shutil.copytree(exports / "bert", tmp_path / "export")
    for name in ("context.json", "context.safetensors"):
        (folder / name).unlink()
    module = ContextualModule.load(str(folder))
    assert module.convention == "cde" and module.default_context.shape == (0, WIDTH)


def test_users_of_cde_find_their_names() -> None:
    model = sentence_transformer(tiny_encoder())
    module = model[0]
    assert module.first_stage_model is module.encoder.first_stage_model
    assert module.second_stage_model is module.encoder.second_stage_model
    assert module.transductive_corpus_size == CONTEXT_SIZE
    assert sorted(model.get_model_kwargs()) == ["dataset_embeddings", "first_stage"]
    assert model.get_embedding_dimension() == WIDTH


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (np.zeros((5, WIDTH)), "5 context documents, this model reads at most 4: draw 4 documents"),
        (torch.zeros(2, WIDTH + 1), r"dataset_embeddings is 2 × 33, it must be at most 4 × 32: give what encode"),
        (np.zeros(WIDTH), r"dataset_embeddings is 32, it must be"),
        ([[0.0] * WIDTH], r"dataset_embeddings is a list, it must be a tensor or an array"),
        (
            np.eye(2, WIDTH),
            r"search embeddings \(all of norm 1\), not first-stage vectors: give what encode.*first_stage",
        ),
    ],
)
def test_a_context_that_does_not_fit_is_refused(given: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        sentence_transformer(tiny_encoder()).encode("text", dataset_embeddings=given)


def test_a_module_refuses_what_it_cannot_be_and_do() -> None:
    from hardbatch.trainer.sentence_module import ContextualModule

    with pytest.raises(ValueError, match="needs stock modules only"):
        sentence_transformer(tiny_encoder(context_size=0))
    with pytest.raises(ValueError, match="convention is 'other', it must be one of"):
        ContextualModule(tiny_encoder(), None, convention="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="first_stage=True takes no dataset_embeddings"):
        sentence_transformer(tiny_encoder()).encode("text", first_stage=True, dataset_embeddings=np.zeros((1, WIDTH)))


def test_longer_texts_are_cut_where_the_user_says() -> None:
    model = sentence_transformer(tiny_encoder())
    long = "one two three four five six seven eight nine ten"
    assert model.max_seq_length == 48
    whole = model.encode(long)
    model.max_seq_length = 6
    assert np.array_equal(model.encode(long), model.encode("one two three four"))
    assert not np.allclose(whole, model.encode(long))


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
        with pytest.raises(ConfigError, match="foreign: already exists and is not an export; give a new folder"):
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


def test_a_rename_that_fails_leaves_the_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, target = tmp_path / ".export.new.tmp", tmp_path / "export"
    new.mkdir()
    (target / "earlier").mkdir(parents=True)
    rename = os.replace

    def fail_for_new(source: Path, to: Path) -> None:
        if source == new:
            raise OSError(errno.EIO, "input/output error")
        rename(source, to)

    monkeypatch.setattr(os, "replace", fail_for_new)
    with pytest.raises(OSError, match="input/output error"):
        replace_folder(new, target)
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("export"), Path("export/earlier")]


class TestCommand:
    def test_prompts_are_those_of_the_training_or_given(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        checkpoint = save_model_folder(tmp_path / "checkpoint", tiny_encoder(), prompts=PROMPTS | {"other": "o: "})
        arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "export"), "--query-prompt", "q: "]
        assert export.main(arguments) == 0
        printed = capsys.readouterr()
        assert printed.out == f"{tmp_path / 'export'}\n"
        assert "has no context documents, so plain encode() will use no context; give --context-from" in printed.err
        saved = json.loads((tmp_path / "export" / "config_sentence_transformers.json").read_text())
        assert saved["prompts"] == {"query": "q: ", "document": "search_document: ", "other": "o: "}

    def test_the_default_context_is_that_of_the_training_or_drawn(
        self, tmp_path: Path, finished_run: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        checkpoint = save_model_folder(tmp_path / "checkpoint", tiny_encoder())
        kept = ContextDocuments(documents=OTHERS, origin="the training")
        (checkpoint / "context.json").write_bytes(kept.to_bytes())
        corpus = ["one", "two", "two", "three", "four"]
        (tmp_path / "corpus").mkdir()
        pq.write_table(pa.table({"doc_id": range(5), "text": corpus}), tmp_path / "corpus" / "corpus.parquet")
        texts = set(pl.read_parquet(finished_run[2] / "data" / "*.parquet")["document"])

        def drawn(*options: object) -> dict[str, Any]:
            arguments = ["--checkpoint", checkpoint, "--output", tmp_path / "export", *options]
            assert export.main([str(argument) for argument in arguments]) == 0
            assert capsys.readouterr().err == ""
            return json.loads((tmp_path / "export" / "context.json").read_text())

        assert drawn() == {"convention": "default", "origin": "the training", "documents": list(OTHERS)}
        shards = [drawn("--context-from", finished_run[2], "--seed", seed) for seed in (0, 0, 1)]
        assert shards[0] == shards[1] != shards[2] and finished_run[2].name in shards[0]["origin"]
        assert len(set(shards[0]["documents"])) == CONTEXT_SIZE and texts.issuperset(shards[0]["documents"])
        found = drawn("--context-from", tmp_path / "corpus", "--export-convention", "cde")
        assert found["convention"] == "cde" and set(found["documents"]) <= set(corpus)
        assert "first-stage vectors, which are not suitable" in (tmp_path / "export" / "README.md").read_text()

    def test_mistakes_end_in_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def run(checkpoint: Path, output: Path) -> tuple[int, str]:
            code = export.main(["--checkpoint", str(checkpoint), "--output", str(output)])
            (line,) = capsys.readouterr().err.splitlines()
            return code, line

        checkpoint = save_model_folder(tmp_path / "checkpoint", tiny_encoder(context_size=0))
        code, line = run(tmp_path / "none", tmp_path / "export")
        assert code == 2 and re.search(r"--checkpoint .*none: no config\.json there; give the folder of one", line)
        code, line = run(minilm_folder(), tmp_path / "export")
        assert code == 2 and "not the configuration of a trained model" in line
        code, line = run(checkpoint, checkpoint)
        assert code == 2 and "is not an export" in line
        code, line = run(checkpoint, checkpoint / "config.json" / "export")
        assert code == 2 and "config.json" in line
        (checkpoint / "model.safetensors").write_bytes(b"torn")
        code, line = run(checkpoint, tmp_path / "export")
        assert code == 4 and "model.safetensors: damaged" in line
        assert not (tmp_path / "export").exists()

    def test_damaged_files_are_named(self, tmp_path: Path) -> None:
        for name, read in (("state.json", read_prompts), ("context.json", read_documents)):
            (tmp_path / name).write_text("{")
            with pytest.raises(IntegrityError, match=f"{name}: cannot be read"):
                read(tmp_path)
