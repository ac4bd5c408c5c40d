"""The order in which batches are trained on: a pure function of (index, weights, seed, position).

    position = epoch · N + offset, N batches in every epoch

Epoch e reads packing e mod E, for E packings. It contains each batch of a domain `weight` times: the
integer part of the weight for every batch, the fraction for a selection drawn from (seed, e, domain).
All of it is permuted by (seed, e). A step of W ranks that accumulate A micro-batches takes W·A
consecutive positions; a tail of an epoch that is shorter than that is left out.

For example, with N = 5 and W·A = 2, steps start at positions 0, 2, 5, 7, 10: position 4 is the tail
of the first epoch. So the position is the whole state of a run, and any number of ranks reads the
same order.

Ranks wait for the one with the longest texts. With `similar_lengths` = R, every R consecutive batches
from the start of an epoch on are of similar length: the permuted epoch is cut into windows of 16 · R
batches, each is sorted by length and cut into runs of R, and the runs are permuted again.

Legend: I rows of the index, N batches of an epoch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardbatch.pipeline.errors import ConfigError, IntegrityError

_CHOICE, _PERMUTATION, _RUNS = 1, 2, 3  # separate streams of random numbers
_RUNS_OF_WINDOW = 16
_CACHED_EPOCHS = 2  # near the end of an epoch, a prefetching reader works on two


class BatchOrder:
    """Batches by position, over endless epochs.

    Attributes:
        epoch_length: N, the batches of every epoch.
    """

    def __init__(
        self,
        *,
        batch_ids_I: NDArray[np.int64],
        packings_I: NDArray[Any],
        domains_I: NDArray[Any],
        domains: Sequence[str],
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        lengths_I: NDArray[np.int64] | None = None,
        similar_lengths: int = 1,
    ) -> None:
        """Prepares the order; epochs are drawn when they are read.

        Args:
            batch_ids_I: The batches, as a column of the index, in any order.
            packings_I: The packing of each batch.
            domains_I: The domain of each batch, as an index into `domains`.
            domains: The names of the domains.
            weights: How often an epoch reads the batches of a domain; 1 for a domain that is absent.
            seed: Seed of the order, 0 or more.
            lengths_I: What stands for the length of each batch's texts, for example its bytes.
            similar_lengths: R, how many consecutive batches are of similar length; 1: the order ignores lengths.

        Raises:
            ConfigError: If a weight or the seed is not allowed, or if nothing is left to read.
            IntegrityError: If the epochs of two packings differ in length.
        """
        if seed < 0:
            raise ConfigError(f"seed {seed}: must be 0 or more")
        assert similar_lengths == 1 or lengths_I is not None, "similar lengths need lengths"
        self._seed = seed
        self._lengths_I, self._similar_lengths = lengths_I, similar_lengths
        self._domains = list(domains)
        self._weights = check_weights(weights or {}, self._domains)

        # By batch_id, so that the rows of the index may be in any order.
        by_batch_I = np.argsort(batch_ids_I, kind="stable")
        domains_I, packings_I = domains_I[by_batch_I], packings_I[by_batch_I]
        self._rows = {  # packing → rows of each domain
            int(packing): [
                by_batch_I[(domains_I == domain) & (packings_I == packing)] for domain in range(len(self._domains))
            ]
            for packing in np.unique(packings_I)
        }
        self._packings = sorted(self._rows)
        self.epoch_length = self._common_length()
        self._epoch = lru_cache(maxsize=_CACHED_EPOCHS)(self._draw_epoch)

    @property
    def num_packings(self) -> int:
        """E: after this many epochs, the first packing is read again."""
        return len(self._packings)

    def batch_at(self, position: int) -> int:
        """Returns the row of the index that holds the batch at `position`."""
        epoch, offset = divmod(position, self.epoch_length)
        return int(self._epoch(epoch)[offset])

    def step_at(self, position: int, step_size: int) -> int:
        """Returns where the next step starts: at `position`, or at the next epoch if the rest of this one is too short.

        Raises:
            ConfigError: If an epoch has fewer batches than a step.
        """
        num_batches = self.epoch_length
        if step_size > num_batches:
            raise ConfigError(
                f"an epoch has {num_batches} batches, a step of all ranks takes {step_size}; use fewer ranks, "
                "accumulate less, or make more batches with a smaller pack.batch_size"
            )
        epoch, offset = divmod(position, num_batches)
        return position if offset + step_size <= num_batches else (epoch + 1) * num_batches

    def next_step(self, position: int, step_size: int) -> int:
        """Returns where the step after the one at `position` starts, for steps of `step_size` = W·A batches.

        This is the position to store: a run that resumes there, with any number of ranks, does not
        read a batch twice in an epoch.
        """
        return self.step_at(self.step_at(position, step_size) + step_size, step_size)

    def _common_length(self) -> int:
        lengths = {
            packing: sum(
                _num_read(len(rows), self._weights[name]) for name, rows in zip(self._domains, rows_of, strict=True)
            )
            for packing, rows_of in self._rows.items()
        }
        if not lengths or max(lengths.values()) == 0:
            given = ", ".join(f"{name} {weight:g}" for name, weight in self._weights.items())
            raise ConfigError(f"no batch is left to train on; weights: {given or 'none'}; raise one above 0")
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"packing {packing}: {length}" for packing, length in lengths.items())
            raise IntegrityError(f"epochs differ in their number of batches ({found}); make the shards again")
        return lengths[self._packings[0]]

    def _draw_epoch(self, epoch: int) -> NDArray[np.int64]:
        """Returns the rows of the index in the order of an epoch (N)."""
        rows_of = self._rows[self._packings[epoch % len(self._packings)]]
        parts = []
        for name, rows in zip(self._domains, rows_of, strict=True):
            times, extra = _times_and_extra(len(rows), self._weights[name])
            parts += [rows] * times
            if extra:
                chosen = _draw_order(len(rows), self._seed, epoch, _CHOICE, _number_of(name))[:extra]
                parts.append(rows[np.sort(chosen)])
        rows_N = np.concatenate(parts)
        rows_N = rows_N[_draw_order(len(rows_N), self._seed, epoch, _PERMUTATION)]
        return rows_N if self._similar_lengths == 1 else self._in_runs(rows_N, epoch)

    def _in_runs(self, rows_N: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Returns the rows in runs of similar length; what does not fill a run comes last."""
        assert self._lengths_I is not None
        size = self._similar_lengths
        parts = []
        for start in range(0, len(rows_N), _RUNS_OF_WINDOW * size):
            window = rows_N[start : start + _RUNS_OF_WINDOW * size]
            window = window[np.argsort(self._lengths_I[window], kind="stable")]
            num_runs = len(window) // size
            runs = window[: num_runs * size].reshape(num_runs, size)
            parts += [runs[_draw_order(num_runs, self._seed, epoch, _RUNS, start)].ravel(), window[num_runs * size :]]
        return np.concatenate(parts)


