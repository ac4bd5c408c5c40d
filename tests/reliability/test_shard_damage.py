"""Rows 7 and 8: a flipped bit in any file of the shards; files cut, gone, exchanged, of another run, too many."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from hardbatch.pipeline.artifacts.artifact import MANIFEST, find_artifact, read_artifact, verify_artifact
from hardbatch.pipeline.errors import IntegrityError
from hardbatch.pipeline.run import plan_corpus, run_step
from hardbatch.trainer.main import main
from hardbatch.trainer.shards import open_shards
from hardbatch.trainer.stream import BatchStream
from tests.reliability.processes import HARDBATCH, run
from tests.reliability.trainings import TRAINER

BATCH_SIZE = 4
CORPUS = """
corpus = "damaged"
[[dataset]]
name = "plain"
source = "plain.jsonl"
query_prompt = "search_query: "
[[dataset]]
name = "hard"
source = "hard.jsonl"
columns = { negatives = "negatives" }
[embed]
model = "lexical"
surrogate_model = "lexical"
[pack]
batch_size = 4
num_packings = 2
[write]
batches_per_part = 2
margin = 1e-5
"""
RecordRow = Callable[[int, str], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shards of two domains in many parts, and those of the same pairs packed otherwise. Read only."""
    folder = tmp_path_factory.mktemp("damaged")
    pairs = [{"query": f"what is number {i:04}", "document": f"number {i:04} is in {i % 7}"} for i in range(192)]
    hard = [{**pair, "negatives": [f"no {i}"] * (i % 3)} for i, pair in enumerate(pairs[160:])]
    for name, rows in (("plain", pairs[:160]), ("hard", hard)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "corpus.toml").write_text(CORPUS)
    found = []
    for name, overrides in (("one", []), ("other", ["pack.seed=1", "cluster.seed=5"])):
        plan = plan_corpus(folder / "corpus.toml", folder / name, overrides=overrides)
        for step in plan.steps:
            run_step(step)
        found.append(plan.shards)
    return found[0], found[1]


