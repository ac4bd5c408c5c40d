"""What a training reports: a progress line, `log.jsonl` with one record per line, and curves for TensorBoard.

`log.jsonl` is the record that counts. It survives a resume, and it is opened and closed for each
line, so that a full disk raises at the line that did not fit. The curves repeat it for TensorBoard;
if they cannot be written, the training continues without them.

Shapes: N texts of a batch, M context documents.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
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

# The metrics of an evaluation that are printed, and their names; the log has all of them.
_PRINTED = {
    "loss": "loss",
    "accuracy": "accuracy",
    "ndcg_at_10": "nDCG@10",
    "ndcg_at_10_no_context": "nDCG@10 without context",
}


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Metrics of one step over all ranks."""

    loss: float
    accuracy: float
    mask_rate: float
    positives: float
    """Positives of a query in the loss, its own document included; the mean."""
    negatives: float
    """Effective negatives of a query: other slots of its batch that are not masked; the mean."""
    gradient_norm: float
    learning_rate: float
    pairs: int
    tokens: int
    flops: float
    wait_s: float
    """Seconds that a rank waited for its batches, averaged over the ranks."""


class TrainingLog:
    """The log of a training in `output`, with means over the steps between two lines.

    Only the main rank has one.
    """

    def __init__(
        self, output: Path, *, first_step: int, end_position: int, peak_flops: float = 0.0, stream: TextIO | None = None
    ) -> None:
        """Opens the log.

        Args:
            output: The folder of the training.
            first_step: The step after which the training continues; later records are dropped.
            end_position: The position in the order of batches at which the training ends.
            peak_flops: FLOP/s of the devices of all ranks together, 0 if they are not known.
            stream: Receives the lines for a person; standard error by default.
        """
        self.evaluations: dict[str, dict[int, dict[str, float]]] = {}
        """Metrics by collection and step, including those of the runs that this one continues."""
        self._path = output / LOG
        self._stream = stream or sys.stderr
        self._end = end_position
        self._peak = peak_flops
        self._keep_until(first_step)
        self._curves = _Curves(output / "tensorboard", first_step, warn=self.say)

        self._window: list[StepMetrics] = []
        self._started = time.monotonic()
        self._paused = 0.0

    def step(self, metrics: StepMetrics) -> None:
        """Adds the metrics of a step to the next line."""
        self._window.append(metrics)

    def flush(self, *, step: int, position: int, batches_per_step: int) -> None:
        """Writes the means since the last call, if there were any steps.

        Args:
            step: The number of the last step.
            position: The position in the order of batches after that step.
            batches_per_step: Batches that all ranks together read in a step.
        """
        if not self._window:
            return

        window, seconds = self._window, max(time.monotonic() - self._started - self._paused, 1e-9)
        self._window, self._started, self._paused = [], time.monotonic(), 0.0

        mean = {
            name: sum(getattr(one, name) for one in window) / len(window)
            for name in ("loss", "accuracy", "mask_rate", "positives", "negatives", "gradient_norm")
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
            f"{mean['accuracy']:.3f}  positives {mean['positives']:.2f}  negatives {mean['negatives']:.1f}  "
            f"masked {mean['mask_rate']:.3f}  gradient {mean['gradient_norm']:.2f}  "
            f"{rates['pairs_per_s']:,.0f} pairs/s, {rates['tokens_per_s']:,.0f} tokens/s, "
            f"waiting {rates['data_wait']:.1%}{utilisation}, {timedelta(seconds=round(left_s))} left"
        )

    def write(self, kind: str, metrics: dict[str, float], *, step: int, position: int) -> None:
        """Appends a record of `kind` to the log, and a point to the curve of each metric."""
        record = {"kind": kind, "step": step, "position": position, **metrics}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._curves.write({f"{kind}/{name}": value for name, value in metrics.items()}, step)

    def evaluation(self, name: str, metrics: dict[str, float], *, step: int, position: int) -> None:
        """Writes and prints the metrics of a collection."""
        self.write(f"{_EVALUATION}{name}", metrics, step=step, position=position)
        self.say(f"{name} after step {step:,}: {evaluation_text(metrics)}")
        self.evaluations.setdefault(name, {})[step] = metrics

    def say(self, line: str) -> None:
        """Prints a line for the person who watches."""
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
                    metrics = {
                        name: value for name, value in record.items() if name not in ("kind", "step", "position")
                    }
                    self.evaluations.setdefault(record["kind"].removeprefix(_EVALUATION), {})[record["step"]] = metrics
        write_file_atomic(self._path, "".join(kept).encode())


