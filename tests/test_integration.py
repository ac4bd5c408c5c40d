"""Training with SentenceTransformerTrainer on batches of build_batches."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import hardbatch
from hardbatch.trainer.stream import BatchStream
from tests.test_batches import SIZE, pairs
from tests.trainer_models import tiny_backbone

sentence_transformers = pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate", reason="SentenceTransformerTrainer needs accelerate")
MAX_LENGTH = 24


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    tiny_backbone(folder)
    return folder


@pytest.fixture(scope="module")
def batches():
    return hardbatch.build_batches(pairs(), model="lexical", batch_size=SIZE)


def open_model(backbone):
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(backbone), max_seq_length=MAX_LENGTH)
    return sentence_transformers.SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu")


def loss_of(batches, model, number, **options):
    """The loss of a batch, tokenised as the trainer's collator does it."""
    frame = batches[number]
    features = [model.preprocess(frame[name].to_list()) for name in ("query", "document")]
    first = number * batches.batch_size
    return batches.loss(model, **options)(features, torch.arange(first, first + batches.batch_size))


def test_the_loss_of_a_batch_by_hand(batches, backbone):
    model = open_model(backbone).eval()
    number = int(np.argmax([batches.false_negatives(i).sum() for i in range(len(batches))]))
    frame = batches[number]
    queries, documents = (
        model.encode(frame[name].to_list(), convert_to_tensor=True, normalize_embeddings=True).double()
        for name in ("query", "document")
    )
    scores = (queries @ documents.T / 0.05).exp()
    scores[torch.from_numpy(batches.false_negatives(number))] = 0
    expected = -(scores.diag() / scores.sum(1)).log().mean()
    assert loss_of(batches, model, number, temperature=0.05).item() == pytest.approx(expected.item(), abs=1e-5)
    assert batches.false_negatives(number).any()


def test_the_first_loss_is_that_of_our_trainer(batches, backbone, tmp_path, write_manifest):
    pairs().write_parquet(tmp_path / "pairs.parquet")
    manifest = write_manifest(
        f'corpus = "same"\n[[dataset]]\nname = "pairs"\nsource = "pairs.parquet"\n[pack]\nbatch_size = {SIZE}\n'
        "[ingest]\nmax_quarantined_fraction = 0.5\n"
    )
    shards = hardbatch.run_corpus(manifest, workspace=tmp_path / "workspace")
    output = tmp_path / "out"
    flags = {
        "shards": shards, "output": output, "architecture": "biencoder", "backbone": backbone, "dropout": 0,
        "max-length": MAX_LENGTH, "max-steps": 1, "warmup-steps": 1, "temperature": 0.05, "precision": "fp32",
        "log-every": 1, "seed": 3,
    }  # fmt: skip
    from hardbatch.trainer.main import main

    assert main([f"--{name}={value}" for name, value in flags.items()]) == 0
    from tests.reliability.trainings import log_of

    (logged,) = [record["loss"] for record in log_of({"--output": output}) if record["step"] == 1]
    (first,) = BatchStream(shards, seed=3, stop=1)
    model = open_model(backbone).train()
    assert loss_of(batches, model, first.batch_id).item() == pytest.approx(logged, abs=1e-5)


def arguments(batches, folder, **options):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": SIZE,
        "batch_sampler": batches.batch_sampler,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 1e-3,
        "num_train_epochs": 8,
    }
    return sentence_transformers.SentenceTransformerTrainingArguments(**settings | options)


