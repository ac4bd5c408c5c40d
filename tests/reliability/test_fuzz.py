"""Row 17, by chance: whatever a manifest, a setting or a file has, rows are accounted for or an error says why not."""

from __future__ import annotations

import gzip
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hardbatch.pipeline.artifacts.artifact import read_artifact
from hardbatch.pipeline.errors import HardbatchError
from hardbatch.pipeline.run import plan_corpus, run_step
from tests.reliability.poison import comma_separated, json_lines, pairs

Record = Callable[[int, str], None]
QUICK_AND_LONG = pytest.mark.parametrize("examples", [40, pytest.param(1_500, marks=pytest.mark.soak)])
MANIFEST = """corpus = "c"
[[dataset]]
name = "n"
source = ["pairs.jsonl", "*.csv"]
format = "auto"
columns = { query = "query", document = "document", negatives = "negatives" }
query_prompt = "q: "
revision = "main"
limit = 10
weight = 0.5
holdout = 0.1
[ingest]
max_characters = 100
max_quarantined_fraction = 0.5
decontaminate = ["eval"]
[embed]
model = "lexical"
surrogate_model = "lexical"
surrogate_revision = "abc"
device = "cpu"
dtype = "float32"
[cluster]
method = "folded"
[pack]
batch_size = 8
remainder = "mix"
[write]
margin = 0.1
"""
VALUES = [
    "nan", "-inf", "0", "1", "2", "-1", "0.5", "1e400", "9" * 30, "true", '""', '"x"', '"\\u0000"', '"../x"', '"~x/y"',
    '"/etc/passwd"', '"a" * 9', '"file:///x"', '"s3://b/k"', '"zip::x"', '"python:json"', '"python:"', '"\\u001b[31m"',
    '"\\u202e"', "[]", "{}", "[[1]]", '"*"', '"**"', '"["', '"' + "x" * 5_000 + '"', "2026-01-01", "'''\n'''",
    '"mixed"', '"cuda:99"', '"org/name"', '"a/b/c"',
]  # fmt: skip
NASTY = [
    b'"', b"'", b",", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\\",
    b"\\ud800", b"\\u0000", b"{", b"}", b"[", b"]", b"null", b"1e999", b"NaN", b'""', b'"\n', b"\t",
    b"\x1b[31m", "\u202e\u200b".encode(), b"PAR1", b"[" * 2_000, b'"query":', b'{"query": "same"}\n',
    b'{"query": 1, "document": []}\n', b"a,b,c\n", b'"a\nb",c\n',
]  # fmt: skip


def fuzz(check: Callable[[Any], str], strategy: Any, examples: int) -> Counter[str]:
    """How often `check` came to what, over examples that are the same on every machine."""
    found: Counter[str] = Counter()

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def one(example: Any) -> None:
        found[check(example)] += 1

    one()
    return found


def refusal(error: HardbatchError) -> str:
    """Checks that a user can read what an error says."""
    lines = str(error).split("\n")
    assert error.exit_code in (2, 3, 7), error
    assert all(line.isprintable() and 10 < len(line) < 2_100 for line in lines), lines
    return "refused"


# files


