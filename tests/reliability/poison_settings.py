"""Kinds of poison: manifests, settings and models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.reliability.poison import GOOD, Kind, json_lines

USUAL = 'corpus = "poison"\n[[dataset]]\nname = "numbers"\nsource = "pairs.jsonl"\n'
LEXICAL = '[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\n'
PICKLE = b"cos\nsystem\n(S'false'\ntR."


def good_file(folder: Path) -> None:
    (folder / "pairs.jsonl").write_bytes(json_lines())


def manifest(kind: str, content: str | bytes, *says: str) -> Kind:
    """A manifest of this content, which is refused with these words."""
    raw = content if isinstance(content, bytes) else content.encode()
    return Kind(name=kind, write=good_file, manifest=raw, code=2, says=says)


def stub_model(**files: bytes) -> Callable[[Path], object]:
    """Makes a folder that looks like a model until it is refused; `__` in a name stands for a folder or a dot."""

    def write(folder: Path) -> None:
        good_file(folder)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_bytes(b"{}")
        for name, content in files.items():
            path = folder / "model" / name.replace("__", ".").replace("_in_", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    return write


def tiny_model(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """A tiny model at `model`, changed, and good pairs, two of them with the word poison."""

    def write(folder: Path) -> None:
        from tests import models

        models.save_gtr(folder / "whole")
        change(folder / "whole")
        odd = [b'{"query": "poison one", "document": "d"}', b'{"query": "q", "document": "poison two"}']
        (folder / "pairs.jsonl").write_bytes(json_lines(*odd))

    return write


def without_numbers(whole: Path) -> None:
    from tests import models

    models.poison(whole, whole.with_name("model"), "poison")


def pickled(whole: Path) -> None:
    shutil.copytree(whole, whole.with_name("model"))
    (whole.with_name("model") / "model.safetensors").write_bytes(PICKLE)


FOREIGN = b'[{"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}]'
SETTINGS = [
    *(
        manifest(f"the name {name} for a {what}", (USUAL + LEXICAL).replace(old, f'{key} = "{name}"'), key, "pattern")
        for what, key, old in (("domain", "name", 'name = "numbers"'), ("corpus", "corpus", 'corpus = "poison"'))
        for name in ("../x", "a/b", "..")
    ),
    manifest(
        "a domain named with a command of a terminal",
        (USUAL + LEXICAL).replace("numbers", "\\u001b[31m"),
        "pattern",
        "x1b[31m",
    ),
    manifest(
        "../ to an evaluation",
        USUAL + LEXICAL + '[ingest]\ndecontaminate = ["../x"]\n',
        "ingest.decontaminate",
        "'../x' leads out of",
    ),
    manifest("an unknown key", USUAL + "[pack]\nbatchsize = 8\n", "pack.batchsize", "batch_size"),
    manifest("a manifest that is not UTF-8", b"\xff\xfe\x00", "poison.toml", "UTF-8"),
    manifest("a manifest that is not TOML", b'corpus = "\x1b[31m', "poison.toml", "not valid TOML"),
    manifest("an empty manifest", b"", "corpus: is required"),
    Kind(
        name="a setting that is not a number",
        write=good_file,
        arguments=("--set", "pack.batch_size=many"),
        code=2,
        says=("--set", "pack.batch_size", "'many'"),
    ),
    Kind(name="../ to a model", write=good_file, model="../model", code=2, says=("'../model' leads out", "--set")),
    Kind(name="an absolute model", write=good_file, model="/model", code=2, says=("'/model' leads out", "--set")),
    Kind(name="a model of 5,000 letters", write=good_file, model="m" * 5_000, code=2, says=("model 'mmm",)),
    Kind(
        name="a model in the home of nobody",
        write=good_file,
        arguments=("--set", "embed.model=~nobody-here/x"),
        code=2,
        says=("~nobody-here/x",),
    ),
    Kind(
        name="pickled weights",
        write=stub_model(pytorch_model__bin=PICKLE),
        model="model",
        code=2,
        says=("no .safetensors weights", "pickled weights are not loaded"),
    ),
    Kind(
        name="pickled weights of an adapter",
        write=stub_model(model__safetensors=b"", one_in_adapter_model__bin=PICKLE),
        model="model",
        code=2,
        says=("adapter_model.bin", "pickled weights are not loaded"),
    ),
    Kind(
        name="a model with code of its own",
        write=stub_model(model__safetensors=b"", modules__json=FOREIGN, evil__py=b"raise SystemExit(99)\n"),
        model="model",
        code=2,
        says=("evil.Evil", "embed.trust_remote_code"),
    ),
    Kind(
        name="a pickle named .safetensors",
        write=tiny_model(pickled),
        model="model",
        code=2,
        says=("model 'model'", "cannot be loaded"),
        is_long=True,
    ),
    Kind(
        name="NaN vectors", write=tiny_model(without_numbers), model="model", rows=GOOD + 2, no_vector=2, is_long=True
    ),
]
