"""Checkpoints: the whole state of a training in a folder that is complete or absent.

    <output>/checkpoints/step-00000500/
        config.json, model.safetensors, tokenizer files    the model, which `hardbatch.trainer.model.load_encoder` reads
        context.json                                       documents for the default context of an export
        optimizer.safetensors                              AdamW's moments and steps by parameter name
        state.json                                         stream position, schedule, settings, prompts, shards
        manifest.json                                      digests of the above, written last (docs/artifacts.md)

The protocol is that of every artifact: a killed save leaves nothing that passes for a checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hardbatch.pipeline.artifacts.artifact import MANIFEST, verify_artifact
from hardbatch.pipeline.artifacts.commit import open_builder, write_unit
from hardbatch.pipeline.artifacts.faults import fault_point
from hardbatch.pipeline.artifacts.files import as_user_error, user_path
from hardbatch.pipeline.errors import ConfigError, IntegrityError, NoSpaceError
from hardbatch.trainer.config import setting_defaults
from hardbatch.trainer.model import Encoder

STATE_VERSION = 1
_STAGE = "checkpoint"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The position of a training and what it must continue with. Positions count batches (`trainer.order`)."""

    step: int
    position: int
    warmup_batches: int
    end_position: int
    shards_key: str
    settings: dict[str, Any]
    prompts: dict[str, str]
    pairs: int
    seconds: float
    state_version: int = STATE_VERSION


def save_checkpoint(
    output: Path,
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    *,
    model_files: Mapping[str, bytes],
    keep_last: int,
) -> Path:
    """Commits a checkpoint below `output`, then deletes all but the newest `keep_last`.

    Args:
        output: The folder of the training.
        encoder: The model.
        optimizer: Its optimizer.
        state: The position of the training.
        model_files: Tokenizer and context documents, by file name.
        keep_last: How many checkpoints are kept.

    Returns:
        The folder of the checkpoint.

    Raises:
        NoSpaceError: The disk is full. Earlier checkpoints are unchanged.
    """
    path = output / "checkpoints" / f"step-{state.step:08d}"
    try:
        if not _is_saved(path, state):  # absent, incomplete, damaged, or of a run with another history
            _delete(path)
            with open_builder(path) as builder:
                with write_unit(path, _STAGE) as unit:
                    config = json.dumps(encoder.config_dict(), indent=1, sort_keys=True)
                    unit.add_file("config.json").write_text(config, encoding="utf-8")
                    save_file(_contiguous(encoder.state_dict()), unit.add_file("model.safetensors"))
                    save_file(_optimizer_tensors(encoder, optimizer), unit.add_file("optimizer.safetensors"))
                    content = json.dumps(asdict(state), indent=1, sort_keys=True)
                    unit.add_file("state.json").write_text(content, encoding="utf-8")
                    for name, data in model_files.items():
                        unit.add_file(name).write_bytes(data)
                builder.finish(
                    units=[_STAGE],
                    stage=_STAGE,
                    stage_version=STATE_VERSION,
                    domain="",
                    key=path.name,
                    config={},
                    inputs={"shards": state.shards_key},
                )
        fault_point("checkpoint.saved")
        kept = _checkpoint_folders(output)[-keep_last:]
        for old in path.parent.glob("step-*"):
            if old not in kept and old.name < path.name:
                _delete(old)
    except OSError as error:
        raise as_user_error(error) or error from None
    except SafetensorError as error:  # it has no errno
        if "No space left" in str(error) or "os error 28" in str(error):
            raise NoSpaceError(f"no space left while writing {path}; free some and add --resume auto") from None
        raise
    return path


