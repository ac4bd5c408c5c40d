"""A trained encoder → a folder that sentence-transformers loads, without this project installed.

python -m hardbatch.trainer.export --checkpoint DIR --output DIR

config.json, model.safetensors, tokenizer files    the model, readable by `hardbatch.trainer.model.load_encoder` too
modules.json, config_sentence_transformers.json    what sentence-transformers reads: the module, the prompts
sentence_module.py, model.py, tokens.py            copies of this project's own: what it computes is written once
README.md                                          how to load and use it
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

from hardbatch.pipeline.artifacts.artifact import MANIFEST, verify_artifact
from hardbatch.pipeline.artifacts.faults import fault_point
from hardbatch.pipeline.artifacts.files import as_user_error, fsync_path, temporary_name
from hardbatch.pipeline.artifacts.lock import lock
from hardbatch.pipeline.errors import ConfigError, HardbatchError, IntegrityError, NoSpaceError
from hardbatch.trainer.batch import Tokenizer, load_tokenizer
from hardbatch.trainer.model import CONFIG_KEY, Encoder, load_encoder
from hardbatch.trainer.replace import replace_folder, sweep

CODE_FILES = ("sentence_module.py", "model.py", "tokens.py")
_MODULES = "modules.json"
_SENTENCE_CONFIG = "config_sentence_transformers.json"


def export_model(
    encoder: Encoder,
    tokenizer_folder: Path,
    output: Path,
    *,
    prompts: dict[str, str],
    trained_on: str | None = None,
) -> Path:
    """Writes the export to the folder `output`, which appears whole or not at all, and returns it.

    `prompts` has `query` and `document` at least, each put before a text as it is; `trained_on` is a line for the
    README. An earlier export is replaced, and is there until the new one is. Raises ConfigError where `output` is
    anything else, or cannot be written, NoSpaceError where the disk is full, LockedError where another process writes
    there.
    """
    from transformers import AutoTokenizer

    from hardbatch.trainer.sentence_module import (
        ContextualModule,  # late: sentence-transformers takes seconds to import
    )

    assert {"query", "document"} <= prompts.keys(), "the two prompts that users name"
    staging = temporary_name(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with lock(output.parent / f".{output.name}.lock"):
            sweep(output)
            refuse_foreign(output)
            staging.mkdir()
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
            ContextualModule(encoder, tokenizer).save(staging)
            for name in CODE_FILES:
                shutil.copyfile(Path(__file__).with_name(name), staging / name)
            for name, content in (
                (_MODULES, [{"idx": 0, "name": "0", "path": "", "type": "sentence_module.ContextualModule"}]),
                (_SENTENCE_CONFIG, _sentence_config(prompts)),
            ):
                (staging / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            (staging / "README.md").write_text(_readme(encoder, output.name, prompts, trained_on), encoding="utf-8")
            for path in [*staging.iterdir(), staging]:
                fsync_path(path)
            fault_point("export.written")
            replace_folder(staging, output)
    except OSError as error:
        told = as_user_error(error) or ConfigError(f"{output}: cannot be written: {error.strerror or error}")
        raise told from None
    except Exception as error:  # those of safetensors and of tokenizers have no errno
        if "No space left" not in str(error) and "os error 28" not in str(error):
            raise
        raise NoSpaceError(f"no space left while writing {output}; free some and export again") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output


def open_model(folder: Path, flag: str) -> tuple[Encoder, Tokenizer]:
    """The encoder of a checkpoint or an export, in evaluation mode, and its tokenizer; `flag` names it in messages.

    Raises ConfigError where `folder` holds none, IntegrityError where its files are damaged.
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
    limits = {"max_length_tokens": encoder.config.max_length_tokens, "vocab_size": encoder.backbone_config.vocab_size}
    return encoder, load_tokenizer(folder, **limits)


def read_prompts(folder: Path) -> dict[str, str]:
    """The prompts by name of a checkpoint or an export; `query` and `document` are always there, empty by default."""
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
    """Runs `command`; a user's mistake ends in one line and its exit code."""
    try:
        command()
    except HardbatchError as error:
        print(f"trainer: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def main(arguments: Sequence[str]) -> int:
    """Exports a checkpoint; prints the folder. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hardbatch.trainer.export", description="Exports a checkpoint.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, new or an earlier export")
    parser.add_argument("--query-prompt", help="text before a query; default: as in training")
    parser.add_argument("--document-prompt", help="text before a document; default: as in training")
    options = parser.parse_args(arguments)

    def export() -> None:
        encoder, _ = open_model(options.checkpoint, "--checkpoint")
        given = {"query": options.query_prompt, "document": options.document_prompt}
        prompts = read_prompts(options.checkpoint) | {name: text for name, text in given.items() if text is not None}
        print(export_model(encoder, options.checkpoint, options.output, prompts=prompts))

    return exit_code_of(export)


def refuse_foreign(output: Path) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        ours = CONFIG_KEY in json.loads((output / "config.json").read_bytes()) and (output / _MODULES).is_file()
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise ConfigError(f"{output}: is there, and is no earlier export; give a new folder")


def _sentence_config(prompts: dict[str, str]) -> dict[str, Any]:
    versions = {"pytorch": "torch", "sentence_transformers": "sentence-transformers", "transformers": "transformers"}
    return {
        "model_type": "SentenceTransformer",
        "__version__": {name: importlib.metadata.version(package) for name, package in versions.items()},
        "requirements": {"sentence-transformers": ">=5.4"},  # the first with the module class that we extend
        "prompts": prompts,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }


_README = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, contextual-document-embeddings]
---
# {name}

{kind} on a {backbone} backbone, embeddings of width {width}, texts of up to {max_length} tokens.{trained_on}

```python
{code}
```
{notes}
The folder holds the code of its one module; `trust_remote_code=True` says that you let it run.
Needs sentence-transformers 5.4 or newer. Prompts: {prompts}.
"""
_CONTEXT_CODE = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}", trust_remote_code=True)
context = model.encode(minicorpus, prompt_name="document")  # first stage
documents = model.encode(corpus, prompt_name="document", dataset_embeddings=context)
queries = model.encode(questions, prompt_name="query", dataset_embeddings=context)
scores = model.similarity(queries, documents)"""
_CONTEXT_NOTES = """
`minicorpus` is up to {size} documents drawn from the corpus that is searched; the same context goes with its documents
and queries. Without a corpus pass an empty context, `np.empty((0, {width}))`. Without `dataset_embeddings` you get the
vectors of the first stage, which are good for nothing but a context.
"""
_PLAIN_CODE = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}", trust_remote_code=True)
documents = model.encode(corpus, prompt_name="document")
queries = model.encode(questions, prompt_name="query")
scores = model.similarity(queries, documents)"""


def _readme(encoder: Encoder, name: str, prompts: dict[str, str], trained_on: str | None) -> str:
    config, backbone = encoder.config, encoder.backbone_config
    contextual = config.context_size > 0
    return _README.format(
        name=name,
        kind=f"A contextual encoder of two stages, J = {config.context_size}," if contextual else "A biencoder",
        backbone=backbone.model_type,
        width=backbone.hidden_size,
        max_length=config.max_length_tokens,
        trained_on=f" Trained on {trained_on}." if trained_on else "",
        code=(_CONTEXT_CODE if contextual else _PLAIN_CODE).format(name=name),
        notes=_CONTEXT_NOTES.format(size=config.context_size, width=backbone.hidden_size) if contextual else "",
        prompts=", ".join(f"`{key}` = `{json.dumps(text, ensure_ascii=False)}`" for key, text in prompts.items()),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
