"""Resolves a model before a key is made: its folder, the digest of its files, and every "auto" setting.

Only safetensors are loaded. Code of a model's repository runs only if it is asked for, at a full commit.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path

from hardbatch.pipeline.artifacts.files import DigestCache, content_key
from hardbatch.pipeline.config import EmbedConfig
from hardbatch.pipeline.errors import ConfigError
from hardbatch.pipeline.models.locate import locate_model, require_safetensors

LEXICAL_FEATURES = 2**16
_TOKEN_BUDGET = {"cpu": 2_048, "mps": 8_192, "cuda": 65_536}
_FULL_COMMIT_LENGTH = 40
_OWN_MODULES = "sentence_transformers."


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model with every "auto" setting resolved.

    Its vectors depend on all fields but two, which describe this machine: `location`, the folder of the model, and
    `runs_on`, its device with the number, for example `cuda:1`. `device` is only the type, since all GPUs give the
    same vectors.
    """

    name: str
    revision: str | None
    weights_sha256: str
    query_prompt: str
    document_prompt: str
    max_length_tokens: int | None
    device: str
    dtype: str
    token_budget: int
    trust_remote_code: bool
    location: str
    runs_on: str


def resolve_model(config: EmbedConfig, role: str, root: Path, digests: DigestCache) -> ModelSpec:
    """Resolves the model of a role.

    Args:
        config: The settings of embedding.
        role: `cluster` or `surrogate`.
        root: The folder that a relative folder of a model may start from.
        digests: Digests of local files; new ones are added.

    Raises:
        ConfigError: The model is unknown, has no safetensors, or needs remote code that is not allowed or not pinned.
    """
    surrogate = role == "surrogate"
    name = config.surrogate_model if surrogate else config.model
    revision = config.surrogate_revision if surrogate else config.revision
    query_prompt = config.surrogate_query_prompt if surrogate else config.query_prompt
    document_prompt = config.surrogate_document_prompt if surrogate else config.document_prompt
    if surrogate and "nomic-embed" in name:
        query_prompt = "search_query: " if query_prompt is None else query_prompt
        document_prompt = "search_document: " if document_prompt is None else document_prompt

    shared = {"query_prompt": query_prompt or "", "document_prompt": document_prompt or ""}
    if name == "lexical":
        version = importlib.metadata.version("scikit-learn")
        return ModelSpec(
            name=name,
            revision=None,
            weights_sha256=content_key(lexical=1, features=LEXICAL_FEATURES, scikit_learn=version),
            max_length_tokens=None,
            device="cpu",
            dtype="float32",
            token_budget=0,
            trust_remote_code=False,
            location="",
            runs_on="cpu",
            **shared,
        )

    # On the hub a branch or tag may point to other code tomorrow. Folders and packages have no revision.
    pinned = bool(revision and _is_full_commit(revision))
    name, location, revision = locate_model(name, revision, root)
    require_safetensors(name, location)
    if config.trust_remote_code and revision is not None and not pinned:
        field = "surrogate_revision" if surrogate else "revision"
        raise ConfigError(
            f"embed.trust_remote_code: code of '{name}' is run only at a full commit; "
            f"set embed.{field} to its {_FULL_COMMIT_LENGTH} hex digits"
        )
    if config.trust_remote_code:
        _refuse_code_elsewhere(name, location)
    else:
        _refuse_own_code(name, location)

    runs_on = _resolve_device(config.device)
    device = runs_on.split(":")[0]
    return ModelSpec(
        name=name,
        revision=revision,
        weights_sha256=_digest_of_model(location, digests),
        max_length_tokens=config.max_length_tokens,
        device=device,
        dtype=_resolve_dtype(config.dtype, device),
        token_budget=config.token_budget or _TOKEN_BUDGET[device],
        trust_remote_code=config.trust_remote_code,
        location=str(location),
        runs_on=runs_on,
        **shared,
    )


def _is_full_commit(revision: str) -> bool:
    return len(revision) == _FULL_COMMIT_LENGTH and all(char in "0123456789abcdef" for char in revision)


def _refuse_own_code(name: str, location: Path) -> None:
    """Refuses a model with a module that is not from sentence-transformers: loading it would run the code it names."""
    try:
        modules = json.loads((location / "modules.json").read_bytes())
        foreign = [str(module["type"]) for module in modules if not str(module["type"]).startswith(_OWN_MODULES)]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"model '{name}' cannot be loaded: {location / 'modules.json'} is damaged") from None
    if foreign:
        raise ConfigError(
            f"model '{name}' runs code that is not from sentence-transformers ({foreign[0]}); read it, and set "
            "embed.trust_remote_code if you trust it, or take another model"
        )


def _refuse_code_elsewhere(name: str, location: Path) -> None:
    """Refuses a model that takes code from another repository, which a commit of its own does not pin."""
    for path in location.rglob("*.json"):
        try:
            classes = json.loads(path.read_bytes()).get("auto_map") or {}
            elsewhere = [str(target) for target in classes.values() if "--" in str(target)]
        except (ValueError, AttributeError, RecursionError):
            continue
        if elsewhere:
            raise ConfigError(
                f"embed.trust_remote_code: '{name}' takes code from another repository ({elsewhere[0]}), which is not "
                "pinned; leave it off where transformers knows the model (nomic_bert is), or use a copy with its code"
            )


def _digest_of_model(location: Path, digests: DigestCache) -> str:
    files = sorted(
        path for path in location.rglob("*") if path.suffix in (".json", ".txt", ".model", ".safetensors", ".py")
    )
    return content_key(**{path.relative_to(location).as_posix(): digests.digest(path) for path in files})


def _resolve_device(device: str) -> str:
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"embed.device: '{device}' was requested, but no CUDA device can be used here; use auto or cpu"
        )
    return device


def _resolve_dtype(dtype: str, device: str) -> str:
    import torch

    if dtype != "auto":
        return dtype
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bfloat16"
    return "float32"