def find_checkpoint(output: Path, resume: str) -> tuple[Path | None, list[str]]:
    """Finds the checkpoint to resume from.

    Args:
        output: The folder of the training.
        resume: "never", "auto" (the newest undamaged checkpoint), or the folder of a checkpoint.

    Returns:
        The checkpoint, or None for a fresh start, and a line for each damaged one that was skipped.

    Raises:
        ConfigError: The answer would mix two trainings in `output`, or the folder is not a checkpoint.
        IntegrityError: The named checkpoint is damaged, or all of them are.
    """
    if resume not in ("never", "auto"):
        path = user_path(resume)
        if not (path / MANIFEST).is_file():
            raise ConfigError(f"--resume {resume}: no checkpoint there (no {MANIFEST}); give auto or its folder")
        faults = verify_artifact(path)
        if faults:
            raise IntegrityError(f"--resume {resume}: damaged", *faults)
        found = _checkpoint_folders(output)
        if found and found[-1].resolve() != path.resolve():
            raise ConfigError(
                f"--resume {resume}: {output} holds another newest checkpoint, {found[-1].name}, and two trainings "
                "would mix; give another --output, or --resume auto"
            )
        return path, []
    found = _checkpoint_folders(output)
    if resume == "never":
        if found:
            raise ConfigError(
                f"--output {output}: already holds checkpoints up to {found[-1].name}; add --resume auto to continue, "
                "or give another folder"
            )
        return None, []
    skipped: list[str] = []
    for path in reversed(found):
        faults = verify_artifact(path)
        if not faults:
            return path, skipped
        skipped.extend(faults)
    if skipped:
        raise IntegrityError(f"--resume auto: every checkpoint in {output} is damaged", *skipped)
    return None, []


def read_state(path: Path) -> TrainState:
    """Reads the state of a checkpoint. Raises IntegrityError if it is damaged or of a newer version."""
    try:
        content = json.loads((path / "state.json").read_bytes())
        version = content["state_version"]
        if version > STATE_VERSION:
            raise IntegrityError(
                f"{path}: checkpoint of version {version}, this hardbatch reads up to {STATE_VERSION}; use a newer one"
            )
        return TrainState(**content)
    except (OSError, ValueError, KeyError, TypeError):
        raise IntegrityError(f"{path / 'state.json'}: not the state of a training, or damaged") from None


def check_resumable(path: Path, state: TrainState, *, shards_key: str, settings: dict[str, Any]) -> None:
    """Raises ConfigError if the checkpoint belongs to other shards or to a training with other settings."""
    if state.shards_key != shards_key:
        raise ConfigError(
            f"{path}: belongs to the shards {state.shards_key}, --shards gives {shards_key}; give those, or start a "
            "new training in another --output with --init-from"
        )
    saved = setting_defaults() | state.settings
    changed = [
        f"{'--' + name.replace('_', '-')} {saved.get(name)} there, {value} here"
        for name, value in settings.items()
        if saved.get(name) != value
    ]
    if changed:
        raise ConfigError(
            f"{path}: belongs to another training ({'; '.join(changed)}); give the same flags, or start a new "
            "training in another --output with --init-from"
        )


def load_optimizer(path: Path, encoder: Encoder, optimizer: torch.optim.Optimizer) -> None:
    """Restores the moments of a checkpoint into `optimizer`. Raises IntegrityError if they do not fit the model."""
    try:
        tensors = load_file(path / "optimizer.safetensors")

        # A fused optimizer counts its steps on the device of the parameter, and any other on the CPU.
        fused = {parameter for group in optimizer.param_groups if group["fused"] for parameter in group["params"]}

        for name, parameter in encoder.named_parameters():
            moments = {key: tensors.pop(f"{name}.{key}") for key in ("exp_avg", "exp_avg_sq", "step")}
            if moments["exp_avg"].shape != parameter.shape:
                raise KeyError(name)
            optimizer.state[parameter] = {
                "step": moments["step"].to(parameter.device) if parameter in fused else moments["step"],
                "exp_avg": moments["exp_avg"].to(parameter.device),
                "exp_avg_sq": moments["exp_avg_sq"].to(parameter.device),
            }
    except (KeyError, OSError, SafetensorError) as error:
        raise IntegrityError(f"{path / 'optimizer.safetensors'}: does not fit the model ({error})") from None


def _is_saved(path: Path, state: TrainState) -> bool:
    return not verify_artifact(path) and replace(read_state(path), seconds=0) == replace(state, seconds=0)


def _optimizer_tensors(encoder: Encoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return _contiguous(
        {
            f"{name}.{key}": value
            for name, parameter in encoder.named_parameters()
            for key, value in optimizer.state[parameter].items()
        }
    )


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _checkpoint_folders(output: Path) -> list[Path]:
    """Complete checkpoints, which are those with a manifest, the oldest first."""
    return sorted(path.parent for path in (output / "checkpoints").glob(f"step-*/{MANIFEST}"))


def _delete(path: Path) -> None:
    (path / MANIFEST).unlink(missing_ok=True)  # without it the folder is not a checkpoint, whatever happens next
    fault_point("checkpoint.disowned")
    shutil.rmtree(path, ignore_errors=True)
    fault_point("checkpoint.emptied")
    (path.parent / f".{path.name}.lock").unlink(missing_ok=True)
