"""What `build_batches` is given: a dataset of any kind, and models that embed its texts.

Shape letters: N texts of a side, D dimension.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.files import DigestCache
from hardbatch.pipeline.config import EmbedConfig, IngestConfig
from hardbatch.pipeline.models.encoders import open_encoder
from hardbatch.pipeline.models.resolve import resolve_model
from hardbatch.pipeline.sources.files import RawRow
from hardbatch.pipeline.stages.ingest import clean_row

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_TEXTS_PER_BLOCK = 8_192


def as_frame(dataset: Any) -> pl.DataFrame:
    """Returns the dataset as a polars frame; raises TypeError if it is of a kind that cannot be read."""
    if isinstance(dataset, pl.DataFrame):
        return dataset
    if isinstance(dataset, pl.LazyFrame):
        return dataset.collect()
    if isinstance(dataset, tuple | list) and len(dataset) == 2 and not any(isinstance(side, str) for side in dataset):
        queries, documents = map(list, dataset)
        if len(queries) != len(documents):
            raise ValueError(f"two lists must be of the same length, given {len(queries)} and {len(documents)}")
        return _table({"anchor": queries, "positive": documents}.items())
    if isinstance(dataset, Mapping):
        if any(hasattr(value, "column_names") for value in dataset.values()):
            raise TypeError(f"dataset has the splits {', '.join(dataset)}; give one of them, such as dataset['train']")
        return _table(dataset.items())
    if hasattr(dataset, "to_polars"):  # datasets.Dataset
        found: pl.DataFrame = dataset.to_polars()
        return found
    if type(dataset).__module__.split(".")[0] == "pandas" and type(dataset).__name__ == "DataFrame":
        return _table(dataset.items())
    raise TypeError(
        f"dataset is a {type(dataset).__name__}; give a datasets.Dataset, a polars or pandas frame, a mapping of "
        "columns, or two lists (queries, documents). Other things become one of these: a list of pairs by "
        "tuple(zip(*pairs)), a list of dictionaries by polars.DataFrame(rows), a file by polars.read_parquet(path)"
    )


def _table(columns: Iterable[tuple[Any, Iterable[Any]]]) -> pl.DataFrame:
    """Columns of Python values as a polars frame."""
    return pl.DataFrame([_series(str(name), list(values)) for name, values in columns])


def _series(name: str, values: list[Any]) -> pl.Series:
    # polars would write numbers among texts as texts, so the NaN that pandas has for a missing text became "NaN".
    if any(isinstance(value, str) for value in values):
        values = [value if isinstance(value, str) else None for value in values]
    return pl.Series(name, values, strict=False)


def column_names(frame: pl.DataFrame, anchor: str | None, positive: str | None) -> tuple[str, str]:
    """Finds the columns of queries and documents; raises ValueError if one is missing or does not hold texts."""
    names = frame.columns
    for option, name in (("anchor_column_name", anchor), ("positive_column_name", positive)):
        if name is not None and name not in names:
            raise ValueError(f"{option}: the dataset has no column {name!r}; its columns are {', '.join(names)}")
    if len(names) < 2:
        raise ValueError(f"a dataset of pairs needs two columns, given {', '.join(names) or 'none'}")
    query = anchor or next(name for name in names if name != positive)
    document = positive or next(name for name in names if name != query)
    for name in (query, document):
        if frame[name].dtype not in (pl.String, pl.Categorical, pl.Enum, pl.Null, pl.Object):
            raise ValueError(
                f"column {name!r} holds {frame[name].dtype}, not texts; name the columns of queries and documents with "
                f"anchor_column_name and positive_column_name (the columns are {', '.join(names)})"
            )
    return query, document


def usable_rows(queries: Sequence[Any], documents: Sequence[Any]) -> tuple[Array, tuple[list[str], list[str]], dict]:
    """Sorts out the rows that cannot be used, by the rules of ingest.

    Returns:
        The other rows (int64), their queries and documents, and by reason the rows that cannot be used (int64 each).
    """
    limit = IngestConfig().max_characters
    rows: list[int] = []
    texts: tuple[list[str], list[str]] = ([], [])
    left: dict[str, list[int]] = {}
    seen: set[tuple[str, str]] = set()
    for row, (query, document) in enumerate(zip(queries, documents, strict=True)):
        clean = clean_row(RawRow(row, query, document, None), limit)
        pair = clean.query, clean.document
        reason = clean.reason or ("duplicate_pair" if pair in seen else None)
        if reason is not None:
            left.setdefault(reason, []).append(row)
            continue
        seen.add(pair)
        rows.append(row)
        for side, text in zip(texts, pair, strict=True):
            side.append(text)
    leftover = {reason: np.array(numbers) for reason, numbers in left.items()}
    return np.array(rows, dtype=np.int64), texts, leftover


def reasons_text(leftover: Mapping[str, Array]) -> str:
    """How many rows there are for each reason, for example `3 empty, 1 duplicate_pair`."""
    return ", ".join(f"{len(rows)} {reason}" for reason, rows in leftover.items() if len(rows)) or "none"


def distinct_texts(texts: list[str]) -> tuple[list[str], Array]:
    """The distinct texts in order of first appearance, and the number of each text among them (int64)."""
    number: dict[str, int] = {}
    return_numbers = np.array([number.setdefault(text, len(number)) for text in texts], dtype=np.int64)
    return list(number), return_numbers


def embed_texts(
    model: str | SentenceTransformer,
    role: str,
    texts: tuple[list[str], list[str]],
    prompts: tuple[str | None, str | None],
    *,
    show: bool,
) -> tuple[Array, Array]:
    """Embeds queries and documents.

    Args:
        model: A SentenceTransformer, or a name as `embed.model` takes it.
        role: `cluster` or `surrogate`: the prompts of a named model may depend on it.
        texts: The queries and the documents.
        prompts: What is put before each of them; None: the model's own.
        show: Whether to show a progress bar.

    Returns:
        The vectors of both (N × D), of unit length and float16, as in the `vectors` artifact.
    """
    if not isinstance(model, str):
        if not hasattr(model, "encode_query"):
            raise TypeError(f"a model is a SentenceTransformer or a name, given a {type(model).__name__}")
        encoders = model.encode_query, model.encode_document
        query_vectors, document_vectors = (
            encode(
                side,
                normalize_embeddings=True,
                show_progress_bar=show,
                **({} if prompt is None else {"prompt": prompt}),
            )
            for encode, side, prompt in zip(encoders, texts, prompts, strict=True)
        )
        return query_vectors.astype(np.float16), document_vectors.astype(np.float16)

    queries, documents = (prompt or "" for prompt in prompts)
    config = EmbedConfig(model=model, query_prompt=queries, document_prompt=documents)
    if role == "surrogate":
        config = EmbedConfig(surrogate_model=model)
    spec = resolve_model(config, role, Path(), DigestCache(Path(os.devnull)))
    encoder = open_encoder(spec, [texts[1]])
    sides = []
    for side, prompt in zip(texts, (spec.query_prompt, spec.document_prompt), strict=True):
        blocks = [side[start : start + _TEXTS_PER_BLOCK] for start in range(0, len(side), _TEXTS_PER_BLOCK)]
        vectors = [
            encoder.encode(encoder.tokenize([prompt + text for text in block])) for block in _shown(blocks, show)
        ]
        sides.append(np.concatenate(vectors).astype(np.float16))
    return sides[0], sides[1]


def _shown(blocks: list[list[str]], show: bool) -> Any:
    if not show:
        return blocks
    from tqdm.auto import tqdm

    return tqdm(blocks, desc="embed", unit="block")
