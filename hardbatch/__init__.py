"""Hard batches for retrieval models: make them with `run_corpus`, read them with `BatchStream` or `load_shards`.

Names are loaded when they are first used, so that importing this package is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hardbatch.pipeline.run import run_corpus
    from hardbatch.trainer.shards import load_shards
    from hardbatch.trainer.stream import BatchStream

__version__ = "0.1.0"
__all__ = ["BatchStream", "__version__", "load_shards", "run_corpus"]

_HOMES = {
    "BatchStream": "hardbatch.trainer.stream",
    "load_shards": "hardbatch.trainer.shards",
    "run_corpus": "hardbatch.pipeline.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hardbatch' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
