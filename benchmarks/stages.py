"""Seconds, peak memory and bytes per pair of every stage on real domains, with the lexical embedder.

    HARDBATCH_DATA=DIR python benchmarks/stages.py domains     # each domain of DIR/train as a domain of one corpus
    HARDBATCH_DATA=DIR python benchmarks/stages.py growth      # one domain of 24k, 96k, 384k pairs, domains merged;
                                                               # up to 96k also with all clusters found in one level

Each step runs in a process of its own, so that its peak memory is its own: anonymous memory, sampled every 10 ms, less
what a process holds that only imports what the stages import. Pages of memory-mapped files are left out: the kernel
takes them back when it needs the room.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from hardbatch.pipeline.artifacts.artifact import find_artifact, read_artifact
from hardbatch.pipeline.run import plan_corpus, run_step
from hardbatch.pipeline.step import Step

SETTINGS = '[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\n'
GROWTH = (24_000, 96_000, 384_000)
FLAT_UP_TO = 96_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("domains", "growth"))
    options = parser.parse_args()
    data = Path(os.environ["HARDBATCH_DATA"]) / "train"
    folder = Path(tempfile.mkdtemp())
    baseline = in_own_process(only_import, None)[1]
    print(f"a process that only imports holds {baseline:.0f} MiB, subtracted below")
    if options.what == "domains":
        names = sorted(path.stem for path in data.glob("*.parquet"))
        datasets = "".join(f'[[dataset]]\nname = "{name}"\nsource = "{name}.parquet"\n' for name in names)
        measure("domains", datasets, data, folder, baseline)
    else:
        columns = [pl.scan_parquet(path).select("query", "document") for path in sorted(data.glob("*.parquet"))]
        merged = pl.concat(columns).collect().sample(fraction=1.0, shuffle=True, seed=0)
        for num_pairs in GROWTH:
            merged.head(num_pairs).write_parquet(folder / f"merged-{num_pairs}.parquet")
            dataset = f'[[dataset]]\nname = "merged-{num_pairs}"\nsource = "merged-{num_pairs}.parquet"\n'
            measure(f"merged-{num_pairs}", dataset, folder, folder, baseline)
            if num_pairs <= FLAT_UP_TO:
                flat = ["cluster.two_level_above=1000000"]
                measure(f"merged-{num_pairs}", dataset, folder, folder, baseline, overrides=flat)
    shutil.rmtree(folder)


def measure(
    corpus: str, datasets: str, data: Path, folder: Path, baseline: float, *, overrides: Sequence[str] = ()
) -> None:
    """Runs the steps of a corpus that are not done and prints a line per stage, over all its domains."""
    manifest = folder / f"{corpus}.toml"
    manifest.write_text(f'corpus = "{corpus}"\n{SETTINGS}{datasets}')
    plan = plan_corpus(manifest, folder / "workspace", data_root=data, overrides=overrides)
    seconds: dict[str, float] = defaultdict(float)
    peak: dict[str, float] = defaultdict(float)
    num_bytes: dict[str, int] = defaultdict(int)
    num_pairs = 0
    for step in plan.steps:
        if step.stage == "pairs" and find_artifact(step.path):
            num_pairs += read_artifact(step.path).manifest.counts["pairs"]
        if find_artifact(step.path):
            continue
        taken, memory = in_own_process(run, step)
        seconds[step.stage] += taken
        peak[step.stage] = max(peak[step.stage], memory - baseline)
        artifact = read_artifact(step.path)
        num_bytes[step.stage] += artifact.bytes
        num_pairs += artifact.manifest.counts["pairs"] if step.stage == "pairs" else 0
    figures = read_artifact(plan.shards).manifest.counts["domains"]
    shares = ", ".join(f"{domain} {found['share']:.3f}" for domain, found in figures.items() if "share" in found)
    print(f"\n{corpus}: {num_pairs:,} pairs {' '.join(overrides)}; share {shares}")
    print(f"{'stage':<10}{'seconds':>9}{'µs/pair':>9}{'peak MiB':>10}{'bytes/pair':>12}")
    for stage, taken in seconds.items():
        row = f"{stage:<10}{taken:>9.1f}{taken / num_pairs * 1e6:>9.1f}{peak[stage]:>10.0f}"
        print(f"{row}{num_bytes[stage] / num_pairs:>12.1f}", flush=True)


def run(step: Step) -> None:
    """A step, as a run would do it."""
    assert run_step(step), f"{step.path} was there already"


def only_import(_: None) -> None:
    """Loads what the stages load."""
    import hardbatch.pipeline.stages.cluster
    import hardbatch.pipeline.stages.embed
    import hardbatch.pipeline.stages.ingest
    import hardbatch.pipeline.stages.measure
    import hardbatch.pipeline.stages.pack
    import hardbatch.pipeline.stages.write  # noqa: F401


def in_own_process(function: object, argument: object) -> tuple[float, float]:
    """Seconds and peak MiB of `function(argument)` in a fresh process, imports left out of the seconds."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (function, argument))


def _measured(function: object, argument: object) -> tuple[float, float]:
    only_import(None)
    peak = anonymous_mib()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous_mib())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    function(argument)  # type: ignore[operator]
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    return seconds, peak


def anonymous_mib() -> float:
    """Anonymous memory of this process, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
