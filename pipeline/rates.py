"""rates: how long a step will take and how much it will write, estimated from earlier runs in the workspace.

The run logs say how many rows each step had, how many seconds it took and how many bytes it wrote. A new
step of the same kind takes those rows per second and bytes per row; where seconds grow faster than rows, the
stage has a growth exponent.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from hardbatch.pipeline.errors import HardbatchError
from hardbatch.pipeline.runlog import LoggedStep, kind_of, list_logs, read_log
from hardbatch.pipeline.step import Step

Rates = dict[str, dict[str, LoggedStep]]  # kind of step → domain → the last such step that was made

# Seconds grow as rows ** exponent. K-Means compares n points with n / cluster_size centroids, in two
# levels about n · √n products; all other stages are linear.
_GROWTH = {"clusters": 1.5}

_LIMIT = 1e18  # no number in a log that we wrote is this large


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds and bytes of a step to come; None if they are not known."""

    seconds: float | None = None
    bytes: float | None = None


UNKNOWN = Estimate()


def read_rates(workspace: Path) -> Rates:
    """The steps that earlier runs in the workspace made from nothing; of each kind and domain the newest."""
    rates: Rates = defaultdict(dict)
    for path in list_logs(workspace):
        try:
            steps = read_log(path).steps.values()
        except HardbatchError:
            continue  # damaged, or of a newer version: it says nothing to us
        for step in steps:
            from_nothing = not step.failure and not step.units_before
            is_sound = 0 < step.rows < _LIMIT and 0 < step.seconds < _LIMIT and 0 <= step.bytes < _LIMIT
            if step.kind and from_nothing and is_sound:
                rates[step.kind][step.domain] = step
    return rates


def estimate(rates: Rates, step: Step, rows: int | None) -> Estimate:
    """What `step` will take and write, given its rows.

    The same domain tells most, as its texts are alike; failing that, the largest step of the kind.
    """
    known = rates.get(kind_of(step), {})
    if rows is None or not known:
        return UNKNOWN
    like = known.get(step.domain) or max(known.values(), key=lambda made: made.rows)
    growth = _GROWTH.get(step.stage, 1.0)
    return Estimate(seconds=like.seconds * (rows / like.rows) ** growth, bytes=like.bytes / like.rows * rows)
