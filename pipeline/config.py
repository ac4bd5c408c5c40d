"""The manifest of a corpus: what to read, and the settings of each stage. TOML in, frozen models out.

Every table and key is checked here, once; an unknown key is refused with a suggestion. `docs/manifests.md`
describes them for users.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hardbatch.pipeline.advice import advice_on_key, advice_on_toml, advice_on_value, is_data_file
from hardbatch.pipeline.errors import ConfigError
from hardbatch.pipeline.schemas import (
    MAX_BATCH_SIZE,
    MAX_BATCHES_PER_PART,
    MIXED_DOMAIN,
    NEGATIVE_PLACES,
    SHARDS_WITH_NEGATIVES,
)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Table(BaseModel):
    """A table of settings: frozen, with strict types, refusing unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Column = str | Annotated[int, Field(ge=1)]
SeveralColumns = Annotated[list[Column], Field(min_length=1)]


class Columns(Table):
    """The columns of the source that hold query, document and negatives.

    A column is given by its name, by a dotted path into nested values, or in delimited text by its
    number from 1. A cell may hold several texts; `sources/columns.py` describes how they are read.
    """

    query: Column | SeveralColumns = Field("query", description="a list of columns is joined with spaces")
    document: Column | SeveralColumns = Field("document", description="a list of columns is joined with spaces")
    negatives: Column | SeveralColumns | None = Field(
        None,
        description="column with hard negatives, one text or a list of texts; a list of columns, each with its own",
    )

    @model_validator(mode="after")
    def _check(self) -> Columns:
        given = [tuple(self.names(field)) for field in ("query", "document", "negatives")]
        if given[0] == given[1] or given[2] in given[:2]:
            names = ", ".join(str(name) for names in given for name in names)
            raise ValueError(
                f"query, document and negatives must be different columns, given {names}; if queries and documents are "
                "in files of their own, give the folder of both and their qrels as the source"
            )
        return self

    def names(self, field: str) -> list[Column]:
        """The columns of `field`, which is query, document or negatives; none if it is not mapped."""
        given: Column | list[Column] | None = getattr(self, field)
        return given if isinstance(given, list) else [] if given is None else [given]


class Dialect(Table):
    """How delimited text (CSV, TSV) is written."""

    delimiter: str | None = Field(
        None, min_length=1, max_length=1, description="what separates two fields; default: comma in csv, tab in tsv"
    )
    quote: str = Field('"', max_length=1, description="what encloses a field; empty: nothing does")
    escape: str | None = Field(None, min_length=1, max_length=1, description="what escapes a quote or a delimiter")
    header: bool = Field(True, description="the first line names the columns; else they are column_1, column_2, ...")


class Source(Table):
    """A dataset's name, and where its files are."""

    name: Name = Field(description="the domain's name")
    source: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="paths, globs, folders of a known layout, fsspec URLs, or python:PACKAGE"
    )
    format: Literal["auto", "parquet", "arrow", "jsonl", "csv", "tsv"] = Field(
        "auto", description="auto: by the file name; text files may be compressed (gzip, zstd, bzip2, xz)"
    )
    revision: str | None = Field(None, description="revision of the source, which replaces {revision} in its URL")
    sha256: dict[str, Digest] = Field({}, description="expected digest of each file, by file name")

    @property
    def sources(self) -> list[str]:
        """The sources as a list, with `{revision}` filled in."""
        sources = [self.source] if isinstance(self.source, str) else self.source
        return [source.replace("{revision}", self.revision or "main") for source in sources]


