"""Cost of GradCache and of padding, and what a step computes on, over shards of real pairs.

    python benchmarks/training.py --shards DIR [--backbone minilm] [--num-layers 3] [--rounds 5]

gradcache  CPU seconds of a step in chunks over those of the same step in one graph, rounds interleaved, medians
padding    tokens computed with over tokens of the texts: chunks sorted by length, in pieces; sorted alone; in order
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from hardbatch.trainer.backbone import build_encoder, find_backbone
from hardbatch.trainer.batch import Batch, chunk_by_tokens, concat, load_tokenizer, padding_ratio, split_tightly
from hardbatch.trainer.config import parse_flags
from hardbatch.trainer.gradcache import GradCache, StepConfig
from hardbatch.trainer.model import Encoder
from hardbatch.trainer.stream import BatchStream

CHUNKS = (2_048, 4_096, 8_192, 16_384)  # tokens, padding and context included
WHOLE = 1_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--num-layers", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--context-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = find_backbone(options.backbone)
    flags = ["--shards", str(options.shards), "--output", "-", "--backbone", str(folder), "--dropout", "0"]
    flags += ["--num-layers", str(options.num_layers), "--max-length", str(options.max_length)]
    encoder = build_encoder(parse_flags([*flags, "--context-size", str(options.context_size)]), folder).train()
    tokenizer = load_tokenizer(folder, max_length_tokens=options.max_length)
    with BatchStream(options.shards, tokenize=tokenizer, stop=max(options.rounds, 64)) as stream:
        batches = list(stream)
    print_padding(batches, options.context_size)
    print_gradcache(encoder, batches[: options.rounds])


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
    for told, same_length in (("as they are", False), ("all of the length of the median", True)):
        seconds: dict[int, list[float]] = {size: [] for size in (WHOLE, *CHUNKS)}
        for number, batch in enumerate([batches[0], *batches]):
            for size in seconds:
                taken = time_step(encoder, even(batch) if same_length else batch, size)
                if number:  # the first round warms up
                    seconds[size].append(taken)
        whole = seconds.pop(WHOLE)
        print(f"\ngradcache, texts {told}: CPU seconds in chunks / in one graph ({statistics.median(whole):.2f} s)")
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


def even(batch: Batch) -> Batch:
    """The batch with all texts as long as its median text, cut or filled with their first token."""
    from dataclasses import replace

    from hardbatch.trainer.batch import Tokens

    length = int(torch.cat([tokens.lengths_N for tokens in batch.sides]).median())

    def cut(tokens: Tokens) -> Tokens:
        rows = [(row.tolist() * length)[:length] for row in tokens.ids.split(tokens.lengths_N.tolist())]
        lengths_N = torch.full_like(tokens.lengths_N, length)
        return Tokens(ids=torch.tensor(rows).flatten(), lengths_N=lengths_N, prompt_lengths_N=tokens.prompt_lengths_N)

    return replace(batch, queries=cut(batch.queries), documents=cut(batch.documents), negatives=None)


if __name__ == "__main__":
    main()
