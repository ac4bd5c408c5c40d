"""What is compared: families of models, and the arms of each grid, which differ in one thing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from corpus import Sample

DOMAINS = (
    "code_python",
    "dictionary_wordnet",
    "factbook",
    "intents_clinc",
    "law_dc",
    "medical",
    "movies_wiki",
    "reddit",
    "science_acl",
    "shell_tldr",
    "stackexchange",
)
TUNING_DOMAIN = "techdocs"  # where learning rates and temperatures are chosen, and nothing else is measured

SAMPLE = Sample(domains=DOMAINS, num_pairs=5_000, max_length_tokens=48)
TUNING_SAMPLE = Sample(domains=(TUNING_DOMAIN,), num_pairs=5_000, max_length_tokens=48)

_SMALLER = ("squad_dev", "covid_qa", "code_networkx")


def one_domain(domain: str) -> Sample:
    """What a user has who fine-tunes a good model on texts of one kind."""
    return Sample(domains=(domain,), num_pairs=5_000, max_length_tokens=48, holdout=0.15, out_of_domain=_SMALLER)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to make batches, to mask them, and to learn from them.

    Attributes:
        name: How tables name it.
        settings: Of the pipeline, such as `pack.batch_size`.
        masks: The rule of masking; see masks.py.
        flags: Of the trainer, for families that it trains.
        b3: The ranks that B3 skips and those that it takes, if it makes the groups; see b3.py.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    masks: str = "written"
    flags: tuple[str, ...] = ()
    b3: tuple[int, int] | None = None


NUM_PACKINGS = 4
SYMMETRIC = "symmetric floor=0.5 cap=0.25"
RULES = (
    "none",
    "same-answer",
    "one-sided",
    "one-sided margin=0.1",
    "one-sided margin=0.05",
    "one-sided margin=-0.05",
    "one-sided margin=-0.1",
    "one-sided floor=0.5",
    "one-sided floor=0.5 cap=0.25",
    "transposed",
    "either",
    "symmetric",
    "symmetric margin=0.05",
    SYMMETRIC,
)


def _arm(size: int, group: int, masks: str, **settings: Any) -> Arm:
    """An arm with batches of `size` pairs in groups of `group`; further settings are those of `pack`."""
    words = [f"{name} {value}" for name, value in settings.items()]
    pack = {"batch_size": size, "group_size": group, "num_packings": NUM_PACKINGS, **settings}
    return Arm(
        name=", ".join([f"B = {size}", f"K = {group}", masks, *words]),
        settings={f"pack.{name}": value for name, value in pack.items()},
        masks=masks,
    )


def _written(size: int, group: int, **settings: Any) -> Arm:
    """An arm with the masks that the pipeline writes; further settings are those of `write`."""
    words = [f"{name} {value}" for name, value in settings.items()]
    pack = {"pack.batch_size": size, "pack.group_size": group, "pack.num_packings": NUM_PACKINGS}
    return Arm(
        name=", ".join([f"B = {size}", f"K = {group}", *words]),
        settings=pack | {f"write.{name}": value for name, value in settings.items()},
    )


def _b3(group: int, skip: int, num_neighbours: int) -> Arm:
    arm = _arm(256, group, "one-sided")
    return replace(arm, name=f"{arm.name}, B3 from rank {skip} on", b3=(skip, num_neighbours))


TUNED = [_arm(256, group, "one-sided") for group in (1, 256)]
GRIDS: dict[str, list[Arm]] = {
    # Which documents are no negatives, in random and in the hardest batches.
    "masks": [_arm(256, group, rule) for group in (1, 256) for rule in RULES],
    # How many alike pairs stand together.
    "dial": [_arm(256, group, rule) for rule in ("one-sided", SYMMETRIC) for group in (1, 4, 8, 16, 32, 64, 128, 256)],
    # Pairs left out whose own document ranks beyond a rank.
    "weak": [_arm(256, 256, "one-sided")]
    + [_arm(256, 256, "one-sided", weak_pair_rank=rank) for rank in (10, 30, 100, 300)],
    # Batch sizes at equal pairs.
    "size": [_arm(size, group, "one-sided") for size, group in ((64, 1), (64, 8), (256, 1), (256, 8), (1024, 1))],
    # Groups by another method, at its own settings and without skipping ranks.
    "b3": [_arm(256, group, "one-sided") for group in (8, 32)]
    + [_b3(group, skip, 100) for group in (8, 32) for skip in (30, 0)],
    # For models that take minutes.
    "few": [
        _written(64, 1),
        _written(64, 8),
        _written(64, 8, likely_rule="one-sided"),
        _written(64, 64),
    ],
}
