"""The training loop: steps over the stream, checkpoints, evaluations, and an orderly end."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hardbatch.pipeline.errors import HardbatchError
from hardbatch.trainer.batch import Batch
from hardbatch.trainer.checkpoint import TrainState, save_checkpoint
from hardbatch.trainer.collection import Collection
from hardbatch.trainer.draws import draw_context
from hardbatch.trainer.evaluate import evaluate_retrieval
from hardbatch.trainer.export import export_model
from hardbatch.trainer.held_out import held_out_loss
from hardbatch.trainer.log import StepMetrics, TrainingLog, model_flops, peak_flops, summary_text
from hardbatch.trainer.loss import Loss, mask_rate
from hardbatch.trainer.memory import naming_the_flag
from hardbatch.trainer.model import choose_attention
from hardbatch.trainer.signals import Stop, StoppedError, deferred_signals
from hardbatch.trainer.stream import BatchStream
from hardbatch.trainer.training import Training, export_folder, startup_summary


class DivergedError(HardbatchError):
    """A loss or a gradient is not a finite number."""


def train(training: Training) -> int:
    """Trains to the end of the schedule, or until a signal. The last line printed is the folder of the export.

    Returns:
        The exit code: 0, or 128 + the signal.
    """
    ranks, config = training.ranks, training.config
    with contextlib.ExitStack() as stack:
        log = None
        with ranks.errors_raised_together():
            if ranks.is_main:
                log = _open_log(training)
        stop = stack.enter_context(deferred_signals())
        loop = stack.enter_context(contextlib.closing(_Loop(training, log, stop)))
        loop.evaluate(due=training.state.step == 0)
        while loop.next_position + training.step_size <= training.state.end_position and not loop.stopped():
            loop.step()
            step = training.state.step
            if step % config.log_every == 0:
                loop.flush()
            if step % config.save_every == 0:
                loop.save()
            loop.evaluate()
        loop.save()
        loop.evaluate(due=True)
        stopped = loop.stopped()
        if not stopped:
            loop.finish()
        elif log is not None:
            log.say(f"stopped by a signal after step {training.state.step:,}; add --resume auto to continue")
    return 128 + stopped if stopped else 0


def learning_rate_factor(position: int, step_size: int, *, warmup_batches: int, end_position: int) -> float:
    """The learning rate of a step, as a share of its peak: linear warm-up, then linear decay.

    Depends on the position in the stream only, so that a resumed training and any number of ranks agree.

    Args:
        position: Where the step starts, in batches.
        step_size: Batches in a step.
        warmup_batches: Length of the warm-up.
        end_position: Where the rate reaches 0.
    """
    done = position + step_size
    if done <= warmup_batches:
        return done / warmup_batches
    remaining = (end_position - position) / max(step_size, end_position - warmup_batches)
    return min(1.0, max(0.0, remaining))


class _Loop:
    """The steps of a training, and what happens between them."""

    def __init__(self, training: Training, log: TrainingLog | None, stop: Stop) -> None:
        self._training = training
        self._log = log
        config, ranks = training.config, training.ranks
        self._gradients = training.gradients()
        self._stream = BatchStream(
            training.shards,
            seed=config.seed,
            position=training.state.position,
            rank=ranks.rank,
            world_size=ranks.world_size,
            accumulate=config.accumulate,
            similar_lengths=config.similar_lengths,
            stop=training.state.end_position,
            tokenize=training.tokenizer,
            num_workers=config.workers,
            prefetch=config.prefetch,
            pin_memory=ranks.device.type == "cuda",
        )
        self._batches = iter(self._stream)
        self._waited_s = 0.0
        self._started = time.monotonic()
        self._stop = stop
        self._checkpoint = Path()

    @property
    def next_position(self) -> int:
        """Where the next step starts."""
        return self._training.order.step_at(self._training.state.position, self._training.step_size)

    def step(self) -> None:
        """Does one step: W · A batches, their gradients, one update."""
        training = self._training
        with naming_the_flag(training.ranks.device, training.chunk_tokens, training.memory):
            self._step()

    def _step(self) -> None:
        training, ranks = self._training, self._training.ranks
        config, step_size = training.config, training.step_size
        position = self.next_position

        # A damaged batch on one rank, or one that does not fit its memory, ends all of them.
        with ranks.errors_raised_together(), naming_the_flag(ranks.device, training.chunk_tokens, training.memory):
            batches = [next(self._batches) for _ in range(config.accumulate)]
            losses = [self._gradients.backward(batch, scale=1 / config.accumulate) for batch in batches]
        ranks.average_gradients(training.encoder)
        gradient_norm = float(torch.nn.utils.clip_grad_norm_(training.encoder.parameters(), config.max_gradient_norm))

        learning_rate = config.learning_rate * learning_rate_factor(
            position,
            step_size,
            warmup_batches=training.state.warmup_batches,
            end_position=training.state.end_position,
        )
        metrics = self._metrics(batches, losses, gradient_norm=gradient_norm, learning_rate=learning_rate)
        self._refuse_divergence(batches, [float(one.value) for one in losses], metrics)

        for group in training.optimizer.param_groups:
            group["lr"] = learning_rate
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)
        training.state = replace(
            training.state,
            step=training.state.step + 1,
            position=position + step_size,
            pairs=training.state.pairs + metrics.pairs,
        )
        if self._log is not None:
            self._log.step(metrics)

    def stopped(self) -> int:
        """The signal that any rank has received, 0 for none."""
        return self._training.ranks.max(self._stop.signum)

    def _leave_if_stopped(self) -> None:
        if self.stopped():
            raise StoppedError

    def flush(self) -> None:
        """Writes a line of the log."""
        state = self._training.state
        with self._training.ranks.errors_raised_together():
            if self._log is not None:
                self._log.flush(step=state.step, position=state.position, batches_per_step=self._training.step_size)

    def save(self) -> None:
        """Saves a checkpoint on the main rank, after a line of the log. Does nothing before the first step."""
        training = self._training
        if training.state.step == 0:
            return
        self.flush()
        with self._pause(), training.ranks.errors_raised_together():
            if training.ranks.is_main:
                self._checkpoint = save_checkpoint(
                    training.config.output,
                    training.encoder,
                    training.optimizer,
                    self._state_now(),
                    model_files=training.model_files,
                    keep_last=training.config.keep_last,
                )

    def evaluate(self, *, due: bool = False) -> None:
        """Evaluates on every --eval folder, all ranks together, if it is `due` or --eval-every says so.

        Metrics that the log has are not measured again. A signal ends the evaluation within seconds,
        and the metrics of an unfinished folder are lost.
        """
        training, config, state = self._training, self._training.config, self._training.state
        if not due and not (config.eval_every and state.step % config.eval_every == 0):
            return
        with self._pause():
            for collection in training.collections:
                known = self._log is not None and state.step in self._log.evaluations.get(collection.name, {})
                if self.stopped() or training.ranks.max(known):
                    continue
                try:
                    metrics = self._measure(collection)
                except StoppedError:
                    return
                with training.ranks.errors_raised_together():
                    if self._log is not None:
                        self._log.evaluation(collection.name, metrics, step=state.step, position=state.position)

    def _measure(self, collection: Collection) -> dict[str, float]:
        training, config = self._training, self._training.config
        encoder, tokenizer = training.encoder, training.tokenizer
        options: dict[str, Any] = {
            "seed": config.seed,
            "query_prompt": training.state.prompts["query"],
            "document_prompt": training.state.prompts["document"],
            "texts_per_chunk": max(1, training.chunk_tokens // training.memory.longest_text_tokens),
            "precision": training.autocast,
            "between_blocks": self._leave_if_stopped,
        }
        sizes: dict[str, Any] = {"batch_size": training.shards.batch_size, "temperature": config.temperature}
        held_out = held_out_loss(encoder, tokenizer, collection, **sizes, **options)
        metrics = {"loss": held_out.loss, "accuracy": held_out.accuracy}
        for with_context in (False, True) if encoder.config.context_size else (False,):
            suffix = "" if with_context else "_no_context"
            found = evaluate_retrieval(encoder, tokenizer, collection, with_context=with_context, **options)
            metrics |= {name + suffix: value for name, value in asdict(found).items()}
        return metrics

    def finish(self) -> None:
        """Exports the model, and prints the summary and then the folder of the export."""
        training = self._training
        with training.ranks.errors_raised_together():
            if self._log is not None:
                export = export_model(
                    training.encoder,
                    self._checkpoint,
                    export_folder(training.config.output),
                    prompts=training.state.prompts,
                    context=training.context,
                    trained_on=f"shards {training.shards.key} ({', '.join(training.shards.domains)})",
                )
                state = self._state_now()
                self._log.say(
                    f"trained {state.step:,} steps, {state.pairs:,} pairs in {state.seconds:,.0f} s"
                    + summary_text(self._log.evaluations)
                )
                print(export)

    def close(self) -> None:
        """Stops the background threads."""
        self._stream.close()

    def _state_now(self) -> TrainState:
        state = self._training.state
        return replace(state, seconds=state.seconds + time.monotonic() - self._started)

    def _metrics(
        self, batches: list[Batch], losses: list[Loss], *, gradient_norm: float, learning_rate: float
    ) -> StepMetrics:
        """Sums and means of the step over all ranks."""
        training = self._training
        context_size = training.encoder.config.context_size
        flops = sum(
            model_flops(
                training.encoder,
                batch,
                draw_context(len(batch.documents), context_size, seed=training.config.seed, position=batch.position),
            )
            for batch in batches
        )
        waited = self._stream.waited_s - self._waited_s
        self._waited_s = self._stream.waited_s

        loss, accuracy, masked, positives, pairs, tokens, all_flops, all_waited = training.ranks.sum(
            sum(float(one.value) for one in losses),
            sum(float(one.accuracy) for one in losses),
            sum(mask_rate(batch.equivalent_BB) for batch in batches),
            sum(batch.num_positives for batch in batches),
            sum(len(batch.queries) for batch in batches),
            sum(batch.num_tokens for batch in batches),
            flops,
            waited,
        )
        return StepMetrics(
            loss=loss / training.step_size,
            accuracy=accuracy / training.step_size,
            mask_rate=masked / training.step_size,
            positives=positives / pairs,
            negatives=(1 - masked / training.step_size) * (training.shards.batch_size - 1),
            gradient_norm=gradient_norm,
            learning_rate=learning_rate,
            pairs=int(pairs),
            tokens=int(tokens),
            flops=all_flops,
            wait_s=all_waited / training.ranks.world_size,
        )

    def _refuse_divergence(self, batches: list[Batch], losses: list[float], metrics: StepMetrics) -> None:
        """Raises DivergedError on every rank, before the update, if the loss or the gradient is not finite."""
        if math.isfinite(metrics.loss) and math.isfinite(metrics.gradient_norm):
            return
        bad = [
            f"batch {batch.batch_id} of {batch.domain} (position {batch.position:,} of the order): loss {loss}"
            for batch, loss in zip(batches, losses, strict=True)
            if not math.isfinite(loss)
        ]
        if math.isfinite(metrics.loss):
            names = ", ".join(str(batch.batch_id) for batch in batches)
            bad = [f"batches {names}: gradient norm {metrics.gradient_norm}"]
        attention = choose_attention(self._training.config.attention, self._training.encoder.config)
        advice = divergence_advice(attention, on_cuda=self._training.ranks.device.type == "cuda")
        self._training.ranks.raise_together(DivergedError(f"{'; '.join(bad)}; {advice}") if bad else None)

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        if self._log is not None:
            self._log.pause(time.monotonic() - started)


def divergence_advice(attention: str, *, on_cuda: bool) -> str:
    """Says what to do about a loss or a gradient that is not finite, the likeliest cause first.

    On CUDA a fused attention kernel, or bfloat16, is suspected before the learning rate.
    """
    restart = "start again with --init-from the last checkpoint, another --output, and"
    if not on_cuda:
        return f"the model was not updated by it; {restart} a lower --learning-rate or --precision fp32"

    state = f"the model was not updated by it, and attention was that of --attention {attention}"
    if attention in ("eager", "packed"):
        return f"{state}; {restart} --precision fp32, then a lower --learning-rate"
    return (
        f"{state}; try --resume auto with --attention eager first; if that gives the same, {restart} "
        "--precision fp32, then a lower --learning-rate"
    )


def _open_log(training: Training) -> TrainingLog:
    state = training.state
    log = TrainingLog(
        training.config.output,
        first_step=state.step,
        end_position=state.end_position,
        peak_flops=peak_flops(training.ranks.device) * training.ranks.world_size,
    )
    for line in [*startup_summary(training), *training.notices]:
        log.say(line)
    return log
