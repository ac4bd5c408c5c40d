"""Trains a model on shards in a loop of your own: `BatchStream` reads them, and plain torch does the rest.

    python examples/your_own_loop.py [SHARDS]

SHARDS is the folder that `hardbatch run` prints; without it, shards of docstrings are made first. About a minute on
two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl
import torch
from offline import docstring_pairs, minilm
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import hardbatch
from hardbatch import BatchStream

NUM_STEPS, TEMPERATURE = 20, 0.02


def make_shards() -> Path:
    """Shards of the pairs of the other examples."""
    folder = Path("workspace/example")
    folder.mkdir(parents=True, exist_ok=True)
    queries, documents = docstring_pairs(limit=800)
    pl.DataFrame({"query": queries, "document": documents}).write_parquet(folder / "pairs.parquet")
    manifest = folder / "pairs.toml"
    manifest.write_text('corpus = "example"\n[[dataset]]\nname = "docstrings"\nsource = "pairs.parquet"\n')
    return hardbatch.run_corpus(manifest, workspace=folder, overrides={"pack.batch_size": 32})


shards = Path(sys.argv[1]) if len(sys.argv) > 1 else make_shards()
tokenizer = AutoTokenizer.from_pretrained(minilm())
model = AutoModel.from_pretrained(minilm()).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)


def embed(prompts: list[str], texts: list[str]) -> torch.Tensor:
    """Unit vectors: the mean of the last layer over the tokens of a text."""
    prompted = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    tokens = tokenizer(prompted, padding=True, truncation=True, max_length=48, return_tensors="pt")
    hidden_BTD = model(**tokens).last_hidden_state
    mask_BT1 = tokens["attention_mask"].unsqueeze(2)
    return F.normalize((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1), dim=1)


# `stop` counts batches. `batch.position` is the whole state: give it as `position`, and the stream continues there.
for batch in BatchStream(shards, seed=0, stop=NUM_STEPS):
    queries_BD = embed(batch.query_prompts, batch.queries)
    documents_BD = embed(batch.document_prompts, batch.documents)

    # Documents that may answer a query as well as its own does are not negatives of it.
    scores_BB = queries_BD @ documents_BD.T / TEMPERATURE
    scores_BB = scores_BB.masked_fill(torch.from_numpy(batch.equivalent_BB), -torch.inf)
    loss = F.cross_entropy(scores_BB, torch.arange(len(scores_BB)))

    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    masked = int(batch.equivalent_BB.sum())
    print(f"batch {batch.batch_id} of {batch.domain}: loss {loss.item():.3f}, {masked} slots masked")
