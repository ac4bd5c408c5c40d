"""rates: what a step will take and write, told from steps that were built in this workspace, else from typical ones.

`.rates.json` in the workspace's root keeps the last steps of each kind that were built there; artifacts hold no times.
A kind is a stage and the settings that its speed depends on; the work of a step is what its seconds grow with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hardbatch.pipeline.artifacts.artifact import Artifact, read_artifact
from hardbatch.pipeline.artifacts.files import RATES, canonical_json, write_cache
from hardbatch.pipeline.schemas import MIXED_DOMAIN
from hardbatch.pipeline.step import Step

_FORMAT = 2  # of 1 the work of clusters was told otherwise
_MIN_ROWS = 1_000  # a step of fewer says nothing of one of millions, and is not kept
_MIN_SECONDS = 0.2  # a shorter step is mostly start-up: it tells seconds only of steps of up to ...
_REACH = 4  # ... so many times its rows
_KEPT_OF_DOMAIN, _KEPT = 3, 60  # measurements of a kind
_BYTES_PER_TOKEN = 4.0  # of English, roughly
_LIMIT = 1e18  # no number of a measurement is as large
_MAX_TOKENS = 512  # where the model's own limit is not told

# Typical: seconds per unit of work (see `load_of`) and bytes per row, on 2 cores of an AMD EPYC without a GPU, B = 64:
# docs/benchmarks.md, 'Stages on 13 real domains' and 'Growth'. MiniLM: 233 texts of 32 tokens a second and core in
# bfloat16, 107 in float32. No figure: none until measured.
_TYPICAL = {
    "pairs": (25e-6, 625.0),
    "vectors lexical": (0.45e-6, 513.0),
    "clusters folded": (0.0083e-6, 20.0),
    "hardness": (34e-6 / 4_096, 0.0),
    "batches tour": (0.12e-9, 3.7),
    "batches random": (2.5e-6, 3.7),
    "shards": (28e-6, 310.0),
}
_MINILM_TEXTS = {"bfloat16": 233, "float32": 107}
_MINILM_BYTES = 769.0
_START_UP_S = {"vectors": 0.3}  # to load MiniLM, to draw the projection of `lexical`; a few hundredths elsewhere


@dataclass(frozen=True, kw_only=True)
class PairsSize:
    """Size of a `pairs` artifact: rows of the source, pairs, distinct texts of both sides, bytes where known."""

    rows: int
    pairs: int
    texts: int
    bytes: float | None


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a step has to do: its kind, its rows (source rows of `pairs`, texts of `vectors`, else pairs), its work."""

    kind: str
    rows: int
    work: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A step as it was built: its rows and work, wall seconds, bytes of the artifact."""

    domain: str
    rows: int
    work: float
    seconds: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds and bytes of a step to come, None where unknown; `source` says from which rates."""

    seconds: float | None = None
    bytes: float | None = None
    source: str = ""


UNKNOWN = Estimate()


class Rates:
    """The measurements of a workspace: one file, in which content that is not ours counts as none."""

    def __init__(self, workspace: Path) -> None:
        self._path = workspace / RATES
        self._kinds: dict[str, list[Measurement]] = {}  # of each kind the last one first
        try:
            content = json.loads(self._path.read_bytes())
            kinds = {kind: [Measurement(**item) for item in items] for kind, items in content["kinds"].items()}
            if content["format"] == _FORMAT and all(_is_sound(item) for items in kinds.values() for item in items):
                self._kinds = kinds
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass  # absent, damaged, foreign: the next step that is built writes it anew

    def add(self, kind: str, measurement: Measurement) -> None:
        """Keeps a measurement, and of its kind only the last ones; of writers at the same time the last one wins."""
        kept = self._kinds.setdefault(kind, [])
        for item in [item for item in kept if item.domain == measurement.domain][_KEPT_OF_DOMAIN - 1 :]:
            kept.remove(item)
        kept.insert(0, measurement)
        del kept[_KEPT:]
        kinds = {name: [asdict(item) for item in items] for name, items in self._kinds.items()}
        write_cache(self._path, canonical_json({"format": _FORMAT, "kinds": kinds}))

    def estimate(self, step: Step, load: Load) -> Estimate:
        """What `step` will take and write.

        From what was measured of its kind on the same domain, whose texts are alike, else on others: the median of the
        three that are nearest in rows. Where nothing was, typical rates.
        """
        known = self._kinds.get(load.kind, [])
        same = [item for item in known if item.domain == step.domain]
        timed = [item for item in same if _tells_seconds(item, load)]
        timed = timed or [item for item in known if _tells_seconds(item, load)]
        start_up_s = _START_UP_S.get(step.stage, 0.0)
        typical = _typical(step)
        per_work, per_row = typical or (None, None)
        if timed:
            net = [max(item.seconds - start_up_s, item.seconds / 2) / item.work for item in _nearest(timed, load)]
            per_work = median(net)
        if known:
            per_row = median(item.bytes / item.rows for item in _nearest(same or known, load))
        sources = ["measured"] if timed else ["typical"] if typical else []
        if known and not timed:
            sources.append("bytes measured")
        return Estimate(
            seconds=None if per_work is None else start_up_s + per_work * load.work,
            bytes=None if per_row is None else per_row * load.rows,
            source=", ".join(sources),
        )


