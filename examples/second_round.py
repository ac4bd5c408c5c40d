"""Two rounds: train on hard batches, embed with the model just trained, make batches again, train on.

    python examples/second_round.py

What is hard changes while a model learns, so the second round groups pairs that are alike for the model of the first.
Needs `pip install "sentence-transformers[train]"`. About a minute on two cores.
"""

from __future__ import annotations

from offline import docstring_pairs, minilm
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

import hardbatch

BATCH_SIZE = 32

pairs = docstring_pairs(limit=500)
model = SentenceTransformer(minilm(), device="cpu")
model.max_seq_length = 48

for number in (1, 2):
    # Another seed each time, so that groups meet in other batches. The stock model stays the judge of false negatives:
    # a model that has learned these pairs scores their own documents so high that it finds hardly any.
    batches = hardbatch.build_batches(pairs, model=model, guide="minilm", batch_size=BATCH_SIZE, seed=number)
    print(f"round {number}: {batches}")

    args = SentenceTransformerTrainingArguments(
        output_dir="workspace/example",
        per_device_train_batch_size=BATCH_SIZE,
        batch_sampler=batches.batch_sampler,
        num_train_epochs=1,
        learning_rate=5e-5,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=batches.to_dataset(), loss=batches.loss(model)
    )
    trainer.train()
