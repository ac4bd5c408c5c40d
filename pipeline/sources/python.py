"""Docstring→code pairs from the Python packages installed on this machine: real text that needs no download.

The query is the first paragraph of a function's docstring, the document its source without the docstring. Tests,
vendored folders and stubs of fewer than 3 lines are left out. Files are parsed, never imported.
"""

from __future__ import annotations

import ast
import importlib.util
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from hardbatch.pipeline.errors import ConfigError, InputError

_SKIPPED_FOLDERS = {
    "test", "tests", "testing", "__pycache__", "third_party", "thirdparty",
    "_vendor", "_vendored", "vendor", "vendored", "extern", "external", "_external", "externals", "_externals",
}  # fmt: skip
_MIN_LINES = 3
_MIN_QUERY_CHARACTERS = 10


def list_modules(package: str) -> list[tuple[str, Path]]:
    """Lists the modules of an installed package, without importing it.

    Args:
        package: Its import name, or that of a part of it, for example `numpy` or `torch.nn`.

    Returns:
        (name, path) of each module, in order of path.

    Raises:
        ConfigError: The package is not installed.
        InputError: It has no Python source.
    """
    if not all(part.isidentifier() for part in package.split(".")):
        raise ConfigError(f"source 'python:{package}': give the import name of a package, for example python:numpy")
    top, *rest = package.split(".")
    try:
        spec = importlib.util.find_spec(top)  # finds a top-level package without importing it
    except ValueError:  # a module that was not imported from a file, such as __main__
        spec = None
    if spec is None:
        raise ConfigError(f"source 'python:{package}': no package '{top}' is installed here; pip install it")
    roots = [Path(root).joinpath(*rest) for root in spec.submodule_search_locations or []]
    modules = [
        (f"{package}/{path.relative_to(root).as_posix()}", path)
        for root in sorted(root for root in roots if root.is_dir())
        for path in list_files(root)
    ]
    if not modules:
        raise InputError(f"source 'python:{package}': no Python source found; it must be a package, not a module")
    return modules


def list_files(root: Path) -> list[Path]:
    """The Python files below a folder, in order of path, without tests and vendored packages."""
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1])
        and not path.name.startswith(("test_", "conftest"))
    ]


def read_functions(path: Path) -> Iterator[tuple[int, str, str]]:
    """Reads (line, query, document) of each function of a module that has a docstring.

    Raises:
        InputError: The file cannot be read. One that cannot be parsed has no functions.
    """
    try:
        with tokenize.open(path) as file:  # respects a coding line and a byte order mark
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes, which our user cannot fix
            tree = ast.parse(source)
    except OSError as error:
        raise InputError(f"{path}: cannot be read any more: {error.strerror}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # a template, or a module for another version of Python

    lines = source.split("\n")  # as `ast` counts them: a form feed does not end a line
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring is None or len(node.body) < 2:
                continue
            query = " ".join(docstring.split("\n\n")[0].split())
            document = _source_without_docstring(node, lines)
            if len(query) >= _MIN_QUERY_CHARACTERS and document.count("\n") + 1 >= _MIN_LINES:
                yield node.lineno, query, document


def _source_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    docstring = node.body[0]
    assert docstring.end_lineno is not None, "nodes of a parsed module know where they end"

    # Code may follow the docstring on its last line. Columns of nodes count bytes, not characters.
    behind = lines[docstring.end_lineno - 1].encode()[docstring.end_col_offset :].decode().lstrip(" ;")  # `; b = a`
    indented = [" " * docstring.col_offset + behind] if behind and not behind.startswith("#") else []
    kept = lines[node.lineno - 1 : docstring.lineno - 1] + indented + lines[docstring.end_lineno : node.end_lineno]
    return "\n".join(
        line[node.col_offset :] if line[: node.col_offset].isspace() else line for line in kept if line.strip()
    )