class Reading(Table):
    """How the rows of a dataset are read: which columns, and which rows."""

    columns: Columns = Field(Columns(), description="columns that hold query, document and (optionally) negatives")
    extra_columns: dict[str, Column] = Field(
        {}, description="further columns that the shards carry: a list, or a table of NAME_IN_THE_SHARDS = column"
    )
    where: str | None = Field(
        None, description="SQL condition that a row must meet, e.g. \"label = 1 AND lang = 'en'\""
    )
    limit: int | None = Field(None, ge=1, description="read only this many rows from the start")
    sample: int | None = Field(None, ge=1, description="draw this many of the rows at random; they keep their order")
    sample_seed: int = Field(0, ge=0, description="seed of the draw")
    encoding: str = Field("utf-8", description="encoding of text files, e.g. windows-1252 or utf-16")
    csv: Dialect = Field(Dialect(), description="how CSV and TSV files are written")

    @field_validator("extra_columns", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        """The columns by their names in the shards, in alphabetical order, so that no other order changes a key."""
        if isinstance(given, str | int):
            raise ValueError(f"give a list of columns, for example extra_columns = {[given]!r}, given {given!r}")
        if isinstance(given, list):
            names = [f"column_{column}" if isinstance(column, int) else str(column) for column in given]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"names the column '{name}' twice; leave one out")
            given = dict(zip(names, given, strict=True))
        return dict(sorted(given.items())) if isinstance(given, dict) else given

    @field_validator("extra_columns")
    @classmethod
    def _are_free(cls, columns: dict[str, Column]) -> dict[str, Column]:
        for name, column in columns.items():
            if not name or not name.isprintable() or "*" in name:
                raise ValueError(f"{name!a} cannot be the name of a column; give each column by its own name")
            if name in (*SHARDS_WITH_NEGATIVES.names, NEGATIVE_PLACES.name):
                raise ValueError(
                    f"the shards have a column '{name}' of their own; give yours another name: "
                    f"extra_columns = {{ source_{name} = {json.dumps(column)} }}"
                )
        return columns

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, encoding: str) -> str:
        try:
            "".encode(encoding)
        except (LookupError, ValueError):  # unknown, not of texts, or with a NUL in its name
            raise ValueError(f"'{encoding}' is not an encoding that Python knows, such as windows-1252") from None
        return encoding


class Dataset(Reading, Source):
    """One dataset, which is one domain. Clusters and batches never mix domains unless asked to."""

    query_prompt: str = Field("", description="text put before every query in training, e.g. 'search_query: '")
    document_prompt: str = Field("", description="text put before every document in training")
    licence: str = Field("", description="licence that the data card states")
    num_pairs: int | None = Field(None, ge=1, description="number of pairs in the source, if known; used by `plan`")
    weight: float = Field(
        1.0, ge=0.0, description="how often an epoch of training reads its batches; fractions are allowed"
    )
    holdout: Fraction = Field(0.0, description="fraction of the pairs to hold out for evaluation")


class IngestConfig(Table):
    """Reading and cleaning."""

    max_characters: int = Field(32_768, ge=1, description="longer texts are cut to this length and counted")
    max_quarantined_fraction: float = Field(
        0.1, ge=0.0, le=1.0, description="a larger fraction of broken rows stops the run with exit code 7"
    )
    holdout_seed: int = Field(0, ge=0, description="seed for drawing the texts that are held out")
    decontaminate: list[str] = Field(
        [], description="collections (corpus and queries, as for --eval) whose texts are quarantined"
    )


class AnswersConfig(Table):
    """Which texts of one side say the same."""

    near_copies: bool = Field(
        True, description="join near-copies to one class, not equal texts alone; see docs/negatives.md"
    )


