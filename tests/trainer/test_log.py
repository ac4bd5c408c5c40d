"""What a training reports, and what its log keeps over a resume."""

from __future__ import annotations

import io
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hardbatch.trainer.batch import Batch, Tokens
from hardbatch.trainer.log import LOG, StepMetrics, TrainingLog, model_flops, peak_flops
from tests.trainer_models import tiny_encoder


def make_metrics(loss=1.0, wait_s=0.0):
    return StepMetrics(
        loss=loss,
        wait_s=wait_s,
        accuracy=0.5,
        mask_rate=0.1,
        positives=1.25,
        negatives=loss + 5,
        gradient_norm=2.0,
        learning_rate=1e-4,
        pairs=8,
        tokens=100,
        flops=1e6,
    )


def open_log(folder, first_step=0, peak_flops=0.0):
    return TrainingLog(folder, first_step=first_step, end_position=100, peak_flops=peak_flops, stream=io.StringIO())


def records(folder):
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_a_line_has_means_rates_and_the_time_left(tmp_path):
    log = open_log(tmp_path)
    log.step(make_metrics(1.0))
    log.step(make_metrics(2.0, wait_s=1e-6))
    log.flush(step=2, position=4, batches_per_step=2)
    log.flush(step=2, position=4, batches_per_step=2)  # nothing new: no line
    (record,) = records(tmp_path)
    assert record["kind"] == "train" and record["step"] == 2 and record["position"] == 4
    assert record["positives"] == 1.25 and record["negatives"] == 6.5
    assert record["loss"] == 1.5 and record["learning_rate"] == 1e-4 and record["data_wait"] > 0
    assert record["tokens_per_s"] == pytest.approx(record["pairs_per_s"] * 12.5)
    line = log._stream.getvalue()
    assert "  positives 1.25  negatives 6.5  " in line
    assert "batch 4 of 100" in line and "loss 1.5000" in line and "0:00:00 left" in line and line.count("\n") == 1


def test_a_resumed_log_and_its_curves_continue_at_the_checkpoint(tmp_path):
    log = open_log(tmp_path)
    for step in (1, 2, 3):
        log.write("train", {"loss": float(step)}, step=step, position=step)
    with (tmp_path / LOG).open("a") as file:
        file.write('{"kind": "train", "st')  # a kill amid a line
    log = open_log(tmp_path, first_step=2)
    log.write("train", {"loss": 3.5}, step=3, position=3)
    expected = [(1, 1.0), (2, 2.0), (3, 3.5)]
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == expected
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in curves.Scalars("train/loss")] == expected


@pytest.mark.parametrize(("first_step", "kept"), [(0, []), (5, [0])], ids=["a new training", "a resume"])
def test_the_evaluation_before_step_1_survives_a_resume_only(tmp_path, first_step, kept):
    open_log(tmp_path).write("eval/x", {"loss": 1.0}, step=0, position=0)
    log = open_log(tmp_path, first_step=first_step)
    assert [record["step"] for record in records(tmp_path)] == kept
    assert log.evaluations == ({"x": {0: {"loss": 1.0}}} if kept else {})


def test_curves_that_cannot_be_written_are_reported_once(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    log = open_log(tmp_path)
    for step in (1, 2):
        log.write("train", {"loss": 1.0}, step=step, position=step)
    assert len(records(tmp_path)) == 2
    assert log._stream.getvalue().count("no more curves for TensorBoard") == 1


def tokens(lengths):
    lengths_N = torch.tensor(lengths)
    ids = torch.zeros(int(lengths_N.sum()), dtype=torch.int64)
    return Tokens(ids=ids, lengths_N=lengths_N, prompt_lengths_N=torch.zeros_like(lengths_N))


@pytest.mark.parametrize(("context_size", "context_attention"), [(0, "full"), (2, "full"), (2, "shared")])
def test_flops_by_hand(context_size, context_attention):
    encoder = tiny_encoder("bert", context_size, num_layers=3, hidden_size=32, context_attention=context_attention)
    batch = Batch(
        position=0,
        batch_id=0,
        domain="x",
        queries=tokens([3, 4]),
        documents=tokens([5, 6]),
        negatives=None,
        negative_owner_M=torch.zeros(0, dtype=torch.int64),
        equivalent_BB=torch.zeros(2, 2, dtype=torch.bool),
    )
    layer = 4 * 32 * 32 + 2 * 32 * 64
    if context_attention == "shared":  # each text reads the context and itself; the context reads itself, once
        second = sum(6 * 3 * layer * n + 12 * 3 * 32 * n * (n + 2) for n in (3, 4, 5, 6))
        second += 6 * 3 * layer * 2 + 12 * 3 * 32 * 2 * 2
    else:
        second = sum(6 * 3 * layer * (n + context_size) + 12 * 3 * 32 * (n + context_size) ** 2 for n in (3, 4, 5, 6))
    first = sum(6 * (3 * layer + 32 * 32) * n + 12 * 3 * 32 * n**2 for n in (5, 6)) if context_size else 0
    assert model_flops(encoder, batch, torch.tensor([0, 1])) == pytest.approx(second + first)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2_250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 0.0),  # another card than the A10
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 0.0),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0.0),
        ("NVIDIA H100 PCIe MIG 1g.10gb", 0.0),
    ],
)
def test_the_speed_of_a_gpu_goes_by_its_whole_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 1)) == peak
    assert peak_flops(torch.device("cpu")) == 0.0


def test_utilisation_is_reported_if_the_speed_is_known(tmp_path):
    for peak, reported in ((1e12, True), (0.0, False)):
        log = open_log(tmp_path, peak_flops=peak)
        log.step(make_metrics())
        log.flush(step=1, position=1, batches_per_step=1)
        assert ("MFU" in log._stream.getvalue()) == reported
        assert ("model_flop_utilisation" in records(tmp_path)[-1]) == reported
