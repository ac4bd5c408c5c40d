"""The manifest of a corpus: what to read and how each stage is set. TOML in, frozen models out.

Every table and key is checked here, once; an unknown key is refused with a suggestion. `docs/manifests.md` describes
them for users.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hardbatch.pipeline.errors import ConfigError
from hardbatch.pipeline.schemas import MAX_BATCH_SIZE, MAX_BATCHES_PER_PART, MIXED_DOMAIN

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Table(BaseModel):
    """A table of settings: frozen, with strict types, refusing unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Columns(Table):
    """Which columns (or JSON keys) of the source hold what."""

    query: str = "query"
    document: str = "document"
    negatives: str | None = Field(None, description="column with hard negatives: a list of texts, or one text")

    @model_validator(mode="after")
    def _check(self) -> Columns:
        names = [name for name in (self.query, self.document, self.negatives) if name is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"query, document and negatives must be different columns, given {', '.join(names)}")
        return self


class Dataset(Table):
    """One dataset, which is one domain: clusters and batches never mix domains unless asked."""

    name: Name = Field(description="the domain's name")
    source: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="paths, globs, fsspec URLs, or python:PACKAGE"
    )
    format: Literal["auto", "parquet", "jsonl", "csv", "tsv"] = Field(
        "auto", description="auto tells by the name; .gz and .zst of text formats are read as they are"
    )
    columns: Columns = Field(Columns(), description="which columns hold query, document and (optional) negatives")
    query_prompt: str = Field("", description="put before a query in training, e.g. 'search_query: '")
    document_prompt: str = Field("", description="put before a document in training")
    licence: str = Field("", description="written to the data card")
    revision: str | None = Field(None, description="revision of the source, written into {revision} of its URL")
    sha256: dict[str, Digest] = Field({}, description="expected digest per file name")
    limit: int | None = Field(None, ge=1, description="read at most this many rows, the first ones")
    num_pairs: int | None = Field(None, ge=1, description="pairs the source is known to hold, for `plan`")
    weight: float = Field(1.0, ge=0.0, description="how often an epoch of training reads its batches")
    holdout: Fraction = Field(0.0, description="fraction of the pairs held out for evaluation")

    @property
    def sources(self) -> list[str]:
        """The sources as a list, `{revision}` filled in."""
        sources = [self.source] if isinstance(self.source, str) else self.source
        return [source.replace("{revision}", self.revision or "main") for source in sources]


class IngestConfig(Table):
    """Reading and cleaning."""

    max_characters: int = Field(32_768, ge=1, description="longer texts are cut, and counted")
    max_quarantined_fraction: float = Field(
        0.1, ge=0.0, le=1.0, description="more broken rows than this stop the run with exit code 7"
    )
    holdout_seed: int = Field(0, ge=0, description="draws the texts that are held out")
    decontaminate: list[str] = Field([], description="folders of corpus/queries Parquet whose texts are quarantined")


class EmbedConfig(Table):
    """Embedding. `model` makes the vectors that are clustered, `surrogate_model` those of the equivalence sets."""

    model: str = Field("minilm", description="minilm, lexical, a folder below the data root, or a hub name")
    revision: str | None = Field(None, description="commit of a hub model")
    surrogate_model: str = Field("minilm", description="likewise; nomic-ai/nomic-embed-text-v1 in the paper")
    surrogate_revision: str | None = Field(None, description="commit of a hub model")
    query_prompt: str = Field("", description="prompt of the clustering model")
    document_prompt: str = Field("", description="prompt of the clustering model")
    surrogate_query_prompt: str | None = Field(None, description="default: 'search_query: ' for nomic-embed")
    surrogate_document_prompt: str | None = Field(None, description="default: 'search_document: ' for nomic-embed")
    max_length_tokens: int | None = Field(None, ge=4, description="default: the model's own limit")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="cpu, mps, cuda or cuda:N; clustering and packing too run on cuda",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the hardware has it, else float32 (float16 on older GPUs)"
    )
    token_budget: int | None = Field(None, ge=64, description="padded tokens of a forward pass; default by device")
    unit_rows: int = Field(8_192, ge=16, description="texts of a unit, the piece of work that is committed whole")
    trust_remote_code: bool = Field(False, description="run code of the model's repository; needs a full commit")


class ClusterConfig(Table):
    """Asymmetric K-Means (Eq. 3)."""

    method: Literal["folded", "doubled"] = Field(
        "folded", description="folded: K-Means on d + q, streamed; doubled: the paper's 2n points, on FAISS, in memory"
    )
    cluster_size: int | None = Field(None, ge=2, description="mean pairs of a cluster; default: pack.batch_size")
    iterations: int | None = Field(None, ge=1, description="default: 10 for folded, 100 for doubled")
    restarts: int = Field(3, ge=1, description="doubled only: the best of so many runs is kept")
    tolerance: float = Field(1e-3, ge=0.0, description="folded: stop when the relative gain is below")
    balance: float = Field(
        0.02, ge=0.0, le=1.0, description="folded: how fast clusters of unequal size grow alike; 0: plain K-Means"
    )
    two_level_above: int = Field(1_024, ge=1, description="folded: more clusters than this are found in two levels")
    seed: int = Field(0, ge=0, description="draws the first centroids")


