"""Runs a corpus with each step in a process of its own, and prints the most anonymous memory that it held, in bytes.

    python peaks.py MANIFEST WORKSPACE

Steps are forked from a process that has imported what stages import; a step's peak counts that too. Anonymous memory,
sampled every 5 ms: pages of mapped files are the kernel's to take back.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import sklearn.feature_extraction.text  # noqa: F401

import hardbatch.pipeline.stages.cluster
import hardbatch.pipeline.stages.embed
import hardbatch.pipeline.stages.ingest
import hardbatch.pipeline.stages.measure
import hardbatch.pipeline.stages.pack
import hardbatch.pipeline.stages.write  # noqa: F401
from hardbatch.pipeline.run import plan_corpus, run_step
from hardbatch.pipeline.step import Step


def main(manifest: str, workspace: str) -> None:
    for step in plan_corpus(Path(manifest), Path(workspace)).steps:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            print(json.dumps({"stage": step.stage, "bytes": peak(step)}), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, f"{step.stage} of {step.domain} failed"


def peak(step: Step) -> int:
    found = held()
    done = threading.Event()

    def sample() -> None:
        nonlocal found
        while not done.wait(0.005):
            found = max(found, held())

    sampler = threading.Thread(target=sample)
    sampler.start()
    run_step(step)
    done.set()
    sampler.join()
    return found


def held() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
