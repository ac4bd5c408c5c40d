"""Hard batches for retrieval models.

`build_batches` makes them in memory, `run_corpus` in files, which `load_shards` and `BatchStream` read.
`pack_embeddings` and `false_negative_mask` work on arrays alone.

Names are loaded when they are first used, so that importing this package is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hardbatch.batches import build_batches
    from hardbatch.embeddings import false_negative_mask, pack_embeddings
    from hardbatch.pipeline.run import run_corpus
    from hardbatch.trainer.shards import load_shards
    from hardbatch.trainer.stream import BatchStream

__version__ = "0.1.0"
__all__ = [
    "BatchStream",
    "__version__",
    "build_batches",
    "false_negative_mask",
    "load_shards",
    "pack_embeddings",
    "run_corpus",
]

_HOMES = {
    "BatchStream": "hardbatch.trainer.stream",
    "build_batches": "hardbatch.batches",
    "false_negative_mask": "hardbatch.embeddings",
    "load_shards": "hardbatch.trainer.shards",
    "pack_embeddings": "hardbatch.embeddings",
    "run_corpus": "hardbatch.pipeline.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hardbatch' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
