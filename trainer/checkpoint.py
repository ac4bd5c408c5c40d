"""Checkpoints: a training's whole state in a folder that is complete or not there.

    <output>/checkpoints/step-00000500/
        config.json, model.safetensors, tokenizer files    the model, readable by `hardbatch.trainer.model.load_encoder`
        optimizer.safetensors                              AdamW's moments and steps by parameter name
        state.json                                         stream position, schedule, settings, prompts, shards
        manifest.json                                      digests of the above, written last (docs/artifacts.md)

The protocol is that of every artifact: a killed save leaves nothing that looks like a checkpoint.
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
from hardbatch.pipeline.artifacts.files import as_user_error
from hardbatch.pipeline.errors import ConfigError, IntegrityError, NoSpaceError
from hardbatch.trainer.config import setting_defaults
from hardbatch.trainer.model import Encoder

STATE_VERSION = 1
_STAGE = "checkpoint"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a training is, and what it must go on with. Positions and batches count the stream (`trainer.order`)."""

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
    tokenizer_files: Mapping[str, bytes],
    keep_last: int,
) -> Path:
    """Commits a checkpoint below `output`, then deletes all but the newest `keep_last`. Returns its folder.

    Raises NoSpaceError where the disk is full; what was there before stays whole.
    """
    path = output / "checkpoints" / f"step-{state.step:08d}"
    try:
        if not _is_saved(path, state):  # absent, unfinished, damaged, or of a run that went on from elsewhere
            _delete(path)
            with open_builder(path) as builder:
                with write_unit(path, _STAGE) as unit:
                    config = json.dumps(encoder.config_dict(), indent=1, sort_keys=True)
                    unit.add_file("config.json").write_text(config, encoding="utf-8")
                    save_file(_contiguous(encoder.state_dict()), unit.add_file("model.safetensors"))
                    save_file(_optimizer_tensors(encoder, optimizer), unit.add_file("optimizer.safetensors"))
                    told = json.dumps(asdict(state), indent=1, sort_keys=True)
                    unit.add_file("state.json").write_text(told, encoding="utf-8")
                    for name, content in tokenizer_files.items():
                        unit.add_file(name).write_bytes(content)
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
    except SafetensorError as error:  # has no errno
        if "No space left" in str(error) or "os error 28" in str(error):
            raise NoSpaceError(f"no space left while writing {path}; free some and add --resume auto") from None
        raise
    return path


def find_checkpoint(output: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, None for a fresh start, and a line for each damaged one that was passed over.

    `resume` is never, auto or a folder. Raises ConfigError where checkpoints are there and `never` would mix two
    trainings, IntegrityError where all are damaged or the one named is.
    """
    if resume not in ("never", "auto"):
        path = Path(resume)
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
                f"--output {output}: already holds checkpoints up to {found[-1].name}; add --resume auto to go on from "
                "there, or give another folder"
            )
        return None, []
    passed_over: list[str] = []
    for path in reversed(found):
        faults = verify_artifact(path)
        if not faults:
            return path, passed_over
        passed_over.extend(faults)
    if passed_over:
        raise IntegrityError(f"--resume auto: every checkpoint in {output} is damaged", *passed_over)
    return None, []


def read_state(path: Path) -> TrainState:
    """The state of the checkpoint at `path`. Raises IntegrityError where it cannot be read or is of a newer version."""
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
    """Raises ConfigError where the checkpoint belongs to other shards or to a training with other settings."""
    if state.shards_key != shards_key:
        raise ConfigError(
            f"{path}: belongs to the shards {state.shards_key}, --shards gives {shards_key}; give those, or start anew "
            "in another --output with --init-from"
        )
    saved = setting_defaults() | state.settings
    changed = [
        f"{'--' + name.replace('_', '-')} {saved.get(name)} there, {value} here"
        for name, value in settings.items()
        if saved.get(name) != value
    ]
    if changed:
        raise ConfigError(
            f"{path}: belongs to another training ({'; '.join(changed)}); give the same flags, or start anew in "
            "another --output with --init-from"
        )


def load_optimizer(path: Path, encoder: Encoder, optimizer: torch.optim.Optimizer) -> None:
    """Gives `optimizer` the moments of the checkpoint at `path`. Raises IntegrityError where they do not fit."""
    try:
        tensors = load_file(path / "optimizer.safetensors")

        # A fused optimizer counts its steps on the parameter's device, any other one on the CPU.
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
    """Complete checkpoints (those with a manifest), the oldest first."""
    return sorted(path.parent for path in (output / "checkpoints").glob(f"step-*/{MANIFEST}"))


def _delete(path: Path) -> None:
    (path / MANIFEST).unlink(missing_ok=True)  # from here on it is no checkpoint, whatever happens
    fault_point("checkpoint.disowned")
    shutil.rmtree(path, ignore_errors=True)
    fault_point("checkpoint.emptied")
    (path.parent / f".{path.name}.lock").unlink(missing_ok=True)
