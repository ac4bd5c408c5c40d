"""config: what a manifest may say, and how a mistake in one is told."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hardbatch.pipeline.advice import advice_on_override
from hardbatch.pipeline.config import Columns, CorpusManifest, load_manifest
from hardbatch.pipeline.errors import ConfigError

MINIMAL = 'corpus = "c"\n[[dataset]]\nname = "n"\nsource = "x.jsonl"\n'
Load = Callable[..., CorpusManifest]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """`load(text, *overrides)`."""

    def load(text: str, *overrides: str) -> CorpusManifest:
        (tmp_path / "m.toml").write_text(text, encoding="utf-8")
        return load_manifest(tmp_path / "m.toml", overrides)

    return load


def refused(load: Load, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_minimal_manifest_has_defaults(load: Load) -> None:
    manifest = load(MINIMAL)
    assert manifest.corpus == "c"
    assert manifest.pack.batch_size == 64
    assert manifest.dataset[0].sources == ["x.jsonl"]
    assert manifest.dataset[0].columns.negatives is None


def test_the_revision_is_written_into_the_sources(load: Load) -> None:
    text = MINIMAL.replace('"x.jsonl"', '["hf://a@{revision}/b.parquet", "c.csv"]')
    assert load(text).dataset[0].sources == ["hf://a@main/b.parquet", "c.csv"]
    assert load(text + 'revision = "abc"\n').dataset[0].sources == ["hf://a@abc/b.parquet", "c.csv"]


@pytest.mark.parametrize(
    ("text", "key", "suggested"),
    [
        (MINIMAL + "[embd]\nmodel = 1\n", "embd", "embed"),
        (MINIMAL + "lmit = 1\n", "dataset[0].lmit (dataset 'n')", "limit"),
        (MINIMAL + "[dataset.columns]\nqurey = 'a'\n", "dataset[0].columns.qurey (dataset 'n')", "query"),
        (MINIMAL + "[ingest]\nmax_character = 1\n", "ingest.max_character", "max_characters"),
        (MINIMAL + "[embed]\nmodle = 'x'\n", "embed.modle", "model"),
        (MINIMAL + "[cluster]\niteration = 1\n", "cluster.iteration", "iterations"),
        (MINIMAL + "[pack]\nbatchsize = 1\n", "pack.batchsize", "batch_size"),
        (MINIMAL + "[hardness]\nanchor = 1\n", "hardness.anchor", "anchors"),
        (MINIMAL + "[write]\nmargins = 1\n", "write.margins", "margin"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(load: Load, text: str, key: str, suggested: str) -> None:
    message = refused(load, text)
    assert f"m.toml: {key}: unknown key; did you mean '{suggested}'?; allowed: " in message
    assert suggested in message.split("allowed: ")[1].split(", ")


@pytest.mark.parametrize(
    ("given_", "allowed"),
    [
        ("0", "greater than or equal to 2"),
        ("1", "greater than or equal to 2"),
        ("-64", "greater than or equal to 2"),
        ("65537", "less than or equal to 65536"),
        ("1.5", "integer"),
        ("64.0", "integer"),
        ('"64"', "integer"),
        ("true", "integer"),
        ("[64]", "integer"),
        ("nan", "integer"),
        ("1979-05-27", "integer"),
    ],
)
@pytest.mark.parametrize("way", ["manifest", "override"])
def test_a_batch_size_that_is_not_allowed(load: Load, given_: str, allowed: str, way: str) -> None:
    if way == "manifest":
        message = refused(load, MINIMAL + f"[pack]\nbatch_size = {given_}\n")
    else:
        message = refused(load, MINIMAL, f"pack.batch_size={given_}")
    assert ("m.toml" if way == "manifest" else "--set") + ": pack.batch_size: " in message
    assert allowed in message
    assert "given " in message


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("limit = 0", "dataset[0].limit"),
        ("limit = -1", "dataset[0].limit"),
        ("holdout = 1.0", "dataset[0].holdout"),
        ("holdout = -0.1", "dataset[0].holdout"),
        ("holdout = nan", "dataset[0].holdout"),
        ("weight = nan", "dataset[0].weight"),
        ("weight = -1", "dataset[0].weight"),
        ('format = "xml"', "dataset[0].format"),
        ("licence = 3", "dataset[0].licence"),
        ("columns = 'query'", "dataset[0].columns"),
        ('sha256 = {"x.jsonl" = "abc"}', "dataset[0].sha256.x.jsonl"),
        ("query_prompt = ['a']", "dataset[0].query_prompt"),
        ("weight = inf", "dataset[0].weight"),
    ],
)
def test_a_wrong_value_of_a_dataset_names_it(load: Load, line: str, key: str) -> None:
    message = refused(load, MINIMAL + line + "\n")
    assert f"m.toml: {key} (dataset 'n'): " in message
    assert "given " in message


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("cluster.balance=-0.1", "greater than or equal to 0"),
        ("cluster.balance=1.1", "less than or equal to 1"),
        ("cluster.tolerance=-1e-9", "greater than or equal to 0"),
        ("cluster.iterations=0", "greater than or equal to 1"),
        ("cluster.cluster_size=1", "greater than or equal to 2"),
        ("cluster.two_level_above=0", "greater than or equal to 1"),
        ("cluster.method=fold", "'folded' or 'doubled'"),
        ("pack.refine_rounds=-1", "greater than or equal to 0"),
        ("pack.refine_rounds=1.5", "integer"),
        ("pack.refine_tolerance=-0.1", "greater than or equal to 0"),
        ("pack.num_packings=0", "greater than or equal to 1"),
        ("pack.num_packings=65", "less than or equal to 64"),
        ("pack.exact_tour_below=0", "greater than or equal to 1"),
        ("pack.group_size=0", "greater than or equal to 1"),
        ("pack.group_size=24", "must divide pack.batch_size, 64, given 24; allowed: 1, 2, 4, 8, 16, 32, 64"),
        ("pack.compose=all", "'domain' or 'corpus'"),
        ("pack.remainder=keep", "'drop' or 'mix'"),
        ("write.margin=true", "valid number"),
        ('write.margin="0.5"', "valid number"),
        ("write.margin=inf", "finite"),
        ("ingest.max_quarantined_fraction=true", "valid number"),
        ('cluster.tolerance="1"', "valid number"),
    ],
)
def test_settings_have_types_and_bounds(load: Load, override: str, allowed: str) -> None:
    message = refused(load, MINIMAL, override)
    assert f"--set: {override.partition('=')[0]}: " in message
    assert allowed in message and "given " in message


@pytest.mark.parametrize(
    "override",
    [
        "cluster.balance=0",
        "cluster.balance=1",
        "pack.refine_rounds=0",
        "pack.refine_tolerance=0",
        "pack.num_packings=64",
        "write.margin=1",  # an integer is a number
    ],
)
def test_bounds_themselves_are_allowed(load: Load, override: str) -> None:
    stage, name = override.partition("=")[0].split(".")
    assert getattr(getattr(load(MINIMAL, override), stage), name) == float(override.partition("=")[2])


@pytest.mark.parametrize("value", ["3", "true", "{}", '["a", 3]', "[]"])
def test_a_source_that_is_no_text_is_refused(load: Load, value: str) -> None:
    assert "dataset[0].source" in refused(load, MINIMAL.replace('"x.jsonl"', value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL.replace('source = "x.jsonl"\n', ""), "dataset[0].source (dataset 'n'): is required"),
        (MINIMAL + '[pack]\ncompose = "corpus"\nremainder = "mix"\n', "pack: compose 'corpus' mixes domains already"),
        (
            MINIMAL + 'weight = 2.0\n[pack]\ncompose = "corpus"\n',
            "dataset 'n' has weight 2, but with pack.compose 'corpus'",
        ),
        (MINIMAL + '[[dataset]]\nname = "n"\nsource = "y"\n', "two datasets are named 'n'"),
        (MINIMAL.replace('"n"', '"mixed"'), "'mixed' names the batches of several domains"),
        (
            MINIMAL + 'columns = {query = "a", document = "a"}\n',
            "query, document and negatives must be different columns, given a, a",
        ),
        (MINIMAL + "[pack]\nbatch_size = " + "[" * 5_000, "is not valid TOML"),
        (MINIMAL + "[pack]\nbatch_size = " + "1" * 5_000, "is not valid TOML"),
        (MINIMAL + "[pack]\nbatch_size = 0x" + "f" * 5_000, "a number too long to print"),
    ],
)
def test_what_a_manifest_must_not_say(load: Load, text: str, message: str) -> None:
    assert message in refused(load, text)


@pytest.mark.parametrize(
    "name", [".digests.json", "", ".", "..", "../a", "a/b", "/a", "a b", "-a", "a\\n", "é", "n" * 101]
)
@pytest.mark.parametrize("what", ["corpus", "name"])
def test_names_that_are_no_folder_names_are_refused(load: Load, name: str, what: str) -> None:
    old = 'corpus = "c"' if what == "corpus" else 'name = "n"'
    assert what in refused(load, MINIMAL.replace(old, f'{what} = "{name}"'))


def test_every_mistake_is_told_at_once(load: Load) -> None:
    lines = refused(load, "[pack]\nbatch_size = 0\nsed = 1\n").splitlines()
    assert len(lines) == 4
    assert all("m.toml: " in line for line in lines)


@pytest.mark.parametrize(
    "override",
    ["pack", "pack.seed", "=", "pack=1", "pack.seed.x=1", "pack.=1", "corpus=c", ""],
)
def test_an_override_of_another_form_is_refused(load: Load, override: str) -> None:
    message = refused(load, MINIMAL, override)
    assert message == f"--set {override}: expected stage.field=value, for example pack.batch_size=64"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pack.sed=1", "--set: pack.sed: unknown key; did you mean 'seed'?"),
        ("pack.zzzzzz=1", "--set: pack.zzzzzz: unknown key; allowed: batch_size, group_size"),
        ("embed.query_prompt=\udcff", "has characters that cannot be printed"),
    ],
)
def test_an_override_that_cannot_be_used_is_refused(load: Load, override: str, message: str) -> None:
    assert message in refused(load, MINIMAL, override)


@pytest.mark.parametrize("override", ["packs.seed=1", ".seed=1", "Pack.seed=1"])
def test_an_override_of_no_stage_is_refused(load: Load, override: str) -> None:
    message = refused(load, MINIMAL, override)
    assert (
        "no stage" in message
        and "stages: ingest, answers, embed, cluster, pack, hardness, consistency, write" in message
    )


def test_an_override_below_what_is_no_table_is_refused(load: Load) -> None:
    assert "'pack' is not a table" in refused(load, "pack = 3\n" + MINIMAL, "pack.seed=1")


TWO = 'corpus = "c"\n[[dataset]]\nname = "a"\nsource = "x.csv"\n[[dataset]]\nname = "a.b"\nsource = "y.csv"\n'


@pytest.mark.parametrize(
    ("override", "number", "expected"),
    [
        ("dataset.a.limit=1000", 0, {"limit": 1000}),
        ("dataset.a.b.limit = 7", 1, {"limit": 7}),  # the longest name that fits, as names may have dots
        ("dataset.a.columns.query=question", 0, {"columns": Columns(query="question")}),
        ('dataset.a.b.source=["z.csv"]', 1, {"source": ["z.csv"]}),
    ],
)
def test_a_setting_of_one_dataset_is_overridden(
    load: Load, override: str, number: int, expected: dict[str, Any]
) -> None:
    found, before = load(TWO, override).dataset, load(TWO).dataset
    assert found[number] == before[number].model_copy(update=expected)
    assert found[1 - number] == before[1 - number]


@pytest.mark.parametrize("override", ["dataset.limit=5", "dataset.c.limit=5", "dataset.0.limit=5"])
def test_an_override_of_no_dataset_names_those_there_are(load: Load, override: str) -> None:
    message = refused(load, TWO, override)
    assert message.startswith(f"--set {override}: expected dataset.NAME.field=value, for example dataset.a.limit=5; ")
    assert message.endswith("datasets: a, a.b")


def test_a_wrong_value_of_a_dataset_is_traced_to_its_override(load: Load) -> None:
    assert refused(load, TWO, "dataset.a.b.limit=0").startswith("--set: dataset[1].limit (dataset 'a.b'): ")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (MINIMAL.replace("[[dataset]]", "[dataset]"), "every dataset begins with a line [[dataset]]"),
        ('corpus = "c"\n[dataset.n]\nsource = "x.jsonl"\n', "every dataset begins with a line [[dataset]]"),
        (MINIMAL.replace("dataset", "datasets"), "did you mean 'dataset'?"),
        (MINIMAL.replace("corpus =", "name ="), "did you mean 'corpus'?"),
        (MINIMAL.replace("source =", "path ="), "did you mean 'source'?"),
        (MINIMAL.replace("source =", "data-files ="), "did you mean 'source'?"),
        (MINIMAL + "max_rows = 3\n", "did you mean 'limit'?"),
        (MINIMAL + 'query = "q"\n', "did you mean 'dataset.columns.query'?"),
        ("batch_size = 8\n" + MINIMAL, "did you mean 'pack.batch_size'?"),
        (MINIMAL + "[cluster]\nbatch_size = 8\n", "did you mean 'pack.batch_size'?"),
        (MINIMAL + "[pack]\nbatch-size = 8\n", "did you mean 'batch_size'?"),
        (MINIMAL + "[[pack]]\nbatch_size = 8\n", "write [pack] in single brackets"),
        ("pack = 8\n" + MINIMAL, "write its settings below a line [pack]"),
        (MINIMAL + 'columns = ["q", "d"]\n', "write columns = { query = "),
        (MINIMAL + 'limit = "5"\n', "write it without quotes"),
        (MINIMAL + "revision = 5\n", "write it in quotes"),
        (MINIMAL + 'holdout = "10%"\n', "write a fraction, for example 0.1"),
        (MINIMAL + "holdout = 10\n", "write a fraction, for example 0.1"),
        (MINIMAL.replace('"x.jsonl"', "“x.jsonl”"), "write text in straight quotes"),
        ('corpus = "c"\n', "dataset: is required; every dataset begins with a line [[dataset]]"),
        (MINIMAL.replace("x.jsonl", "data\\train.jsonl"), "write paths with /"),  # a tab to TOML
        (MINIMAL.replace("x.jsonl", "data\\x.jsonl"), "write paths with /"),  # an escape that TOML does not know
        (MINIMAL.replace('"x.jsonl"', "x.jsonl"), "the line is 'source = x.jsonl': write text in quotes: source = \"x"),
        (MINIMAL + "[embed]\ntrust_remote_code = True\n", "write true and false in lower case"),
        (MINIMAL + "limit = None\n", "leave the key out"),
        (MINIMAL + "limit = 5 6\n", "the line is 'limit = 5 6'"),
        ("corpus: c\ndataset:\n  - name: n\n", "this looks like YAML"),
        ('{"corpus": "c"}', "this looks like JSON"),
    ],
)
def test_a_mistake_that_people_make_is_answered_with_what_to_write(load: Load, text: str, advice: str) -> None:
    assert advice in refused(load, text)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet", "pairs.CSV", "pairs.jsonl.gz"])
def test_data_in_place_of_a_manifest_is_named_as_such(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"query": "a"}\n' if "jsonl" in name else b"PAR1\xff")
    with pytest.raises(ConfigError, match=r"is a data file; .*`hardbatch look .*pairs\..*` proposes one"):
        load_manifest(tmp_path / name)


def test_an_override_without_its_stage_is_completed(load: Load) -> None:
    assert refused(load, MINIMAL, "batch_size=8").endswith("pack.batch_size=64; did you mean 'pack.batch_size'?")


@pytest.mark.parametrize(
    ("given_", "following", "advice"),
    [
        ("pack.seed", ["7", "--workspace", "w"], "; write --set pack.seed=7, without blanks"),
        ("embed.model", ["=", "lexical"], "; write --set embed.model=lexical, without blanks"),
        ("pack.seed=", ["7", "m.toml"], "; write --set pack.seed=7, without blanks"),
        ("pack.seed", ["=7"], "; write --set pack.seed=7, without blanks"),
        ("pack.seed=7", ["8"], ""),
        ("pack.seed", ["--json"], ""),
        ("pack.seed", [], ""),
    ],
)
def test_an_override_that_the_shell_cut_is_joined(given_: str, following: list[str], advice: str) -> None:
    assert advice_on_override(given_, following) == advice


@pytest.mark.parametrize(
    ("override", "stage", "field", "value"),
    [
        ("pack.seed=7", "pack", "seed", 7),  # the last of several
        ("cluster.method=doubled", "cluster", "method", "doubled"),
        ('cluster.method="doubled"', "cluster", "method", "doubled"),
        ("write.margin=0.25", "write", "margin", 0.25),
        ("embed.query_prompt=query: a=b", "embed", "query_prompt", "query: a=b"),
        ("ingest.decontaminate=['a', 'b']", "ingest", "decontaminate", ["a", "b"]),
        ("embed.trust_remote_code=true", "embed", "trust_remote_code", True),
        pytest.param("embed.model = lexical", "embed", "model", "lexical"),
    ],
)
def test_an_override_wins_over_the_manifest(load: Load, override: str, stage: str, field: str, value: object) -> None:
    assert getattr(getattr(load(MINIMAL + "[pack]\nseed = 1\n", "pack.seed=3", override), stage), field) == value


@pytest.mark.parametrize("kind", ["missing", "a folder", "no UTF-8", "no TOML", "below a file", "empty"])
def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.toml"
    if kind == "a folder":
        path.mkdir()
    elif kind == "below a file":
        path.write_text("x")
        path /= "m.toml"
    elif kind != "missing":
        path.write_bytes({"no UTF-8": b'corpus = "\xff"', "no TOML": b"corpus = ", "empty": b""}[kind])
    with pytest.raises(ConfigError) as caught:
        load_manifest(path)
    assert str(caught.value).startswith(f"{path}: ")
    expected = {
        "missing": "no such manifest",
        "a folder": "is a folder",
        "no UTF-8": "is not UTF-8",
        "no TOML": "is not valid TOML",
        "below a file": "Not a directory",
        "empty": "corpus: is required",
    }
    assert expected[kind] in str(caught.value)


def test_a_manifest_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text('corpus = "c"\n[[dataset]]\nname = "d"\nsource = "x.csv"\n', encoding="utf-8-sig")
    assert load_manifest(path).corpus == "c"


def test_a_label_among_the_columns_is_told_where(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text('corpus = "c"\n[[dataset]]\nname = "d"\nsource = "x.csv"\ncolumns = { label = "y" }\n')
    with pytest.raises(ConfigError, match=r"columns\.label .*unknown key.*where = \"label = 1\""):
        load_manifest(path)


# anything at all

KEYS = st.sampled_from([*CorpusManifest.model_fields, "name", "source", "columns", "batch_size", "sha256", "x y"])
VALUES = st.recursive(
    st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(string.printable + "\0é\u2028\U0001f600", max_size=5)
    | st.sampled_from(["n", "mixed", "auto", "x.jsonl"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
DATASETS = st.lists(
    st.fixed_dictionaries({}, optional={"name": VALUES, "source": VALUES, "columns": VALUES, "holdout": VALUES})
    | VALUES,
    max_size=3,
)
MANIFESTS = st.fixed_dictionaries(
    {}, optional={"corpus": st.just("c") | VALUES, "dataset": DATASETS | VALUES, "pack": VALUES, "embed": VALUES}
)


def to_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_toml(str(key))} = {to_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(char):08x}" if not char.isalnum() else char for char in value) + '"'
    return repr(value)


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=MANIFESTS, overrides=st.lists(st.text("pack.seed=[]{}1'\" \n", max_size=12), max_size=2))
@example(content={"corpus": "c", "dataset": [{"name": {}, "source": []}, {"name": 3}]}, overrides=[])
@example(content={"corpus": "c", "dataset": {"0": {}}}, overrides=["pack.seed=1"])
def test_no_manifest_raises_anything_but_a_config_error(load: Load, content: Any, overrides: list[str]) -> None:
    text = "".join(f"{key} = {to_toml(value)}\n" for key, value in content.items())
    try:
        manifest = load(text, *overrides)
    except ConfigError as error:
        assert str(error)
    else:
        assert manifest.corpus and manifest.dataset


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60) | st.text("corpus=[]{}\"'#\n.1-:TZe+_ ", max_size=40).map(str.encode))
def test_no_bytes_raise_anything_but_a_config_error(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "m.toml").write_bytes(raw)
    with pytest.raises(ConfigError):
        load_manifest(tmp_path / "m.toml")


@pytest.mark.parametrize(("batch_size", "group_size"), [(64, 8), (12, 6), (100, 5), (9, 9), (37, 37), (4, 4), (2, 2)])
def test_the_default_group_is_a_divisor_of_the_batch_near_8(load: Load, batch_size: int, group_size: int) -> None:
    settings = load(MINIMAL + f"[pack]\nbatch_size = {batch_size}\n").pack
    assert (settings.group_size, settings.with_group_size().group_size) == (None, group_size)
    given = load(MINIMAL + f"[pack]\nbatch_size = {batch_size}\ngroup_size = 1\n").pack
    assert given.with_group_size() == given