class EmbedConfig(Table):
    """Embedding. `model` makes the vectors for clustering, `surrogate_model` those for the equivalence sets."""

    model: str = Field(
        "minilm",
        description="minilm, lexical, a folder below the data root, or a hub name; static models work too",
    )
    revision: str | None = Field(None, description="commit of the model on the hub")
    surrogate_model: str = Field(
        "minilm",
        description="model of the equivalence sets, given likewise; the paper uses nomic-ai/nomic-embed-text-v1",
    )
    surrogate_revision: str | None = Field(None, description="commit of the model on the hub")
    query_prompt: str = Field("", description="prompt of the clustering model")
    document_prompt: str = Field("", description="prompt of the clustering model")
    surrogate_query_prompt: str | None = Field(
        None, description="prompt of the surrogate model; default for nomic-embed: 'search_query: '"
    )
    surrogate_document_prompt: str | None = Field(
        None, description="prompt of the surrogate model; default for nomic-embed: 'search_document: '"
    )
    max_length_tokens: int | None = Field(
        None, ge=4, description="longer texts are cut for the model; default: its own limit"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="auto, cpu, mps, cuda or cuda:N; on cuda, clustering and packing run there too",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 if the hardware has it, otherwise float32 (float16 on older GPUs)"
    )
    token_budget: int | None = Field(
        None, ge=64, description="padded tokens per forward pass; the default depends on the device"
    )
    unit_rows: int = Field(8_192, ge=16, description="texts per unit, the piece of work that is committed whole")
    trust_remote_code: bool = Field(False, description="run code from the model's repository; needs a full commit")


_ITERATIONS = {"folded": 10, "doubled": 100}


class ClusterConfig(Table):
    """Asymmetric K-Means (Eq. 3)."""

    method: Literal["folded", "doubled"] = Field(
        "folded",
        description="folded: K-Means on d + q, streamed; doubled: on the paper's 2n points, with FAISS, in memory",
    )
    cluster_size: int | None = Field(
        None,
        ge=2,
        description="mean number of pairs per cluster; default: pack.group_size (pack.batch_size if that is 1)",
    )
    iterations: int | None = Field(
        None, ge=1, description="maximum number of iterations; default: 10 for folded, 100 for doubled"
    )
    restarts: int = Field(3, ge=1, description="doubled: number of runs, of which the best is kept")
    tolerance: float = Field(
        1e-3, ge=0.0, description="folded: stop when the relative gain of an iteration is below this"
    )
    balance: float = Field(
        0.02, ge=0.0, le=1.0, description="folded: strength of cluster-size balancing; 0: plain K-Means"
    )
    two_level_above: int = Field(
        1_024, ge=1, description="folded: cluster in two levels if there are more clusters than this"
    )
    seed: int = Field(0, ge=0, description="seed for drawing the first centroids")

    def resolved(self, pack: PackConfig) -> ClusterConfig:
        """Returns these settings with the defaults that follow from the method and from packing."""
        size = pack.with_group_size().group_size or pack.batch_size
        return self.model_copy(
            update={
                "cluster_size": self.cluster_size or (pack.batch_size if size == 1 else size),
                "iterations": self.iterations or _ITERATIONS[self.method],
            }
        )


class PackConfig(Table):
    """Cutting clusters into groups of alike pairs, and composing batches of exactly `batch_size` pairs."""

    batch_size: int = Field(64, ge=2, le=MAX_BATCH_SIZE, description="number of pairs in every batch, B")
    group_size: int | None = Field(
        None,
        ge=1,
        description="the dial of hardness, K: a batch is B / K groups of K alike pairs, drawn at random; "
        "1: random batches; batch_size: as hard as can be; "
        "default: the largest divisor of batch_size from 4 to 8, or else batch_size",
    )
    seed: int = Field(
        0, ge=0, description="seed for the start of the tour and the draw of groups; each further packing adds 1"
    )
    compose: Literal["domain", "corpus"] = Field(
        "domain",
        description="domain: the groups of a batch are of one domain; corpus: they are drawn from all domains, "
        "into batches of domain mixed",
    )
    exact_tour_below: int = Field(8_192, ge=1, description="exact greedy tour if there are fewer clusters than this")
    refine_rounds: int = Field(
        30, ge=0, description="maximum number of rounds in which nearby batches trade pairs; 0: none"
    )
    refine_tolerance: float = Field(
        5e-4, ge=0.0, description="stop when a round raises Eq. 2 by a smaller fraction than this"
    )
    num_packings: int = Field(
        1, ge=1, le=64, description="number of ways to cut the pairs into batches; epochs take turns"
    )
    remainder: Literal["drop", "mix"] = Field(
        "drop", description="pairs that do not fill a batch: drop them, or mix them with other domains"
    )
    weak_pair_rank: int | None = Field(
        None,
        ge=1,
        description="leave out pairs whose own document ranks beyond this for its query, among consistency.pool "
        "documents by the surrogate; default: none is left out",
    )

    def with_group_size(self) -> PackConfig:
        """Returns these settings with K, which is the default for B if it is not given; see docs/quality.md."""
        if self.group_size is not None:
            return self
        size = max((size for size in _divisors(self.batch_size) if 4 <= size <= 8), default=self.batch_size)
        return self.model_copy(update={"group_size": size})

    @field_validator("group_size")
    @classmethod
    def _divides_batch_size(cls, group_size: int | None, info: ValidationInfo) -> int | None:
        batch_size = info.data.get("batch_size")  # missing if it is not valid itself
        if group_size is not None and batch_size is not None and batch_size % group_size != 0:
            allowed = ", ".join(map(str, _divisors(batch_size)))
            raise ValueError(f"must divide pack.batch_size, {batch_size}, given {group_size}; allowed: {allowed}")
        return group_size

    @model_validator(mode="after")
    def _check(self) -> PackConfig:
        if self.compose == "corpus" and self.remainder == "mix":
            raise ValueError("compose 'corpus' mixes domains already and goes with remainder 'drop', given 'mix'")
        return self


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


