"""sources.python: pairs from installed packages, read and never imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hardbatch.pipeline.errors import ConfigError, InputError
from hardbatch.pipeline.sources.python import list_modules, read_functions

FUNCTION = '''def area(width, height):
    """Area of a rectangle,
    in its units.

    More of it.
    """
    # what follows is code
    result = width * height

    return result
'''
QUERY = "Area of a rectangle, in its units."
DOCUMENT = """def area(width, height):
    # what follows is code
    result = width * height
    return result"""
Functions = Callable[[bytes | str], list[tuple[int, str, str, None]]]


@pytest.fixture
def functions(tmp_path: Path) -> Functions:
    """`functions(source)`: what is read of a module with this source."""

    def read(source: bytes | str) -> list[tuple[int, str, str, None]]:
        (tmp_path / "module.py").write_bytes(source if isinstance(source, bytes) else source.encode())
        return list(read_functions(tmp_path / "module.py"))

    return read


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package on the path that cannot be imported."""
    names = [
        "__init__.py", "b.py", "a.py", "deep/c.py", "data.txt", "stub.pyi", "tests/test_x.py", "deep/test/y.py",
        "_vendor/z.py", "deep/third_party/v.py", "test_top.py", "conftest.py", "__pycache__/a.py",
    ]  # fmt: skip
    for name in names:
        path = tmp_path / "site" / "hardbatch_example" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FUNCTION if name.endswith("a.py") else "raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return "hardbatch_example"


def test_modules_come_in_order_without_tests_and_vendored_code(package: str) -> None:
    before = set(sys.modules)
    names = [name for name, _ in list_modules(package)]
    assert names == [f"{package}/{name}" for name in ("__init__.py", "a.py", "b.py", "deep/c.py")]
    assert [name for name, _ in list_modules(f"{package}.deep")] == [f"{package}.deep/c.py"]
    assert not any(name.startswith(package) for name in set(sys.modules) - before)


def test_a_package_is_read_without_being_imported(package: str) -> None:
    pairs = [pair for _, path in list_modules(package) for pair in read_functions(path)]
    assert pairs == [(1, QUERY, DOCUMENT)]
    assert package not in sys.modules


@pytest.mark.parametrize("name", ["no_such_package_here", "class"])
def test_a_package_that_is_not_installed_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"source 'python:{name}': no package '{name}' is installed here"):
        list_modules(name)


@pytest.mark.parametrize("name", ["", "a b", "a-b", "../a", "a..b", ".a", "a/b", "numpy."])
def test_what_is_not_the_name_of_a_package_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="give the import name of a package"):
        list_modules(name)


@pytest.mark.parametrize("name", ["sys", "math", "this", "json.no_such_part"])
def test_a_module_without_a_folder_of_source_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"python:{name}.*no Python source found"):
        list_modules(name)


def test_a_loaded_module_without_a_spec_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    with pytest.raises(ConfigError):
        list_modules("__main__")


def test_the_query_is_the_first_paragraph_and_the_document_has_no_docstring(functions: Functions) -> None:
    assert functions(FUNCTION) == [(1, QUERY, DOCUMENT)]


def test_methods_and_coroutines_are_read_and_moved_to_the_left(functions: Functions) -> None:
    body = "".join(f"    {line}\n" for line in FUNCTION.splitlines())
    assert functions("class A:\n    @property\n" + body) == [(3, QUERY, DOCUMENT)]
    assert functions("class A:\n" + body.replace("def", "async def"))[0][2] == "async " + DOCUMENT


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    x = 1\n    y = 2\n    return x\n",  # no docstring
        'def f():\n    """Only a docstring, no code."""\n',
        'def f():\n    """Too short a stub."""\n    return 1\n',
        'def f():\n    """Short."""\n    x = 1\n    y = 2\n    return x\n',
        "def f(:\n",
        "x = 1\0\n" + FUNCTION,
        b"# \xff\n" + FUNCTION.encode(),
        "x = " + "(" * 150 + ")" * 150 + "\n",
    ],
)
def test_what_is_not_a_pair_is_left_out(functions: Functions, source: str | bytes) -> None:
    assert functions(source) == []


def test_a_module_too_deep_for_the_parser_is_left_out(functions: Functions) -> None:
    assert functions("x = " + "-" * 100_000 + "1\n" + FUNCTION) == []


def test_line_endings_do_not_matter(functions: Functions) -> None:
    assert functions(FUNCTION.replace("\n", "\r\n")) == [(1, QUERY, DOCUMENT)]


@pytest.mark.parametrize("char", ["\f", "\x0b", "\x1c", "\x85", "\u2028"])
def test_lines_are_counted_as_the_parser_does(functions: Functions, char: str) -> None:
    comment = f"# a{char}b\n"
    assert functions(comment + FUNCTION) == [(2, QUERY, DOCUMENT)]


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", "# -*- coding: latin-1 -*-\n# \xe9\n".encode("latin-1")])
def test_declared_encodings_are_read(functions: Functions, start: bytes) -> None:
    assert [pair[1:3] for pair in functions(start + FUNCTION.encode())] == [(QUERY, DOCUMENT)]


def test_code_behind_the_docstring_is_kept(functions: Functions) -> None:
    source = 'def f(a):\n    """Docstring of the function."""; b = a\n    c = b\n    d = c\n    return d\n'
    assert "b = a" in functions(source)[0][2]
