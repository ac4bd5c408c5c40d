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
        context_size: Documents that the contextual model reads; 0: a biencoder.
        groups: Another method that makes the groups; see groups.py.
        positives: Which documents a query learns to find: its own, or all `same-answer` ones of the batch.
        later: Settings of the second half of the training, where they differ from `settings`.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    masks: str = "written"
    flags: tuple[str, ...] = ()
    context_size: int = 0
    groups: str = ""
    positives: str = "own"
    later: dict[str, Any] = field(default_factory=dict)


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


def written(size: int, group: int, **settings: Any) -> Arm:
    """An arm with the masks that the pipeline writes; further settings are those of `write`."""
    words = [f"{name} {value}" for name, value in settings.items()]
    pack = {"pack.batch_size": size, "pack.group_size": group, "pack.num_packings": NUM_PACKINGS}
    return Arm(
        name=", ".join([f"B = {size}", f"K = {group}", *words]),
        settings=pack | {f"write.{name}": value for name, value in settings.items()},
    )


def _by(method: str, group: int) -> Arm:
    arm = written(256, group)
    return replace(arm, name=f"{arm.name}, by {method}", groups=method)


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
    "size": [
        written(size, group)
        for size, group in ((512, 1), (64, 1), (64, 8), (64, 64), (256, 1), (256, 8), (512, 8), (1024, 1), (1024, 8))
    ],
    # Groups by another method, at its own settings and without skipping ranks.
    "groups": [written(256, 1)]
    + [
        arm
        for group in (8, 32, 256)
        for arm in (written(256, group), *(_by(method, group) for method in ("b3", "b3-from-0", "paper")))
    ],
    # What else may matter: groups that are not refined, batches over domains, all same answers as positives, and
    # hard batches after random ones.
    "others": [
        written(256, 1),
        written(256, 8),
        written(256, 256),
        *(
            replace(written(256, group), name=f"B = 256, K = {group}, not refined", settings=unrefined.settings)
            for group in (8, 256)
            for unrefined in [_arm(256, group, "written", refine_rounds=0)]
        ),
        *(_arm(256, group, "written", compose="corpus") for group in (1, 8)),
        *(
            replace(
                written(256, group), name=f"B = 256, K = {group}, same answers as positives", positives="same-answer"
            )
            for group in (1, 8)
        ),
        *(
            replace(written(256, 1), name=f"B = 256, K = 1 and then {group}", later={"pack.group_size": group})
            for group in (8, 64, 256)
        ),
        replace(written(256, 256), name="B = 256, K = 256 and then 1", later={"pack.group_size": 1}),
        *(_arm(256, 8, "written", num_packings=number) for number in (1, 2)),
    ],
    # Does more training change the order? With --pairs.
    "compute": [written(256, group) for group in (1, 8, 64)],
    # For models that take minutes.
    "few": [
        written(64, 1),
        written(64, 8),
        written(64, 8, likely_rule="symmetric"),
        written(64, 32),
        written(64, 64),
    ],
    # The contextual model beside the biencoder, on the same batches.
    "contextual": [
        arm
        for group in (8, 64)
        for arm in (
            written(64, group),
            replace(written(64, group), name=f"B = 64, K = {group}, contextual", context_size=24),
        )
    ],
}
