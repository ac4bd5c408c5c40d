"""Checkpoints are complete or absent, and verified; the newest are kept."""

from __future__ import annotations

import json

import pytest
import torch

from hardbatch.pipeline.artifacts.artifact import verify_artifact
from hardbatch.pipeline.errors import ConfigError, IntegrityError
from hardbatch.trainer.checkpoint import (
    TrainState,
    check_resumable,
    find_checkpoint,
    load_optimizer,
    read_state,
    save_checkpoint,
)
from hardbatch.trainer.model import load_encoder
from tests.trainer_models import save_tokenizer, tiny_encoder

SETTINGS = {"learning_rate": 0.1, "seed": 0}


def make_state(step=10, position=None):
    return TrainState(
        step=step,
        position=2 * step if position is None else position,
        warmup_batches=5,
        end_position=100,
        shards_key="abc",
        settings=SETTINGS,
        prompts={"query": "q: ", "document": "d: "},
        pairs=step * 8,
        seconds=1.5,
    )


@pytest.fixture
def saver(tmp_path):
    """`saver(step, keep_last=2)`: saves a trained encoder below tmp_path/run; it has `.encoder` and `.optimizer`."""
    encoder = tiny_encoder("bert", 4)
    files = {path.name: path.read_bytes() for path in save_tokenizer(tmp_path / "tokenizer").iterdir()}

    def save(step=10, keep_last=2):
        take_step(encoder, save.optimizer, seed=step)
        state = make_state(step, save.position)
        return save_checkpoint(save.output, encoder, save.optimizer, state, model_files=files, keep_last=keep_last)

    save.encoder, save.optimizer = encoder, torch.optim.AdamW(encoder.parameters(), lr=0.01)
    save.output, save.position = tmp_path / "run", None
    return save


def take_step(encoder, optimizer, seed=0):
    torch.manual_seed(seed)
    for parameter in encoder.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_everything_comes_back(saver, fused):
    """Also of the fused optimizer, as on CUDA; torch has its kernel for the CPU too."""
    saver.optimizer = torch.optim.AdamW(saver.encoder.parameters(), lr=0.01, fused=fused)
    path = saver(10)
    assert verify_artifact(path) == [] and read_state(path) == make_state(10)
    loaded = load_encoder(path)
    for (name, before), after in zip(saver.encoder.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(before, after), name
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.01, fused=fused)
    load_optimizer(path, loaded, optimizer)
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
    for encoder, stepper in ((saver.encoder, saver.optimizer), (loaded, optimizer)):
        take_step(encoder, stepper)
    for before, after in zip(saver.encoder.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(before, after)  # the next update is the same to the bit


@pytest.mark.parametrize("fused", [False, True])
def test_steps_are_counted_where_the_optimizer_wants_them(saver, fused):
    """A fused one on the device of the parameter, any other one on the CPU; the pretended device is `meta`."""
    path = saver(10)
    moved = load_encoder(path).to("meta")
    optimizer = torch.optim.AdamW(moved.parameters(), lr=0.01)
    for group in optimizer.param_groups:
        group["fused"] = fused
    load_optimizer(path, moved, optimizer)
    for state in optimizer.state.values():
        assert state["exp_avg"].device.type == "meta"
        assert state["step"].device.type == ("meta" if fused else "cpu")


def test_the_newest_are_kept(saver):
    for step in (10, 20, 30):
        saver(step, keep_last=2)
    names = sorted(path.name for path in (saver.output / "checkpoints").iterdir() if not path.name.startswith("."))
    assert names == ["step-00000020", "step-00000030"]
    assert find_checkpoint(saver.output, "auto")[0].name == "step-00000030"


def test_a_half_written_one_is_none(saver):
    saver(10)
    newest = saver(20)
    (newest / "manifest.json").unlink()  # what a kill before the last step leaves
    assert find_checkpoint(saver.output, "auto") == (newest.parent / "step-00000010", [])
    saver(20)
    assert find_checkpoint(saver.output, "auto")[0] == newest and verify_artifact(newest) == []


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_one_is_passed_over_aloud(saver, name):
    before = saver(10)
    path = saver(20)
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    found, told = find_checkpoint(saver.output, "auto")
    assert found == before and any(str(path) in line for line in told)
    with pytest.raises(IntegrityError, match="damaged"):
        find_checkpoint(saver.output, str(path))
    saver(20)  # the same step again repairs it
    assert find_checkpoint(saver.output, "auto") == (path, [])


def test_all_damaged_is_an_error(saver):
    path = saver(10)
    (path / "state.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"every checkpoint in .* is damaged"):
        find_checkpoint(saver.output, "auto")


def test_never_and_named(saver, tmp_path):
    assert find_checkpoint(tmp_path / "empty", "never") == (None, [])
    assert find_checkpoint(tmp_path / "empty", "auto") == (None, [])
    path = saver(10)
    with pytest.raises(ConfigError, match=r"already holds checkpoints up to step-00000010; add --resume auto"):
        find_checkpoint(saver.output, "never")
    assert find_checkpoint(saver.output, str(path)) == (path, [])
    with pytest.raises(ConfigError, match="no checkpoint there"):
        find_checkpoint(saver.output, str(tmp_path / "nowhere"))
    newest = saver(20)
    with pytest.raises(ConfigError, match="another newest checkpoint, step-00000020"):
        find_checkpoint(saver.output, str(path))  # two trainings would mix
    assert find_checkpoint(saver.output, str(newest)) == (newest, [])


def test_the_same_step_of_another_way_is_written_anew(saver):
    """A run that went on with other ranks comes to the same step at another place of the order."""
    path = saver(10)
    before = (path / "model.safetensors").read_bytes()
    saver(10)
    assert (path / "model.safetensors").read_bytes() == before  # that state is saved
    content = json.loads((path / "state.json").read_text())
    saver.position = content["position"] + 1
    saver(10)
    assert read_state(path).position == saver.position and (path / "model.safetensors").read_bytes() != before


def test_other_shards_and_other_settings_are_refused(saver):
    """A setting that an old checkpoint does not know has its default."""
    path = saver(10)
    state = read_state(path)
    for settings in (SETTINGS, {**SETTINGS, "no_context_rate": 0.0}):
        check_resumable(path, state, shards_key="abc", settings=settings)
    with pytest.raises(ConfigError, match="belongs to the shards abc, --shards gives xyz"):
        check_resumable(path, state, shards_key="xyz", settings=SETTINGS)
    for name, value, was in (("learning_rate", 0.2, 0.1), ("no_context_rate", 0.5, 0.0)):
        flag = name.replace("_", "-")
        with pytest.raises(ConfigError, match=f"--{flag} {was} there, {value} here"):
            check_resumable(path, state, shards_key="abc", settings={**SETTINGS, name: value})


def test_a_newer_version_and_a_foreign_state_are_refused(saver):
    path = saver(10)
    content = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**content, "state_version": 9}))
    with pytest.raises(IntegrityError, match="checkpoint of version 9, this hardbatch reads up to 1"):
        read_state(path)
    (path / "state.json").write_text("[]")
    with pytest.raises(IntegrityError, match="not the state of a training"):
        read_state(path)


def test_moments_of_another_model_are_refused(saver):
    path = saver(10)
    other = tiny_encoder("bert", 4, num_layers=3)
    with pytest.raises(IntegrityError, match="does not fit the model"):
        load_optimizer(path, other, torch.optim.AdamW(other.parameters()))
