"""benchmarks/quality at toy size: models are trained once, its rules of masking are those of the product."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest

from hardbatch.pipeline.errors import ConfigError
from hardbatch.trainer.collection import load_collection
from hardbatch.trainer.stream import BatchStream
from tests import models
from tests.samples import WORDS
from tests.trainer.test_evaluate import write_collection

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "quality"
MODULES = ("arms", "corpus", "groups", "masks", "measure", "report", "runs", "static", "transformer", "speedrun")


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of the benchmark, whose names are short enough to be other modules' elsewhere."""
    monkeypatch.syspath_prepend(str(FOLDER))
    with monkeypatch.context() as context:
        for name in MODULES:
            context.delitem(sys.modules, name, raising=False)
        yield {name: import_module(name) for name in MODULES}


@pytest.fixture
def runs(quality: dict[str, ModuleType], tmp_path: Path):
    models.require_minilm()
    (tmp_path / "data" / "train").mkdir(parents=True)
    pl.DataFrame(pairs_of_drawn_words(500)).write_parquet(tmp_path / "data" / "train" / "numbers.parquet")
    write_collection(tmp_path / "data" / "eval" / "tiny")
    sample = quality["corpus"].Sample(
        domains=("numbers",), num_pairs=400, max_length_tokens=16, model="lexical", out_of_domain=("tiny",)
    )
    family = quality["static"].StaticFamily(sample, dimension=16, pairs_seen=512)
    return quality["runs"].Runs(family, tmp_path / "workspace", tmp_path / "data")


def pairs_of_drawn_words(num_pairs: int) -> list[dict[str, str]]:
    """Pairs that share one of four words, so that many documents fit another query better."""
    generator = random.Random(0)
    rows = []
    for number in range(num_pairs):
        query, document = generator.sample(WORDS, 4), generator.sample(WORDS, 4)
        rows.append({"query": " ".join(query), "document": " ".join([query[0], *document, str(number)])})
    return rows


def arm(quality: dict[str, ModuleType], group: int, masks: str, **settings: object):
    pack = {"pack.batch_size": 16, "pack.group_size": group}
    return quality["arms"].Arm(name=f"K = {group}", settings=pack | settings, masks=masks)


def test_an_arm_is_trained_once_and_measured_over_all_documents(quality, runs, monkeypatch) -> None:
    one, other = (arm(quality, group, "one-sided") for group in (1, 16))
    figures = runs.run(one, 0)
    assert {name: len(values) for name, values in figures.items()} == {"numbers": 39, "tiny": 2}
    assert all(0 <= value <= 1 for values in figures.values() for value in values)
    assert not np.array_equal(runs.run(other, 0)["numbers"], figures["numbers"])

    monkeypatch.setattr(quality["static"].StaticFamily, "train", lambda *_: pytest.fail("trained again"))
    assert np.array_equal(runs.run(one, 0)["numbers"], figures["numbers"])
    assert ({name: len(seeds) for name, seeds in runs.kept(one).items()}, runs.kept(arm(quality, 16, "none"))) == (
        {"K = 1": 1},
        {},
    )
    held_out = runs.collections(None)["numbers"]
    assert len(held_out.documents) == len(set(held_out.documents)) > 300


@pytest.mark.parametrize("rule", ["one-sided", "symmetric"])
def test_rules_with_floor_and_cap_are_those_that_are_written(quality, runs, rule: str) -> None:
    masks = f"{rule} floor=0.5 cap=0.25"
    plan = runs.plan(arm(quality, 16, masks, **{"write.likely_rule": rule}))
    masking = quality["masks"].find_masking(masks, quality["masks"].Surrogate(plan))
    one_sided = quality["masks"].find_masking("one-sided", quality["masks"].Surrogate(plan))
    num_masked = 0
    with BatchStream(plan.shards, stop=10) as stream:
        for batch in stream:
            assert np.array_equal(masking(batch), batch.equivalent_BB)
            assert (one_sided(batch) | ~batch.positive_BB).all()
            num_masked += int((batch.equivalent_BB & ~batch.positive_BB).sum())
    assert num_masked > 0


