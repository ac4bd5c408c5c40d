"""The two stages: context without order, nulls, pooling, saving."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from hardbatch.trainer.model import (
    BACKBONES,
    SecondStage,
    first_position,
    load_encoder,
    longest_text_tokens,
    mean_pool,
    new_backbone,
)
from tests.models import VOCABULARY_SIZE
from tests.trainer_models import CONTEXTUAL_TYPES, HIDDEN_SIZE, tiny_config, tiny_encoder

CONTEXT_SIZE = 40  # more than any attention window: modernbert's is 8 here


def texts(num_texts=6, num_tokens=30, seed=0):
    """ids and a mask with padding in two rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY_SIZE, (num_texts, num_tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:2, 10:] = 0
    mask[2:3, 3:] = 0
    return ids, mask


def context(num_documents, scale=0.05, seed=1):
    return scale * torch.randn(num_documents, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("context_attention", ["full", "shared"])
@pytest.mark.parametrize("model_type", CONTEXTUAL_TYPES)
def test_the_order_of_the_context_changes_nothing(model_type, context_attention):
    second = tiny_encoder(model_type, CONTEXT_SIZE, context_attention=context_attention).second_stage_model
    ids, mask = texts()
    with torch.no_grad():
        given = context(CONTEXT_SIZE)
        plain = second(ids, mask, mask, given)
        turned = second(ids, mask, mask, given[torch.randperm(CONTEXT_SIZE)])
        other = second(ids, mask, mask, given.roll(1, dims=1))
    assert (plain - turned).abs().max() < 1e-5
    assert (plain - other).abs().max() > 1e-4  # and it does read the context


@pytest.mark.parametrize("model_type", CONTEXTUAL_TYPES)
def test_every_token_sees_every_context_document(model_type):
    backbone = tiny_config(model_type, num_layers=1)
    if model_type == "modernbert":
        backbone.layer_types = ["sliding_attention"]
    second = SecondStage(new_backbone(backbone), CONTEXT_SIZE).eval()
    ids, mask = texts(num_texts=1, num_tokens=60)
    last = torch.zeros_like(mask)
    last[:, -1] = 1  # pool the last token alone, farthest from the context
    for place in (0, CONTEXT_SIZE - 1):
        given = context(CONTEXT_SIZE)
        changed = given.clone()
        changed[place] *= -1
        with torch.no_grad():
            moved = (second(ids, mask, last, given) - second(ids, mask, last, changed)).abs().max()
        assert moved > 1e-5


@pytest.mark.parametrize("model_type", CONTEXTUAL_TYPES)
def test_beside_a_context_a_text_keeps_its_positions(monkeypatch, model_type):
    """If no token sees the context, embeddings are those of the plain backbone."""
    second = tiny_encoder(model_type, CONTEXT_SIZE).second_stage_model
    ids, mask = texts()
    ids[0, 7] = second.backbone.config.pad_token_id  # "<pad>" in the words of a text takes no position in roberta
    monkeypatch.setattr(
        second, "_attention_mask", lambda _, mask_NL: mask_NL.index_fill(1, torch.arange(CONTEXT_SIZE), 0)
    )
    plain = SecondStage(second.backbone, 0)
    with torch.no_grad():
        assert (second(ids, mask, mask, context(4)) - plain(ids, mask, mask)).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", CONTEXTUAL_TYPES)
def test_padding_changes_nothing(model_type):
    encoder = tiny_encoder(model_type, 4)
    ids, mask = texts()
    given = context(4)
    with torch.no_grad():
        together = encoder.second_stage_model(ids, mask, mask, given)
        alone = encoder.second_stage_model(ids[1:2, :10], mask[1:2, :10], mask[1:2, :10], given)
        first_together = encoder.first_stage_model(ids, mask, mask)
        first_alone = encoder.first_stage_model(ids[1:2, :10], mask[1:2, :10], mask[1:2, :10])
    assert torch.allclose(together[1], alone[0], atol=1e-6)
    assert torch.allclose(first_together[1], first_alone[0], atol=1e-6)


@pytest.mark.parametrize("context_size", [0, CONTEXT_SIZE])
@pytest.mark.parametrize("model_type", CONTEXTUAL_TYPES)
def test_packed_rows_give_the_embeddings_and_gradients_of_padded_texts(model_type, context_size):
    """Also of texts that a window does not cover, that pool a part of their tokens, and that drop documents."""
    ids, mask = texts()
    mask = mask.bool()
    ids[~mask] = tiny_config(model_type).pad_token_id
    ids[0, 7] = tiny_config(model_type).pad_token_id  # "<pad>" in the words of a text takes no position in roberta
    pooled = mask & (torch.arange(30) >= 2)
    keep = torch.rand(6, CONTEXT_SIZE, generator=torch.Generator().manual_seed(3)) < 0.7
    results = []
    for attention in ("sdpa", "packed"):
        encoder = tiny_encoder(model_type, context_size, attention=attention)
        inputs = [(ids, mask, pooled)] if context_size == 0 else [(ids, mask, pooled, context(30, 1.0), keep)]
        outputs = [encoder.second_stage_model(*inputs[0])]
        if context_size:
            vectors = encoder.first_stage_model(ids[:3], mask[:3], pooled[:3])
            outputs += [vectors, encoder.second_stage_model(ids, mask, mask, vectors, num_tokens=int(mask.sum()))]
        weights = torch.randn(len(outputs), 6, HIDDEN_SIZE, generator=torch.Generator().manual_seed(4))
        sum((weights[i, : len(one)] * one).sum() for i, one in enumerate(outputs)).backward()
        results.append((outputs, {name: parameter.grad for name, parameter in encoder.named_parameters()}))

    (expected, of_padded), (found, of_packed) = results
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    for name, gradient in of_padded.items():
        assert (of_packed[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-5, name


def test_a_shared_context_needs_packed_attention():
    with pytest.raises(ValueError, match="a shared context needs packed attention, sdpa is asked for"):
        tiny_encoder(attention="sdpa", context_attention="shared")
    with pytest.raises(ValueError, match="a shared context needs packed attention"):
        SecondStage(new_backbone(tiny_config()), 4, "shared")
    with pytest.raises(ValueError, match="mpnet cannot read packed rows; use sdpa or eager"):
        new_backbone(tiny_config("mpnet"), "packed")


@pytest.mark.parametrize("model_type", CONTEXTUAL_TYPES)
@pytest.mark.parametrize("num_given", [0, 3, 6])
def test_the_states_of_a_shared_context_are_computed_once_and_change_nothing(monkeypatch, model_type, num_given):
    second = tiny_encoder(model_type, 6, context_attention="shared").second_stage_model
    ids, mask = texts()
    given = context(num_given, 1.0)
    rows = []
    forward = second.backbone.forward

    def spy(**inputs):
        rows.append(inputs["inputs_embeds"].shape[1])
        return forward(**inputs)

    monkeypatch.setattr(second.backbone, "forward", spy)
    expected = second(ids, mask, mask, given).detach()  # with a graph, the context is in the row
    with torch.no_grad():
        found = [second(ids, mask, mask, given.clone()) for _ in range(2)]
    size = num_given + (num_given < 6)  # and a null vector for those that are not given
    num_tokens = int(mask.sum())
    assert rows == [size + num_tokens, size + 1, num_tokens, num_tokens]
    assert torch.equal(*found) and torch.allclose(found[0], expected, rtol=0, atol=1e-6)


def test_the_states_of_a_shared_context_follow_the_context_and_the_weights():
    second = tiny_encoder("bert", 4, context_attention="shared").second_stage_model
    ids, mask = texts()

    def expected(given):
        return second(ids, mask, mask, given).detach()

    given = context(3, 1.0)
    with torch.no_grad():
        second(ids, mask, mask, given)
        given[1] += 1
        assert torch.allclose(second(ids, mask, mask, given), torch.enable_grad()(expected)(given), atol=1e-6)
        for change in (second.null_context, second.backbone.encoder.layer[0].attention.self.value.weight):
            before = second(ids, mask, mask, given)
            change.mul_(-1)
            found = second(ids, mask, mask, given)
            assert (found - before).abs().max() > 1e-4
            assert torch.allclose(found, torch.enable_grad()(expected)(given), atol=1e-6)
        half = second.to(torch.bfloat16)
        assert half(ids, mask, mask, given).isfinite().all()


@pytest.mark.parametrize("context_attention", ["full", "shared"])
def test_missing_context_is_null_context(context_attention):
    second = tiny_encoder("bert", 6, context_attention=context_attention).second_stage_model
    ids, mask = texts()
    given = context(4)
    nulls = second.null_context.detach().expand(2, -1)
    with torch.no_grad():
        short = second(ids, mask, mask, given)
        padded = second(ids, mask, mask, torch.cat([given, nulls]))
        none = second(ids, mask, mask)
        empty = second(ids, mask, mask, given[:0])
        all_nulls = second(ids, mask, mask, second.null_context.detach().expand(6, -1))
        rows = 6 if context_attention == "full" else 1
        dropped = second(ids, mask, mask, given, torch.zeros(rows, 6, dtype=torch.bool))
    close = torch.equal if context_attention == "full" else partial(torch.allclose, rtol=0, atol=1e-6)
    assert close(short, padded)
    assert torch.equal(none, empty) and torch.equal(none, dropped) and close(none, all_nulls)
    assert not torch.allclose(short, none)


def test_dropping_is_for_each_text_by_itself():
    second = tiny_encoder("bert", 4).second_stage_model
    ids, mask = texts()
    given = context(4)
    keep = torch.ones(6, 4, dtype=torch.bool)
    keep[3, 1] = False
    changed = given.clone()
    changed[1] += 1
    with torch.no_grad():
        moved = (second(ids, mask, mask, given, keep) - second(ids, mask, mask, changed, keep)).abs().amax(1)
    assert moved[3] == 0 and (moved[[0, 1, 2, 4, 5]] > 0).all()


@pytest.mark.parametrize("context_attention", ["full", "shared"])
def test_the_null_vector_always_gets_a_gradient(context_attention):
    second = tiny_encoder("bert", 4, context_attention=context_attention).second_stage_model
    ids, mask = texts()
    second(ids, mask, mask, context(4)).sum().backward()
    assert second.null_context.grad is not None and not second.null_context.grad.any()
    second(ids, mask, mask, context(3)).sum().backward()
    assert second.null_context.grad.any()


@pytest.mark.parametrize("context_attention", ["full", "shared"])
def test_every_parameter_gets_a_gradient(context_attention):
    for model_type in CONTEXTUAL_TYPES:
        encoder = tiny_encoder(model_type, 4, context_attention=context_attention)
        ids, mask = texts()
        vectors = encoder.first_stage_model(ids[:3], mask[:3], mask[:3])
        encoder.second_stage_model(ids, mask, mask, vectors)[:, 0].sum().backward()
        without = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
        assert without == []


@pytest.mark.parametrize("context_attention", ["full", "shared"])
def test_more_context_than_the_model_reads_is_refused(context_attention):
    second = tiny_encoder("bert", 4, context_attention=context_attention).second_stage_model
    ids, mask = texts()
    with pytest.raises(ValueError, match="5 context documents are given, the model reads at most 4"):
        second(ids, mask, mask, context(5))


@pytest.mark.parametrize("model_type", BACKBONES)
def test_a_biencoder_is_the_plain_backbone(model_type):
    encoder = tiny_encoder(model_type, 0)
    ids, mask = texts()
    with torch.no_grad():
        ours = encoder.second_stage_model(ids, mask, mask)
        plain = encoder.second_stage_model.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    assert encoder.first_stage_model is None and not hasattr(encoder.second_stage_model, "null_context")
    assert torch.equal(ours, torch.nn.functional.normalize(mean_pool(plain, mask), dim=-1))


def test_only_marked_tokens_are_pooled():
    hidden = torch.arange(12.0).reshape(1, 4, 3)
    assert torch.equal(mean_pool(hidden, torch.tensor([[0, 1, 1, 0]])), hidden[:, 1:3].mean(1))


def test_the_head_starts_in_the_scale_of_token_embeddings():
    for hidden_size in (32, 64):
        encoder = tiny_encoder("bert", 4, hidden_size=hidden_size)
        ids, mask = texts()
        with torch.no_grad():
            vectors = encoder.first_stage_model(ids, mask, mask)
        embeddings = encoder.second_stage_model.backbone.get_input_embeddings().weight
        assert vectors.pow(2).mean().sqrt() == pytest.approx(embeddings.pow(2).mean().sqrt().item(), rel=0.01)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_one_text_under_flash_attention_goes_in_with_padding(monkeypatch, model_type):
    second = tiny_encoder(model_type, 4).second_stage_model
    ids, mask = texts(num_texts=1, num_tokens=longest_text_tokens(second.backbone.config))
    given = context(4)
    with torch.no_grad():
        expected = second(ids, mask, mask, given)
        monkeypatch.setattr(second.backbone.config, "_attn_implementation_internal", "flash_attention_2")
        seen = {}
        forward = second.backbone.forward

        def spy(**inputs):
            seen.update(inputs)
            monkeypatch.setattr(second.backbone.config, "_attn_implementation_internal", "sdpa")
            return forward(**inputs)

        monkeypatch.setattr(second.backbone, "forward", spy)
        found = second(ids, mask, mask, given)
    assert not seen["attention_mask"].all()
    positions = seen["position_ids"][0].tolist()
    assert positions[:5] == [first_position(second.backbone.config)] * 5  # four context vectors, and the first token
    assert torch.allclose(found, expected, atol=1e-6)


def test_refused_backbones():
    from transformers import ElectraConfig

    with pytest.raises(ValueError, match="type 'electra' is not supported; supported: bert, camembert, distilbert"):
        new_backbone(ElectraConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match="mpnet cannot read a context"):
        SecondStage(new_backbone(tiny_config("mpnet")), CONTEXT_SIZE)
    with pytest.raises(ValueError, match="use sdpa, eager or packed"):
        new_backbone(tiny_config("modernbert"), attention="flash_attention_2")


def save(folder, encoder):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(encoder.config_dict(), sort_keys=True))
    save_file(encoder.state_dict(), folder / "model.safetensors")


@pytest.mark.parametrize(
    ("model_type", "context_size", "context_attention"),
    [
        *((name, 0, "full") for name in BACKBONES),
        *((name, 4, "full") for name in CONTEXTUAL_TYPES),
        ("bert", 4, "shared"),
    ],
)
def test_saved_and_loaded(tmp_path, model_type, context_size, context_attention):
    encoder = tiny_encoder(model_type, context_size, pool_prompt=False, context_attention=context_attention)
    save(tmp_path, encoder)
    own = json.loads((tmp_path / "config.json").read_text())["hardbatch"]
    if context_attention == "shared":
        assert own["format_version"] == 2 and own["context_attention"] == "shared"
        with pytest.raises(ValueError, match="a shared context needs packed attention, eager is asked for"):
            load_encoder(tmp_path, "eager")
    else:
        assert own["format_version"] == 1 and "context_attention" not in own  # earlier code reads it
    loaded = load_encoder(tmp_path)
    assert loaded.config == encoder.config and not loaded.training
    ids, mask = texts()
    with torch.no_grad():
        assert torch.equal(loaded.second_stage_model(ids, mask, mask), encoder.second_stage_model(ids, mask, mask))
    again = tmp_path / "again"
    save(again, loaded)
    assert (again / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_what_is_no_saved_model_is_refused(tmp_path):
    encoder = tiny_encoder("bert", 4)
    save(tmp_path, encoder)
    content = json.loads((tmp_path / "config.json").read_text())
    content["hardbatch"]["format_version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="format version 99, this code reads up to 2"):
        load_encoder(tmp_path)
    del content["hardbatch"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not the configuration of a trained model"):
        load_encoder(tmp_path)
    save(tmp_path, encoder)
    weights = encoder.state_dict()
    del weights["first_stage_model.head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing, 0 unexpected, first: first_stage_model\.head\.weight"):
        load_encoder(tmp_path)


def test_the_null_vector_has_the_scale_of_token_embeddings():
    backbone = new_backbone(tiny_config("bert"))
    scale = backbone.get_input_embeddings().weight.pow(2).mean().sqrt().item()
    torch.manual_seed(0)
    assert SecondStage(backbone, 4).null_context.std().item() == pytest.approx(scale, rel=0.4)
