"""What can go wrong for a user, and the exit code of each.

A message says what was given, where (file, row, field), what is allowed and what to do next. Anything that is
not a `HardbatchError` is a fault of ours and may show a traceback.
"""

from __future__ import annotations


class HardbatchError(Exception):
    """A mistake or a state of the world that the user can mend; never shown with a traceback."""

    exit_code = 1
    may_pass = False  # whether trying again later may help


class ConfigError(HardbatchError):
    """Usage, manifest or setting that is not allowed."""

    exit_code = 2


class InputError(HardbatchError):
    """A source file or a corpus that cannot be used."""

    exit_code = 3


class UnreachableError(InputError):
    """A remote source that does not answer now."""

    may_pass = True


class IntegrityError(HardbatchError):
    """An artifact whose bytes are not those that its manifest promises, or of an unknown format version."""

    exit_code = 4


class LockedError(HardbatchError):
    """Another live process is building the same artifact."""

    exit_code = 5


class NoSpaceError(HardbatchError):
    """The disk or the quota is full."""

    exit_code = 6


class DiskError(HardbatchError):
    """The disk or the network storage failed to read or write."""

    exit_code = 1
    may_pass = True


class QuarantineError(HardbatchError):
    """More rows had to be quarantined than `ingest.max_quarantined_fraction` allows."""

    exit_code = 7
