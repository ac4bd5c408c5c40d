"""What executors cost and gain: the gaps between units of ten seconds, and two workers against one on embedding.

    python benchmarks/executors.py --data-root DIR [--domain reddit] [--pairs 400] [--rounds 3]

Run it with OMP_NUM_THREADS=1, so that a worker uses one core. The first table compares the seconds of a stage with the
seconds that its units spent in the worker, so it hardly depends on other load of the machine; the second one does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from hardbatch.pipeline.artifacts.commit import open_builder, write_unit
from hardbatch.pipeline.executors.choose import open_executor
from hardbatch.pipeline.progress import SilentProgress
from hardbatch.pipeline.run import plan_corpus, run_step
from hardbatch.pipeline.step import Unit

_EXECUTORS = (("inline", None), ("processes", 1), ("processes", 2), ("ray", 1), ("ray", 2))
_WARM_PAIRS = 16


@dataclass(frozen=True, kw_only=True)
class Busy:
    """A work whose units compute for `seconds` each."""

    path: Path
    seconds: float

    def open(self) -> Busy:
        return self

    def prepare(self, unit: Unit) -> None:
        return None

    def commit(self, unit: Unit, prepared: None) -> None:
        started = time.monotonic()
        with write_unit(self.path, unit.name) as writer:
            while time.monotonic() - started < self.seconds:
                sum(range(10_000))
            writer.add_file(unit.name).write_text(unit.name)
            writer.counts = {"seconds": time.monotonic() - started}


def measure_overhead(executor: str, seconds: float, num_units: int) -> tuple[float, float]:
    """The seconds that a stage took beyond those of its units, first with new workers and then with these."""
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        open_executor(executor, None if executor == "inline" else 1) as opened,
    ):
        for name in ("first", "second"):
            units = [Unit(name=f"unit-{i}", start=i, stop=i + 1) for i in range(num_units)]
            with open_builder(Path(folder) / name) as builder:
                started = time.monotonic()
                opened.run(Busy(path=builder.path, seconds=seconds), units, SilentProgress())
                took = time.monotonic() - started
                found.append(took - sum(builder.unit_record(unit.name).counts["seconds"] for unit in units))
    return found[0], found[1]


def measure_embedding(executor: str, num_workers: int | None, manifest: Path, data_root: Path) -> float:
    """The seconds of embedding a domain with workers that have the model loaded."""
    with tempfile.TemporaryDirectory() as folder, open_executor(executor, num_workers) as opened:
        steps = plan_corpus(manifest, Path(folder), data_root=data_root).steps
        for step in steps:
            if step.stage == "pairs":
                run_step(step)
        warm, measured = (step for step in steps if step.stage == "vectors")
        run_step(warm, executor=opened)
        started = time.monotonic()
        run_step(measured, executor=opened)
        return time.monotonic() - started


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root", type=Path, required=True, help="folder with train/DOMAIN.parquet")
    parser.add_argument("--domain", default="reddit")
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--unit-rows", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unit-seconds", type=float, default=10.0)
    options = parser.parse_args()

    print(
        f"| executor, one worker | first stage | next stage | a unit of {options.unit_seconds:g} s |\n|---|---|---|---|"
    )
    for executor in ("inline", "processes", "ray"):
        num_units = 3
        first, later = measure_overhead(executor, options.unit_seconds, num_units)
        each = later / num_units
        print(f"| {executor} | {first:.2f} s | {later:.3f} s | +{each / options.unit_seconds:.2%} |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "c.toml"
        source = f'source = "train/{options.domain}.parquet"'
        manifest.write_text(
            f'corpus = "c"\n[[dataset]]\nname = "warm"\n{source}\nlimit = {_WARM_PAIRS}\n'
            f'[[dataset]]\nname = "measured"\n{source}\nlimit = {options.pairs}\n'
            f'[embed]\nmodel = "minilm"\nsurrogate_model = "minilm"\nunit_rows = {options.unit_rows}\n'
        )
        seconds: dict[tuple[str, int | None], list[float]] = {each: [] for each in _EXECUTORS}
        for _ in range(options.rounds):
            for executor, num_workers in _EXECUTORS:
                took = measure_embedding(executor, num_workers, manifest, options.data_root)
                seconds[executor, num_workers].append(took)

    medians = {each: statistics.median(took) for each, took in seconds.items()}
    print("\n| executor | workers | embed, median | spread | times as fast as inline |\n|---|---|---|---|---|")
    for (executor, num_workers), took in seconds.items():
        median = medians[executor, num_workers]
        ratio = medians["inline", None] / median
        print(f"| {executor} | {num_workers or 1} | {median:.1f} s | {min(took):.1f}–{max(took):.1f} s | {ratio:.2f} |")


if __name__ == "__main__":
    from executors import main as main_of_module  # workers import this file by that name

    main_of_module()
