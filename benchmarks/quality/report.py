"""Tables with confidence: a paired bootstrap over queries and seeds.

The primary figure is the mean of two macro averages of nDCG@10: over the domains of training (held-out queries), and
over the collections of other origin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hardbatch.pipeline.arrays import Array

Results = Mapping[str, Sequence[Mapping[str, Array]]]  # arm → seed → collection → nDCG@10 of each query

_DRAWS = 1_000


def print_table(results: Results, domains: Sequence[str], against: str) -> None:
    """Prints each arm: in domain, out of domain, primary, and its lead over one arm with its 95 % interval."""
    width = max(map(len, results)) + 2
    print(f"{'':<{width}}{'in':>8}{'out':>8}{'mean':>8}{'seeds':>7}   lead over {against}")
    for name, seeds in results.items():
        inside, outside = means(seeds, domains)
        low, high = interval(seeds, results[against], domains)
        print(
            f"{name:<{width}}{inside:>8.4f}{outside:>8.4f}{(inside + outside) / 2:>8.4f}{len(seeds):>7}"
            f"   {lead(seeds, results[against], domains):+.4f} ({low:+.4f} to {high:+.4f})"
        )


def interval(
    one: Sequence[Mapping[str, Array]], other: Sequence[Mapping[str, Array]], domains: Sequence[str]
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


def means(seeds: Sequence[Mapping[str, Array]], domains: Sequence[str]) -> tuple[float, float]:
    """The macro averages over the domains of training and over the other collections."""
    names = list(seeds[0])
    mean = {name: float(np.mean([seed[name].mean() for seed in seeds])) for name in names}
    return (
        float(np.mean([mean[name] for name in names if name in domains])),
        float(np.mean([mean[name] for name in names if name not in domains] or [0.0])),
    )


def by_quality(results: Results, domains: Sequence[str]) -> list[str]:
    """The names of arms, the best first."""
    return sorted(results, key=lambda name: -sum(means(results[name], domains)))


def draw_dial(results: Mapping[str, Results], domains: Sequence[str], path: Path) -> None:
    """Draws the lead over random batches against K, a line for each rule of masking.

    Args:
        results: By rule the arms, whose names have a part `K = ...`, with that of K = 1 among them.
        domains: Those of training.
        path: Where to write the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for number, (rule, arms) in enumerate(results.items()):
        by_size = {group_size(name): seeds for name, seeds in arms.items()}
        sizes = sorted(by_size)
        leads = [lead(by_size[size], by_size[1], domains) for size in sizes]
        bounds = [interval(by_size[size], by_size[1], domains) for size in sizes]
        spread = [[mean - low for mean, (low, _) in zip(leads, bounds, strict=True)]]
        spread.append([high - mean for mean, (_, high) in zip(leads, bounds, strict=True)])
        shifted = [size * 1.04**number for size in sizes]  # so that the bars of two rules stand side by side
        axes.errorbar(shifted, leads, yerr=np.maximum(spread, 0), marker="o", capsize=3, label=rule)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("K, alike pairs that stand together in a batch (1: random)")
    axes.set_ylabel("nDCG@10 above random batches")
    axes.legend(title="likely answers by", frameon=False)
    figure.savefig(path)


def draw_compute(results: Mapping[int, Results], domains: Sequence[str], path: Path) -> None:
    """Draws the primary figure against the number of pairs that were seen, a line for each arm.

    Args:
        results: By number of pairs.
        domains: Those of training.
        path: Where to write the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name in next(iter(results.values())):
        seen = [number for number, arms in results.items() if name in arms]
        axes.plot(seen, [sum(means(results[number][name], domains)) / 2 for number in seen], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(results), [f"{number:,}" for number in results])
    axes.minorticks_off()
    axes.set_xlabel("pairs seen, to which the seconds of training are proportional")
    axes.set_ylabel("nDCG@10")
    axes.legend(frameon=False)
    figure.savefig(path)


def group_size(name: str) -> int:
    """The K in the name of an arm."""
    return int(next(part for part in name.split(", ") if part.startswith("K = ")).removeprefix("K = "))


def lead(one: Sequence[Mapping[str, Array]], other: Sequence[Mapping[str, Array]], domains: Sequence[str]) -> float:
    """The difference in the primary figure, of the seeds that both have."""
    num_seeds = min(len(one), len(other))
    first, second = (sum(means(seeds[:num_seeds], domains)) / 2 for seeds in (one, other))
    return first - second
