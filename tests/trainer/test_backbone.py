"""From the name of a backbone to an encoder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from hardbatch.pipeline.errors import ConfigError
from hardbatch.trainer.backbone import build_encoder, find_backbone, ignored_modules, initial_encoder
from hardbatch.trainer.batch import load_tokenizer
from hardbatch.trainer.config import parse_flags
from hardbatch.trainer.embed import Embedder
from hardbatch.trainer.model import mean_pool
from tests.trainer_models import CONTEXTUAL_TYPES, save_tokenizer, tiny_backbone, tiny_config

TEXTS = ["short", "a text of several words", "words " * 100, "", "naïve café — 日本 🙂", "a <pad> within a [PAD] text"]


def settings(*flags):
    return parse_flags(["--shards", "S", "--output", "O", "--max-length", "24", *flags])


@pytest.mark.parametrize("model_type", CONTEXTUAL_TYPES)
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


def plain(folder, model):
    model.save_pretrained(folder)
    return folder


def sentence_transformers_folder(folder, model):
    """What sentence-transformers writes today: the model beside modules.json."""
    plain(folder, model)
    write_modules(folder, "")
    return folder


def older_sentence_transformers_folder(folder, model):
    """What it wrote once: the model in a folder of its own, and another config.json above."""
    write_modules(folder, "0_Transformer")
    (folder / "config.json").write_text(json.dumps({"__version__": "0.2.5"}))
    return plain(folder / "0_Transformer", model)


def write_modules(folder, path):
    folder.mkdir(exist_ok=True)
    module = {"idx": 0, "name": "0", "path": path, "type": "sentence_transformers.models.Transformer"}
    (folder / "modules.json").write_text(json.dumps([module]))


@pytest.mark.parametrize(
    ("model_type", "head", "layout"),
    [
        ("roberta", True, plain),  # byte-level BPE
        ("xlm-roberta", False, sentence_transformers_folder),  # Unigram
        ("camembert", True, sentence_transformers_folder),
        ("distilbert", True, older_sentence_transformers_folder),  # WordPiece
        ("mpnet", False, plain),  # WordPiece with the special tokens of roberta
    ],
)
def test_embeddings_are_those_of_transformers(tmp_path, model_type, head, layout):
    """With every kind of tokenizer, names of weights, and folder."""
    torch.manual_seed(0)
    model = (AutoModelForMaskedLM if head else AutoModel).from_config(tiny_config(model_type)).eval()
    folder = save_tokenizer(layout(tmp_path / "backbone", model), model_type)
    body = getattr(model, model.base_model_prefix, model)
    assert (body is not model) == head
    pretrained = AutoTokenizer.from_pretrained(folder)
    inputs = pretrained(TEXTS, truncation=True, max_length=24, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        pooled = mean_pool(body(**inputs).last_hidden_state, inputs["attention_mask"])
    expected = torch.nn.functional.normalize(pooled, dim=-1)

    found = find_backbone(str(tmp_path / "backbone"))
    encoder = build_encoder(settings("--architecture", "biencoder"), found)
    tokenizer = load_tokenizer(found, max_length_tokens=24, vocab_size=encoder.backbone_config.vocab_size)
    own = Embedder(encoder=encoder, tokenizer=tokenizer, texts_per_chunk=2).queries(TEXTS)
    assert (own - expected).abs().max() < 1e-5
    assert not [name for name, _ in encoder.named_parameters() if "pooler" in name or "lm_head" in name]


@pytest.mark.parametrize(
    ("model_type", "changed", "limit"),
    [
        ("bert", {}, 128),
        ("distilbert", {}, 128),
        ("mpnet", {}, 126),
        ("roberta", {}, 126),
        ("xlm-roberta", {"pad_token_id": 5}, 122),
    ],
)
def test_the_longest_text_that_a_backbone_has_positions_for(tmp_path, model_type, changed, limit):
    config = tiny_config(model_type)
    config.update(changed)
    config.save_pretrained(tmp_path)
    flags = "--random-weights", "--architecture", "biencoder", "--max-length"
    with pytest.raises(ConfigError, match=f"--max-length {limit + 1}: .* reads at most {limit} tokens"):
        build_encoder(settings(*flags, str(limit + 1)), tmp_path)
    encoder = build_encoder(settings(*flags, str(limit)), tmp_path)
    longest, longer = (torch.full((2, length), 20) for length in (limit, limit + 1))
    encoder.second_stage_model(longest, torch.ones_like(longest), torch.ones_like(longest))
    with pytest.raises((IndexError, RuntimeError)):
        encoder.second_stage_model(longer, torch.ones_like(longer), torch.ones_like(longer))


@pytest.mark.parametrize("model_type", CONTEXTUAL_TYPES)
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


@pytest.mark.parametrize("model_type", CONTEXTUAL_TYPES)
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
    (other / "config.json").write_text(json.dumps({**content, "model_type": "electra"}))
    unheard = shutil.copytree(folder, tmp_path / "unheard")
    (unheard / "config.json").write_text(json.dumps({**content, "model_type": "unheard_of"}))
    mpnet = tiny_backbone(tmp_path / "mpnet", "mpnet")
    unpadded = tiny_backbone(tmp_path / "unpadded", "roberta")
    roberta = json.loads((unpadded / "config.json").read_text())
    (unpadded / "config.json").write_text(json.dumps({**roberta, "pad_token_id": None}))
    biencoder = settings("--architecture", "biencoder", "--attention", "flash_attention_2", "--precision", "bf16")
    known = r"bert, camembert, distilbert, modernbert, mpnet \(biencoder only\), nomic_bert, roberta, xlm-roberta"
    partial = shutil.copytree(folder, tmp_path / "partial")
    (partial / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 5}))
    cases = [
        (lambda: find_backbone("lexical"), "lexical has no weights to train"),
        (lambda: find_backbone("no/such/model@abc"), "unknown model 'no/such/model'"),
        (lambda: find_backbone(str(tmp_path)), "has no config.json"),
        (lambda: build_encoder(settings(), broken), "cannot be read"),
        (lambda: build_encoder(settings(), other), f"type 'electra' is not supported; supported: {known}$"),
        (lambda: build_encoder(settings(), unheard), f"type 'unheard_of' is not supported; supported: {known}$"),
        (
            lambda: build_encoder(settings(), mpnet),
            "mpnet cannot read a context: .* give --architecture biencoder, or a backbone of type bert.*, xlm-roberta$",
        ),
        (lambda: build_encoder(biencoder, mpnet), "MPNetModel does not support Flash Attention"),
        (lambda: build_encoder(settings(), unpadded), "roberta counts positions from pad_token_id"),
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


def test_what_a_training_leaves_out_of_a_model_is_known(tmp_path):
    """Of folders that sentence-transformers writes itself, and of an older one."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    tiny_backbone(tmp_path / "raw")
    assert ignored_modules(tmp_path / "raw") == []
    transformer = Transformer(str(tmp_path / "raw"), max_seq_length=24)
    for name, modules, expected in (
        ("mean", [Pooling(32, "mean"), Normalize()], []),
        ("cls", [Pooling(32, "cls"), Dense(32, 8)], ["pooling by cls", "Dense"]),
        ("both", [Pooling(32, ["mean", "max"])], ["pooling by max"]),
    ):
        folder = tmp_path / name
        SentenceTransformer(modules=[transformer, *modules], device="cpu").save(str(folder), create_model_card=False)
        found = ignored_modules(find_backbone(str(folder)))
        assert [word.removesuffix("_tokens") for word in found] == expected

    older = tmp_path / "older"
    shutil.copytree(tmp_path / "cls", older)
    modules = json.loads((older / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (older / "modules.json").write_text(json.dumps(modules))
    (older / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    shutil.copytree(tmp_path / "raw", older / "0_Transformer")
    assert ignored_modules(find_backbone(str(older))) == ["pooling by cls", "Dense"]
