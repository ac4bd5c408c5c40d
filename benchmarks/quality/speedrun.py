"""The speedrun: the best small model from 4,800 pairs of docstrings and code.

    python benchmarks/quality/speedrun.py --workspace DIR [--seeds 3] [--only NAME ...]

Fixed are the data (functions of seven Python packages, whose versions and digests are below), the model (MiniLM's
first 3 layers), the number of pairs that it sees and the metric. Entries, in speedrun.toml, say how batches are made.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "ALL")  # several times faster, and no bits are compared here

import polars as pl
from arms import Arm
from corpus import Sample
from report import Results, by_quality, interval, lead, means
from runs import Runs
from transformer import TransformerFamily

from hardbatch.pipeline.errors import ConfigError
from hardbatch.pipeline.sources.python import list_files, read_functions

TRAINED_ON = {
    "django==5.2.8": "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
    "mne==1.10.2": "9d5ec2b7a4b127114bf8987e5f16577f4fca236e7fc24bf164cfe8ca8dad453e",
    "sympy==1.14.0": "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    "twisted==25.5.0": "8559f654d01a54a8c3efe66d533d43f383531ebf8d81d9f9ab4769d91ca15df7",
}
MEASURED_ON = {
    "networkx==3.5": "0030d386a9a06dee3565298b4a734b68589749a544acbb6c412dc9e2489ec6ec",
    "sqlalchemy==2.0.44": "19de7ca1246fbef9f9d1bff8f1ab25641569df226364a0e40457dc5457c54b05",
    "xarray==2025.10.1": "a4e699433b87a7fac340951bc36648645eeef72bdd915ff055ac2fd99865a73d",
}
ENTRIES = Path(__file__).with_suffix(".toml")
_FLAGS = ("--learning-rate", "--temperature", "--weight-decay", "--positives")
_FIXED = {"pack.batch_size": 64, "pack.num_packings": 4}  # unless an entry gives others
_MAX_LENGTH_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of entries, besides the first, which others are compared with")
    options = parser.parse_args()

    data = options.workspace / "data"
    for requirement, digest in (TRAINED_ON | MEASURED_ON).items():
        _make_pairs(requirement, digest, data)
    sample = Sample(
        domains=tuple(map(_name, TRAINED_ON)),
        num_pairs=2_000,
        max_length_tokens=_MAX_LENGTH_TOKENS,
        out_of_domain=tuple(map(_name, MEASURED_ON)),
    )
    family = TransformerFamily(
        sample, options.workspace / "models", num_layers=3, max_length=_MAX_LENGTH_TOKENS, pairs_seen=4_800
    )
    runs = Runs(family, options.workspace, data)
    arms = read_entries(ENTRIES)
    arms = [arm for arm in arms if options.only is None or arm is arms[0] or arm.name in options.only]
    for seed in range(options.seeds):
        for arm in arms:
            runs.run(arm, seed)
    results: Results = {arm.name: runs.kept(arm)[arm.name] for arm in arms}
    results |= {name: [figures] * options.seeds for name, figures in runs.references(arms[0]).items()}
    print_markdown(results, sample.domains, arms[0].name)


def read_entries(path: Path) -> list[Arm]:
    """Reads the entries.

    Raises:
        ConfigError: An entry changes what is fixed.
    """
    arms = []
    for entry in tomllib.loads(path.read_text())["entry"]:
        for flag in entry.get("flags", ()):
            if flag.partition("=")[0] not in _FLAGS:
                raise ConfigError(
                    f"{path}: entry '{entry['name']}': flag {flag} is fixed; allowed: {', '.join(_FLAGS)}"
                )
        for name in entry.get("settings", {}):
            if name.startswith(("ingest.", "dataset.")):
                raise ConfigError(f"{path}: entry '{entry['name']}': {name} is fixed, because it would change the data")
        settings = _FIXED | entry.get("settings", {})
        arms.append(Arm(name=entry["name"], settings=settings, flags=tuple(entry.get("flags", ()))))
    return arms


def print_markdown(results: Results, domains: tuple[str, ...], against: str) -> None:
    """Prints the table of docs/speedrun.md, the best entry first."""
    print(f"| batches | in | out | mean | lead over {against} (95 %) | seeds |\n|---|---|---|---|---|---|")
    for name in by_quality(results, domains):
        inside, outside = means(results[name], domains)
        low, high = interval(results[name], results[against], domains)
        ahead = f"{lead(results[name], results[against], domains):+.4f} ({low:+.4f} to {high:+.4f})"
        row = [name, f"{inside:.4f}", f"{outside:.4f}", f"{(inside + outside) / 2:.4f}"]
        print(f"| {' | '.join([*row, '' if name == against else ahead, str(len(results[name]))])} |")


def _make_pairs(requirement: str, digest: str, data: Path) -> None:
    """Downloads a package and writes its functions, to train on or as a collection."""
    name = _name(requirement)
    pairs = data / "train" / f"{name}.parquet" if requirement in TRAINED_ON else data / "eval" / name / "corpus.parquet"
    if pairs.exists():
        return
    source = _download(requirement, digest, data)
    functions = [row for path in list_files(source) for row in read_functions(path)]
    pairs.parent.mkdir(parents=True, exist_ok=True)
    texts = pl.DataFrame({"query": [row[1] for row in functions], "document": [row[2] for row in functions]})
    if requirement in TRAINED_ON:
        texts.write_parquet(pairs)
        return

    # A question that several functions answer has several answers.
    texts = texts.unique(maintain_order=True)
    documents = texts.select(text="document").unique(maintain_order=True).with_row_index("doc_id")
    queries = texts.select(text="query").unique(maintain_order=True).with_row_index("query_id")
    qrels = texts.join(documents, left_on="document", right_on="text").join(queries, left_on="query", right_on="text")
    queries.write_parquet(pairs.with_name("queries.parquet"))
    qrels.select("query_id", "doc_id", score=pl.lit(1)).write_parquet(pairs.with_name("qrels.parquet"))
    documents.write_parquet(pairs)


def _download(requirement: str, digest: str, data: Path) -> Path:
    """The package as a folder, from PyPI, if it has the digest."""
    folder = data / "packages" / _name(requirement)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        wanted = folder.with_suffix(".txt")
        wanted.write_text(f"{requirement} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*command, "--only-binary=:all:", "-r", wanted, "-d", folder.parent], check=True)
        (wheel,) = folder.parent.glob(f"{_name(requirement)}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


def _name(requirement: str) -> str:
    return requirement.partition("==")[0]


if __name__ == "__main__":
    main()
