"""errors: what a user reads is one printable line for each thing that is wrong."""

from __future__ import annotations

import pickle

import pytest

from hardbatch.pipeline.errors import ConfigError, IntegrityError, printable


def test_each_argument_is_a_line() -> None:
    assert str(ConfigError("one", "two")) == "one\ntwo"


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\nb\r", "a\\nb\\r"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\u202egnp.exe\u200b", "\\u202egnp.exe\\u200b"),
        ("\ud800", "\\ud800"),
        ("é 字 \\n '\"", "é 字 \\n '\""),
    ],
)
def test_what_does_not_print_is_an_escape(raw: str, shown: str) -> None:
    assert printable(raw) == str(ConfigError(raw)) == shown


def test_a_huge_line_is_shortened_in_its_middle() -> None:
    line = printable("a" * 5_000 + "b" * 5_000)
    assert len(line) == 2_003 and line.startswith("aaa") and line.endswith("bbb") and " … " in line


def test_it_goes_from_one_process_to_another() -> None:
    error = pickle.loads(pickle.dumps(IntegrityError("one\n", "two")))  # noqa: S301 -- our own bytes
    assert (type(error), str(error)) == (IntegrityError, "one\\n\ntwo")
