"""Measures, prints and plots the batches that batching.py makes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.vectors import FoldedPoints
from hardbatch.pipeline.batching.hardness import TEMPERATURE, Bounds


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A domain: its pairs, and the vectors of both sides by the clustering model and by another (float32, n × D)."""

    points: FoldedPoints
    query_row: torch.Tensor
    document_row: torch.Tensor
    own: tuple[torch.Tensor, torch.Tensor]
    other: tuple[torch.Tensor, torch.Tensor]


def measure(corpus: Corpus, batches: Array, labels: Array, bounds: Bounds, reference: float | None) -> dict[str, float]:
    """Returns all figures of the batches; `reference` is the mask rate at which losses are compared."""
    places = torch.from_numpy(batches)
    similar, mask, loss, above = [], {"own": [], "other": []}, [], []
    for rows in places:
        documents, queries = (side[rows] for side in corpus.own)
        scores = queries @ documents.T
        similar.append((scores + scores.T) / 2)
        known = corpus.query_row[rows][:, None] == corpus.query_row[rows]
        known |= corpus.document_row[rows][:, None] == corpus.document_row[rows]
        for model, (far_documents, far_queries) in (("own", corpus.own), ("other", corpus.other)):
            far = far_queries[rows] @ far_documents[rows].T
            masked = ((far >= far.diagonal()[:, None]) | known).fill_diagonal_(False)
            mask[model].append(masked)
            if model == "own":
                above.append((far - far.diagonal()[:, None]).masked_fill(known, torch.inf).fill_diagonal_(-torch.inf))
                own = far.diagonal() / TEMPERATURE
                loss.append(float(((far / TEMPERATURE).masked_fill(masked, -torch.inf).logsumexp(1) - own).mean()))
    size = places.shape[1]
    alike = torch.stack(similar).double()
    off = ~torch.eye(size, dtype=torch.bool)
    figures = {"H": float(alike[:, off].mean())}
    figures["share"] = bounds.share(figures["H"])
    for model, suffix in (("own", ""), ("other", ", other model")):
        masked = torch.stack(mask[model])
        hardness = float(alike[off & ~masked].mean())
        figures["masked H" + suffix] = hardness
        figures["masked share" + suffix] = bounds.share(hardness)
        rates = masked.double().sum((1, 2)) / (size * (size - 1))
        figures["mask rate" + suffix] = float(rates.mean())
        if model == "own":
            figures["loss"] = float(np.mean(loss))
            figures["loss at shipped's mask rate"] = loss_at(rates.numpy(), np.array(loss), reference)
            figures["loss at its margin"] = (
                loss_at_margin(torch.stack(above), reference) if reference else figures["loss"]
            )
    quantiles = np.quantile(np.bincount(labels), (0.05, 0.5, 0.95)) / size if len(labels) else [float("nan")] * 3
    figures.update(dict(zip(("size q05", "size q50", "size q95"), map(float, quantiles), strict=True)))
    return figures


def loss_at(rates: Array, losses: Array, wanted: float | None) -> float:
    """Returns the mean loss after dropping the most masked batches until the mask rate is at most `wanted`."""
    order = np.argsort(rates, kind="stable")
    mean_rates = np.cumsum(rates[order]) / np.arange(1, len(rates) + 1)
    kept = len(rates) if wanted is None else max(1, int((mean_rates <= wanted).sum()))
    return float(losses[order[:kept]].mean())


def loss_at_margin(above_bBB: torch.Tensor, wanted: float) -> float:
    """Returns the mean loss if a fraction `wanted` of the slots is masked: those furthest above the own document.

    Known pairs are always masked: `above_bBB` is infinite there. It is minus infinity on the diagonal.
    """
    size = above_bBB.shape[1]
    number = max(1, round(wanted * len(above_bBB) * size * (size - 1)))
    threshold = above_bBB.flatten().kthvalue(above_bBB.numel() - number + 1).values
    apart_bBB = (above_bBB / TEMPERATURE).masked_fill(above_bBB >= threshold, -torch.inf)
    apart_bBB.diagonal(dim1=1, dim2=2).zero_()
    return float(apart_bBB.logsumexp(2).double().mean())


def print_table(title: str, found: dict[str, list[dict[str, float]]]) -> None:
    """Prints medians over seeds, as Markdown."""
    columns = list(next(iter(found.values()))[0])
    print(f"\n{title}\n\n| method | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, runs in found.items():
        values = [statistics.median(run[column] for run in runs) for column in columns]
        cells = [f"{value:.3f}" for value in values]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def plot(medians: list[tuple[str, int, str, dict[str, float]]], path: Path) -> None:
    """Draws masked share against seconds (logarithmic), in a panel for each domain and B."""
    import matplotlib.pyplot as plt

    panels = sorted({(domain, size) for domain, size, _, _ in medians}, key=lambda panel: (panel[1], panel[0]))
    per_row = len({domain for domain, _ in panels})
    figure, axes = plt.subplots(-(-len(panels) // per_row), per_row, figsize=(4 * per_row, 7), squeeze=False)
    names = list(dict.fromkeys(name for _, _, name, _ in medians if name != "random"))
    for axis, (domain, size) in zip(axes.flat, panels, strict=False):  # a row may end with an empty one
        for number, name in enumerate(names):
            rows = [row for other, b, method, row in medians if (other, b, method) == (domain, size, name)]
            marker = {"w": "*", "p": "o", "f": "s"}.get(name[0], "X")
            for row in rows:
                axis.scatter(row["seconds"], row["masked share"], marker=marker, color=f"C{number % 10}", label=name)
        axis.set(xscale="log", title=f"{domain}, B = {size}", xlabel="seconds", ylabel="masked share")
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path)
