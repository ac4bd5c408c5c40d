"""From the name of a backbone to an encoder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModel

from hardbatch.pipeline.errors import ConfigError
from hardbatch.trainer.backbone import build_encoder, find_backbone, initial_encoder
from hardbatch.trainer.config import parse_flags
from hardbatch.trainer.model import BACKBONE_TYPES
from tests.trainer_models import tiny_backbone


def settings(*flags):
    return parse_flags(["--shards", "S", "--output", "O", "--max-length", "24", *flags])


@pytest.mark.parametrize("model_type", BACKBONE_TYPES)
def test_pretrained_weights_go_into_both_stages(tmp_path, model_type):
    folder = tiny_backbone(tmp_path / "backbone", model_type)
    encoder = build_encoder(settings("--context-size", "5"), folder)
    saved = AutoModel.from_pretrained(folder).state_dict()
    for stage in (encoder.first_stage_model, encoder.second_stage_model):
        found = stage.backbone.state_dict()
        assert found.keys() <= saved.keys() and len(found) > 10
        assert all(torch.equal(found[name], saved[name]) for name in found)
    first, second = encoder.first_stage_model.backbone, encoder.second_stage_model.backbone
    assert first.get_input_embeddings().weight.data_ptr() != second.get_input_embeddings().weight.data_ptr()
    assert encoder.config.context_size == 5 and encoder.config.max_length_tokens == 24


@pytest.mark.parametrize("model_type", BACKBONE_TYPES)
def test_the_first_layers_alone(tmp_path, model_type):
    folder = tiny_backbone(tmp_path / "backbone", model_type, num_layers=3)
    encoder = build_encoder(settings("--num-layers", "2", "--architecture", "biencoder"), folder)
    assert encoder.first_stage_model is None and encoder.backbone_config.num_hidden_layers == 2
    found, saved = encoder.second_stage_model.backbone.state_dict(), AutoModel.from_pretrained(folder).state_dict()
    assert len(found) < len(saved) and all(torch.equal(found[name], saved[name]) for name in found)
    ids = torch.randint(5, 100, (2, 6))
    encoder.second_stage_model(ids, torch.ones_like(ids), torch.ones_like(ids))


def test_random_weights_come_from_the_seed(tmp_path):
    folder = tiny_backbone(tmp_path / "backbone")
    (folder / "model.safetensors").unlink()
    weights = [
        build_encoder(settings("--random-weights", "--seed", seed), folder).state_dict() for seed in ("1", "1", "2")
    ]
    name = "second_stage_model.backbone.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(weights[0][name], weights[1][name]) and not torch.equal(weights[0][name], weights[2][name])
    assert not torch.equal(weights[0][name], weights[0][name.replace("second", "first")])
    with pytest.raises(ConfigError, match=r"no \.safetensors weights"):
        build_encoder(settings(), folder)


@pytest.mark.parametrize("model_type", BACKBONE_TYPES)
def test_dropout_is_set_everywhere(tmp_path, model_type):
    folder = tiny_backbone(tmp_path / "backbone", model_type)
    encoder = build_encoder(settings("--dropout", "0.25"), folder)
    rates = {module.p for module in encoder.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.25}
    ids = torch.randint(5, 100, (2, 6))
    mask = torch.ones_like(ids)
    encoder.train()
    assert not torch.equal(*(encoder.second_stage_model(ids, mask, mask) for _ in range(2)))


def test_what_cannot_be_a_backbone(tmp_path):
    folder = tiny_backbone(tmp_path / "backbone")
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    other = shutil.copytree(folder, tmp_path / "other")
    content = json.loads((folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**content, "model_type": "roberta"}))
    partial = shutil.copytree(folder, tmp_path / "partial")
    (partial / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 5}))
    cases = [
        (lambda: find_backbone("lexical"), "lexical has no weights to train"),
        (lambda: find_backbone("no/such/model@abc"), "unknown model 'no/such/model'"),
        (lambda: find_backbone(str(tmp_path)), "has no config.json"),
        (lambda: build_encoder(settings(), broken), "cannot be read"),
        (
            lambda: build_encoder(settings(), other),
            "type 'roberta' is not supported; supported: bert, modernbert, nomic_bert",
        ),
        (lambda: build_encoder(settings(), partial), "lacks 48 of its weights"),
        (lambda: build_encoder(settings("--num-layers", "3"), folder), "has 2 layers"),
        (lambda: build_encoder(settings("--max-length", "129"), folder), "reads at most 128 tokens"),
        (lambda: initial_encoder(settings(), folder, flag="--init-from"), "not the configuration of a trained model"),
        (lambda: initial_encoder(settings(), tmp_path, flag="--init-from"), "no config.json and model.safetensors"),
    ]
    for act, message in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)
