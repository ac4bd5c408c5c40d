"""A corpus of poison: every kind of bad input, what `hardbatch run` makes of it, and the table docs/bad_inputs.md.

    python tests/reliability/poison.py            runs all kinds and writes docs/bad_inputs.md

A kind writes its files below a folder; the command is run there. It must end with the exit code and a line that names
what is wrong where, or complete with every row accounted for: rows in = pairs + quarantined + held out.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from tests.reliability import processes, warm

GOOD = 40  # pairs beside the poison, so that there are batches
_CELL_CHARACTERS = 130
MANIFEST = """corpus = "poison"
[[dataset]]
name = "numbers"
source = {source}
{dataset}
[ingest]
max_quarantined_fraction = {allowed}
[embed]
model = "{model}"
surrogate_model = "lexical"
[pack]
batch_size = 8
"""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of bad input: how it is written, and how a run over it must end."""

    name: str
    write: Callable[[Path], object]
    source: str | list[str] = "pairs.jsonl"
    dataset: str = ""
    model: str = "lexical"
    arguments: tuple[str, ...] = ()
    allowed: float = 1.0  # ingest.max_quarantined_fraction
    code: int = 0
    says: tuple[str, ...] = ()  # what the line must contain if the run is refused
    rows: int = 0  # rows of the source if the run completes
    reasons: dict[str, int] = field(default_factory=dict)  # and what is quarantined
    no_vector: int = 0  # pairs left over without a vector
    manifest: bytes | None = None  # instead of the usual one
    odd: tuple[bytes, ...] = ()  # rows in a good file: the quick half takes all such kinds at once
    is_long: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: its exit code, what it printed, and what is wrong with it."""

    kind: Kind
    code: int
    errors: str
    faults: tuple[str, ...]

    @property
    def line(self) -> str:
        """The line that the user sees."""
        lines = [line for line in self.errors.splitlines() if line.startswith("hardbatch:")]
        return lines[0].removeprefix("hardbatch: ") if lines else ""


def pairs(num_rows: int = GOOD, start: int = 0) -> list[dict[str, object]]:
    """Distinct pairs about a few topics."""
    return [
        {"query": f"what is number {i} of topic {i % 7}", "document": f"number {i} lies in {i % 7}"}
        for i in range(start, start + num_rows)
    ]


def json_lines(*odd: bytes, good: int = GOOD) -> bytes:
    """Lines of good pairs with the odd lines behind the third."""
    lines = [json.dumps(pair).encode() for pair in pairs(good)]
    return b"\n".join([*lines[:3], *odd, *lines[3:]]) + b"\n"


def comma_separated(*odd: bytes) -> bytes:
    """The same as CSV."""
    lines = [f"{pair['query']},{pair['document']}".encode() for pair in pairs()]
    return b"\n".join([b"query,document", *lines[:3], *odd, *lines[3:]]) + b"\n"


def run(kind: Kind, folder: Path) -> Outcome:
    """Writes a kind below `folder`, which must not be there, and runs `hardbatch run` over it."""
    data = folder / "data"
    data.mkdir(parents=True)
    kind.write(data)
    manifest = data / "poison.toml"
    text = MANIFEST.format(
        source=json.dumps(kind.source), dataset=kind.dataset, allowed=kind.allowed, model=kind.model
    ).encode()
    manifest.write_bytes(text if kind.manifest is None else kind.manifest)
    arguments = [word.replace("FOLDER", str(folder)) for word in kind.arguments]
    started = warm.start(warm.PIPELINE, ["run", manifest, "--workspace", folder / "workspace", *arguments])
    ended = started.wait(300)
    return judge(kind, ended.code, ended.errors, folder)


def judge(kind: Kind, code: int, printed: str, folder: Path) -> Outcome:
    """What is wrong with how a run over a kind ended."""
    faults = []
    if code != kind.code:
        faults.append(f"exit code {code}, expected {kind.code}")
    if "Traceback" in printed:
        faults.append("a traceback")
    if not printed.replace("\n", "").isprintable():
        faults.append("signs that do not print")
    if code == 0:
        faults += account(kind, Path(printed.splitlines()[-1]))
    else:
        lines = [line for line in printed.splitlines() if line.startswith("hardbatch:")]
        if len(lines) != 1:
            faults.append(f"{len(lines)} lines of the error instead of 1")
        faults += [f"'{word}' is missing" for word in kind.says if word not in "".join(lines)]
    return Outcome(kind=kind, code=code, errors=printed, faults=tuple(faults))


def account(kind: Kind, shards: Path) -> Iterator[str]:
    """What does not add up in the artifacts of a finished run, counted from their tables."""
    corpus = shards.parents[1]
    (made,) = (corpus / "pairs" / "numbers").iterdir()
    (packed,) = (corpus / "batches" / "numbers").iterdir()
    num_pairs = pq.read_metadata(made / "pairs.parquet").num_rows
    quarantined = Counter(pq.read_table(made / "quarantine.parquet")["reason"].to_pylist())
    held_out = made / "holdout" / "qrels.parquet"
    num_held_out = pq.read_metadata(held_out).num_rows if held_out.exists() else 0
    if num_pairs + quarantined.total() + num_held_out != kind.rows:
        yield f"{kind.rows} rows in, {num_pairs} pairs + {quarantined.total()} quarantined + {num_held_out} held out"
    if quarantined != kind.reasons:
        yield f"quarantined {dict(quarantined)}, expected {kind.reasons}"
    left = Counter(pq.read_table(packed / "leftover.parquet")["reason"].to_pylist())
    slots = sum(pq.read_metadata(path).num_rows for path in (shards / "data").iterdir())
    if slots + left.total() != num_pairs:
        yield f"{num_pairs} pairs, {slots} in batches + {left.total()} left over"
    if left["invalid_vector"] != kind.no_vector:
        yield f"{left['invalid_vector']} pairs without a vector, expected {kind.no_vector}"


def without_machine(text: str, folder: Path) -> str:
    """`text` with the paths of this machine replaced by names."""
    text = text.replace(str(folder / "data"), "DATA").replace(str(folder), "FOLDER")
    return re.sub(r"/[0-9a-f]{16}\b", "/KEY", text).replace(str(Path.home()), "HOME")


def table(outcomes: Sequence[tuple[Outcome, Path]]) -> str:
    """The list of bad inputs in Markdown."""
    lines = [
        "# Bad inputs, and what a user sees",
        "",
        "`hardbatch run` over one kind of bad input after the other, each beside a few dozen good rows.",
        "Regenerate this page with `python tests/reliability/poison.py`, which takes some minutes.",
        "",
        "Exit codes: 0 done, 2 usage or settings, 3 bad input, 7 too many broken rows. When a run completes,",
        "each row is a pair, held out, or in quarantine with a reason. Long messages are cut here.",
        "",
        "| kind | exit code | what the user sees |",
        "|---|---|---|",
    ]
    for outcome, folder in outcomes:
        kind = outcome.kind
        seen = without_machine(outcome.line, folder)
        if outcome.code == 0:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(kind.reasons.items())) or "nothing"
            seen = f"quarantined: {reasons}" + f"; without a vector: {kind.no_vector}" * bool(kind.no_vector)
        if len(seen) > _CELL_CHARACTERS:
            seen = f"{seen[:_CELL_CHARACTERS]} …"
        cell = seen.replace("|", "\\|").replace("*", "\\*").replace("`", "'").replace("<", "\\<")
        lines.append(f"| {kind.name} | {outcome.code} | {cell} |")
    return "\n".join(lines) + "\n"


def all_kinds() -> list[Kind]:
    """Every kind of poison."""
    from tests.reliability import poison_files, poison_rows, poison_settings

    return [*poison_rows.ROWS, *poison_files.FORMATS, *poison_files.NAMES, *poison_settings.SETTINGS]


def quick_kinds() -> list[Kind]:
    """Those that are small; kinds that are rows of a good file are taken all at once."""
    from tests.reliability.poison_rows import rows

    kinds = all_kinds()
    odd = [kind for kind in kinds if kind.odd]
    reasons = sum((Counter(kind.reasons) for kind in odd), Counter())
    together = rows("all of these rows at once", *(line for kind in odd for line in kind.odd), **reasons)
    return [together, *(kind for kind in kinds if not kind.odd and not kind.is_long)]


def main() -> int:
    """Runs all kinds and writes docs/bad_inputs.md; returns 1 if one did not end as it must."""
    outcomes = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, kind in enumerate(all_kinds()):
            folder = Path(scratch) / str(number)
            outcome = run(kind, folder)
            outcomes.append((outcome, folder))
            print(f"{'; '.join(outcome.faults) or 'as expected'}: {kind.name}", file=sys.stderr)
            if outcome.faults:
                print(without_machine(outcome.errors[-2_000:], folder), file=sys.stderr)
    (processes.ROOT / "docs" / "bad_inputs.md").write_text(table(outcomes), encoding="utf-8")
    return int(any(outcome.faults for outcome, _ in outcomes))


if __name__ == "__main__":
    sys.exit(main())
