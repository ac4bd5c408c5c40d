"""What executors cost and gain: the gaps between units of ten seconds, and two workers against one on embedding.

    python benchmarks/executors.py --data-root DIR [--domain reddit] [--pairs 100] [--rounds 3]

Run it with OMP_NUM_THREADS=1, so that a worker uses one core. The first table compares the seconds of a stage with the
seconds that its units spent in the worker, so it hardly depends on other load of the machine. The second has seconds,
which do, and CPU seconds of the busiest worker, which a stage takes if every worker has a core to itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardbatch.pipeline.artifacts.commit import open_builder, write_unit
from hardbatch.pipeline.executors.choose import open_executor
from hardbatch.pipeline.progress import SilentProgress
from hardbatch.pipeline.run import plan_corpus, run_step
from hardbatch.pipeline.step import Executor, Progress, Unit, Work, Worker

_EXECUTORS = (("inline", None), ("processes", 2), ("ray", 2))
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


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A work whose workers leave the CPU seconds of each unit in `folder`."""

    work: Work
    folder: Path

    def open(self) -> TimedWorker:
        return TimedWorker(self.work.open(), self.folder)


class TimedWorker:
    def __init__(self, worker: Worker, folder: Path) -> None:
        self.prepare, self._commit, self._folder = worker.prepare, worker.commit, folder
        self._before = time.process_time()

    def commit(self, unit: Unit, prepared: Any) -> None:
        self._commit(unit, prepared)
        now = time.process_time()  # of all threads, so preparing counts
        (self._folder / f"{os.getpid()}.{unit.name}").write_text(str(now - self._before))
        self._before = now


@dataclass(frozen=True)
class TimingExecutor:
    executor: Executor
    folder: Path

    def run(self, work: Work, units: Sequence[Unit], progress: Progress, device: str = "cpu") -> int:
        return self.executor.run(Timed(work=work, folder=self.folder), units, progress, device)


def measure_embedding(
    executor: str, num_workers: int | None, manifest: Path, data_root: Path
) -> tuple[float, float, int]:
    """Embeds a domain with workers that have the model loaded.

    Returns:
        The seconds, the CPU seconds of the worker that needed most, and the number of workers that did units.
    """
    with tempfile.TemporaryDirectory() as folder, open_executor(executor, num_workers) as opened:
        times = Path(folder) / "times"
        times.mkdir()
        steps = plan_corpus(manifest, Path(folder), data_root=data_root).steps
        for step in steps:
            if step.stage == "pairs":
                run_step(step)
        warm, measured = (step for step in steps if step.stage == "vectors")
        run_step(warm, executor=opened)
        started = time.monotonic()
        run_step(measured, executor=TimingExecutor(opened, times))
        took = time.monotonic() - started
        cpu: Counter[str] = Counter()
        for path in times.iterdir():
            cpu[path.name.partition(".")[0]] += float(path.read_text())
        return took, max(cpu.values()), len(cpu)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root", type=Path, required=True, help="folder with train/DOMAIN.parquet")
    parser.add_argument("--domain", default="reddit")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--unit-rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unit-seconds", type=float, default=10.0, help="0: leave the first table out")
    options = parser.parse_args()

    if options.unit_seconds:
        print("| executor, one worker | first stage | next stage | share of the units' seconds |\n|---|---|---|---|")
    for executor in ("inline", "processes", "ray") if options.unit_seconds else ():
        num_units = 3
        first, later = measure_overhead(executor, options.unit_seconds, num_units)
        share = later / num_units / options.unit_seconds
        print(f"| {executor} | {first:.2f} s | {later:.3f} s | {share:.2%} |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "c.toml"
        source = f'source = "train/{options.domain}.parquet"'
        manifest.write_text(
            f'corpus = "c"\n[[dataset]]\nname = "warm"\n{source}\nlimit = {_WARM_PAIRS}\n'
            f'[[dataset]]\nname = "measured"\n{source}\nlimit = {options.pairs}\n'
            f'[embed]\nmodel = "minilm"\nsurrogate_model = "minilm"\nunit_rows = {options.unit_rows}\n'
        )
        found: dict[tuple[str, int | None], list[tuple[float, float, int]]] = {each: [] for each in _EXECUTORS}
        for _ in range(options.rounds):
            for executor, num_workers in _EXECUTORS:
                measured = measure_embedding(executor, num_workers, manifest, options.data_root)
                found[executor, num_workers].append(measured)
                print(executor, *measured, file=sys.stderr, flush=True)

    medians = {each: [statistics.median(column) for column in zip(*rows, strict=True)] for each, rows in found.items()}
    base = medians["inline", None]
    print("\n| executor | workers | seconds | times as fast | CPU s of the busiest | times as fast |")
    print("|---|---|---|---|---|---|")
    for (executor, _), (took, cpu, workers) in medians.items():
        ratios = f"{base[0] / took:.2f} | {cpu:.2f} | {base[1] / cpu:.2f}"
        print(f"| {executor} | {workers:.0f} | {took:.1f} | {ratios} |")


if __name__ == "__main__":
    from executors import main as main_of_module  # workers import this file by that name

    main_of_module()