class PackConfig(Table):
    """Cutting clusters into batches of exactly `batch_size` pairs."""

    batch_size: int = Field(64, ge=2, le=MAX_BATCH_SIZE, description="pairs of every batch, B")
    seed: int = Field(0, ge=0, description="draws the cluster where the tour starts; the next packing takes seed + 1")
    order: Literal["tour", "random"] = Field(
        "tour", description="tour: like beside like; random: the baseline that hard batches are compared with"
    )
    exact_tour_below: int = Field(8_192, ge=1, description="fewer clusters than this: exact greedy tour")
    refine_rounds: int = Field(30, ge=0, description="rounds in which near batches trade pairs, at most; 0: none")
    refine_tolerance: float = Field(5e-4, ge=0.0, description="stop when a round gains less of Eq. 2 than this")
    num_packings: int = Field(1, ge=1, le=64, description="ways in which the pairs are cut into batches, by epoch")
    remainder: Literal["drop", "mix"] = Field("drop", description="pairs that fill no batch: drop, or mix domains")


class HardnessConfig(Table):
    """Measuring: the bounds that `share` is relative to."""

    anchors: int = Field(4_096, ge=1, description="pairs whose nearest are looked up among all of the domain")
    seed: int = Field(0, ge=0, description="draws the anchors")


class WriteConfig(Table):
    """Equivalence sets and shards."""

    margin: float = Field(0.0, ge=0.0, description="mask d' where f(q,d') >= f(q,d) - margin")
    batches_per_part: int = Field(
        MAX_BATCHES_PER_PART, ge=1, le=MAX_BATCHES_PER_PART, description="batches of a Parquet file, the unit"
    )


class CorpusManifest(Table):
    """A corpus: its name, its datasets, the settings of the stages."""

    corpus: Name
    dataset: list[Dataset] = Field(min_length=1)
    ingest: IngestConfig = IngestConfig()
    embed: EmbedConfig = EmbedConfig()
    cluster: ClusterConfig = ClusterConfig()
    pack: PackConfig = PackConfig()
    hardness: HardnessConfig = HardnessConfig()
    write: WriteConfig = WriteConfig()

    @model_validator(mode="after")
    def _check(self) -> CorpusManifest:
        names = [dataset.name for dataset in self.dataset]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two datasets are named '{name}'; give each its own name")
            if name == MIXED_DOMAIN:
                raise ValueError(f"'{MIXED_DOMAIN}' names the batches of several domains; choose another dataset name")
        return self


def load_manifest(path: Path, overrides: Sequence[str] = ()) -> CorpusManifest:
    """Reads and checks the manifest at `path`, with `stage.field=value` overrides on top.

    Raises ConfigError naming the file, the key, what was given and what is allowed.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such manifest") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give the manifest's .toml file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; a manifest is a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, or numbers and nesting beyond any use
        raise ConfigError(f"{path}: is not valid TOML: {error}") from None
    _refuse_model_paths(content, path)
    for override in overrides:
        _apply_override(content, override)
    try:
        return CorpusManifest.model_validate(content)
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            key = ".".join(map(str, item["loc"]))
            overridden = any(override.partition("=")[0].strip() == key for override in overrides)
            lines.append(f"{'--set' if overridden else path}: {_explain(item, content)}")
        raise ConfigError(*lines) from None


def _refuse_model_paths(content: dict[str, Any], path: Path) -> None:
    """A manifest may come from elsewhere, so its models lie below the data root or on the hub; `--set` may say more."""
    embed = content.get("embed")
    for field in ("model", "surrogate_model"):
        name = embed.get(field) if isinstance(embed, dict) else None
        if isinstance(name, str) and (name.startswith(("/", "~")) or ".." in Path(name).parts):
            raise ConfigError(
                f"{path}: embed.{field}: '{name}' leads out of the data root; give a folder below it, "
                f"or on the command line: --set embed.{field}={name}"
            )


def _apply_override(content: dict[str, Any], override: str) -> None:
    if not override.isprintable():
        raise ConfigError(f"--set {override!a}: has signs that cannot be printed; give stage.field=value as text")
    target, separator, text = override.partition("=")
    stage, dot, name = target.strip().partition(".")
    if not separator or not dot or not name or "." in name:
        raise ConfigError(f"--set {override}: expected stage.field=value, for example pack.batch_size=64")
    stages = [key for key, field in CorpusManifest.model_fields.items() if _is_table(field.annotation)]
    if stage not in stages:
        raise ConfigError(f"--set {override}: no stage '{stage}'{_suggest(stage, stages)}; stages: {', '.join(stages)}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()  # a bare word such as folded
    table = content.setdefault(stage, {})
    if not isinstance(table, dict):
        raise ConfigError(f"--set {override}: '{stage}' is not a table in the manifest")
    table[name] = value


def _explain(item: Any, content: dict[str, Any]) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).lstrip(".")
    if item["loc"][:1] == ("dataset",) and len(item["loc"]) > 1 and isinstance(item["loc"][1], int):
        name = content["dataset"][item["loc"][1]]
        where += f" (dataset '{name['name']}')" if isinstance(name, dict) and "name" in name else ""
    if item["type"] == "extra_forbidden":
        allowed = _fields_at(item["loc"][:-1])
        return f"{where}: unknown key{_suggest(str(item['loc'][-1]), allowed)}; allowed: {', '.join(allowed)}"
    if item["type"] == "missing":
        return f"{where}: is required"
    if item["type"] == "value_error":
        return (f"{where}: " if where else "") + str(item["ctx"]["error"])
    try:
        given = ascii(item["input"])
    except ValueError:  # an integer of thousands of digits
        given = "a number too long to print"
    return f"{where}: {item['msg'][0].lower()}{item['msg'][1:]}, given {given[:80]}"


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


def _is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _suggest(word: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
