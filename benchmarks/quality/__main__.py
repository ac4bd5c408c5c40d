"""Does it make better models? Trains the same model on batches that are made in different ways, and compares.

    HARDBATCH_DATA=DIR python benchmarks/quality FAMILY GRID --workspace DIR [--seeds 3] [--threads 1]

A run that was stopped continues: every arm and seed is a file in the workspace, and is trained once.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "ALL")  # several times faster, and no bits are compared here

import numpy as np
import torch
from arms import GRIDS, SAMPLE, TUNED, TUNING_SAMPLE, one_domain
from report import Results, draw_compute, draw_dial, print_table
from runs import Figures, Runs
from static import StaticFamily
from transformer import TransformerFamily


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=("static", "small", "minilm"))
    parser.add_argument("grid", choices=(*GRIDS, "tune"))
    parser.add_argument("--domain", default="shell_tldr", help="of the family minilm")
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[""], help="arms whose names contain one of these")
    parser.add_argument("--against", help="the arm that others are compared with; default: the first of the grid")
    parser.add_argument("--learning-rate", type=float, help="instead of that of the family")
    parser.add_argument("--temperature", type=float, help="of the loss, instead of that of the family")
    parser.add_argument("--pairs", type=int, nargs="*", help="how many pairs each model sees; several, to compare")
    parser.add_argument(
        "--plot", type=Path, help="draw the lead against K (for the grid `dial`), or quality against several --pairs"
    )
    parser.add_argument("--references", action="store_true", help="measure BM25 and MiniLM as published too")
    parser.add_argument("--table", action="store_true", help="train nothing, print what there is")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if "HARDBATCH_DATA" not in os.environ:
        parser.error("set HARDBATCH_DATA to the folder of real pairs, which has train/ and eval/")
    data = Path(os.environ["HARDBATCH_DATA"])

    if options.grid == "tune":
        tune(options.workspace, data)
        return
    families: dict[str, StaticFamily | TransformerFamily] = {
        "static": StaticFamily(SAMPLE),
        "small": TransformerFamily(SAMPLE, options.workspace / "models"),
        "minilm": TransformerFamily(
            one_domain(options.domain),
            options.workspace / "models",
            num_layers=None,
            max_length=48,
            pairs_seen=9_600,
            learning_rate=5e-5,
        ),
    }
    family = families[options.family]
    for name in ("learning_rate", "temperature"):
        if getattr(options, name) is not None:
            family = replace(family, **{name: getattr(options, name)})
    arms = [arm for arm in GRIDS[options.grid] if any(part in arm.name for part in options.only)]
    if not arms:
        names = "; ".join(arm.name for arm in GRIDS[options.grid])
        parser.error(f"--only {' '.join(options.only)}: no such arm; arms: {names}")

    against = options.against or arms[0].name
    by_pairs: dict[int, Results] = {}
    for pairs_seen in options.pairs or [family.pairs_seen]:
        runs = Runs(replace(family, pairs_seen=pairs_seen), options.workspace, data)
        if not options.table:
            for seed in range(options.seeds):
                for arm in arms:
                    runs.run(arm, seed)
        results: dict[str, list[Figures]] = {}
        for arm in arms:
            results |= runs.kept(arm)
        if against not in results:
            parser.error(
                f"no run of the arm '{against}' yet; run it, or give another one with --against; "
                f"there are: {'; '.join(results) or 'none'}"
            )
        if options.references:
            results |= {name: [figures] * len(results[against]) for name, figures in runs.references(arms[0]).items()}
        by_pairs[pairs_seen] = results
        print(f"{pairs_seen:,} pairs seen")
        print_table(results, family.sample.domains, against)
    if options.plot is not None and len(by_pairs) > 1:
        draw_compute(by_pairs, family.sample.domains, options.plot)
    elif options.plot is not None:
        rules = dict.fromkeys(arm.masks for arm in arms)
        by_rule = {
            rule: {arm.name: results[arm.name] for arm in arms if arm.masks == rule and arm.name in results}
            for rule in rules
        }
        draw_dial(by_rule, family.sample.domains, options.plot)


def tune(workspace: Path, data: Path) -> None:
    """Learning rate and temperature of `static`, on a domain of its own, for random and for hard batches."""
    for arm in TUNED:
        for learning_rate in (0.03, 0.1, 0.3):
            row = []
            for temperature in (0.02, 0.05, 0.1):
                family = StaticFamily(
                    TUNING_SAMPLE, learning_rate=learning_rate, temperature=temperature, pairs_seen=40_000
                )
                figures = Runs(family, workspace, data).run(arm, 0)
                row.append(float(np.mean(figures[TUNING_SAMPLE.domains[0]])))
            print(f"{arm.name:<8}{learning_rate:>6}" + "".join(f"{value:>8.4f}" for value in row), flush=True)


if __name__ == "__main__":
    main()