def test_an_interval_is_of_paired_differences(quality) -> None:
    generator = np.random.default_rng(0)
    runs = [{"inside": generator.random(200), "outside": generator.random(100)} for _ in range(2)]
    better = [{name: values + 0.1 for name, values in figures.items()} for figures in runs]
    interval = quality["report"].interval
    assert interval(better, runs, ["inside"]) == pytest.approx((0.1, 0.1))

    # Of independent figures, the 95 % interval is that of a mean of two means.
    others = [{name: generator.permutation(values) for name, values in figures.items()} for figures in runs]
    low, high = interval(others, runs, ["inside"])
    spread = np.sqrt(sum(2 / 12 / (2 * size) / 4 for size in (200, 100)))
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.5) and low < 0 < high


def test_hits_are_judged_as_ndcg_is_defined(quality, tmp_path: Path) -> None:
    collection = load_collection(write_collection(tmp_path))
    for first, second in itertools.permutations([0, 1]):
        found = quality["measure"].ndcg_of_hits(collection, np.array([0, 1]), [[first, second]] * 2)
        assert found[[first, second]].tolist() == pytest.approx([1.0, 1 / np.log2(3)])


FUNCTION = """
def {name}(numbers, {argument}):
    \"\"\"{query}\"\"\"
    total = sum(numbers)
    return total + {argument}
"""


def test_the_speedrun_reads_functions_of_packages(quality, monkeypatch, tmp_path: Path) -> None:
    speedrun = quality["speedrun"]
    functions = [
        ("add", "a", "Adds the numbers."),
        ("join", "b", "Adds the numbers."),
        ("sum_up", "c", "Sums them up."),
    ]
    source = "".join(FUNCTION.format(name=n, argument=a, query=q) for n, a, q in functions)
    (tmp_path / "package" / "tests").mkdir(parents=True)
    (tmp_path / "package" / "module.py").write_text(source)
    (tmp_path / "package" / "tests" / "module.py").write_text(source.replace("def ", "def test_"))
    monkeypatch.setattr(speedrun, "_download", lambda *_: tmp_path / "package")
    for requirement in ("sympy==1.14.0", "networkx==3.5"):
        speedrun._make_pairs(requirement, "", tmp_path)

    trained_on = pl.read_parquet(tmp_path / "train" / "sympy.parquet")
    assert trained_on["query"].to_list() == [query for *_, query in functions]
    assert "def join(numbers, b):" in trained_on["document"][1] and "Adds" not in trained_on["document"][1]
    collection = load_collection(tmp_path / "eval" / "networkx")
    found = zip(collection.query_rows, collection.document_rows, strict=True)
    answers = [(collection.queries[query], collection.documents[document][4:8]) for query, document in found]
    assert sorted(answers) == [("Adds the numbers.", "add("), ("Adds the numbers.", "join"), ("Sums them up.", "sum_")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('flags = ["--max-steps=9"]', "flag --max-steps=9 is fixed; allowed: --learning-rate"),
        ('settings = { "ingest.max_characters" = 9 }', "ingest.max_characters is fixed"),
    ],
)
def test_an_entry_that_changes_what_is_fixed_is_refused(quality, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "entries.toml").write_text(f'[[entry]]\nname = "mine"\n{line}\n')
    with pytest.raises(ConfigError, match=message):
        quality["speedrun"].read_entries(tmp_path / "entries.toml")


def test_the_entries_of_the_speedrun_are_valid(quality) -> None:
    speedrun = quality["speedrun"]
    names = [entry.name for entry in speedrun.read_entries(speedrun.ENTRIES)]
    assert names[0] == "random batches" and len(set(names)) == len(names) >= 3