class HardnessConfig(Table):
    """Measuring the bounds that `share` is relative to."""

    anchors: int = Field(
        4_096, ge=1, description="number of pairs whose nearest neighbours in the whole domain are looked up"
    )
    seed: int = Field(0, ge=0, description="seed for drawing the anchors")


class ConsistencyConfig(Table):
    """Measuring how well each pair agrees with the surrogate."""

    pool: int = Field(
        8_192, ge=1, description="number of documents of the domain that each pair's own document is ranked against"
    )
    seed: int = Field(0, ge=0, description="seed for drawing them, if the domain has more documents")


class WriteConfig(Table):
    """Equivalence sets and shards."""

    likely_rule: Literal["one-sided", "symmetric"] = Field(
        "one-sided",
        description="one-sided: a likely answer scores as high for the query as its own document (Eq. 4); "
        "symmetric: each of two documents must fit the other query as well",
    )
    margin: float = Field(
        0.0, description="how far below the own score a likely answer may score; negative: it must lead by this much"
    )
    margin_strategy: Literal["absolute", "relative"] = Field(
        "absolute",
        description="absolute: own score - margin; relative: own score - margin * abs(own score), "
        "so 0.05 asks for 95 % of it",
    )
    floor_quantile: Fraction = Field(
        0.5,
        description="a likely answer scores at least as high as this fraction of the domain's own pairs; 0: no floor",
    )
    max_likely: float = Field(
        0.25, ge=0.0, le=1.0, description="largest part of a batch that the surrogate alone may mask for a query"
    )
    batches_per_part: int = Field(
        MAX_BATCHES_PER_PART,
        ge=1,
        le=MAX_BATCHES_PER_PART,
        description="batches per Parquet file, which is the unit of work",
    )


class CorpusManifest(Table):
    """A corpus: its name, its datasets, the settings of the stages."""

    corpus: Name
    dataset: list[Dataset] = Field(min_length=1)
    ingest: IngestConfig = IngestConfig()
    answers: AnswersConfig = AnswersConfig()
    embed: EmbedConfig = EmbedConfig()
    cluster: ClusterConfig = ClusterConfig()
    pack: PackConfig = PackConfig()
    hardness: HardnessConfig = HardnessConfig()
    consistency: ConsistencyConfig = ConsistencyConfig()
    write: WriteConfig = WriteConfig()

    @model_validator(mode="after")
    def _check(self) -> CorpusManifest:
        names = [dataset.name for dataset in self.dataset]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two datasets are named '{name}'; give each its own name")
            if name == MIXED_DOMAIN:
                raise ValueError(f"'{MIXED_DOMAIN}' names the batches of several domains; choose another dataset name")
        for dataset in self.dataset:
            if self.pack.compose == "corpus" and dataset.weight != 1:
                raise ValueError(
                    f"dataset '{dataset.name}' has weight {dataset.weight:g}, but with pack.compose 'corpus' a batch "
                    "belongs to no dataset, so there is nothing to weigh; remove the weight or compose by domain"
                )
        return self