@st.composite
def changed(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` after a few changes: cut, doubled, overwritten, with nasty bytes put in; sometimes quite another."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        stop = place + draw(st.sampled_from([0, 0, 1, 5, 100]))
        piece = draw(st.sampled_from(NASTY) | st.binary(max_size=4))
        match draw(st.sampled_from(["put", "put", "over", "double", "cut"])):
            case "put":
                content = content[:place] + piece + content[stop:]
            case "over":
                content = content[:place] + piece + content[place + len(piece) :]
            case "double":
                content = content[:stop] + content[place:]
            case "cut":
                content = content[:place]
    return content


def ingest(name: str, content: bytes) -> str:
    """Runs ingest over a file; checks that each of its rows is in one place."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / name).write_bytes(content)
        text = f'corpus = "c"\n[[dataset]]\nname = "n"\nsource = "{name}"\nholdout = 0.2\n'
        text += "[ingest]\nmax_quarantined_fraction = 1.0\nmax_characters = 50\n"
        (folder / "c.toml").write_text(text + '[embed]\nmodel = "lexical"\nsurrogate_model = "lexical"\n')
        try:
            step = plan_corpus(folder / "c.toml", folder / "workspace").steps[0]
            run_step(step)
        except HardbatchError as error:
            assert name in str(error)
            return refusal(error)
        counts = read_artifact(step.path).manifest.counts
        kept = pq.read_table(step.path / "pairs.parquet")["source_row"].to_numpy()
        dropped = pq.read_table(step.path / "quarantine.parquet")["source_row"].to_numpy()
        held_out = pq.read_metadata(step.path / "holdout" / "qrels.parquet").num_rows
        if name.endswith("jsonl") and not content.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
            text_lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
            assert counts["rows"] == sum(bool(line.strip()) for line in text_lines)
        assert len(kept) + len(dropped) + held_out == counts["rows"]
        places = np.concatenate([kept, dropped])
        assert len(np.unique(places)) == len(places) and set(places.tolist()) <= set(range(counts["rows"]))
        return "rows accounted for"


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(pairs()), sink)
    return sink.getvalue().to_pybytes()


@QUICK_AND_LONG
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pairs.jsonl", json_lines()),
        ("pairs.csv", comma_separated()),
        ("pairs.parquet", parquet()),
        ("pairs.jsonl.gz", gzip.compress(json_lines(), mtime=0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files(name: str, content: bytes, examples: int, record_row: Record) -> None:
    found = fuzz(lambda raw: ingest(name, raw), changed(content), examples)
    assert found["refused"] > 0 and (found["rows accounted for"] > 0 or "jsonl" not in name)
    counts = ", ".join(f"{count} {what}" for what, count in sorted(found.items()))
    record_row(17, f"{found.total()} changed {name}: {counts}")


# manifests and settings


@st.composite
def manifests(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A manifest with some values exchanged or some signs changed, and overrides."""
    lines = MANIFEST.splitlines()
    for _ in range(draw(st.integers(0, 2))):
        number = draw(st.integers(0, len(lines) - 1))
        name, equals, _ = lines[number].partition(" = ")
        value = draw(st.sampled_from(VALUES))
        match draw(st.sampled_from(["value", "value", "value", "sign", "drop", "double"])):
            case "value" if equals:
                lines[number] = f"{name} = {value}"
            case "sign":
                place = draw(st.integers(0, len(lines[number])))
                lines[number] = lines[number][:place] + draw(st.text(max_size=2)) + lines[number][place + 1 :]
            case "drop":
                lines[number] = ""
            case _:
                lines[number] += "\n" + lines[number]
    fields = [line.partition(" = ")[0] for line in MANIFEST.splitlines()] + ["seed", "x.y", ""]
    stages = ["ingest", "embed", "cluster", "pack", "write", "dataset", "corpus", "", "nosuch"]
    override = st.builds(
        "{}.{}={}".format,
        st.sampled_from(stages),
        st.sampled_from(fields),
        st.sampled_from(VALUES) | st.text(max_size=5),
    )
    return "\n".join(lines), draw(st.just([]) | st.lists(override | st.text(max_size=10), max_size=2))


def plan(example: tuple[str, list[str]]) -> str:
    """Plans over a manifest and overrides."""
    text, overrides = example
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "pairs.jsonl").write_bytes(json_lines())
        (folder / "pairs.csv").write_bytes(comma_separated())
        (folder / "eval").mkdir()
        for name in ("corpus", "queries"):
            pq.write_table(pa.table({"text": ["x"]}), folder / "eval" / f"{name}.parquet")
        (folder / "c.toml").write_bytes(text.encode(errors="surrogatepass"))
        try:
            steps = plan_corpus(folder / "c.toml", folder / "workspace", overrides=overrides).steps
        except HardbatchError as error:
            return refusal(error)
        assert all(step.path.resolve().is_relative_to((folder / "workspace").resolve()) for step in steps)
        return "planned"


@QUICK_AND_LONG
def test_manifests_and_settings(examples: int, record_row: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any, **options: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr("fsspec.core.url_to_fs", unreachable)
    found = fuzz(plan, manifests(), 2 * examples)
    assert found["refused"] > 0 and found["planned"] > 0
    record_row(17, f"{found.total()} changed manifests: {found['planned']} planned, {found['refused']} refused")
