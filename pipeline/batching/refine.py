"""Refine: near batches trade pairs while Eq. 2 rises; the sizes of batches never change.

Eq. 2 of a batch, with i = j included, is Σ_ij d_i·q_j = D·Q with D = Σd and Q = Σq, so no matrix of pairs is
needed. Write x = d⊕q for a pair, X = D⊕Q for a batch, and X' = Q⊕D for X with its halves swapped. To first
order, taking a pair from batch A to batch B gains x·(X'_B − X'_A). If A receives what sums to Δ more than it
gives, and B gives it, Eq. 2 of the two changes by exactly

    Δ·(X'_A − X'_B) + Δ·Δ'.

An example with d = q (so x·x' = 2d·d) and two topics, u and v, orthogonal unit vectors. A holds the pairs
u, u, v and B holds v, v, u:

    D_A = 2u + v, D_B = u + 2v        Eq. 2 is 5 + 5; without the three d·q of each batch, 2 + 2
    A gives its v and receives B's u: Δ = (u−v)⊕(u−v), and X'_A − X'_B = (u−v)⊕(u−v)
    Δ·(X'_A − X'_B) + Δ·Δ' = 4 + 4    Eq. 2 is 9 + 9: D_A = 3u and D_B = 3v

A round asks of every pair what it would gain in each of the batches nearest to its own, and ranks, for
every two near batches, what they would best exchange. Then it makes several matchings, in which a batch
takes part at most once. Each two matched batches exchange their best pairs, as many as gain most, if that
gains in float64: Eq. 2 never falls. A pair may only go to a batch that has room for its classes (spread.py).

Shape letters: b batches, B slots, L near batches, M candidates, P exchanging pairs of batches, N = M + 1,
F = 2·dimension, k capped classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.batching.nearest import fast_products
from hardbatch.pipeline.batching.spread import CappedClasses

_NUM_NEAR = 32  # batches that a batch may trade with: more gain more, and take proportionally longer
_NUM_CANDIDATES = 8  # pairs that a batch may give to another at once
_NUM_MATCHINGS = 6  # per round: they share the gains, which are most of the work
_GAINS_HELD = 2**22  # float32 gains of a block of batches: 16 MiB
_EXCHANGING = 128  # pairs of batches that exchange at once
_VALUES_READ = 2**18  # float32 values of x summed at a time: 1 MiB
_LEAST_GAIN = 1e-6  # of Eq. 2, a sum over B² cosines


@dataclass(frozen=True, kw_only=True)
class Refined:
    """Batches after trading (int64, b × B), and Eq. 2 over all of them before and after each round."""

    batches: Array
    objective: list[float]


def refine(
    vectors: torch.Tensor,
    batches: Array,
    *,
    rounds: int,
    tolerance: float,
    capped: CappedClasses | None = None,
    device: str = "cpu",
) -> Refined:
    """Trades pairs between batches while Eq. 2 (summed over i ≠ j) rises.

    Holds, beside the vectors, 16 MiB of gains, 20·M·F bytes for each of 128 exchanges, b × b cosines, and
    2 bytes for each capped class and batch.

    Args:
        vectors: x = d⊕q of the pairs, slot by slot (float32, b·B × F). On the CPU they are traded too: they
            come out in the order of the refined batches.
        batches: The pairs, by any number (int64, b × B).
        rounds: The maximum.
        tolerance: Ends after a round that gains no more than this part of Eq. 2.
        capped: The classes of the pairs, slot by slot (b × B × 2). No batch comes to hold more pairs of a
            class than its cap, unless it does already.
        device: Where to trade, as torch names it.
    """
    if len(batches) == 0:
        return Refined(batches=batches, objective=[0.0])

    trade = _Trade(vectors.to(device).view(*batches.shape, -1), torch.tensor(batches, device=device), capped)
    objective = [trade.value()]
    for _ in range(rounds if len(batches) > 1 else 0):
        gained = trade.round()
        objective.append(objective[-1] + gained)
        if gained <= tolerance * abs(objective[-2]):
            break
    return Refined(batches=trade.pairs.cpu().numpy(), objective=objective)


class _Trade:
    """Batches that trade, with the sums of their pairs kept up to date."""

    def __init__(self, x_bBF: torch.Tensor, pairs_bB: torch.Tensor, capped: CappedClasses | None) -> None:
        self.pairs = pairs_bB
        self._room = None if capped is None else _Room(capped, pairs_bB.device)
        self._x_bBF = x_bBF
        self._half = x_bBF.shape[2] // 2
        self._sum_bF = x_bBF.new_empty((len(x_bBF), x_bBF.shape[2]), dtype=torch.float64)
        self._own_bB = x_bBF.new_empty(x_bBF.shape[:2])  # d·q of each pair
        for block in _blocks(len(x_bBF), _VALUES_READ // (x_bBF.shape[1] * x_bBF.shape[2])):
            x = x_bBF[block]
            self._sum_bF[block] = x.sum(1, dtype=torch.float64)
            self._own_bB[block] = (x[..., : self._half] * x[..., self._half :]).sum(2)

    def value(self) -> float:
        """Σ_b Σ_{i≠j} d_i·q_j, in float64."""
        documents_bD, queries_bD = self._sum_bF[:, : self._half], self._sum_bF[:, self._half :]
        return float((documents_bD * queries_bD).sum() - self._own_bB.double().sum())

    def round(self) -> float:
        """Runs one round of trading; returns by how much Eq. 2 rose."""
        near_bL, back_bL, alike_bL = self._near_batches()
        gain_bLM, slot_bLM = self._best_to_give(near_bL)

        # What two near batches promise: both give their best pairs, as many as add up to most. The two pairs that
        # cross each time do not become batch-mates, as their gains assume; this takes back the mean of that.
        crossing_bL = 2 * alike_bL / self.pairs.shape[1] ** 2
        both_bLM = gain_bLM + gain_bLM[near_bL, back_bL.clamp_min(0)] - crossing_bL[..., None]
        promise_bL = both_bLM.cumsum(2).amax(2).masked_fill(back_bL < 0, -torch.inf)

        gained = 0.0
        for _ in range(_NUM_MATCHINGS):
            one_P, index_P = _match(promise_bL, near_bL)
            if len(one_P) == 0:
                break
            two_P, back_P = near_bL[one_P, index_P], back_bL[one_P, index_P]
            promise_bL[one_P, index_P] = promise_bL[two_P, back_P] = -torch.inf  # once per round
            slot_PM, back_slot_PM = slot_bLM[one_P, index_P], slot_bLM[two_P, back_P]
            for part in _blocks(len(one_P), _EXCHANGING):
                gained += self._exchange(one_P[part], two_P[part], slot_PM[part], back_slot_PM[part])
        return gained

    def _near_batches(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The nearest batches of each.

        Returns:
            `near_bL`, the batches by falling X·X'; `back_bL`, the index of a batch in the list of its near
            batch, -1 if it is not in that; `alike_bL`, X·X' of the two.
        """
        num_batches = len(self.pairs)
        sums_bF = self._sum_bF.float()
        with fast_products():
            alike_bb = sums_bF @ self._swapped(sums_bF).T
        alike_bb.fill_diagonal_(-torch.inf)
        alike_bL, near_bL = alike_bb.topk(min(_NUM_NEAR, num_batches - 1), dim=1)

        index_bb = torch.full_like(alike_bb, -1, dtype=torch.int32)
        order_L = torch.arange(near_bL.shape[1], dtype=torch.int32, device=near_bL.device)
        index_bb.scatter_(1, near_bL, order_L.expand(num_batches, -1))
        own_b1 = torch.arange(num_batches, device=near_bL.device)[:, None]
        return near_bL, index_bb[near_bL, own_b1].long(), alike_bL

    def _best_to_give(self, near_bL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each batch and near batch, the gains of the pairs that gain most by going there, and their slots.

        Both are b × L × M, by falling gain.
        """
        toward_bF = self._swapped(self._sum_bF).float()
        num_slots, width = self._x_bBF.shape[1:]
        own_b1 = torch.arange(len(near_bL), device=near_bL.device)[:, None]
        either_bL = torch.cat([own_b1, near_bL], dim=1)  # the batch itself first

        block_size = max(1, _GAINS_HELD // (either_bL.shape[1] * max(num_slots, width)))
        target_F = toward_bF.new_empty((min(block_size, len(near_bL)) * either_bL.shape[1], width))
        best = []
        for block in _blocks(len(near_bL), block_size):
            rows = either_bL[block].flatten()
            torch.index_select(toward_bF, 0, rows, out=target_F[: len(rows)])
            target_bLF = target_F[: len(rows)].view(-1, either_bL.shape[1], width)
            with fast_products():
                score_bLB = torch.bmm(target_bLF, self._x_bBF[block].transpose(1, 2))
            gain_bLB = score_bLB[:, 1:] - score_bLB[:, :1]

            # The score in its own batch counts d·q and q·d of the pair itself, which it does not lose by leaving.
            gain_bLB += 2 * self._own_bB[block, None]
            if self._room is not None:
                self._room.forbid(gain_bLB, block, near_bL[block])
            best.append(gain_bLB.topk(min(_NUM_CANDIDATES, num_slots), dim=2))
        return torch.cat([top.values for top in best]), torch.cat([top.indices for top in best])

    def _exchange(
        self, one_P: torch.Tensor, two_P: torch.Tensor, slot_PM: torch.Tensor, back_slot_PM: torch.Tensor
    ) -> float:
        """Exchanges the best first m candidates of each two batches, if Eq. 2 rises; returns by how much."""
        here_PM, there_PM = self._row(one_P[:, None], slot_PM), self._row(two_P[:, None], back_slot_PM)
        change_PMF = self._pairs_in(there_PM) - self._pairs_in(here_PM)
        apart_PF = self._swapped(self._sum_bF[one_P] - self._sum_bF[two_P])
        may_PM = torch.ones_like(slot_PM, dtype=torch.bool)
        if self._room is not None:
            may_PM = self._room.admits(two_P, here_PM) & self._room.admits(one_P, there_PM)
        is_given_PM = self._best_prefix(change_PMF, apart_PF.float(), may_PM)

        # The prefix was chosen in float32; whether it gains is decided in float64.
        change_PF = torch.bmm(is_given_PM[:, None].double(), change_PMF.double())[:, 0]
        gain_P = (change_PF * (apart_PF + self._swapped(change_PF))).sum(1)
        gains = gain_P > _LEAST_GAIN

        self._sum_bF[one_P[gains]] += change_PF[gains]
        self._sum_bF[two_P[gains]] -= change_PF[gains]
        given_PM = is_given_PM & gains[:, None]
        self._swap_slots(here_PM[given_PM], there_PM[given_PM])
        return float(gain_P[gains].sum())

    def _best_prefix(self, change_PMF: torch.Tensor, apart_PF: torch.Tensor, may_PM: torch.Tensor) -> torch.Tensor:
        """Marks (bool, P × M) the first m changes, with m where Δ·(X'_A − X'_B) + Δ·Δ' is largest.

        Δ is the sum of the first m changes. So the first term is a running sum of products, and the second
        is the sum of the leading m × m block of a matrix of products. The changes end before the first one
        that `may_PM` does not allow.
        """
        against_PNF = torch.cat([apart_PF[:, None], self._swapped(change_PMF)], dim=1)
        product_PMN = torch.bmm(change_PMF, against_PNF.transpose(1, 2))
        gain_PM = product_PMN[..., 0].cumsum(1)
        gain_PM += product_PMN[..., 1:].cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2)
        order_M = torch.arange(change_PMF.shape[1], device=change_PMF.device)
        may_PM = may_PM.cumprod(1).bool()
        return may_PM & (order_M <= gain_PM.masked_fill(~may_PM, -torch.inf).argmax(1)[:, None])

    def _swap_slots(self, here: torch.Tensor, there: torch.Tensor) -> None:
        for values in (self._x_bBF.flatten(0, 1), self.pairs.flatten(), self._own_bB.flatten()):
            values[here], values[there] = values[there], values[here]
        if self._room is not None:
            self._room.swap(here, there)

    def _pairs_in(self, row_PM: torch.Tensor) -> torch.Tensor:
        """d⊕q of the pairs in these rows (P × M × F)."""
        return self._x_bBF.flatten(0, 1).index_select(0, row_PM.flatten()).view(*row_PM.shape, -1)

    def _row(self, batch: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        return batch * self.pairs.shape[1] + slot

    def _swapped(self, vectors: torch.Tensor) -> torch.Tensor:
        """d⊕q → q⊕d."""
        return vectors.roll(self._half, dims=-1)


class _Room:
    """How many more pairs of each class a batch may hold, kept up to date."""

    def __init__(self, capped: CappedClasses, device: torch.device) -> None:
        self._classes_bB2 = torch.tensor(capped.numbers, device=device)
        self._room_kb = torch.from_numpy(capped.room()).to(device)

    def forbid(self, gain_bLB: torch.Tensor, block: slice, near_bL: torch.Tensor) -> None:
        """Makes the gains -inf, in place, of the pairs of a block whose near batch has no room for their classes."""
        classes_bB2 = self._classes_bB2[block]
        batch, slot = (classes_bB2 > 0).any(2).nonzero(as_tuple=True)
        classes, near = classes_bB2[batch, slot][:, :, None], near_bL[batch][:, None]
        is_full = (self._room_kb[classes, near] <= 0).any(1)
        gain_bLB[batch, :, slot] = gain_bLB[batch, :, slot].masked_fill(is_full, -torch.inf)

    def admits(self, to_P: torch.Tensor, row_PM: torch.Tensor) -> torch.Tensor:
        """Whether a batch has room for each pair (bool, P × M), after those that come before it in its list."""
        classes_PM2 = self._classes_bB2.flatten(0, 1)[row_PM]
        same_PMM2 = classes_PM2[:, :, None] == classes_PM2[:, None]
        place_PM2 = same_PMM2.transpose(1, 3).triu().sum(2).transpose(1, 2)  # 1 for the first of its class
        return (place_PM2 <= self._room_kb[classes_PM2, to_P[:, None, None]]).all(2)

    def swap(self, here: torch.Tensor, there: torch.Tensor) -> None:
        """Exchanges the pairs in these rows."""
        classes, num_slots = self._classes_bB2.flatten(0, 1), self._classes_bB2.shape[1]
        one = self._room_kb.new_ones(())
        for origin, target in ((here, there), (there, here)):
            for rows, change in ((origin, one), (target, -one)):
                batch = (rows // num_slots)[:, None]
                self._room_kb.index_put_((classes[origin], batch), change, accumulate=True)
        classes[here], classes[there] = classes[there], classes[here]
        self._room_kb[0] = num_slots  # there is always room for small classes


def _blocks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, max(1, size)):
        yield slice(start, start + max(1, size))


def _match(promise_bL: torch.Tensor, near_bL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of batches that promise a gain, each batch in one at most: (batch, index of the other in its list).

    Takes all pairs that are each other's best, again and again. That is the matching that a walk over all
    pairs by falling promise would find.
    """
    promise_bL = promise_bL.clone()
    every_b = torch.arange(len(near_bL), device=near_bL.device)
    taken_b = torch.zeros(len(near_bL), dtype=torch.bool, device=near_bL.device)
    ones, indices = [every_b[:0]], [every_b[:0]]
    while True:
        best_b, index_b = promise_bL.max(1)
        other_b = near_bL[every_b, index_b]
        promises_b = (best_b > 0) & (best_b[other_b] > 0)
        mutual_b = promises_b & (other_b[other_b] == every_b) & (every_b < other_b)
        one = every_b[mutual_b]
        if len(one) == 0:
            return torch.cat(ones), torch.cat(indices)

        ones.append(one)
        indices.append(index_b[one])
        taken_b[one] = taken_b[other_b[one]] = True
        promise_bL.masked_fill_(taken_b[:, None] | taken_b[near_bL], -torch.inf)