def test_the_trainer_of_sentence_transformers_sees_whole_batches(batches, backbone, tmp_path, monkeypatch):
    seen = []
    model = open_model(backbone)
    loss = batches.loss(model)
    mask = loss._mask
    monkeypatch.setattr(loss, "_mask", lambda labels, size: seen.append(labels.tolist()) or mask(labels, size))
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model, args=arguments(batches, tmp_path), train_dataset=batches.to_dataset(), loss=loss
    )
    trainer.train()
    assert len(seen) == 8 * len(batches)
    numbers = [labels[0] // SIZE for labels in seen]
    assert seen == [list(range(SIZE * number, SIZE * (number + 1))) for number in numbers]
    epochs = [numbers[start : start + len(batches)] for start in range(0, len(numbers), len(batches))]
    assert all(sorted(epoch) == list(range(len(batches))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 6  # each epoch has an order of its own
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6])


def test_two_datasets_in_one_training(batches, backbone, tmp_path):
    """Each has a loss of its own; the trainer draws from both."""
    others = hardbatch.build_batches(pairs(40).reverse(), model="lexical", batch_size=SIZE)
    model = open_model(backbone)
    made = {"one": batches, "two": others}
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model,
        args=arguments(batches, tmp_path, num_train_epochs=1),
        train_dataset={name: of_name.to_dataset() for name, of_name in made.items()},
        loss={name: of_name.loss(model) for name, of_name in made.items()},
    )
    assert trainer.train().global_step == len(batches) + len(others)


def test_two_ranks_take_turns(backbone, tmp_path):
    """Five batches for two ranks: two batches each, all different, and other ones in the next epoch."""
    script = tmp_path / "two_ranks.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import json, os, sys
            sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
            import hardbatch, sentence_transformers
            from pathlib import Path
            from tests.test_batches import SIZE, pairs
            from tests.test_integration import arguments, open_model

            batches = hardbatch.build_batches(pairs(80), model="lexical", batch_size=SIZE)
            model = open_model({str(backbone)!r})
            loss = batches.loss(model)
            seen, mask = [], loss._mask
            loss._mask = lambda labels, size: seen.append(labels.tolist()) or mask(labels, size)
            args = arguments(batches, {str(tmp_path)!r}, num_train_epochs=4, ddp_backend="gloo")
            trainer = sentence_transformers.SentenceTransformerTrainer(
                model=model, args=args, train_dataset=batches.to_dataset(), loss=loss
            )
            length = len(trainer.get_train_dataloader())
            trainer.train()
            weights = sum(float(weight.double().sum()) for weight in model.parameters())
            found = {{"length": length, "seen": seen, "weights": weights}}
            Path({str(tmp_path)!r}, "rank" + os.environ["RANK"]).write_text(json.dumps(found))
            """
        )
    )
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2_000:]
    ranks = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    assert [rank["length"] for rank in ranks] == [2, 2]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    epochs = []
    for epoch in range(4):
        numbers = [labels[0] // SIZE for rank in ranks for labels in rank["seen"][2 * epoch : 2 * epoch + 2]]
        assert len(set(numbers)) == 4
        epochs.append(tuple(numbers))
    assert [len(rank["seen"]) for rank in ranks] == [8, 8] and len(set(epochs)) > 1


def test_what_does_not_fit_is_refused(batches, backbone):
    model = open_model(backbone)
    dataset = batches.to_dataset()
    with pytest.raises(ValueError, match=r"per_device_train_batch_size is 8, but the batches hold 16 pairs"):
        batches.batch_sampler(dataset, batch_size=8)
    with pytest.raises(
        ValueError, match=r"must be batches.to_dataset\(\), whole: batches of 16 rows, .* given 50 rows"
    ):
        batches.batch_sampler(dataset.select(range(50)), batch_size=SIZE)
    others = (dataset.shuffle(seed=0), dataset.select(range(SIZE, 2 * SIZE)), dataset.remove_columns("label"))
    for other in (*others, batches.to_dataset(masks=True)):
        with pytest.raises(ValueError, match="the trainer's dataset must be batches"):
            batches.batch_sampler(other, batch_size=SIZE)
    loss = batches.loss(model.train())
    features = [model.preprocess(batches[0][name].to_list()) for name in ("query", "document")]
    with pytest.raises(ValueError, match="the loss got no labels; train on batches"):
        loss(features)
    with pytest.raises(ValueError, match="rows of 2 batches at a time; pass batch_sampler"):
        loss(features, torch.arange(8, 8 + SIZE))
    model.eval()
    assert loss(features).isfinite()  # pairs of another dataset have no masks