@pytest.fixture
def shards(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """The shards, copied, to be changed."""
    return shutil.copytree(made[0], tmp_path / "shards" / made[0].name)


def files_of(shards: Path) -> dict[str, list[str]]:
    """The files that make the artifact, by kind; records of units are read by nobody once the manifest is there."""
    kinds: dict[str, list[str]] = {}
    for name in [*read_artifact(shards).manifest.files, MANIFEST]:
        kinds.setdefault(name.split("/")[0], []).append(name)
    assert kinds.keys() == {"data", "units", "index.parquet", "README.md", MANIFEST}
    return kinds


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def found_by_trainer(shards: Path, file: Path, place: int) -> str:
    """Where a trainer that reads an epoch of each packing finds the flip in `file`; checks that it names the file."""
    try:
        opened = open_shards(shards)
    except IntegrityError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
        return "before step 1"
    order = opened.order()
    total = order.epoch_length * order.num_packings
    index = pl.read_parquet(shards / "index.parquet").with_row_index("row")
    hit = index.filter(
        (pl.col("file") == file.relative_to(shards).as_posix())
        & (pl.col("byte_offset") <= place)
        & (place < pl.col("byte_offset") + pl.col("byte_length"))
    )["row"].to_list()
    positions = [position for position in range(total) if order.batch_at(position) in hit]
    seen = 0
    try:
        for batch in BatchStream(opened, stop=total, num_workers=1):
            assert batch.position == seen
            seen += 1
    except IntegrityError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
        assert seen == positions[0], "found at the batch that holds it, not before and not after"
        return "in its batch"
    assert not positions
    return "not read"


def flip_bits(shards: Path, num_trials: int, seed: int) -> Counter[tuple[str, str, bool]]:
    """(kind of file, where the trainer found it, whether `verify` did) of flips in each kind of file in turn."""
    generator = random.Random(seed)
    kinds = files_of(shards)
    found: Counter[tuple[str, str, bool]] = Counter()
    for trial in range(num_trials):
        kind = ("data", "index.parquet", "data", MANIFEST, "data", "README.md", "data", "units")[trial % 8]
        file = shards / generator.choice(kinds[kind])
        place, bit = generator.randrange(file.stat().st_size), generator.randrange(8)
        flip(file, place, bit)
        faults = verify_artifact(shards)
        where = found_by_trainer(shards, file, place)
        found[kind, where, len(faults) == 1 and faults[0].startswith(str(file))] += 1
        flip(file, place, bit)
    assert verify_artifact(shards) == []
    return found


@pytest.mark.parametrize("num_trials", [40, pytest.param(400, marks=pytest.mark.soak)])
def test_a_flipped_bit_anywhere_is_found(shards: Path, num_trials: int, record_row: RecordRow) -> None:
    found = flip_bits(shards, num_trials, seed=7)
    assert all(named for _, _, named in found), found
    assert {(kind, where) for kind, where, _ in found} == {
        ("data", "before step 1"),
        ("data", "in its batch"),
        ("index.parquet", "before step 1"),
        (MANIFEST, "before step 1"),
        ("README.md", "not read"),
        ("units", "not read"),  # what the index was made of
    }
    places = Counter(where for _, where, _ in found.elements())
    record_row(7, f"{num_trials} bits flipped, verify found all, naming the file; the trainer: {dict(places)}")


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.soak)])
def test_no_bit_of_the_manifest_is_free(shards: Path, every: int, record_row: RecordRow) -> None:
    """Not even if the JSON would mean the same: 1e-05 and 1E-05, a last digit that rounds away."""
    path = shards / MANIFEST
    data = path.read_bytes()
    same = [8 * found.start() + 13 for found in re.finditer(rb"\de-", data)]  # the e that may as well be an E
    assert same
    flips = {*range(0, 8 * len(data), every), *same}
    for number in flips:
        changed = bytearray(data)
        changed[number // 8] ^= 1 << number % 8
        path.write_bytes(changed)
        with pytest.raises(IntegrityError, match=MANIFEST):
            find_artifact(shards)
    record_row(7, f"{len(flips)} of the {8 * len(data)} bits of a manifest flipped, all found")


def test_commands_end_with_code_4_and_name_the_file(
    shards: Path, made: tuple[Path, Path], tmp_path: Path, record_row: RecordRow
) -> None:
    part = sorted((shards / "data").glob("*.parquet"))[1]
    index = pl.read_parquet(shards / "index.parquet").filter(pl.col("file") == f"data/{part.name}")
    flip(part, index["byte_offset"][0] + 9, 4)
    verified = run([*HARDBATCH, "verify", shards])
    assert verified.code == 4 and str(part) in verified.output + verified.errors
    flip(part, index["byte_offset"][0] + 9, 4)
    flip(part, part.stat().st_size - 30, 2)
    trained = run([*TRAINER, "--shards", shards, "--output", tmp_path / "out"])
    assert trained.code == 4 and trained.errors.startswith(f"trainer: {part}") and trained.errors.count("\n") == 1
    record_row(7, "hardbatch verify and the trainer as processes: exit code 4, the file named")


# -- row 8 -------------------------------------------------------------------------------------------------------------


def refused(shards: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a training refuses the shards before its first step."""
    assert main(["--shards", str(shards), "--output", str(output)]) == 4
    errors = capsys.readouterr().err
    assert errors.startswith("trainer: ") and errors.count("\n") == 1, errors
    assert not (output / "log.jsonl").exists() and not (output / "checkpoints").exists()
    assert verify_artifact(shards), "verify finds it too"
    return errors


def test_cut_and_missing_files(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], record_row: RecordRow
) -> None:
    names = [name for names in files_of(shards).values() for name in names[:3]]
    for name in names:
        path = shards / name
        data = path.read_bytes()
        path.unlink()
        if name == MANIFEST:
            assert main(["--shards", str(shards), "--output", str(tmp_path / "out")]) == 4
            assert "not complete" in capsys.readouterr().err
        else:
            assert name in refused(shards, tmp_path / "out", capsys)
        for length in (0, 1, len(data) // 2, len(data) - 8, len(data) - 1):
            path.write_bytes(data[:length])
            assert name in refused(shards, tmp_path / "out", capsys)
        path.write_bytes(data)
    record_row(8, f"{6 * len(names)} files cut or deleted: all found before step 1, one line, exit code 4")


def test_files_exchanged(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], record_row: RecordRow
) -> None:
    parts = sorted((shards / "data").glob("*.parquet"))
    size = {part: part.stat().st_size for part in parts}
    pairs = list(itertools.combinations(parts, 2))
    equal, unequal = ([pair for pair in pairs if (size[pair[0]] == size[pair[1]]) == same] for same in (True, False))
    assert equal, "some parts are of one size"
    for first, second in equal[:5] + unequal[:3]:
        data = first.read_bytes(), second.read_bytes()
        first.write_bytes(data[1]), second.write_bytes(data[0])
        line = refused(shards, tmp_path / "out", capsys)
        assert first.name in line or second.name in line
        first.write_bytes(data[0]), second.write_bytes(data[1])
    record_row(8, f"{len(equal[:5])} pairs of parts of one size and {len(unequal[:3])} of two exchanged: all found")


def test_files_of_another_run_and_parts_too_many(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], record_row: RecordRow
) -> None:
    other = made[1]
    taken = [[MANIFEST], ["index.parquet"], [MANIFEST, "index.parquet"], ["README.md", MANIFEST], ["data"]]
    for number, names in enumerate(taken):
        shards = shutil.copytree(made[0], tmp_path / str(number) / made[0].name)
        for name in names:
            if (other / name).is_dir():
                shutil.copytree(other / name, shards / name, dirs_exist_ok=True)
            else:
                shutil.copy(other / name, shards / name)
        assert str(shards) in refused(shards, tmp_path / "out", capsys)
    shards = shutil.copytree(made[0], tmp_path / "more" / made[0].name)
    part = sorted((other / "data").glob("*.parquet"))[0]
    shutil.copy(part, shards / "data" / "part-00099.parquet")
    assert "part-00099.parquet: does not belong to these shards; remove it" in refused(shards, tmp_path / "out", capsys)
    record_row(8, f"{len(taken)} mixtures with the files of another run, and a part too many: found before step 1")
