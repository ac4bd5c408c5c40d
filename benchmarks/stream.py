"""BatchStream against `datasets` streaming and mosaicml-streaming, and, tokenised, against bare `tokenizers`.

    HARDBATCH_DATA=DIR python benchmarks/stream.py [--pairs 60000] [--batch-sizes 64 512] [--rounds 5]

The same rows for all: a corpus of all domains of DIR/train (generated words where HARDBATCH_DATA is unset), packed into
many part files. Ours reads batches in the order of training, that is at random, and checks the digest of each; theirs
read in the order of their files and check nothing. `datasets` reads our Parquet files, `iter(batch_size=B)`; mosaicml
reads MDS files on the disk, where a sample is a pair or a whole batch as JSON, without workers and with two. Pairs per
second are those that a loop which does nothing else can take, from the first batch on. Rounds are interleaved; ratios
are taken round by round. What is not installed is left out, with its reason.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import polars as pl
from tokenizers import Tokenizer

from hardbatch.pipeline.models.resolve import locate_model
from hardbatch.pipeline.run import run_corpus
from hardbatch.trainer.batch import load_tokenizer
from hardbatch.trainer.shards import Shards, TextBatch, open_shards
from hardbatch.trainer.stream import BatchStream

COLUMNS = ["query", "document", "query_prompt", "document_prompt", "equivalent_slots"]
SETTINGS = '[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\n[cluster]\niterations = 3\n'
BATCHES_PER_PART = {64: 8, 512: 1}  # some hundred parts of some hundred pairs each
TOKENIZED_PAIRS = 8_192
MAX_LENGTH_TOKENS = 256
Reader = Callable[[], Iterable[int]]  # pairs of each batch, as it comes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60_000)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    tempfile.tempdir = str(folder)  # mosaicml leaves lock files there
    try:
        for batch_size in options.batch_sizes:
            shards = open_shards(build(folder, options.pairs, batch_size))
            print(
                f"B = {batch_size}: {shards.num_batches * batch_size:,} pairs in {len(shards.index.files)} part files, "
                f"{options.rounds} rounds, {os.cpu_count()} cores",
                flush=True,
            )
            readers = {"ours": ours(shards), "ours, one thread": ours(shards, num_workers=1)}
            for add in (datasets_streaming, mosaicml_streaming):
                try:
                    readers |= add(shards, folder)
                except ImportError as error:
                    print(f"  {add.__name__} left out: {error}")
            compare(readers, options.rounds)
            compare(tokenized(shards), options.rounds)
    finally:
        shutil.rmtree(folder)


def build(folder: Path, num_pairs: int, batch_size: int) -> Path:
    """Shards of about `num_pairs` pairs, made by the pipeline."""
    data = folder / "data"
    if not data.exists():
        data.mkdir()
        for name, pairs in domains(num_pairs).items():
            pairs.write_parquet(data / f"{name}.parquet")
    prompts = 'query_prompt = "search_query: "\ndocument_prompt = "search_document: "\n'
    datasets = "".join(
        f'[[dataset]]\nname = "{path.stem}"\nsource = "{path.name}"\n{prompts}' for path in sorted(data.iterdir())
    )
    per_part = BATCHES_PER_PART.get(batch_size, 4)
    packed = f"[pack]\nbatch_size = {batch_size}\n[write]\nbatches_per_part = {per_part}\n"
    manifest = folder / f"bench-{batch_size}.toml"
    manifest.write_text(f'corpus = "bench-{batch_size}"\n{SETTINGS}{packed}{datasets}')
    return run_corpus(manifest, workspace=folder / "workspace", data_root=data)


def domains(num_pairs: int) -> dict[str, pl.DataFrame]:
    """Real pairs of several domains, or generated ones."""
    if "HARDBATCH_DATA" in os.environ:
        paths = sorted((Path(os.environ["HARDBATCH_DATA"]) / "train").glob("*.parquet"))
        return {p.stem: pl.read_parquet(p, columns=["query", "document"]).head(num_pairs // len(paths)) for p in paths}
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubcdfglmnprst", k=draw.randint(2, 9))) for _ in range(20_000)]

    def texts(length: int) -> list[str]:
        return [" ".join(draw.choices(words, k=draw.randint(length // 2, 2 * length))) for _ in range(num_pairs)]

    return {"generated": pl.DataFrame({"query": texts(10), "document": texts(80)})}


def ours(shards: Shards, num_workers: int = 2) -> Reader:
    """The stream of this project, one epoch."""

    def read() -> Iterator[int]:
        with BatchStream(shards, stop=shards.num_batches, num_workers=num_workers, prefetch=16) as stream:
            for batch in stream:
                yield len(batch.queries)

    return read


def datasets_streaming(shards: Shards, folder: Path) -> dict[str, Reader]:
    """`load_dataset(streaming=True)` on our Parquet files."""
    import datasets

    datasets.disable_progress_bars()
    files = [str(shards.path / name) for name in shards.index.files]
    cache = str(folder / "cache")

    def read() -> Iterator[int]:
        rows = datasets.load_dataset(
            "parquet", data_files=files, split="train", streaming=True, columns=COLUMNS, cache_dir=cache
        )
        for batch in rows.iter(batch_size=shards.batch_size):
            yield len(batch["query"])

    return {"datasets": read}


def mosaicml_streaming(shards: Shards, folder: Path) -> dict[str, Reader]:
    """StreamingDataset on MDS files of the same rows."""
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    by_pair, by_batch = (folder / f"mds-{kind}-{shards.key}" for kind in ("pair", "batch"))
    columns = dict.fromkeys(COLUMNS[:-1], "str") | {"equivalent_slots": "json"}
    with (
        MDSWriter(out=str(by_pair), columns=columns) as pairs,
        MDSWriter(out=str(by_batch), columns={"batch": "json"}) as batches,
    ):
        for batch in BatchStream(shards, stop=shards.num_batches):
            rows = columns_of(batch)
            batches.write({"batch": rows})
            for values in zip(*rows.values(), strict=True):
                pairs.write(dict(zip(COLUMNS, values, strict=True)))

    def reader(path: Path, samples: int, num_workers: int) -> Reader:
        def read() -> Iterator[int]:
            clean_stale_shared_memory()
            dataset = StreamingDataset(local=str(path), batch_size=samples)
            if num_workers == 0:
                found = ([sample] for sample in dataset)
            else:
                found = StreamingDataLoader(dataset, batch_size=samples, num_workers=num_workers, collate_fn=list)
            for of_batch in found:
                yield sum(len(sample["batch"]["query"]) if "batch" in sample else 1 for sample in of_batch)

        return read

    return {
        f"mosaicml, a sample a {kind}, {workers} workers": reader(path, samples, workers)
        for kind, path, samples in (("pair", by_pair, shards.batch_size), ("batch", by_batch, 1))
        for workers in (0, 2)
    }


def columns_of(batch: TextBatch) -> dict[str, list[Any]]:
    """A batch as it lies in the files."""
    slots = [np.flatnonzero(row).tolist() for row in batch.equivalent_BB]
    texts = (batch.queries, batch.documents, batch.query_prompts, batch.document_prompts)
    return dict(zip(COLUMNS, (*texts, slots), strict=True))


def tokenized(shards: Shards) -> dict[str, Reader]:
    """The stream with a tokenizer, and a loop of `encode_batch` over the same texts in memory."""
    folder = locate_model("minilm", None, Path())[1]
    num_batches = min(shards.num_batches, TOKENIZED_PAIRS // shards.batch_size)
    tokenizer = load_tokenizer(folder, max_length_tokens=MAX_LENGTH_TOKENS)
    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bare.no_padding()
    bare.enable_truncation(MAX_LENGTH_TOKENS)
    texts = [
        [
            prompt + text
            for prompt, text in zip(b.query_prompts + b.document_prompts, b.queries + b.documents, strict=True)
        ]
        for b in BatchStream(shards, stop=num_batches)
    ]

    def read() -> Iterator[int]:
        with BatchStream(shards, stop=num_batches, tokenize=tokenizer, num_workers=2, prefetch=8) as stream:
            for batch in stream:
                yield len(batch.queries)

    def encoder(encode: Callable[[list[str]], object]) -> Reader:
        def read() -> Iterator[int]:
            for of_batch in texts:
                encode(of_batch)
                yield len(of_batch) // 2

        return read

    return {
        "ours, tokenised": read,
        "bare encode_batch": encoder(bare.encode_batch),
        "bare encode_batch_fast": encoder(bare.encode_batch_fast),
    }


def compare(readers: dict[str, Reader], rounds: int) -> None:
    """Prints the median of pairs per second of each, and the median ratio of the first to each."""
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        for name, reader in readers.items():
            speed = pairs_per_second(reader)
            if number:  # the first round warms up
                speeds[name].append(speed)
    first = next(iter(readers))
    for name, of_name in speeds.items():
        ratios = [a / b for a, b in zip(speeds[first], of_name, strict=True)]
        told = f"  {name:<36}{statistics.median(of_name):>10,.0f} pairs/s"
        if name != first:
            told += f", {first} / it {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(told, flush=True)


def pairs_per_second(reader: Reader) -> float:
    """From the first batch on, so that starting up is left out."""
    batches = iter(reader())
    next(batches)
    start = time.perf_counter()
    num_pairs = sum(islice(batches, None))
    return num_pairs / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
