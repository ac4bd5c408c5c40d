"""Tables with confidence: a paired bootstrap over queries and seeds.

The primary figure is the mean of two macro averages of nDCG@10: over the domains of training (held-out queries), and
over the collections of other origin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Results = Mapping[str, Sequence[Mapping[str, np.ndarray]]]  # arm → seed → collection → nDCG@10 of each query

_DRAWS = 1_000


def print_table(results: Results, domains: Sequence[str], against: str | None = None) -> None:
    """Prints each arm: in domain, out of domain, primary, and its lead over one arm with its 95 % interval."""
    against = against or next(iter(results))
    width = max(map(len, results)) + 2
    print(f"{'':<{width}}{'in':>8}{'out':>8}{'mean':>8}{'seeds':>7}   lead over {against}")
    for name, seeds in results.items():
        if not seeds:
            continue
        inside, outside = _primary(seeds, domains)
        low, high = interval(seeds, results[against], domains)
        lead = (inside + outside - sum(_primary(results[against][: len(seeds)], domains))) / 2
        print(
            f"{name:<{width}}{inside:>8.4f}{outside:>8.4f}{(inside + outside) / 2:>8.4f}{len(seeds):>7}"
            f"   {lead:+.4f} ({low:+.4f} to {high:+.4f})"
        )


def interval(
    one: Sequence[Mapping[str, np.ndarray]], other: Sequence[Mapping[str, np.ndarray]], domains: Sequence[str]
) -> tuple[float, float]:
    """The 95 % interval of the difference in the primary figure, of runs with the same seeds."""
    num_seeds = min(len(one), len(other))
    generator = np.random.default_rng(0)
    names = list(one[0])
    differences = {name: np.stack([one[s][name] - other[s][name] for s in range(num_seeds)]) for name in names}
    totals = np.zeros(_DRAWS)
    num_inside = len(domains)
    drawn_seeds = generator.integers(num_seeds, size=(_DRAWS, num_seeds))
    for name, values in differences.items():
        share = 0.5 / (num_inside if name in domains else len(names) - num_inside)
        for draw in range(_DRAWS):
            queries = generator.integers(values.shape[1], size=values.shape[1])
            totals[draw] += share * values[drawn_seeds[draw]].mean(0)[queries].mean()
    low, high = np.percentile(totals, [2.5, 97.5])
    return float(low), float(high)


def _primary(seeds: Sequence[Mapping[str, np.ndarray]], domains: Sequence[str]) -> tuple[float, float]:
    names = list(seeds[0])
    mean = {name: float(np.mean([seed[name].mean() for seed in seeds])) for name in names}
    return (
        float(np.mean([mean[name] for name in names if name in domains])),
        float(np.mean([mean[name] for name in names if name not in domains] or [0.0])),
    )
