"""Cost of GradCache, of padding and of the context, over shards of real pairs.

    python benchmarks/training.py --shards DIR [--backbone minilm] [--num-layers 3] [--rounds 5] [--only attention]

attention  pairs per CPU second of a step on padded pieces, packed rows, and packed rows with a shared context
queries    CPU seconds of embedding 1,000 queries with one context of J documents, as a search does
gradcache  CPU seconds of a step in chunks over those of the same step in one graph, rounds interleaved, medians
padding    tokens computed with over tokens of the texts: chunks sorted by length, in pieces; sorted alone; in order
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hardbatch.trainer.backbone import build_encoder, find_backbone
from hardbatch.trainer.batch import (
    Batch,
    Tokens,
    chunk_by_length,
    chunk_by_tokens,
    concat,
    load_tokenizer,
    pad,
    padding_ratio,
    split_tightly,
)
from hardbatch.trainer.config import parse_flags
from hardbatch.trainer.embed import evaluating
from hardbatch.trainer.gradcache import GradCache, StepConfig
from hardbatch.trainer.memory import CHUNK_TOKENS_ON_CPU
from hardbatch.trainer.model import Encoder
from hardbatch.trainer.stream import BatchStream

CHUNKS = (2_048, 4_096, 8_192, 16_384)  # tokens, padding and context included
WHOLE = 1_000_000_000
WAYS = {  # of computing a step: flags by name
    "pieces": ("--attention", "sdpa"),
    "packed": ("--attention", "packed"),
    "shared": ("--context-attention", "shared"),
}
NUM_QUERIES = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--num-layers", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--context-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("attention", "queries", "padding", "gradcache"), help="default: all of them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = find_backbone(options.backbone)
    flags = ["--shards", str(options.shards), "--output", "-", "--backbone", str(folder), "--dropout", "0"]
    flags += ["--num-layers", str(options.num_layers), "--max-length", str(options.max_length)]
    flags += ["--context-size", str(options.context_size)]
    tokenizer = load_tokenizer(folder, max_length_tokens=options.max_length)
    with BatchStream(options.shards, tokenize=tokenizer, stop=max(options.rounds, 64)) as stream:
        batches = list(stream)

    def build(*more: str) -> Encoder:
        return build_encoder(parse_flags([*flags, *more]), folder).train()

    if options.only in (None, "attention"):
        print_attention({name: build(*way) for name, way in WAYS.items()}, batches[: options.rounds])
    if options.only in (None, "queries"):
        print_queries(build(*WAYS["pieces"]), build(*WAYS["shared"]), batches, options.rounds)
    if options.only in (None, "padding"):
        print_padding(batches, options.context_size)
    if options.only in (None, "gradcache"):
        print_gradcache(build(*WAYS["pieces"]), batches[: options.rounds])


def print_attention(encoders: dict[str, Encoder], batches: Sequence[Batch]) -> None:
    """Each way of computing a step against pieces, rounds interleaved: real lengths, and all texts at the limit."""
    limit = encoders["pieces"].config.max_length_tokens
    for lengths in ("real", str(limit)):
        seconds: dict[str, list[float]] = {name: [] for name in encoders}
        for number, batch in enumerate([batches[0], *batches]):
            given = batch if lengths == "real" else even(batch, limit)
            for name, encoder in encoders.items():
                taken = time_step(encoder, given, CHUNK_TOKENS_ON_CPU)
                if number:  # the first round warms up
                    seconds[name].append(taken)

        print(f"\nattention, lengths {lengths}: pairs per CPU second, and times as many as pieces")
        for name, taken in seconds.items():
            ratios = [one / own for one, own in zip(seconds["pieces"], taken, strict=True)]
            speed = len(batches[0].queries) / statistics.median(taken)
            print(f"{name:>8}{speed:>9.1f}{statistics.median(ratios):>9.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


def print_queries(full: Encoder, shared: Encoder, batches: Sequence[Batch], rounds: int) -> None:
    """Full context attention, and shared with the states of the context computed for each chunk, or kept."""
    tokens = concat([batch.queries for batch in batches])
    documents = concat([batch.documents for batch in batches])
    size = full.config.context_size
    ways = {"full": (full, False), "shared": (shared, False), "kept": (shared, True)}
    contexts = {}
    for encoder in (full, shared):
        padded = pad(documents, torch.arange(size), 0)
        with evaluating(encoder):
            contexts[encoder] = encoder.first_stage_model(padded.ids_CT, padded.mask_CT, padded.mask_CT)

    mean_length = float(tokens.lengths_N[:NUM_QUERIES].double().mean())
    print(f"\nqueries of {mean_length:.0f} tokens, {size} context documents: CPU seconds of 1,000")
    for texts_per_chunk in (1, 32):
        chunks = chunk_by_length(tokens.lengths_N[:NUM_QUERIES], texts_per_chunk)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, (encoder, kept) in ways.items():
                start = time.process_time()
                with evaluating(encoder):
                    for rows in chunks:
                        if not kept:
                            encoder.second_stage_model._kept = None
                        padded = pad(tokens, rows, 0)
                        tensors = padded.ids_CT, padded.mask_CT, padded.mask_CT
                        encoder.second_stage_model(*tensors, contexts[encoder])
                if number:  # the first round warms up
                    seconds[name].append((time.process_time() - start) * 1_000 / NUM_QUERIES)
        found = (f"{name} {statistics.median(taken):.1f}" for name, taken in seconds.items())
        print(f"in chunks of {texts_per_chunk}: " + ", ".join(found), flush=True)


def print_padding(batches: list[Batch], context_size: int) -> None:
    """Over whole batches: how much longer the padded texts are than the texts."""
    print(f"padding, {len(batches)} batches: tokens computed with / tokens of the texts")
    print(f"{'chunk':>8}{'pieces':>9}{'sorted':>9}{'in order':>10}")
    for size in (*CHUNKS, WHOLE):
        padded = dict.fromkeys(("pieces", "sorted", "in order"), 0.0)
        real = 0.0
        for batch in batches:
            lengths_N = concat(batch.sides).lengths_N
            chunks = chunk_by_tokens(lengths_N, size, context_size=context_size)
            pieces = [piece for rows in chunks for piece in rows.split(split_tightly(lengths_N[rows]))]
            in_order = list(torch.arange(len(lengths_N)).split([len(rows) for rows in chunks]))
            for name, parts in zip(padded, (pieces, chunks, in_order), strict=True):
                padded[name] += padding_ratio(lengths_N, parts) * float(lengths_N.sum())
            real += float(lengths_N.sum())
        ratios = [total / real for total in padded.values()]
        print(f"{'whole' if size == WHOLE else size:>8}{ratios[0]:>9.3f}{ratios[1]:>9.3f}{ratios[2]:>10.3f}")


def print_gradcache(encoder: Encoder, batches: list[Batch]) -> None:
    """A step in chunks against one graph: with the texts as they are, and all of one length."""
    for lengths, same_length in (("as they are", False), ("all of the length of the median", True)):
        seconds: dict[int, list[float]] = {size: [] for size in (WHOLE, *CHUNKS)}
        for number, batch in enumerate([batches[0], *batches]):
            for size in seconds:
                taken = time_step(encoder, even(batch, median_length(batch)) if same_length else batch, size)
                if number:  # the first round warms up
                    seconds[size].append(taken)
        whole = seconds.pop(WHOLE)
        print(f"\ngradcache, texts {lengths}: CPU seconds in chunks / in one graph ({statistics.median(whole):.2f} s)")
        for size, taken in seconds.items():
            ratios = [mine / one for mine, one in zip(taken, whole, strict=True)]
            print(f"{size:>8}{statistics.median(ratios):>9.2f}  ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def time_step(encoder: Encoder, batch: Batch, chunk_tokens: int) -> float:
    """CPU seconds of loss and gradients of a batch."""
    config = StepConfig(
        chunk_tokens=chunk_tokens,
        temperature=0.02,
        sequence_dropout=0.005,
        no_context_rate=0.0,
        seed=0,
    )
    step = GradCache(encoder, config)
    encoder.zero_grad(set_to_none=True)
    start = time.process_time()
    step.backward(batch)
    return time.process_time() - start


def median_length(batch: Batch) -> int:
    """Tokens of the median text."""
    return int(torch.cat([tokens.lengths_N for tokens in batch.sides]).median())


def even(batch: Batch, length: int) -> Batch:
    """The batch with all texts cut to `length` tokens, or repeated up to it."""

    def cut(tokens: Tokens) -> Tokens:
        rows = [(row.tolist() * length)[:length] for row in tokens.ids.split(tokens.lengths_N.tolist())]
        lengths_N = torch.full_like(tokens.lengths_N, length)
        return Tokens(ids=torch.tensor(rows).flatten(), lengths_N=lengths_N, prompt_lengths_N=tokens.prompt_lengths_N)

    return replace(batch, queries=cut(batch.queries), documents=cut(batch.documents), negatives=None)


if __name__ == "__main__":
    main()
