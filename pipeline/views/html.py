"""Shards as one HTML page: figures to look at, and batches to read.

The page holds everything it shows and loads nothing. Bars are plain elements, so that their texts stay readable
on a phone; only the map of clusters is an image. Colours follow the reader's choice of light or dark.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import polars as pl

from hardbatch.pipeline.arrays import Array
from hardbatch.pipeline.artifacts.artifact import Artifact, diagnose_damage, find_artifact
from hardbatch.pipeline.stages.figures import DomainSummary, Summary
from hardbatch.pipeline.stages.warnings import corpus_warnings
from hardbatch.pipeline.views.report import read_shards, read_summary

_BATCHES_READ = 1_024  # evenly spaced over the shards; what is counted slot by slot is counted in these
_BATCHES_SHOWN = 3  # of the hardest, and of the easiest
_BARS = 16  # of a histogram
_MAP_SIZE = 320
_QUERIES_OF_A_CLUSTER = 3
_CLUSTERS_IN_WORDS = 12  # the most masked ones, below each map: a touch screen shows no titles of its dots
_TEXT_CHARACTERS = 160


def report_html(shards: Path) -> str:
    """The page of a shards artifact.

    Args:
        shards: The folder of the artifact, or one above it.

    Raises:
        InputError: There are no shards, or several.
        IntegrityError: A file of theirs is damaged.
    """
    artifact = read_shards(shards)
    summary = read_summary(artifact)
    with diagnose_damage([artifact.path]):
        index = pl.read_parquet(artifact.path / "index.parquet")
        slots = _read_slots(artifact, index)
        sections = [
            _section("From rows to batches", _ROWS, _rows_part(summary)),
            _section("How hard the batches are", _HARDNESS, _hardness_part(summary, index)),
            _section("What a query has to learn from", _NEGATIVES, _negatives_part(summary, slots)),
            _section("Why documents are masked", _MASKS, _masks_part(summary)),
            _section("The map", _MAP, _map_part(artifact, summary, slots)),
            _section("Batches to read", _BATCHES, _batches_part(artifact, index)),
        ]
    config = artifact.manifest.config
    name = escape(artifact.manifest.domain)
    warnings = "".join(f"<li>{escape(line)}</li>" for line in corpus_warnings(summary))
    lead = (
        f"<b>{summary.batches:,}</b> batches of <b>{summary.batch_size}</b> pairs in groups of "
        f"<b>{config.get('group_size', summary.batch_size)}</b>, {summary.packings} packing"
        f"{'s' * (summary.packings > 1)}, {len(summary.domains)} domain{'s' * (len(summary.domains) > 1)}. "
        f"Key <code>{escape(artifact.path.name)}</code>."
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}: hardbatch report</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main><h1>{name}</h1><p>{lead}</p>"
        + (f'<ul class="warnings" aria-label="warnings">{warnings}</ul>' if warnings else "")
        + "".join(sections)
        + "</main></body></html>\n"
    )


_ROWS = """Every row of the source is in a batch or in one of the other parts; the line below the bar gives the reasons.
If there are several packings, this counts one of them."""
_HARDNESS = """Hardness says how alike the pairs of a batch are. The left end of the line is the hardness of random
batches. The right end is a bound that no batches reach: every pair together with its nearest pairs of the
domain. The share is how far along the line the batches are. Groups are harder than batches, which mix
several groups. “Batches, masked” leaves the false negatives out."""
_NEGATIVES = """The negatives of a query are the other slots of its batch that are not masked for it. A query with few
of them learns little."""
_MASKS = """A document is masked for a query if it answers it for certain (equal texts or near-copies of a known pair),
if it is the text of the query itself, or if the surrogate says that it is likely to answer it."""
_MAP = """Each dot is a cluster of alike pairs, and a larger dot has more pairs. Clusters near each other are alike, as
far as two dimensions can show it. The redder a dot, the more slots are masked for its queries. Point at a
dot to see some of them, or unfold the list."""
_PARTS = (
    "in batches", "held out", "left over", "in batches of several domains, or left over there", "quarantined",
    "left out by `where`",
)  # fmt: skip
_DOTS = ("groups", "batches, masked", "batches")
_REASONS = ("same answer", "text of the query", "likely")
_BATCHES = """The hardest and the easiest batches; open one to read it. Thick lines divide groups of alike pairs. The
last column has the slots whose documents are masked for the query. Can you tell which document belongs to a
query? Do the masked documents answer it?"""


@dataclass(frozen=True, kw_only=True)
class _Slots:
    """Slots of some batches: domain, cluster_id, query, and how many slots are masked for the query."""

    frame: pl.DataFrame
    num_batches: int
    is_all: bool


def _read_slots(artifact: Artifact, index: pl.DataFrame) -> _Slots:
    """Reads the batches that are counted slot by slot: all of them, or some that are evenly spaced."""
    import pyarrow.parquet as pq

    rows = np.unique(np.linspace(0, len(index) - 1, min(_BATCHES_READ, len(index)), dtype=np.int64))
    columns = ["domain", "cluster_id", "query", "equivalent_slots"]
    tables = []
    for (file,), entries in index[rows].group_by("file", maintain_order=True):
        with pq.ParquetFile(artifact.path / str(file)) as parquet:
            table = parquet.read_row_groups(entries["row_group"].to_list(), columns=columns)
        masked = pl.col("equivalent_slots").list.len().alias("masked")
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        tables.append(frame.select(pl.col("domain").cast(pl.String), "cluster_id", "query", masked))
    return _Slots(frame=pl.concat(tables), num_batches=len(rows), is_all=len(rows) == len(index))


def _rows_part(summary: Summary) -> str:
    parts = []
    shown: set[str] = set()
    for name, domain in summary.domains.items():
        source = domain.source
        reasons = {
            "in batches": {"": domain.batches * summary.batch_size},
            "held out": {"": source.get("held_out", 0)},
            "left over": {reason: count for reason, count in domain.leftover.items() if reason != "mixed"},
            "in batches of several domains, or left over there": {"": domain.leftover.get("mixed", 0)},
            "quarantined": source.get("quarantined", {}),
            "left out by `where`": {"": source.get("rows_filtered", 0)},
        }
        counts = {part: sum(found.values()) for part, found in reasons.items()}
        shown |= {part for part, count in counts.items() if count}
        texts = []
        for part, found in reasons.items():
            why = ", ".join(f"{count:,} {reason}" for reason, count in found.items() if count and reason)
            texts += [f"{counts[part]:,} {part}" + (f" ({why})" if why else "")] * (counts[part] > 0)
        parts.append(
            _row(name, _stack(counts), f"{source.get('rows', sum(counts.values())):,} rows: {', '.join(texts)}")
        )
    return _legend(_PARTS, shown) + "".join(parts)


def _hardness_part(summary: Summary, index: pl.DataFrame) -> str:
    parts = []
    for name, domain in summary.domains.items():
        if domain.hardness is None:
            continue
        found = domain.hardness
        marks = {"batches": found.share, "batches, masked": found.masked_share}
        text = f"hardness {found.hardness:.3f}"
        if domain.bounds is not None:
            random, knn = domain.bounds
            text = f"{text}, between {random:.3f} (random) and {knn:.3f} (nearest); share {found.share or 0:.3f}"
            if found.group_hardness is not None and knn > random:
                marks = {"groups": (found.group_hardness - random) / (knn - random), **marks}
        points = "".join(
            f'<i class="mark m{i}" style="left:{100 * min(max(value, 0), 1):.1f}%" title="{what} {value:.3f}"></i>'
            for i, what in enumerate(_DOTS)
            if (value := marks.get(what)) is not None
        )
        own = index.filter(pl.col("domain") == name)["hardness"].to_numpy()
        parts.append(_row(name, f'<div class="line">{points}</div>', text) + _histogram(own, "hardness", "batches"))
    return _legend(_DOTS, kind="m") + "".join(parts)


def _negatives_part(summary: Summary, slots: _Slots) -> str:
    others = summary.batch_size - 1
    parts = [] if slots.is_all else [f"<p>Counted in {slots.num_batches:,} batches, evenly spaced.</p>"]
    for name, domain in summary.domains.items():
        kept = others - slots.frame.filter(pl.col("domain") == name)["masked"].to_numpy().astype(np.int64)
        if len(kept) == 0:
            continue
        text = (
            f"{kept.mean():.1f} of {others} on average, {int(np.quantile(kept, 0.05))} or fewer for 5 % of the queries"
        )
        if domain.negatives is not None:
            text += f"; {domain.negatives.without:,} queries have none"
        parts.append(f"<h3>{escape(name)}</h3><p>{text}</p>" + _histogram(kept, "negatives", "queries", (0, others)))
    return "".join(parts)


def _masks_part(summary: Summary) -> str:
    parts = []
    shown: set[str] = set()
    for name, domain in summary.domains.items():
        found, hardness = domain.negatives, domain.hardness
        if found is None or hardness is None or found.same_answer_share is None:
            continue
        shares = {
            "same answer": found.same_answer_share,
            "text of the query": found.query_text_share or 0.0,
            "likely": found.likely_share or 0.0,
        }
        shown |= {reason for reason, share in shares.items() if share}
        text = f"{hardness.mask_rate:.2%} of the slots are masked; of these " + ", ".join(
            f"{share:.0%} {reason}" for reason, share in shares.items() if share
        )
        parts.append(_row(name, _stack(shares), text))
    if not parts:
        return "<p>Nothing is masked.</p>"
    return _legend(_REASONS, shown) + "".join(parts)


def _map_part(artifact: Artifact, summary: Summary, slots: _Slots) -> str:
    maps = []
    for name, domain in summary.domains.items():
        key = artifact.manifest.inputs.get(f"clusters/{name}") or _key_of_clusters(artifact, name)
        folder = artifact.path.parents[1] / "clusters" / name / (key or "")
        if key is None or find_artifact(folder) is None:
            maps.append(f"<p>{escape(name)}: the clusters are gone, or these shards were copied without them.</p>")
            continue
        with diagnose_damage([folder]):
            centroids = np.load(folder / "centroids.npy")
            labels = pl.read_parquet(folder / "clusters.parquet", columns=["cluster_id"])["cluster_id"].to_numpy()
        sizes = np.bincount(labels, minlength=len(centroids))
        own = slots.frame.filter(pl.col("domain") == name)
        maps.append(_map(name, domain, centroids, sizes, own, summary.batch_size))
    return f'<div class="maps">{"".join(maps)}</div>'


def _key_of_clusters(artifact: Artifact, domain: str) -> str | None:
    """The key of the clusters that the batches of a domain were made from."""
    key = artifact.manifest.inputs.get(f"batches/{domain}")
    batches = find_artifact(artifact.path.parents[1] / "batches" / domain / key) if key else None
    return None if batches is None else batches.manifest.inputs.get("clusters")


def _map(
    name: str, domain: DomainSummary, centroids_kD: Array, sizes: Array, slots: pl.DataFrame, batch_size: int
) -> str:
    """The clusters of a domain in the two directions in which their centroids vary most."""
    if len(centroids_kD) < 3:
        return f"<p>{escape(name)}: {len(centroids_kD)} clusters are too few for a map.</p>"
    weights = np.sqrt(sizes)[:, None]
    apart_kD = centroids_kD - np.average(centroids_kD, axis=0, weights=sizes)
    _, _, directions = np.linalg.svd(apart_kD * weights, full_matrices=False)
    along = apart_kD @ directions[:2].T
    low, high = along.min(0), along.max(0)
    places = 12 + (along - low) / np.where(high > low, high - low, 1) * (_MAP_SIZE - 24)

    queries = {}
    for (cluster,), rows in slots.group_by("cluster_id"):
        texts = [_shorten(text, 60) for text in rows["query"].unique(maintain_order=True)[:_QUERIES_OF_A_CLUSTER]]
        rate = int(rows["masked"].sum()) / (len(rows) * max(1, batch_size - 1))
        queries[cluster] = (rate, "\n".join(texts))
    scale = 9 / np.sqrt(sizes.max())
    most = max((rate for rate, _ in queries.values()), default=0) or 1
    dots, in_words = [], []
    for cluster in np.argsort(-sizes):
        rate, shown = queries.get(int(cluster), (0.0, ""))
        x, y = places[cluster]
        text = f"{sizes[cluster]:,} pairs, {rate:.1%} masked\n{escape(shown)}"
        in_words.append((rate, text.replace("\n", "<br>")))
        dots.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{max(1.5, scale * np.sqrt(sizes[cluster])):.1f}" '
            f'style="--rate:{100 * rate / most:.0f}%"><title>{text}</title></circle>'
        )
    most_masked = sorted(in_words, key=lambda each: -each[0])[:_CLUSTERS_IN_WORDS]
    items = "".join(f"<li>{text}" for _, text in most_masked)
    return (
        f'<figure><svg viewBox="0 0 {_MAP_SIZE} {_MAP_SIZE}" role="img" aria-label="clusters of {escape(name)}">'
        f"{''.join(dots)}</svg><figcaption>{escape(name)}: {len(sizes):,} clusters</figcaption>"
        f"<details><summary>the most masked of them</summary><ol>{items}</ol></details></figure>"
    )


def _batches_part(artifact: Artifact, index: pl.DataFrame) -> str:
    """The hardest and the easiest batches, each to be unfolded."""
    import pyarrow.parquet as pq

    order = index.sort("hardness", "batch_id", descending=[True, False])
    shown = {"hardest": order.head(_BATCHES_SHOWN), "easiest": order.tail(_BATCHES_SHOWN).reverse()}
    group_size = artifact.manifest.config.get("group_size", 0)
    parts = []
    for what, entries in shown.items():
        for entry in entries.iter_rows(named=True):
            with pq.ParquetFile(artifact.path / entry["file"]) as parquet:
                rows = parquet.read_row_group(entry["row_group"]).to_pylist()
            parts.append(
                f"<details><summary>{what}: batch {entry['batch_id']} of {escape(entry['domain'])}, hardness "
                f"{entry['hardness']:.3f}, mask rate {entry['mask_rate']:.2%}</summary>"
                f'<div class="scroll"><table><thead><tr><th>slot<th>query<th>document<th>masked slots</tr></thead>'
                f"<tbody>{''.join(_slot(row, group_size) for row in rows)}</tbody></table></div></details>"
            )
    return "".join(parts)


def _slot(row: Mapping[str, object], group_size: int) -> str:
    slot, masked = row["slot"], row["equivalent_slots"]
    assert isinstance(slot, int) and isinstance(masked, list)
    begins = ' class="group"' if group_size > 1 and slot % group_size == 0 else ""
    texts = "".join(f"<td>{escape(_shorten(str(row[side])))}" for side in ("query", "document"))
    return f"<tr{begins}><td>{slot}{texts}<td>{', '.join(map(str, masked))}</tr>"


def _section(title: str, text: str, part: str) -> str:
    return f"<section><h2>{title}</h2><p>{' '.join(text.split())}</p>{part}</section>"


def _row(name: str, bar: str, text: str) -> str:
    return f"<h3>{escape(name)}</h3>{bar}<p>{escape(text)}</p>"


def _stack(counts: Mapping[str, float]) -> str:
    """Parts of a whole, side by side; the order of `counts` gives the colours."""
    total = sum(counts.values()) or 1
    parts = "".join(
        f'<i class="c{i}" style="width:{100 * count / total:.2f}%" title="{escape(what)}: {count:,.4g}"></i>'
        for i, (what, count) in enumerate(counts.items())
        if count
    )
    return f'<div class="stack">{parts}</div>'


def _legend(names: Sequence[str], shown: Collection[str] | None = None, kind: str = "c") -> str:
    """The colours of the names, of which only those in `shown` occur."""
    keys = "".join(
        f'<li><i class="{kind}{i}"></i>{escape(name)}</li>'
        for i, name in enumerate(names)
        if shown is None or name in shown
    )
    return f'<ul class="legend">{keys}</ul>'


def _histogram(values: Array, what: str, counted: str, limits: tuple[float, float] | None = None) -> str:
    """Bars that say how many of the values are in each of some equal ranges."""
    low, high = limits or (float(values.min()), float(values.max()))
    high = high if high > low else low + 1
    counts, edges = np.histogram(values, bins=_BARS, range=(low, high))
    bars = "".join(
        f'<i style="height:{100 * count / counts.max():.1f}%" title="{start:.4g} to {stop:.4g}: {count:,}"></i>'
        for count, start, stop in zip(counts, edges, edges[1:], strict=False)
    )
    scale = f"{what} (highest bar: {counts.max():,} {counted})"
    ends = f"<span>{low:.3g}</span><span>{scale}</span><span>{high:.3g}</span>"
    return f'<div class="histogram">{bars}</div><div class="ends">{ends}</div>'


def _shorten(text: str, limit: int = _TEXT_CHARACTERS) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _colours(names: Iterable[str]) -> str:
    return "".join(f"--c{i}:{colour};" for i, colour in enumerate(names))


_LIGHT = ("#2f6fb2", "#7fb3d9", "#c9b458", "#9a7fc0", "#d0694f", "#b9bec6")
_DARK = ("#5b9bd8", "#3c6f99", "#b8a24a", "#8a72b0", "#d9785f", "#5d6570")
_STYLE = (
    f":root{{{_colours(_LIGHT)}--back:#fff;--text:#1d2330;--soft:#5c6575;--line:#dfe3ea;--hot:#d0402f}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_colours(_DARK)}"
    "--back:#14171d;--text:#e4e7ec;--soft:#9aa3b2;--line:#2c323d;--hot:#ff6b55}}"
    "*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--text);"
    "font:16px/1.5 system-ui,sans-serif}main{max-width:62rem;margin:auto;padding:1rem}"
    "h1{margin:.5rem 0}h2{margin:2.5rem 0 .25rem;border-top:1px solid var(--line);padding-top:1rem}"
    "h3{margin:1.2rem 0 .3rem;font-size:1rem}p{margin:.3rem 0;color:var(--soft)}code{word-break:break-all}"
    ".warnings{border-left:4px solid var(--hot);padding:.5rem 1rem .5rem 2rem;margin:1rem 0}"
    ".stack{display:flex;height:1.4rem;border-radius:4px;overflow:hidden;background:var(--line)}.stack i{min-width:2px}"
    + "".join(f".c{i}{{background:var(--c{i})}}" for i in range(6))
    + ".m0{background:var(--c2)}.m1{background:var(--c4)}.m2{background:var(--c0)}"
    ".legend{list-style:none;display:flex;flex-wrap:wrap;gap:.3rem 1rem;padding:0;margin:.5rem 0}"
    ".legend i{display:inline-block;width:.8rem;height:.8rem;border-radius:3px;margin-right:.4rem}"
    ".line{position:relative;height:1rem;margin:.4rem .5rem;background:linear-gradient(var(--line),var(--line)) "
    "center/100% 3px no-repeat}.mark{position:absolute;top:0;width:1rem;height:1rem;margin-left:-.5rem;"
    "border-radius:50%;border:2px solid var(--back)}"
    ".histogram{display:flex;align-items:flex-end;gap:2px;height:5rem;margin-top:.5rem}"
    ".histogram i{flex:1;min-height:1px;background:var(--c0);border-radius:2px 2px 0 0}"
    ".ends{display:flex;justify-content:space-between;color:var(--soft);font-size:.85rem}"
    ".maps{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(18rem,100%),1fr));gap:1rem;align-items:start}"
    "figure{margin:0}svg{width:100%;border:1px solid var(--line);border-radius:6px}"
    "circle{fill:color-mix(in srgb,var(--hot) var(--rate),var(--c0));fill-opacity:.55}"
    "figcaption{color:var(--soft);text-align:center}"
    "details{border:1px solid var(--line);border-radius:6px;margin:.5rem 0;padding:.4rem .8rem}summary{cursor:pointer}"
    ".scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;min-width:40rem;width:100%}"
    "th,td{text-align:left;vertical-align:top;padding:.25rem .5rem}td{border-top:1px solid var(--line)}"
    ".group td{border-top:2px solid var(--soft)}"
)
