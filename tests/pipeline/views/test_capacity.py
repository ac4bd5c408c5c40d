"""`hardbatch plan --rates`: what a corpus takes, from stated rows and measured rates."""

from __future__ import annotations

from pathlib import Path

import pytest

from hardbatch.pipeline.cli import main
from hardbatch.pipeline.config import load_manifest
from hardbatch.pipeline.errors import ConfigError
from hardbatch.pipeline.views.capacity import STAGES, estimate_corpus, read_rates_file

REPOSITORY = Path(__file__).parents[3]
NOMIC = REPOSITORY / "data_manifests" / "nomic_unsupervised.toml"
SHIPPED = sorted((REPOSITORY / "examples").glob("rates_*.toml"))
THREE = 'corpus = "c"\n[pack]\nnum_packings = 3\n[embed]\nmodel = "lexical"\nsurrogate_model = "minilm"\n' + "".join(
    f'[[dataset]]\nname = "{name}"\nsource = "hf://datasets/no/where.parquet"\nnum_pairs = {rows}\n'
    for name, rows in (("large", 5_000_000), ("middle", 4_000_000), ("small", 1_000_000))
)


def write_rates(path: Path, **other: str) -> Path:
    tables = dict.fromkeys(STAGES, "microseconds_per_row = 1\nbytes_per_row = 2") | other
    path.write_text("".join(f"[{name}]\n{text}\n" for name, text in tables.items()))
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "three.toml"
    path.write_text(THREE)
    return path


def test_each_stage_by_hand(tmp_path: Path, manifest: Path) -> None:
    rates = read_rates_file(
        write_rates(
            tmp_path / "rates.toml",
            vectors='microseconds_per_row = 1\nshared = "units"\nmemory_bytes = 7',
            clusters="microseconds_per_row = 1\ngrowth = 1.5\nmeasured_rows = 1000000",
            shards='microseconds_per_row = 1\nshared = "nothing"\nmemory_bytes_per_row = 2\nmemory_bytes = 7',
        )
    )
    one, two = (
        {need.stage: need for need in estimate_corpus(load_manifest(manifest), rates, workers)} for workers in (1, 2)
    )
    assert (one["pairs"].rows, one["vectors"].rows, one["batches"].rows) == (10_000_000, 40_000_000, 30_000_000)
    assert (one["pairs"].seconds, two["pairs"].seconds) == pytest.approx((10, 5))  # 5 beside 4 + 1
    assert (one["vectors"].seconds, two["vectors"].seconds) == pytest.approx((40, 20))
    assert one["clusters"].seconds == pytest.approx(5**1.5 + 4**1.5 + 1)
    assert two["clusters"].seconds == pytest.approx(5**1.5)
    assert one["shards"].seconds == two["shards"].seconds == pytest.approx(30)
    assert (one["pairs"].bytes, one["shards"].memory, one["vectors"].memory) == (20_000_000, 60_000_007, 7)
    assert one["pairs"].longest == "large 50%"


@pytest.mark.parametrize("rates", SHIPPED, ids=lambda path: path.stem)
def test_the_paper_s_corpus_is_planned_without_its_data(rates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(NOMIC), "--rates", str(rates), "--workers", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == list(STAGES)
    assert lines[-1].startswith("nomic_unsupervised: 234,553,344 pairs of 29 domains on 8 workers: ")


def test_what_is_wrong_is_said(tmp_path: Path, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rates(
        tmp_path / "bad.toml",
        pairs="microseconds_per_row = 0",
        answers="seconds = 1",
        clusters="microseconds_per_row = 1\ngrowth = 1.5",
        other="microseconds_per_row = 1",
    )
    path.write_text(path.read_text().replace("[shards]", "[shard]"))
    with pytest.raises(ConfigError) as caught:
        read_rates_file(path)
    message = str(caught.value)
    for part in (
        "no table [shards]",
        "[shard] is not a stage",
        "[other] is not a stage",
        "pairs.microseconds_per_row",
        "answers.seconds",
        "clusters.growth needs clusters.measured_rows",
    ):
        assert part in message, part

    manifest.write_text(THREE.replace("num_pairs = 4000000\n", ""))
    good = write_rates(tmp_path / "good.toml")
    assert main(["plan", str(manifest), "--rates", str(good)]) == 2
    assert "num_pairs is missing in middle" in capsys.readouterr().err
    assert main(["plan", str(manifest), "--rates", str(tmp_path / "none.toml")]) == 2
    assert "none.toml: cannot be read" in capsys.readouterr().err
    assert main(["plan", str(manifest), "--workers", "2"]) == 2
    assert "--workers needs --rates FILE" in capsys.readouterr().err
