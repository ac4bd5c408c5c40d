"""What a training says: a progress line, TensorBoard, and `log.jsonl`, a record per line that survives a resume.

Files are opened for each record, and nothing is held back: a disk that is full is told where the record is written.

Shapes: N texts of a batch, M context documents.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from hardbatch.pipeline.artifacts.files import write_file_atomic
from hardbatch.trainer.batch import Batch
from hardbatch.trainer.model import Encoder

LOG = "log.jsonl"
_EVALUATION = "eval/"

# Dense bf16 FLOP/s of the vendors' data sheets, by the whole name that CUDA gives to a device:
# cards of one family that differ in power or form differ in speed. A name that is not here gives no
# utilisation rather than a wrong one.
_PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA GH200 144G HBM3e": 989e12,
    "NVIDIA B200": 2_250e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}

# figures of an evaluation that are printed; the log has all
_TOLD = {
    "loss": "loss",
    "accuracy": "accuracy",
    "ndcg_at_10": "nDCG@10",
    "ndcg_at_10_no_context": "nDCG@10 without context",
}


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Figures of one step over all ranks."""

    loss: float
    accuracy: float
    mask_rate: float
    gradient_norm: float
    learning_rate: float
    pairs: int
    tokens: int
    flops: float
    wait_s: float
    """Seconds that a rank waited for its batches, the mean over ranks."""