def check_weights(weights: Mapping[str, float], domains: Sequence[str]) -> dict[str, float]:
    """Returns the weight of each of `domains`, 1 for those that are not in `weights`.

    Raises:
        ConfigError: For an unknown domain or a weight below 0.
    """
    for name, weight in weights.items():
        if name not in domains:
            raise ConfigError(f"weight of '{name}': no such domain in the shards; domains: {', '.join(domains)}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"weight of '{name}': {weight} is not allowed; give 0 or more")
    return {name: float(weights.get(name, 1.0)) for name in domains}


def _times_and_extra(num_rows: int, weight: float) -> tuple[int, int]:
    """Returns how often every row is read, and how many rows are read once more."""
    times = math.floor(weight)
    return times, math.floor((weight - times) * num_rows + 0.5)


def _num_read(num_rows: int, weight: float) -> int:
    times, extra = _times_and_extra(num_rows, weight)
    return times * num_rows + extra


def _draw_order(length: int, *seeds: int) -> NDArray[np.int64]:
    """Draws a permutation of 0..length-1 from `seeds`.

    It sorts the raw output of the bit generator, which numpy guarantees never to change, unlike that
    of `Generator.permutation`.
    """
    raw = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(length)
    return np.argsort(raw, kind="stable")


def _number_of(name: str) -> int:
    """Returns a number for a domain that depends only on its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
