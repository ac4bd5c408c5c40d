"""Row 18: ten times the corpus takes no more memory, but for the buffers that docs/benchmarks.md states."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hardbatch.pipeline.models.encoders import LEXICAL_DIMENSION as D
from tests.reliability.processes import run

PEAKS = Path(__file__).with_name("peaks.py")
B = 64
MIB = 2**20
ALLOWED = 1.10
QUICK_ALLOWED = 1.15  # some MiB of the allocator are more than a tenth of so little
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


def _clusters(n: int, levels: int) -> float:
    """Numbers of a pair, k x D values; the points and the sample, or the blocks of a cell."""
    k = -(-n // B)
    if levels == 1:
        return 44 * n + 24 * k * D + 4 * D * (n + 32 * k)
    rows, near = min(4_096, n / k**0.5), 12 * k**0.5
    return 44 * n + 16 * k * D + 10 * D * rows + 8 * min(2**21, rows * near)


def _batches(n: int) -> float:
    """Cosines of the tour; then vectors of a stretch of it, and what its batches look at and exchange."""
    k, stretch = -(-n // B), -(-n // -(-n // 65_536))
    b = stretch / B
    blocks = 4 * min(2**22, 33 * 2 * D * b) + 20 * 8 * 2 * D * min(128, b / 2) + 8 * b**2
    return 60 * n + 20 * k * D + max(4 * k**2, 8 * D * stretch + max(2 * D * stretch, blocks))


def stated(levels: int) -> dict[str, Callable[[int, float], float]]:
    """Bytes of buffers for n pairs whose texts have so many bytes: docs/benchmarks.md, 'Growth', has the same table."""
    return {
        "pairs": lambda n, text: 780 * n + (4 * text + 500) * min(n, 65_536) + 4 * text * min(n, 8_192),
        "vectors": lambda n, text: 0,
        "clusters": lambda n, text: _clusters(n, levels),
        "hardness": lambda n, text: 40 * n + 10 * D * min(n, 8_192),
        "batches": lambda n, text: _batches(n),
        "shards": lambda n, text: 44 * n + 20_000 * min(n / B, 1_024),
    }


def peaks(folder: Path, table: pl.DataFrame, settings: str) -> dict[str, int]:
    """The most anonymous memory, in bytes, that each stage held over one domain of these pairs."""
    folder.mkdir()
    table.write_parquet(folder / "pairs.parquet")
    manifest = folder / "corpus.toml"
    manifest.write_text(
        f'corpus = "c"\n[[dataset]]\nname = "d"\nsource = "pairs.parquet"\n[pack]\nbatch_size = {B}\n'
        f'[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\n{settings}'
    )
    # oneDNN keeps the code of up to 1,024 shapes of products, whatever n is: 28 MiB of them at 384k pairs, left out
    environment = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1"}
    ended = run([sys.executable, PEAKS, manifest, folder / "workspace"], environment=environment, timeout_s=600)
    assert ended.code == 0, ended.errors
    found = [json.loads(line) for line in ended.output.splitlines()]
    return {item["stage"]: item["bytes"] for item in found}


def compare(
    folder: Path, table: pl.DataFrame, num_pairs: int, settings: str, levels: int
) -> tuple[dict[str, float], str]:
    """By stage, what ten times the pairs hold beyond the stated buffers to what the pairs do; and a line of figures."""
    buffers = stated(levels)
    sizes = (num_pairs, 10 * num_pairs)
    held = [peaks(folder / str(size), table.head(size), settings) for size in sizes]
    assert list(held[0]) == list(buffers)
    text = float(table["document"].str.len_bytes().mean())  # type: ignore[arg-type]
    rest = {
        name: [held[i][name] - buffer(size, text) for i, size in enumerate(sizes)] for name, buffer in buffers.items()
    }
    ratios = {stage: more / less for stage, (less, more) in rest.items()}
    told = [
        f"{stage} {held[0][stage] / MIB:.0f} → {held[1][stage] / MIB:.0f} MiB, {100 * (ratios[stage] - 1):+.0f} %"
        for stage in buffers
    ]
    return ratios, f"{sizes[0]:,} → {sizes[1]:,} pairs: " + ", ".join(told)


def made_up(num_pairs: int) -> pl.DataFrame:
    """Distinct pairs of words that are drawn as real ones are, few of them often."""
    generator = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(20_000)])
    drawn = words[(20_000 * generator.random((num_pairs, 48)) ** 3).astype(int)]
    texts = [f"{i} {' '.join(row)}" for i, row in enumerate(drawn)]
    return pl.DataFrame({"query": [text[:50] for text in texts], "document": [text[8:] + "." for text in texts]})


def test_ten_times_the_pairs_hold_the_stated_buffers_more(
    tmp_path: Path, record_row: Callable[[int, str], None]
) -> None:
    # units and blocks that 3,000 pairs fill: larger ones would grow with the corpus, to no more than a few MiB
    ratios, told = compare(tmp_path, made_up(30_000), 3_000, "unit_rows = 256\n[hardness]\nanchors = 256\n", 1)
    record_row(18, told)
    assert {stage: ratio for stage, ratio in ratios.items() if ratio > QUICK_ALLOWED} == {}


@pytest.mark.soak
def test_ten_times_the_real_pairs_hold_the_stated_buffers_more(
    tmp_path: Path, record_row: Callable[[int, str], None]
) -> None:
    if "HARDBATCH_DATA" not in os.environ:
        pytest.skip("needs real pairs: set HARDBATCH_DATA to a folder with train/*.parquet")
    paths = sorted((Path(os.environ["HARDBATCH_DATA"]) / "train").glob("*.parquet"))
    merged = pl.concat([pl.scan_parquet(path).select("query", "document") for path in paths]).collect()
    ratios, told = compare(
        tmp_path, merged.sample(fraction=1.0, shuffle=True, seed=0), 30_000, "[cluster]\ntwo_level_above = 256\n", 2
    )
    record_row(18, told)
    assert {stage: ratio for stage, ratio in ratios.items() if ratio > ALLOWED} == {}
