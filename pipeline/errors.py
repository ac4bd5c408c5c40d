"""What can go wrong for a user, and the exit code of each.

A message says what was given, where (file, row, field), what is allowed and what to do next. Anything that is
not a `HardbatchError` is a bug of ours and may show a traceback.
"""

from __future__ import annotations

_LINE_CHARACTERS = 2_000
_FIRST_LINE_CHARACTERS = 200


class HardbatchError(Exception):
    """An error that the user can fix; it is printed without a traceback.

    Each argument is one line. It may quote names and texts of other people's files, so characters that do not
    print, among them line breaks and terminal commands, are shown as escapes.
    """

    exit_code = 1
    is_transient = False  # whether another try later may help

    def __str__(self) -> str:
        return "\n".join(printable(str(line)) for line in self.args)


def printable(line: str) -> str:
    """One line that any terminal can show: what does not print is escaped, and a huge line is shortened."""
    if len(line) > _LINE_CHARACTERS:
        line = f"{line[: _LINE_CHARACTERS // 2]} … {line[-_LINE_CHARACTERS // 2 :]}"
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:_FIRST_LINE_CHARACTERS]


class ConfigError(HardbatchError):
    """A command line, a manifest or a setting that is not allowed."""

    exit_code = 2


class InputError(HardbatchError):
    """A source file or a corpus that cannot be used."""

    exit_code = 3


class UnreachableError(InputError):
    """A remote source that does not answer at the moment."""

    is_transient = True


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
    is_transient = True


class WorkerError(HardbatchError):
    """Worker processes that die over the same unit again and again."""

    exit_code = 1


class QuarantineError(HardbatchError):
    """More rows had to be quarantined than `ingest.max_quarantined_fraction` allows."""

    exit_code = 7


class LeavingError(BaseException):
    """A signal asked the command to end. Not an `Exception`, so that no `except Exception` catches it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
