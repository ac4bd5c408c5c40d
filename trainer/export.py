"""Exports a trained encoder to a folder that sentence-transformers loads without this project.

    python -m hardbatch.trainer.export --checkpoint DIR --output DIR

    contextual    config.json, model.safetensors, tokenizer; context.json, context.safetensors: the
                  default context; sentence_module.py, model.py, attention.py, tokens.py: copies
                  of our code
    biencoder     config.json, model.safetensors, tokenizer, 1_Pooling: stock modules, no code
    both          modules.json, config_sentence_transformers.json (prompts), README.md (model card)

`hardbatch.trainer.model.load_encoder` reads both kinds, so --init-from takes either.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from hardbatch.pipeline.artifacts.artifact import MANIFEST, verify_artifact
from hardbatch.pipeline.artifacts.faults import fault_point
from hardbatch.pipeline.artifacts.files import as_user_error, fsync_path, temporary_name, user_path
from hardbatch.pipeline.artifacts.lock import lock
from hardbatch.pipeline.errors import ConfigError, HardbatchError, IntegrityError, NoSpaceError
from hardbatch.trainer.batch import Tokenizer, load_tokenizer
from hardbatch.trainer.context import ContextDocuments, draw_from_folder, read_documents
from hardbatch.trainer.embed import Embedder
from hardbatch.trainer.model import CONFIG_KEY, Encoder, backbone_options, load_encoder
from hardbatch.trainer.replace import replace_folder, sweep

CODE_FILES = ("sentence_module.py", "model.py", "attention.py", "tokens.py")
_MODULES = "modules.json"
_SENTENCE_CONFIG = "config_sentence_transformers.json"
_POOLING = "1_Pooling"


def export_model(
    encoder: Encoder,
    tokenizer_folder: Path,
    output: Path,
    *,
    prompts: dict[str, str],
    context: ContextDocuments | None = None,
    convention: str = "default",
    trained_on: str | None = None,
) -> Path:
    """Writes an export to the folder `output`, whole or not at all; an earlier export is replaced.

    Args:
        encoder: What is exported: contextual, or a biencoder.
        tokenizer_folder: A folder that holds its tokenizer.
        output: A new folder, an empty one or an earlier export.
        prompts: By name, each put before a text as it is; `query` and `document` are required.
        context: Documents of the default context of a contextual encoder; None is no context.
        convention: What plain `encode` does, "default" or "cde"; see `sentence_module`.
        trained_on: What the README says after "Trained on".

    Returns:
        `output`.

    Raises:
        ConfigError: `output` holds something else, or cannot be written.
        NoSpaceError: The disk is full; the earlier export is as it was.
        LockedError: Another process exports to this folder.
    """
    assert {"query", "document"} <= prompts.keys(), "the two prompts that users name"
    staging = temporary_name(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with lock(output.parent / f".{output.name}.lock"):
            sweep(output)
            refuse_foreign(output)
            staging.mkdir()
            if encoder.config.context_size:
                context = context or ContextDocuments()
                _write_contextual(staging, encoder, tokenizer_folder, prompts, context, convention)
            else:
                _write_biencoder(staging, encoder, tokenizer_folder)
            _write_json(staging / _SENTENCE_CONFIG, _sentence_config(encoder, prompts))
            readme = _readme(encoder, output.name, prompts, context, convention, trained_on)
            (staging / "README.md").write_text(readme, encoding="utf-8")

            for path in [*staging.rglob("*"), staging]:
                fsync_path(path)
            fault_point("export.written")
            replace_folder(staging, output)
    except OSError as error:
        reason = error.strerror or error
        raise as_user_error(error) or ConfigError(f"{output}: cannot be written: {reason}") from None
    except Exception as error:  # errors of safetensors and of tokenizers have no errno
        if "No space left" not in str(error) and "os error 28" not in str(error):
            raise
        raise NoSpaceError(f"no space left while writing {output}; free some and export again") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output


def open_model(folder: Path, flag: str) -> tuple[Encoder, Tokenizer]:
    """Loads the encoder of a checkpoint or an export, in evaluation mode, and its tokenizer.

    Args:
        folder: The folder of one checkpoint or of an export.
        flag: The option that named the folder, for messages.

    Raises:
        ConfigError: The folder holds neither.
        IntegrityError: Its files are damaged.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ConfigError(f"{flag} {folder}: no {name} there; give the folder of one checkpoint or of an export")
    if (folder / MANIFEST).is_file() and (faults := verify_artifact(folder)):
        raise IntegrityError(f"{flag} {folder}: damaged", *faults)
    try:
        encoder = load_encoder(folder)
    except SafetensorError as error:
        raise IntegrityError(f"{flag} {folder / 'model.safetensors'}: damaged ({error})") from None
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"{flag} {folder}: {' '.join(str(error).split())[:300]}") from None
    return encoder, _tokenizer_of(encoder, folder)


