"""Fine-tunes a model with SentenceTransformerTrainer on hard batches, without their false negatives.

    python examples/batches_for_sentence_transformers.py

Needs `pip install "sentence-transformers[train]"`. The data are docstrings of an installed package; put your own
`datasets.Dataset` with two columns of texts in their place. About a minute on two cores.
"""

from __future__ import annotations

import logging

from offline import docstring_pairs, minilm
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

import hardbatch

logging.basicConfig(level=logging.WARNING)
BATCH_SIZE, HELD_OUT = 32, 150

# The model, and the pairs.
queries, documents = docstring_pairs(limit=1_000)
model = SentenceTransformer(minilm(), device="cpu")
model.max_seq_length = 48

# The batches: groups of alike pairs, and which of their documents may answer another pair's query.
batches = hardbatch.build_batches(
    (queries[HELD_OUT:], documents[HELD_OUT:]), model=model, batch_size=BATCH_SIZE, show_progress_bar=True
)
print(batches)
print(batches[0].head(8))

# How well held-out queries find their documents among all of them.
evaluator = InformationRetrievalEvaluator(
    queries={str(i): queries[i] for i in range(HELD_OUT)},
    corpus={str(i): document for i, document in enumerate(documents)},
    relevant_docs={str(i): {str(i)} for i in range(HELD_OUT)},
    name="held-out",
)
before = evaluator(model)["held-out_cosine_ndcg@10"]

# Training: the sampler keeps batches whole, and the loss leaves false negatives out.
trainer = SentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(
        output_dir="workspace/example",
        per_device_train_batch_size=BATCH_SIZE,
        batch_sampler=batches.batch_sampler,
        num_train_epochs=1,
        learning_rate=5e-5,
        warmup_steps=3,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=batches.to_dataset(),
    loss=batches.loss(model),
)
trainer.train()
after = evaluator(model)["held-out_cosine_ndcg@10"]
print(f"nDCG@10 of {HELD_OUT} held-out queries: {before:.3f} before, {after:.3f} after")
