"""How long waiting threads may spin: packing on all cores, in quiet and beside a process that keeps each core busy.

    python benchmarks/waiting.py [--pairs 24000] [--rounds 3]

Packs random vectors about topics (B = 64, D = 256) in a process of its own for each way to wait: `sleep` at once
(OMP_WAIT_POLICY=PASSIVE), as `hardbatch` sets it, the default of libgomp, and `spin` (ACTIVE). Medians of interleaved
rounds, as ratios to the default in quiet. Small operations follow each other by the thousand there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from hardbatch.pipeline.threads import spin_briefly

ROOT = Path(__file__).resolve().parents[1]
WAYS: dict[str, dict[str, str]] = {
    "default": {},
    "sleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "hardbatch": {},
    "spin": {"OMP_WAIT_POLICY": "ACTIVE"},
}
spin_briefly(WAYS["hardbatch"])
CHILD = """
import sys, time
import numpy as np, torch
from hardbatch.pipeline.batching.refine import refine
n, B, D = int(sys.argv[1]), 64, 256
generator = np.random.default_rng(0)
topics = generator.standard_normal((n // B, D), dtype=np.float32)
topic = np.sort(generator.integers(0, len(topics), n // B * B))
sides = [topics[topic] + 1.5 * generator.standard_normal((len(topic), D), dtype=np.float32) for _ in range(2)]
vectors = np.concatenate([side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides], axis=1)
batches = np.arange(len(topic)).reshape(-1, B)
start = time.perf_counter()
refine(torch.from_numpy(vectors), batches, rounds=10, tolerance=0.0)
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=24_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    medians: dict[str, list[float]] = {name: [] for name in WAYS}
    for num_busy in (0, os.cpu_count() or 1):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_busy)]
        try:
            found: dict[str, list[float]] = {name: [] for name in WAYS}
            for _ in range(options.rounds):
                for name, setting in WAYS.items():
                    found[name].append(seconds(setting, options.pairs))
        finally:
            for other in others:
                other.kill()
                other.wait()
        for name, taken in found.items():
            medians[name].append(statistics.median(taken))
    print("| threads wait | in quiet | beside a busy process a core |\n|---|---|---|")
    for name, (quiet, busy) in medians.items():
        print(f"| {name} | {quiet / medians['default'][0]:.2f} | {busy / medians['default'][0]:.2f} |")


def seconds(setting: dict[str, str], num_pairs: int) -> float:
    """Of a refinement in a process of its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", CHILD, str(num_pairs)]
    ended = subprocess.run(command, env={**inherited, **setting}, cwd=ROOT, check=True, capture_output=True, text=True)
    return float(ended.stdout)


if __name__ == "__main__":
    main()