def read_prompts(folder: Path) -> dict[str, str]:
    """The prompts by name of a checkpoint or an export. `query` and `document` are empty by default.

    Raises:
        IntegrityError: The file that holds them is damaged.
    """
    prompts: dict[str, str] = {}
    for name in ("state.json", _SENTENCE_CONFIG):
        path = folder / name
        if path.is_file():
            try:
                prompts = json.loads(path.read_bytes()).get("prompts", {})
            except (OSError, ValueError, AttributeError):
                raise IntegrityError(f"{path}: cannot be read; export the checkpoint again") from None
            break
    return {"query": "", "document": "", **prompts}


def exit_code_of(command: Callable[[], None]) -> int:
    """Runs `command`; an error that the user can fix ends in one line and its exit code."""
    try:
        command()
    except HardbatchError as error:
        print(f"trainer: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def main(arguments: Sequence[str]) -> int:
    """Exports a checkpoint and prints the folder. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hardbatch.trainer.export",
        description="Exports a checkpoint for sentence-transformers.",
    )
    add = parser.add_argument
    add("--checkpoint", type=user_path, required=True, help="folder of a checkpoint")
    add("--output", type=user_path, required=True, help="folder to write: new, or an earlier export")
    add("--query-prompt", help="text before a query; default: as in training")
    add("--document-prompt", help="text before a document; default: as in training")
    add(
        "--context-from",
        type=user_path,
        metavar="DIR",
        help="folder of shards, or folder with a corpus, to draw the default context from; "
        "default: the documents that training drew from its shards",
    )
    add("--seed", type=int, default=0, help="draws from --context-from; default: 0")
    add(
        "--export-convention",
        choices=("default", "cde"),
        default="default",
        help="what encode() does without dataset_embeddings: default embeds with the default context, "
        "cde returns first-stage vectors as cde-small does",
    )
    options = parser.parse_args(arguments)

    def export() -> None:
        encoder, _ = open_model(options.checkpoint, "--checkpoint")
        given = {"query": options.query_prompt, "document": options.document_prompt}
        prompts = read_prompts(options.checkpoint)
        prompts |= {name: text for name, text in given.items() if text is not None}

        size = encoder.config.context_size
        if size and options.context_from is not None:
            context = draw_from_folder(options.context_from, size, seed=options.seed)
        else:
            context = read_documents(options.checkpoint)
        if size and not context.documents:
            print(
                f"trainer: {options.checkpoint} has no context documents, so plain encode() will use no "
                "context; give --context-from a folder of shards or of a corpus for a better one",
                file=sys.stderr,
            )
        print(
            export_model(
                encoder,
                options.checkpoint,
                options.output,
                prompts=prompts,
                context=context,
                convention=options.export_convention,
            )
        )

    return exit_code_of(export)


def refuse_foreign(output: Path) -> None:
    """Raises ConfigError if `output` holds anything but an earlier export."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        ours = CONFIG_KEY in json.loads((output / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours or not (output / _MODULES).is_file():
        raise ConfigError(f"{output}: already exists and is not an export; give a new folder")


def _write_contextual(
    folder: Path,
    encoder: Encoder,
    tokenizer_folder: Path,
    prompts: dict[str, str],
    context: ContextDocuments,
    convention: str,
) -> None:
    from transformers import AutoTokenizer

    # sentence-transformers takes seconds to import, so it is imported here
    from hardbatch.trainer.sentence_module import ContextualModule, DefaultContext

    embedder = Embedder(
        encoder=encoder,
        tokenizer=_tokenizer_of(encoder, tokenizer_folder),
        document_prompt=prompts["document"],
        split_over_ranks=False,
    )
    default_context = DefaultContext(
        documents=context.documents,
        origin=context.origin,
        vectors_MH=embedder.context(context.documents),
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    ContextualModule(encoder, tokenizer, default_context, convention).save(folder)
    for name in CODE_FILES:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_module.ContextualModule"}
    _write_json(folder / _MODULES, [module])


def _write_biencoder(folder: Path, encoder: Encoder, tokenizer_folder: Path) -> None:
    """Transformer, Pooling and Normalize of sentence-transformers, under the names of its older versions too."""
    from transformers import AutoTokenizer

    backbone = encoder.second_stage_model.backbone
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", encoder.config_dict())
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    tokenizer.model_max_length = encoder.config.max_length_tokens
    tokenizer.save_pretrained(folder)

    paths = {"Transformer": "", "Pooling": _POOLING, "Normalize": "2_Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(paths.items())
    ]
    _write_json(folder / _MODULES, modules)
    model_args = backbone_options(encoder.backbone_config, "sdpa")  # a pooler would be drawn at random
    _write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": encoder.config.max_length_tokens, "model_args": model_args},
    )
    for path in (_POOLING, "2_Normalize"):
        (folder / path).mkdir()
    pooling = {
        "word_embedding_dimension": encoder.backbone_config.hidden_size,
        "pooling_mode_mean_tokens": True,
        "include_prompt": encoder.config.pool_prompt,
    }
    _write_json(folder / _POOLING / "config.json", pooling)


def _tokenizer_of(encoder: Encoder, folder: Path) -> Tokenizer:
    return load_tokenizer(
        folder,
        max_length_tokens=encoder.config.max_length_tokens,
        vocab_size=encoder.backbone_config.vocab_size,
    )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _sentence_config(encoder: Encoder, prompts: dict[str, str]) -> dict[str, Any]:
    packages = {
        "pytorch": "torch",
        "sentence_transformers": "sentence-transformers",
        "transformers": "transformers",
    }
    config: dict[str, Any] = {
        "model_type": "SentenceTransformer",
        "__version__": {name: importlib.metadata.version(package) for name, package in packages.items()},
        "prompts": prompts,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    if encoder.config.context_size:  # 5.4 is the first version with the class that our module extends
        config["requirements"] = {"sentence-transformers": ">=5.4"}
    return config


_README = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction{tags}]
---
# {name}

{kind}{trained_on}

- Embeddings: {width} dimensions, normalised, compared by cosine similarity
- Texts: up to {max_length} tokens, prompt included; longer texts are cut
- Prompts: {prompts}

{usage}
"""
_BIENCODER_USAGE = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
documents = model.encode(corpus, prompt_name="document")
queries = model.encode(questions, prompt_name="query")
scores = model.similarity(queries, documents)
```"""
_CONTEXTUAL_USAGE = """## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}", trust_remote_code=True)
documents = model.encode(corpus, prompt_name="document")
queries = model.encode(questions, prompt_name="query")
scores = model.similarity(queries, documents)
```

`encode` reads each text together with a default context of {num_context} documents ({origin}).
`context.json` lists these documents.

## Use with a context of your corpus

A context that comes from the searched corpus tells the model more than the default context. Draw up
to {size} of its documents, and pass the same context for documents and queries:

```python
context = model.encode(minicorpus, prompt_name="document", first_stage=True)
documents = model.encode(corpus, prompt_name="document", dataset_embeddings=context)
queries = model.encode(questions, prompt_name="query", dataset_embeddings=context)
scores = model.similarity(queries, documents)
```

Only compare embeddings that were made with the same context. `dataset_embeddings=context[:0]` is no
context at all.

## Tools that follow cde-small

After `model[0].convention = "cde"`, `encode` without `dataset_embeddings` returns first-stage
vectors, as cde-small does. To make that permanent, change `"convention"` in `context.json`.

This folder holds the code of its module, and `trust_remote_code=True` allows it to run. It needs
sentence-transformers 5.4 or newer and nothing else."""

_CDE_USAGE = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}", trust_remote_code=True)
context = model.encode(minicorpus, prompt_name="document")  # first-stage vectors
documents = model.encode(corpus, prompt_name="document", dataset_embeddings=context)
queries = model.encode(questions, prompt_name="query", dataset_embeddings=context)
scores = model.similarity(queries, documents)
```

`minicorpus` is up to {size} documents drawn from the corpus that is searched. This export follows
cde-small: without `dataset_embeddings`, `encode` returns first-stage vectors, which are not suitable
for search. After `model[0].convention = "default"` it embeds with a default context of {num_context}
documents instead ({origin}).

This folder holds the code of its module, and `trust_remote_code=True` allows it to run. It needs
sentence-transformers 5.4 or newer and nothing else."""


def _readme(
    encoder: Encoder,
    name: str,
    prompts: dict[str, str],
    context: ContextDocuments | None,
    convention: str,
    trained_on: str | None,
) -> str:
    config, backbone = encoder.config, encoder.backbone_config
    if config.context_size:
        assert context is not None
        kind = (
            f"A two-stage contextual encoder on a {backbone.model_type} backbone. It reads up to "
            f"{config.context_size} context documents beside each text."
        )
        usage = (_CDE_USAGE if convention == "cde" else _CONTEXTUAL_USAGE).format(
            name=name,
            size=config.context_size,
            num_context=len(context.documents),
            origin=context.origin,
        )
    else:
        kind = f"A biencoder on a {backbone.model_type} backbone."
        usage = _BIENCODER_USAGE.format(name=name)
    shown = (f"`{key}` = `{json.dumps(text, ensure_ascii=False)}`" for key, text in prompts.items())
    return _README.format(
        tags=", contextual-document-embeddings" if config.context_size else "",
        name=name,
        kind=kind,
        trained_on=f" Trained on {trained_on}." if trained_on else "",
        width=backbone.hidden_size,
        max_length=config.max_length_tokens,
        prompts=", ".join(shown),
        usage=usage,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
