"""Row 18: with ten times the pairs, no stage takes more memory than a cap allows on top.

The caps, in MiB, are what stages took on top when they were last measured, and about half as much
again: docs/benchmarks.md says what grows. All vectors in float32 would be 55 MiB more with 30,000
pairs and 550 MiB with 300,000.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.reliability.processes import run
from tests.samples import LEXICAL

PEAKS = Path(__file__).with_name("peaks.py")
MIB = 2**20


def made_up() -> pl.DataFrame:
    """30,000 distinct pairs of words that are drawn as real ones are, few of them often."""
    generator = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(20_000)])
    drawn = words[(20_000 * generator.random((30_000, 48)) ** 3).astype(int)]
    texts = [f"{i} {' '.join(row)}" for i, row in enumerate(drawn)]
    return pl.DataFrame({"query": [text[:50] for text in texts], "document": [text[8:] + "." for text in texts]})


def real() -> pl.DataFrame:
    """300,000 real pairs."""
    if "HARDBATCH_DATA" not in os.environ:
        pytest.skip("needs real pairs: set HARDBATCH_DATA to a folder with train/*.parquet")
    paths = sorted((Path(os.environ["HARDBATCH_DATA"]) / "train").glob("*.parquet"))
    merged = pl.concat([pl.scan_parquet(path).select("query", "document") for path in paths]).collect()
    return merged.sample(300_000, shuffle=True, seed=0)


def peaks(folder: Path, table: pl.DataFrame, settings: str) -> dict[str, float]:
    """The most anonymous memory, in MiB, that each stage held over one domain of these pairs."""
    folder.mkdir()
    table.write_parquet(folder / "pairs.parquet")
    manifest = folder / "corpus.toml"
    manifest.write_text(
        f'corpus = "c"\n[[dataset]]\nname = "d"\nsource = "pairs.parquet"\n[pack]\nbatch_size = 64\n{LEXICAL}{settings}'
    )
    # oneDNN keeps the code of up to 1,024 shapes of products, whatever the number of pairs: left out
    environment = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1"}
    ended = run([sys.executable, PEAKS, manifest, folder / "workspace"], environment=environment, timeout_s=600)
    assert ended.code == 0, ended.errors
    return {item["stage"]: item["bytes"] / MIB for item in map(json.loads, ended.output.splitlines())}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("make_pairs", "settings", "caps_mib"),
    [
        pytest.param(
            made_up,
            "unit_rows = 256\n[hardness]\nanchors = 256\n",  # which 3,000 pairs fill
            {
                "pairs": 95,
                "answers": 45,
                "vectors": 22,
                "clusters": 90,
                "hardness": 33,
                "consistency": 60,
                "batches": 140,
                "shards": 40,
            },
            id="3,000 to 30,000 pairs",
        ),
        pytest.param(
            real,
            "[cluster]\ntwo_level_above = 256\n",
            {
                "pairs": 465,
                "answers": 140,
                "vectors": 30,
                "clusters": 90,
                "hardness": 45,
                "consistency": 60,
                "batches": 160,
                "shards": 45,
            },
            marks=pytest.mark.soak,
            id="30,000 to 300,000 real pairs",
        ),
    ],
)
def test_ten_times_the_pairs(
    tmp_path: Path,
    record_row: Callable[[int, str], None],
    make_pairs: Callable[[], pl.DataFrame],
    settings: str,
    caps_mib: dict[str, int],
) -> None:
    table = make_pairs()
    fewer, more = (peaks(tmp_path / str(size), table.head(size), settings) for size in (len(table) // 10, len(table)))
    lines = [f"{stage} {fewer[stage]:.0f} → {more[stage]:.0f} MiB (cap +{cap})" for stage, cap in caps_mib.items()]
    record_row(18, f"{len(table) // 10:,} → {len(table):,} pairs: {', '.join(lines)}")
    assert fewer.keys() == caps_mib.keys()
    grown = {stage: more[stage] - fewer[stage] for stage in fewer}
    assert {stage: mib for stage, mib in grown.items() if mib > caps_mib[stage]} == {}