class _Curves:
    """Curves for TensorBoard in `folder`; a resume replaces the points after `first_step`.

    Curves are not results: the first OSError, such as that of a full disk, ends them with a
    warning, and the training continues.
    """

    def __init__(self, folder: Path, first_step: int, *, warn: Callable[[str], None]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._warn = warn
        self._writer: Any = None
        with self._warning_once():
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        """Appends a point to each curve."""
        if self._writer is None:
            return
        with self._warning_once():
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()  # nothing is held back that a kill could lose

    @contextlib.contextmanager
    def _warning_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            self._warn(f"warning: {self._folder}: no more curves for TensorBoard ({error}); {LOG} has all metrics")


def evaluation_text(metrics: Mapping[str, float]) -> str:
    """Returns the metrics of an evaluation that are printed, in a line."""
    return ", ".join(f"{name} {metrics[key]:.4f}" for key, name in _PRINTED.items() if key in metrics)


def summary_text(evaluations: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    """Returns a line for each collection that was measured more than once, and one for their mean.

    A line shows the first and the last value of each metric.
    """
    ends = {name: (found[min(found)], found[max(found)]) for name, found in evaluations.items() if len(found) > 1}
    if len(ends) > 1:
        befores, afters = zip(*ends.values(), strict=True)
        ends["mean"] = (_mean(befores), _mean(afters))

    lines = []
    for name, (before, after) in ends.items():
        changes = [f"{_PRINTED[key]} {before[key]:.4f} -> {after[key]:.4f}" for key in _PRINTED if key in before]
        lines.append(f"\n{name}: {', '.join(changes)}")
    return "".join(lines)


def model_flops(encoder: Encoder, batch: Batch, context_rows_M: torch.Tensor) -> float:
    """Returns the FLOPs of the forward and backward pass over the real tokens of a batch and its context.

    Each weight of the layers costs six FLOPs a token, and attention 12 · layers · width for each token
    and each token that it reads. A shared context is computed once. The second forward pass of
    GradCache is not counted, since it is not part of the model.
    """
    lengths_N = torch.cat([tokens.lengths_N for tokens in batch.sides]).double()
    size = encoder.config.context_size
    if encoder.config.context_attention == "shared":
        num_tokens, num_read = lengths_N.sum() + size, (lengths_N * (lengths_N + size)).sum() + size**2
    else:
        num_tokens, num_read = (lengths_N + size).sum(), (lengths_N + size).pow(2).sum()

    total = _stage_flops(encoder.second_stage_model, encoder.backbone_config, num_tokens, num_read)
    if encoder.first_stage_model is not None:
        lengths_M = batch.documents.lengths_N[context_rows_M].double()
        lengths = lengths_M.sum(), lengths_M.pow(2).sum()
        total += _stage_flops(encoder.first_stage_model, encoder.backbone_config, *lengths)
    return total


def peak_flops(device: torch.device) -> float:
    """Returns the dense bf16 FLOP/s of a device: 0 for the CPU and for a GPU that is not known."""
    return _PEAK_FLOPS.get(torch.cuda.get_device_name(device), 0.0) if device.type == "cuda" else 0.0


def _stage_flops(stage: torch.nn.Module, config: Any, num_tokens: torch.Tensor, num_read: torch.Tensor) -> float:
    weights = sum(
        parameter.numel()
        for name, parameter in stage.named_parameters()
        if "embeddings" not in name and parameter.dim() > 1
    )
    attention = 12 * config.num_hidden_layers * config.hidden_size
    return float(6 * weights * num_tokens + attention * num_read)


def _mean(several: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(metrics[key] for metrics in several) / len(several) for key in several[0]}
