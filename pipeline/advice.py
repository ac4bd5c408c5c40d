"""What to do about the mistakes that people make most often in a manifest or on the command line.

Each function returns the end of a message, which begins with `; ` or is empty.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DATA_SUFFIXES = frozenset(
    {".parquet", ".pq", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".bz2", ".xz"}
)
_EXAMPLE = "data_manifests/local_example.toml is an example to copy"
_ALIASES = {  # what other tools call a key of ours
    "source": (
        "path", "paths", "file", "files", "filename", "data", "data_file", "data_files", "data_path", "data_dir",
        "dataset", "folder", "input", "location", "repo", "sources", "uri", "url",
    ),
    "name": ("id", "title", "domain", "dataset_name"),
    "limit": ("head", "max_examples", "max_pairs", "max_rows", "max_samples", "n_rows", "nrows", "num_rows", "rows"),
    "columns": ("column", "column_names", "fields", "mapping"),
    "extra_columns": (
        "carry", "carry_columns", "extra", "extra_fields", "features", "keep", "keep_columns",
        "metadata", "passthrough", "score", "scores",
    ),
    "format": ("file_format", "file_type", "loader", "type"),
    "corpus": ("name", "corpus_name", "title"),
    "dataset": ("data", "datasets", "domains", "sources", "train"),
}  # fmt: skip


_CURLY_QUOTES = "“”„‘’"


def advice_on_key(key: str, allowed: Sequence[str], settings: Sequence[str]) -> str:
    """Suggests what an unknown key was meant to be.

    Args:
        key: The key as given.
        allowed: The keys of its table.
        settings: All settings of a manifest as dotted names, for example `pack.batch_size`.
    """
    key = key.replace("-", "_")
    aliases = [name for name in allowed if key in _ALIASES.get(name, ())]
    elsewhere = [name for name in settings if "." in name and name.rpartition(".")[2] == key]
    close = difflib.get_close_matches(key, allowed, n=1)
    meant = ([key] if key in allowed else []) or aliases[:1] or elsewhere or close
    return f"; did you mean {' or '.join(map(repr, meant))}?" if meant else ""


def advice_on_value(location: Sequence[str | int], kind: str, given: Any) -> str:
    """Says how to write a value that has the wrong type.

    Args:
        location: Where it is in the manifest.
        kind: What pydantic calls the mistake.
        given: The value.
    """
    key = str(location[-1]) if location else ""
    if key == "dataset" and kind == "list_type" and isinstance(given, Mapping):
        return "; every dataset begins with a line [[dataset]], in double brackets"
    if kind == "model_type" and key == "columns":
        return '; write columns = { query = "the query column", document = "the document column" }'
    if kind == "model_type" and isinstance(given, list) and all(isinstance(item, Mapping) for item in given):
        return f"; write [{key}] in single brackets"
    if kind == "model_type" and location[:1] == ("dataset",):
        return "; every dataset begins with a line [[dataset]], followed by its name and source"
    if kind == "model_type":
        return f"; write its settings below a line [{key}]"
    if (isinstance(given, str) and given.endswith("%")) or (kind == "less_than" and key == "holdout"):
        return "; write a fraction, for example 0.1"
    if isinstance(given, str) and kind in ("int_type", "float_type", "bool_type"):
        return "; write it without quotes"
    if isinstance(given, int | float) and kind == "string_type":
        return "; write it in quotes"
    return ""


def advice_on_toml(text: str, error: str) -> str:
    """Quotes the line that is not TOML, and says how to write what was probably meant.

    Args:
        text: The manifest.
        error: What the parser says, which names the line.
    """
    found = re.search(r"at line (\d+)", error)
    lines = text.replace("\r\n", "\n").split("\n")
    line = lines[min(int(found[1]), len(lines)) - 1].strip() if found else lines[-1]
    key, equals, value = (part.strip() for part in line.partition("="))
    quoted = f"; the line is {line[:80]!a}" if found and line else ""
    if text.lstrip().startswith("{"):
        return f": this looks like JSON, but a manifest is TOML; {_EXAMPLE}"
    if re.match(r"(- )?[\w.-]+:(\s|$)", line):
        return f"{quoted}: this looks like YAML, but a manifest is TOML, with = instead of a colon; {_EXAMPLE}"
    if "\\" in line and '"' in line:
        return f"{quoted}: a backslash in double quotes begins an escape; write paths with /"
    if equals and value[:1] in tuple(_CURLY_QUOTES):
        return f'{quoted}: write text in straight quotes, "'
    if equals and value.rstrip(",") in ("True", "False"):
        return f"{quoted}: write true and false in lower case"
    if equals and value in ("None", "null", "nil", ""):
        return f"{quoted}: leave the key out to get its default"
    if equals and re.match(r"[A-Za-z_./~*]", value) and "\n" not in value:
        return f"{quoted}: write text in quotes: {key} = {json.dumps(value)[:80]}"
    return quoted


def advice_on_override(given: str, following: Sequence[str]) -> str:
    """Says how to write an override that the shell has cut at its blanks, for example `--set pack.seed 7`.

    Args:
        given: What came after `--set`.
        following: The words of the command line after that.
    """
    text = given
    for word in following:
        if word.startswith("-") or ("=" in text and not text.endswith("=")):
            break
        text += word if "=" in text or word.startswith("=") else f"={word}"
    name, equals, value = text.partition("=")
    return f"; write --set {name}={value}, without blanks" if equals and value and text != given else ""


def is_data_file(path: Path) -> bool:
    """Whether a file that is given as a manifest holds data, going by its name."""
    return path.suffix.lower() in DATA_SUFFIXES