class TrainingLog:
    """The log of a training in `output`; means over the steps between two lines. Only the main rank has one."""

    def __init__(
        self, output: Path, *, first_step: int, end_position: int, peak_flops: float = 0.0, stream: TextIO | None = None
    ) -> None:
        """Opens the log.

        Args:
            output: the folder of the training.
            first_step: the step that the training goes on from; later records are dropped.
            end_position: the place in the order of batches at which the training ends.
            peak_flops: FLOP/s of the devices of all ranks together, 0 if they are not known.
            stream: receives the lines for a person; standard error by default.
        """
        self.evaluations: dict[str, dict[int, dict[str, float]]] = {}
        """Figures by collection and step, also of the runs that this one goes on from."""
        self._path = output / LOG
        self._keep_until(first_step)
        self._board = _Board(output / "tensorboard", first_step)
        self._stream = stream or sys.stderr
        self._end = end_position
        self._peak = peak_flops
        self._window: list[StepMetrics] = []
        self._started = time.monotonic()
        self._paused = 0.0

    def step(self, figures: StepMetrics) -> None:
        """Takes in the figures of a step."""
        self._window.append(figures)

    def flush(self, *, step: int, position: int, batches_per_step: int) -> None:
        """Writes the means since the last call, if there were steps."""
        if not self._window:
            return
        window, seconds = self._window, max(time.monotonic() - self._started - self._paused, 1e-9)
        self._window, self._started, self._paused = [], time.monotonic(), 0.0
        mean = {
            name: sum(getattr(one, name) for one in window) / len(window)
            for name in ("loss", "accuracy", "mask_rate", "gradient_norm")
        }
        rates = {
            "pairs_per_s": sum(one.pairs for one in window) / seconds,
            "tokens_per_s": sum(one.tokens for one in window) / seconds,
            "data_wait": sum(one.wait_s for one in window) / seconds,
        }
        if self._peak:
            rates["model_flop_utilisation"] = sum(one.flops for one in window) / seconds / self._peak
        last = {"learning_rate": window[-1].learning_rate}
        self.write("train", {**mean, **last, **rates}, step=step, position=position)
        left_s = (self._end - position) / batches_per_step * seconds / len(window)
        utilisation = f", MFU {rates['model_flop_utilisation']:.0%}" if self._peak else ""
        self.say(
            f"step {step:,}  batch {position:,} of {self._end:,}  loss {mean['loss']:.4f}  accuracy "
            f"{mean['accuracy']:.3f}  masked {mean['mask_rate']:.3f}  gradient {mean['gradient_norm']:.2f}  "
            f"{rates['pairs_per_s']:,.0f} pairs/s, {rates['tokens_per_s']:,.0f} tokens/s, "
            f"waiting {rates['data_wait']:.1%}{utilisation}, {_duration(left_s)} left"
        )

    def write(self, kind: str, figures: dict[str, float], *, step: int, position: int) -> None:
        """Appends a record of `kind` to the log, and its figures to TensorBoard."""
        record = {"kind": kind, "step": step, "position": position, **figures}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._board.write({f"{kind}/{name}": value for name, value in figures.items()}, step)

    def evaluation(self, name: str, figures: dict[str, float], *, step: int, position: int) -> None:
        """Takes in the figures of a collection."""
        self.write(f"{_EVALUATION}{name}", figures, step=step, position=position)
        self.say(f"{name} after step {step:,}: {evaluation_text(figures)}")
        self.evaluations.setdefault(name, {})[step] = figures

    def say(self, line: str) -> None:
        """A line for the person who watches."""
        print(line, file=self._stream, flush=True)

    def pause(self, seconds: float) -> None:
        """Leaves the seconds of an evaluation or a checkpoint out of the rates."""
        self._paused += seconds

    def _keep_until(self, step: int) -> None:
        """Drops the records after `step`, which a resumed run writes again, and a half-written last line."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.get("step", 0) <= step and step > 0:
                kept.append(line + "\n")
                if str(record["kind"]).startswith(_EVALUATION):
                    figures = {
                        name: value for name, value in record.items() if name not in ("kind", "step", "position")
                    }
                    self.evaluations.setdefault(record["kind"].removeprefix(_EVALUATION), {})[record["step"]] = figures
        write_file_atomic(self._path, "".join(kept).encode())


class _Board:
    """A file of events for TensorBoard in `folder`, which drops the curves of earlier files after `first_step`.

    That of torch writes in a thread of its own, which dies with a traceback where the disk is full.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        self._append(0, file_version="brain.Event:2")
        if first_step:
            self._append(first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Appends a point to each curve."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._append(step, summary=Summary(value=values))

    def _append(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        event = Event(wall_time=time.time(), step=step, **content)
        with self._path.open("ab") as file:
            RecordWriter(file).write(event.SerializeToString())


def evaluation_text(figures: Mapping[str, float]) -> str:
    """The figures of an evaluation that are printed, in a line."""
    return ", ".join(f"{told} {figures[key]:.4f}" for key, told in _TOLD.items() if key in figures)


def summary_text(evaluations: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    """A line for each collection that was measured more than once: first and last figures; and one for their mean."""
    ends = {name: (found[min(found)], found[max(found)]) for name, found in evaluations.items() if len(found) > 1}
    if len(ends) > 1:
        befores, afters = zip(*ends.values(), strict=True)
        ends["mean"] = (_mean(befores), _mean(afters))
    lines = []
    for name, (before, after) in ends.items():
        told = [f"{_TOLD[key]} {before[key]:.4f} -> {after[key]:.4f}" for key in _TOLD if key in before]
        lines.append(f"\n{name}: {', '.join(told)}")
    return "".join(lines)


def model_flops(encoder: Encoder, batch: Batch, context_rows_M: torch.Tensor) -> float:
    """FLOPs of forward and backward over the real tokens of a batch, context included; second passes are not counted.

    Six for each weight of the layers and token, and 12 · layers · width · length² of attention for each sequence.
    """
    lengths_N = torch.cat([tokens.lengths_N for tokens in batch.sides]).double()
    context_size = encoder.config.context_size
    total = _stage_flops(encoder.second_stage_model, encoder.backbone_config, lengths_N + context_size)
    if encoder.first_stage_model is not None:
        lengths_M = batch.documents.lengths_N[context_rows_M].double()
        total += _stage_flops(encoder.first_stage_model, encoder.backbone_config, lengths_M)
    return total


def peak_flops(device: torch.device) -> float:
    """Dense bf16 FLOP/s of a device; 0 for the CPU and for a GPU that is not known."""
    return _PEAK_FLOPS.get(torch.cuda.get_device_name(device), 0.0) if device.type == "cuda" else 0.0


def _stage_flops(stage: torch.nn.Module, config: Any, lengths: torch.Tensor) -> float:
    weights = sum(
        parameter.numel()
        for name, parameter in stage.named_parameters()
        if "embeddings" not in name and parameter.dim() > 1
    )
    attention = 12 * config.num_hidden_layers * config.hidden_size
    return float(6 * weights * lengths.sum() + attention * lengths.pow(2).sum())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3_600:.1f} h"


def _mean(several: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(figures[key] for figures in several) / len(several) for key in several[0]}