def load_manifest(path: Path, overrides: Sequence[str] = ()) -> CorpusManifest:
    """Reads and checks the manifest at `path`, with overrides on top.

    Args:
        path: The TOML file.
        overrides: Strings `stage.field=value` or `dataset.NAME.field=value`.

    Raises:
        ConfigError: Names the file, the key, what was given and what is allowed; one line per mistake.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Notepad writes a byte order mark
        content = _parse(path, text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such manifest") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give the manifest's .toml file") from None
    except UnicodeDecodeError:
        raise _not_a_manifest(path, "is not UTF-8 text; a manifest is a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None

    _refuse_model_paths(content, path)
    _refuse_escapes(content, path)
    for override in overrides:
        _apply_override(content, override)
    try:
        return CorpusManifest.model_validate(content)
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            overridden = any(_is_target(override, item["loc"], content) for override in overrides)
            lines.append(f"{'--set' if overridden else path}: {_explain(item, content)}")
        raise ConfigError(*lines) from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, or absurdly long numbers or deep nesting
        what = f"is not valid TOML: {error}"
        raise _not_a_manifest(path, what + advice_on_toml(text, str(error))) from None


def _not_a_manifest(path: Path, what: str) -> ConfigError:
    if is_data_file(path):
        what = f"is a data file; give a manifest that names it: `hardbatch look {path}` proposes one"
    return ConfigError(f"{path}: {what}")


def _refuse_model_paths(content: dict[str, Any], path: Path) -> None:
    """A manifest may come from elsewhere, so its models must be below the data root or on the hub; `--set` is free."""
    embed = content.get("embed")
    for field in ("model", "surrogate_model"):
        name = embed.get(field) if isinstance(embed, dict) else None
        if isinstance(name, str) and (name.startswith(("/", "~")) or ".." in Path(name).parts):
            raise ConfigError(
                f"{path}: embed.{field}: '{name}' leads out of the data root; give a folder below it, "
                f"or on the command line: --set embed.{field}={name}"
            )


def _refuse_escapes(content: dict[str, Any], path: Path) -> None:
    """Refuses sources with control characters: TOML reads the backslash of "data\\train.csv" as that of a tab."""
    for dataset in _datasets(content):
        sources = dataset.get("source")
        for source in sources if isinstance(sources, list) else [sources]:
            if isinstance(source, str) and any(char in source for char in "\t\b\f\r\n"):
                raise ConfigError(
                    f"{path}: source {source!a} has a control character: a backslash in double quotes begins an "
                    "escape; write paths with /"
                )


def _datasets(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The datasets of a manifest that has not been checked yet."""
    found = content.get("dataset")
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _apply_override(content: dict[str, Any], override: str) -> None:
    if not override.isprintable():
        raise ConfigError(f"--set {override!a}: has characters that cannot be printed; give stage.field=value as text")
    target, separator, text = override.partition("=")
    stage, dot, name = target.strip().partition(".")
    if not separator or not dot or not name or ("." in name and stage != "dataset"):
        meant = advice_on_key(target.strip(), [], setting_names()) if separator and not dot else ""
        raise ConfigError(f"--set {override}: expected stage.field=value, for example pack.batch_size=64{meant}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()  # a bare word such as folded
    if stage == "dataset":
        table, name = _table_of_dataset(content, override, name)
    else:
        stages = [key for key, field in CorpusManifest.model_fields.items() if _is_table(field.annotation)]
        if stage not in stages:
            meant = advice_on_key(stage, stages, [])
            raise ConfigError(f"--set {override}: no stage '{stage}'{meant}; stages: {', '.join(stages)}")
        table = content.setdefault(stage, {})
    if not isinstance(table, dict):
        raise ConfigError(f"--set {override}: '{target.strip().rpartition('.')[0]}' is not a table in the manifest")
    table[name] = value


def _table_of_dataset(content: dict[str, Any], override: str, target: str) -> tuple[Any, str]:
    """The table and the field that `dataset.NAME.field` or `dataset.NAME.columns.field` names; NAME may have dots."""
    names = {str(item["name"]): item for item in _datasets(content) if "name" in item}
    found = max((name for name in names if target.startswith(f"{name}.")), key=len, default=None)
    if found is None:
        example = f"dataset.{next(iter(names), 'NAME')}.{target.rpartition('.')[2]}={override.partition('=')[2]}"
        raise ConfigError(
            f"--set {override}: expected dataset.NAME.field=value, for example {example}; "
            f"datasets: {', '.join(names) or 'none'}"
        )
    table, _, field = target.removeprefix(f"{found}.").rpartition(".")
    return (names[found].setdefault(table, {}) if table else names[found]), field


def _is_target(override: str, location: Sequence[str | int], content: dict[str, Any]) -> bool:
    """Whether an override set the value at a location of the manifest."""
    parts = [*location]
    if len(parts) > 2 and parts[0] == "dataset" and isinstance(parts[1], int):
        parts[1] = content["dataset"][parts[1]].get("name")
    return override.partition("=")[0].strip() == ".".join(map(str, parts))


def _explain(item: Any, content: dict[str, Any]) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).lstrip(".")
    if item["loc"][:1] == ("dataset",) and len(item["loc"]) > 1 and isinstance(item["loc"][1], int):
        name = content["dataset"][item["loc"][1]]
        where += f" (dataset '{name['name']}')" if isinstance(name, dict) and "name" in name else ""
    if item["type"] == "extra_forbidden":
        allowed = _fields_at(item["loc"][:-1])
        meant = advice_on_key(str(item["loc"][-1]), allowed, setting_names())
        advice = ""
        if allowed == list(Columns.model_fields):
            advice = '; to choose rows by a column: where = "label = 1"; to carry columns to the shards: '
            advice += f"extra_columns = {json.dumps([item['input']] if isinstance(item['input'], str) else ['score'])}"
        return f"{where}: unknown key{meant}; allowed: {', '.join(allowed)}{advice}"
    if item["type"] == "missing":
        advice = "; every dataset begins with a line [[dataset]], followed by its name and source"
        return f"{where}: is required{advice if item['loc'] == ('dataset',) else ''}"
    if item["type"] == "value_error":
        return (f"{where}: " if where else "") + str(item["ctx"]["error"])
    try:
        given = ascii(item["input"])
    except ValueError:  # an integer with thousands of digits
        given = "a number too long to print"
    advice = advice_on_value(item["loc"], item["type"], item["input"])
    message = "input should be a table" if item["type"] == "model_type" else item["msg"]
    return f"{where}: {message[0].lower()}{message[1:]}, given {given[:80]}{advice}"


def _fields_at(location: Sequence[str | int]) -> list[str]:
    model: type[BaseModel] = CorpusManifest
    for part in location:
        if isinstance(part, int):
            continue
        annotation = Dataset if part == "dataset" else model.model_fields[part].annotation
        if not _is_table(annotation):
            return []
        model = annotation  # type: ignore[assignment]
    return list(model.model_fields)


def setting_names() -> list[str]:
    """All settings as dotted names, for example `pack.batch_size`; those of a dataset begin with `dataset.`."""
    tables = [(), *((name,) for name in CorpusManifest.model_fields if name != "corpus")]
    tables += [("dataset", name) for name, field in Dataset.model_fields.items() if _is_table(field.annotation)]
    return [".".join([*table, field]) for table in tables for field in _fields_at(table)]


def _is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
