"""The learning rate over a training."""

from __future__ import annotations


def learning_rate_factor(position: int, step_size: int, *, warmup_batches: int, end_position: int) -> float:
    """Share of the peak learning rate in the step over batches `position` to `position + step_size`.

    Linear warm-up, then linear decay to 0 at `end_position`; a function of the stream's position alone.
    """
    done = position + step_size
    if done <= warmup_batches:
        return done / warmup_batches
    return min(1.0, max(0.0, (end_position - position) / max(step_size, end_position - warmup_batches)))
