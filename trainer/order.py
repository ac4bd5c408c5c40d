"""The order in which batches are trained on: a pure function of (index, weights, seed, position).

    position = epoch · N + offset, N batches in every epoch

Epoch e reads packing e mod E. It holds each batch of a domain `weight` times: the whole part of the weight for every
batch, the fraction for a choice drawn from (seed, e, domain); all of it permuted by (seed, e). A step of W ranks that
accumulate A micro-batches eats W·A consecutive positions; a tail of an epoch that is shorter than that is left out.
So the position is the whole state of a run, and any number of ranks reads the same order.

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

_CHOICE, _PERMUTATION = 1, 2  # what is drawn: tells the streams of random numbers apart
_CACHED_EPOCHS = 2  # a prefetching reader works in two epochs at once around their border


class BatchOrder:
    """Batches by position, over endless epochs.

    `batch_ids_I` and `packings_I` are columns of the index, in any order; `domains_I` holds places in the list
    `domains`; `weights` maps domains to how often an epoch reads their batches (1 where absent). Raises ConfigError
    for a weight or a seed that is not allowed or where nothing is left to read, IntegrityError where epochs of two
    packings differ in length.
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
    ) -> None:
        if seed < 0:
            raise ConfigError(f"seed {seed}: must be 0 or more")
        self._seed = seed
        self._domains = list(domains)
        self._weights = check_weights(weights or {}, self._domains)
        by_batch_I = np.argsort(batch_ids_I, kind="stable")  # whatever the order of the index
        domains_I, packings_I = domains_I[by_batch_I], packings_I[by_batch_I]
        self._rows = {  # packing → rows of each domain
            int(packing): [
                by_batch_I[(domains_I == place) & (packings_I == packing)] for place in range(len(self._domains))
            ]
            for packing in np.unique(packings_I)
        }
        self._packings = sorted(self._rows)
        self.epoch_length = self._common_length()
        self._epoch = lru_cache(maxsize=_CACHED_EPOCHS)(self._draw_epoch)

    @property
    def num_packings(self) -> int:
        """E: after so many epochs the first packing comes again."""
        return len(self._packings)

    def batch_at(self, position: int) -> int:
        """Row of the index of the batch at `position`."""
        epoch, offset = divmod(position, self.epoch_length)
        return int(self._epoch(epoch)[offset])

    def step_at(self, position: int, step_size: int) -> int:
        """Where the next step starts: at `position`, or at the next epoch where the tail of this one is too short.

        Raises ConfigError where an epoch has fewer batches than a step.
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
        """Where the step after the one at `position` starts, for steps of `step_size` = W·A batches.

        It is the position to store: a run that goes on from there, with any number of ranks, does not read a batch
        twice in an epoch.
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
            told = ", ".join(f"packing {packing}: {length}" for packing, length in lengths.items())
            raise IntegrityError(f"epochs differ in their number of batches ({told}); make the shards anew")
        return lengths[self._packings[0]]

    def _draw_epoch(self, epoch: int) -> NDArray[np.int64]:
        """Rows of the index in the order of epoch `epoch` (N)."""
        rows_of = self._rows[self._packings[epoch % len(self._packings)]]
        parts = []
        for name, rows in zip(self._domains, rows_of, strict=True):
            times, extra = _times_and_extra(len(rows), self._weights[name])
            parts += [rows] * times
            if extra:
                chosen = _draw_order(len(rows), self._seed, epoch, _CHOICE, _number_of(name))[:extra]
                parts.append(rows[np.sort(chosen)])
        rows_N = np.concatenate(parts)
        return rows_N[_draw_order(len(rows_N), self._seed, epoch, _PERMUTATION)]


def check_weights(weights: Mapping[str, float], domains: Sequence[str]) -> dict[str, float]:
    """The weight of each of `domains`; raises ConfigError for an unknown domain or a weight below 0."""
    for name, weight in weights.items():
        if name not in domains:
            raise ConfigError(f"weight of '{name}': no such domain in the shards; domains: {', '.join(domains)}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"weight of '{name}': {weight} is not allowed; give 0 or more")
    return {name: float(weights.get(name, 1.0)) for name in domains}


def _times_and_extra(num_rows: int, weight: float) -> tuple[int, int]:
    """How often every row is read, and how many are read once more."""
    times = math.floor(weight)
    return times, math.floor((weight - times) * num_rows + 0.5)


def _num_read(num_rows: int, weight: float) -> int:
    times, extra = _times_and_extra(num_rows, weight)
    return times * num_rows + extra


def _draw_order(length: int, *seeds: int) -> NDArray[np.int64]:
    """A permutation of 0..length-1 drawn from `seeds`.

    It sorts raw output of the bit generator, whose stream numpy keeps for good; `Generator.permutation` may change.
    """
    raw = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(length)
    return np.argsort(raw, kind="stable")


def _number_of(name: str) -> int:
    """A number for a domain that depends on its name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
