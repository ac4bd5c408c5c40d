"""The documents of an export's default context: drawn from shards or from a collection, by seed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hardbatch.pipeline.artifacts.collection import is_collection
from hardbatch.pipeline.errors import IntegrityError
from hardbatch.trainer.collection import load_documents
from hardbatch.trainer.draws import derive_seed
from hardbatch.trainer.shards import Shards, open_shards

CONTEXT_FILE = "context.json"  # of checkpoints and exports


@dataclass(frozen=True, kw_only=True)
class ContextDocuments:
    """Up to J documents, without their prompt, and a sentence that says where they come from."""

    documents: tuple[str, ...] = ()
    origin: str = "none: plain encode() uses the null context"

    def to_bytes(self) -> bytes:
        """The content of a checkpoint's `context.json`."""
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()


def draw_from_folder(folder: Path, size: int, *, seed: int) -> ContextDocuments:
    """Draws `size` documents from a folder of shards, or from one that holds a `corpus.parquet`.

    Raises:
        ConfigError: The folder holds neither.
        InputError: The corpus cannot be read.
        IntegrityError: The shards are damaged.
    """
    if not is_collection(folder) and not (folder / "corpus.parquet").is_file():
        return draw_from_shards(open_shards(folder), size, seed=seed)
    corpus = load_documents(folder)
    rows = _draw(len(corpus), size, seed)
    documents = tuple(dict.fromkeys(corpus[row] for row in rows))
    return ContextDocuments(documents=documents, origin=f"drawn from the corpus {folder.resolve().name}, seed {seed}")


def draw_from_shards(shards: Shards, size: int, *, seed: int) -> ContextDocuments:
    """Draws `size` of the documents of all pairs of one packing; copies are left out.

    Raises:
        IntegrityError: A batch that is read for it is damaged.
    """
    packings = shards.index.packings_I
    batches = np.flatnonzero(packings == packings.min())
    drawn = np.sort(_draw(len(batches) * shards.batch_size, size, seed))

    documents: list[str] = []
    for batch in np.unique(drawn // shards.batch_size):
        texts = shards.read_batch(int(batches[batch]), 0).documents
        slots = drawn[drawn // shards.batch_size == batch] % shards.batch_size
        documents += [texts[slot] for slot in slots]
    return ContextDocuments(
        documents=tuple(dict.fromkeys(documents)),
        origin=f"drawn from the shards {shards.key}, seed {seed}",
    )


def read_documents(folder: Path) -> ContextDocuments:
    """The context documents of the checkpoint or export in `folder`; none if it was made without.

    Raises:
        IntegrityError: Its `context.json` is damaged.
    """
    path = folder / CONTEXT_FILE
    if not path.is_file():
        return ContextDocuments()
    try:
        content = json.loads(path.read_bytes())
        return ContextDocuments(documents=tuple(content["documents"]), origin=content["origin"])
    except (OSError, ValueError, KeyError, TypeError):
        raise IntegrityError(f"{path}: cannot be read; export the checkpoint again") from None


def _draw(population: int, size: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(derive_seed(seed, "default_context"))
    return generator.choice(population, min(size, population), replace=False)