def record_step(step: Step, artifact: Artifact, seconds: float) -> None:
    """Keeps what a step took that was built from nothing; small ones are left out, as is what cannot be written."""
    sizes = [pairs_size(artifact if path == step.path else read_artifact(path)) for path in pairs_paths(step)]
    load = load_of(step, sizes, num_packings(step, lambda path: read_artifact(path).manifest.config))
    if load.rows < _MIN_ROWS or seconds <= 0:
        return
    measured = Measurement(domain=step.domain, rows=load.rows, work=load.work, seconds=seconds, bytes=artifact.bytes)
    try:
        Rates(workspace_of(step)).add(load.kind, measured)
    except OSError:
        pass  # it is only for plans: a run does not fail for it


def workspace_of(step: Step) -> Path:
    """The workspace's root: above corpus, stage, key, and of all but the shards the domain."""
    return step.path.parents[2 if step.stage == "shards" else 3]


def pairs_size(artifact: Artifact) -> PairsSize:
    """The size of a complete `pairs` artifact."""
    counts = artifact.manifest.counts
    texts = counts["queries"] + counts["documents"]
    return PairsSize(rows=counts["rows"], pairs=counts["pairs"], texts=texts, bytes=artifact.bytes)


def pairs_paths(step: Step) -> list[Path]:
    """The `pairs` artifacts that a step works on, its own included."""
    return (
        [step.path]
        if step.stage == "pairs"
        else [path for name, path in step.inputs.items() if name.split("/")[0] == "pairs"]
    )


def num_packings(step: Step, config_of: Callable[[Path], Mapping[str, Any]]) -> int:
    """How often a step packs or writes each pair; `config_of` gives the settings of an input."""
    configs = [config_of(path) for name, path in step.inputs.items() if name.startswith("batches/")]
    return max(int(config.get("num_packings", 1)) for config in [step.config, *configs])


def load_of(step: Step, sizes: Sequence[PairsSize], num_packings: int = 1) -> Load:
    """What `step` has to do on domains of these sizes; the remainders that are mixed are less than a batch of each.

    Work is what seconds grow with, each row times: tokens (vectors); 820 and k centroids, or in two levels 1,370 and
    26√k (clusters: fitted); anchors (hardness); 275,000 and the k centroids a tour chooses from (batches: fitted).
    """
    config = step.config
    rows = sum(size.pairs for size in sizes) * num_packings
    settings: Sequence[Any] = ()
    each: float = 1
    if step.stage == "pairs":
        rows = sum(size.rows for size in sizes)
        settings = sorted({source["format"] for source in step.sources})
    elif step.stage == "vectors":
        rows = sum(size.texts for size in sizes)
        tokens = sum(size.bytes or 0 for size in sizes) / max(1, rows) / _BYTES_PER_TOKEN
        each = max(1, min(tokens, config["max_length_tokens"] or _MAX_TOKENS))
        settings = [config[name] for name in ("name", "device", "dtype", "max_length_tokens")]
    elif step.stage == "clusters":
        k = rows / config["cluster_size"]
        each = 820 + k if k <= config.get("two_level_above", math.inf) else 1_370 + 26 * math.sqrt(k)
        device = config.get("device") or config.get("backend")
        settings = [config["method"], config["cluster_size"], config["iterations"], device]
    elif step.stage == "hardness":
        each = min(rows, config["anchors"])
        settings = [config["anchors"]]
    elif _is_mixed(step):
        rows = (config["batch_size"] - 1) * len(config["domains"]) * num_packings
        settings = ["mixed"]
    elif step.stage == "batches":
        each = 275_000 + rows / num_packings / config["batch_size"] if config["order"] == "tour" else 1
        settings = [config["order"], config["batch_size"], config.get("refine_rounds"), config.get("device")]
    elif step.stage == "shards":
        settings = [config["batch_size"]]
    kind = " ".join(map(str, (step.stage, step.stage_version, *settings)))
    return Load(kind=kind, rows=rows, work=rows * each)


def _is_mixed(step: Step) -> bool:
    return (step.stage, step.domain) == ("batches", MIXED_DOMAIN)


def _typical(step: Step) -> tuple[float, float] | None:
    """Seconds per unit of work and bytes per row on a typical machine, None where there is no figure."""
    config = step.config
    if config.get("device", "cpu") != "cpu":
        return None
    if step.stage == "vectors" and config["name"] == "minilm":
        texts = _MINILM_TEXTS.get(config["dtype"])
        return (1 / (2 * 32 * texts), _MINILM_BYTES) if texts else None
    if _is_mixed(step):
        return _TYPICAL["batches random"]
    setting = {"vectors": "name", "clusters": "method", "batches": "order"}.get(step.stage)
    return _TYPICAL.get(f"{step.stage} {config[setting]}" if setting else step.stage)


def _tells_seconds(item: Measurement, load: Load) -> bool:
    return item.seconds >= _MIN_SECONDS or load.rows <= _REACH * item.rows


def _nearest(items: Sequence[Measurement], load: Load) -> list[Measurement]:
    """The three nearest in rows; of those that are as near the last ones."""
    return sorted(items, key=lambda item: abs(math.log(item.rows / max(1, load.rows))))[:3]


def _is_sound(item: Measurement) -> bool:
    numbers = (item.rows, item.work, item.seconds)
    is_number = all(isinstance(number, int | float) for number in (*numbers, item.bytes))
    return is_number and all(0 < number < _LIMIT for number in numbers) and 0 <= item.bytes < _LIMIT
