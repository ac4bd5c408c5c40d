"""Packed rows against each text alone under a dense mask, and the flash path against the padded one."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from hardbatch.trainer import attention
from hardbatch.trainer.attention import PACKED
from hardbatch.trainer.model import SecondStage, backbone_options, first_position
from tests.trainer_models import CONTEXTUAL_TYPES, tiny_config

LENGTHS = (7, 23, 1, 40, 12)
HIDDEN = 32


def pair_of_backbones(model_type: str) -> tuple[Any, Any]:
    """The same float64 weights under eager attention and under packed attention."""
    config = tiny_config(model_type, hidden_size=HIDDEN, num_layers=3)
    options = backbone_options(config, "eager")
    torch.manual_seed(0)
    reference = AutoModel.from_config(copy.deepcopy(config), attn_implementation="eager", **options).double()
    packed = AutoModel.from_config(copy.deepcopy(config), attn_implementation=PACKED, **options).double()
    packed.load_state_dict(reference.state_dict())
    return reference, packed


def alone(backbone: Any, context_CH: Tensor, ids: Tensor, null_copies: int = 0) -> Tensor:
    """Hidden states of the text tokens, each text run by itself as [context ‖ text] under a dense 4-D mask.

    With `null_copies` the first context row is repeated so many times.
    """
    if null_copies:
        context_CH = torch.cat([context_CH[:1].expand(null_copies, -1), context_CH[1:]])
    size = len(context_CH)
    outputs = []
    for text in ids.split(LENGTHS):
        length = len(text)
        inputs = torch.cat([context_CH, backbone.get_input_embeddings()(text)])
        reads = torch.ones(size + length, size + length, dtype=torch.bool)
        reads[:size, size:] = False
        mask: Any = dense(reads)
        if backbone.config.model_type == "modernbert":
            near = reads.clone()
            places = torch.arange(length)
            near[size:, size:] &= (places[:, None] - places).abs() <= backbone.config.sliding_window
            mask = {"full_attention": mask, "sliding_attention": dense(near)}
        positions = torch.cat([torch.zeros(size, dtype=torch.long), torch.arange(length)])
        positions += first_position(backbone.config)
        output = backbone(inputs_embeds=inputs[None], attention_mask=mask, position_ids=positions[None])
        outputs.append(output.last_hidden_state[0, size:])
    return torch.cat(outputs)


def dense(reads: Tensor) -> Tensor:
    return torch.zeros(1, 1, *reads.shape).double().masked_fill(~reads, torch.finfo(torch.float64).min)


def packed_row(backbone: Any, context_CH: Tensor, ids: Tensor, **spans: int) -> Tensor:
    """Hidden states of the text tokens, all texts in one packed row behind the context."""
    lengths = torch.tensor(LENGTHS)
    size = len(context_CH)
    inputs = torch.cat([context_CH, backbone.get_input_embeddings()(ids)])
    positions = torch.cat([torch.zeros(size, dtype=torch.long), *[torch.arange(n) for n in LENGTHS]])
    positions += first_position(backbone.config)
    output = backbone(
        inputs_embeds=inputs[None],
        position_ids=positions[None],
        bounds=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        longest=max(LENGTHS),
        num_context=size,
        **spans,
    )
    return output.last_hidden_state[0, size:]


@pytest.mark.parametrize("model_type", CONTEXTUAL_TYPES)
@pytest.mark.parametrize(("num_context", "null_weight"), [(0, 0), (20, 0), (20, 5), (1, 9)])
def test_a_packed_row_equals_each_text_alone(model_type: str, num_context: int, null_weight: int) -> None:
    reference, packed = pair_of_backbones(model_type)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 100, (sum(LENGTHS),), generator=generator)
    context = torch.randn(num_context, HIDDEN, generator=generator).double()
    weights = torch.randn(sum(LENGTHS), HIDDEN, generator=generator).double()

    contexts = [context.clone().requires_grad_() for _ in range(2)]
    expected = alone(reference, contexts[0], ids, null_weight)
    found = packed_row(packed, contexts[1], ids, null_weight=null_weight)
    for output in (expected, found):
        (output * weights).sum().backward()

    rotary_is_float32 = model_type == "modernbert"
    tolerance = {"rtol": 0, "atol": 1e-5 if rotary_is_float32 else 1e-12}
    torch.testing.assert_close(found, expected, **tolerance)
    for (name, one), other in zip(packed.named_parameters(), reference.parameters(), strict=True):
        if other.grad is not None:
            assert one.grad is not None, name
            torch.testing.assert_close(one.grad, other.grad, **tolerance, msg=name)
    if num_context:
        torch.testing.assert_close(contexts[1].grad, contexts[0].grad, **tolerance)


@pytest.mark.parametrize("model_type", CONTEXTUAL_TYPES)
@pytest.mark.parametrize("num_given", [0, 5, 8])
def test_a_shared_context_equals_each_text_alone(model_type: str, num_given: int) -> None:
    """Embeddings and gradients; null vectors stand for dropped documents and for those that are not given."""
    size = 8
    reference, packed = pair_of_backbones(model_type)
    second = SecondStage(packed, size, "shared").double()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 100, (sum(LENGTHS),), generator=generator)
    keep_1J = torch.rand(1, size, generator=generator) < 0.6
    keep_1J[0, :2] = torch.tensor([True, False])
    contexts = [torch.randn(num_given, HIDDEN, generator=generator).double().requires_grad_()]
    contexts.append(contexts[0].detach().clone().requires_grad_())
    nulls = second.null_context, second.null_context.detach().clone().requires_grad_()
    weights = torch.randn(len(LENGTHS), HIDDEN, generator=generator).double()

    padded = torch.nn.utils.rnn.pad_sequence(list(ids.split(LENGTHS)), batch_first=True)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    found = second(padded, mask, mask, contexts[0], keep_1J)

    given = torch.cat([contexts[1], nulls[1].expand(size - num_given, -1)])
    context_JH = torch.where(keep_1J[0, :, None], given, nulls[1])
    means = [part.mean(0) for part in alone(reference, context_JH, ids).split(LENGTHS)]
    expected = torch.nn.functional.normalize(torch.stack(means), dim=-1)
    for output in (expected, found):
        (output * weights).sum().backward()

    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)  # pooled in float32
    pairs = zip(packed.named_parameters(), reference.parameters(), strict=True)
    gradients = [(name, one.grad, other.grad) for (name, one), other in pairs if other.grad is not None]
    gradients += [("null", nulls[0].grad, nulls[1].grad), ("context", contexts[0].grad, contexts[1].grad)]
    for name, one, other in gradients:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=name)


@pytest.fixture
def flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two kernels of one part in plain torch, which take the sum of the whole softmax as the real ones do."""

    def scores(q: Tensor, k: Tensor, scale: float, window: int) -> Tensor:
        found = torch.einsum("qhd,khd->hqk", q, k) * scale
        if window >= 0:
            apart = (torch.arange(len(q))[:, None] - torch.arange(len(k))).abs()
            found = found.masked_fill(apart > window, -torch.inf)
        return found

    def spans(bounds_q: Tensor, bounds_k: Tensor) -> list[tuple[slice, slice]]:
        own, keys = ([slice(*ends) for ends in pairwise(bounds.tolist())] for bounds in (bounds_q, bounds_k))
        return list(zip(own, keys, strict=True))

    def forward(q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor, *rest: Any) -> tuple[Any, ...]:
        *_, scale, window = rest
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
        for own, keys in spans(bounds_q, bounds_k):
            found = scores(q[own], k[keys], scale, window)
            lse[:, own] = found.logsumexp(-1)
            out[own] = torch.einsum("hqk,khd->qhd", found.softmax(-1), v[keys])
        return out, lse

    def backward(
        g: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        bounds_q: Tensor,
        bounds_k: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        *_, scale, window = rest
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (g * out).sum(-1).T
        for own, keys in spans(bounds_q, bounds_k):
            p = (scores(q[own], k[keys], scale, window) - lse[:, own, None]).exp()
            dv[keys] += torch.einsum("hqk,qhd->khd", p, g[own])
            ds = p * (torch.einsum("qhd,khd->hqk", g[own], v[keys]) - delta[:, own, None]) * scale
            dq[own] += torch.einsum("hqk,khd->qhd", ds, k[keys])
            dk[keys] += torch.einsum("hqk,qhd->khd", ds, q[own])
        return dq, dk, dv

    monkeypatch.setattr(attention, "_flash", forward)
    monkeypatch.setattr(attention, "_flash_backward", backward)


@pytest.mark.usefixtures("flash_on_cpu")
@pytest.mark.parametrize(("num_context", "null_weight"), [(0, 0), (20, 0), (20, 5), (1, 9)])
@pytest.mark.parametrize("window", [-1, 4])
def test_merged_parts_equal_one_softmax(num_context: int, null_weight: int, window: int) -> None:
    generator = torch.Generator().manual_seed(2)
    shape = (num_context + sum(LENGTHS), 3, 8)
    qkv = torch.randn(3, *shape, generator=generator).double()
    gradient = torch.randn(shape, generator=generator).double()
    bounds = torch.nn.functional.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    results = []
    for merged in (False, True):
        q, k, v = (tensor.clone().requires_grad_() for tensor in qkv)
        if merged:
            numbers = (max(LENGTHS), num_context, null_weight, 0.3, window)
            out, _ = torch.ops.hardbatch.attention(q, k, v, bounds, *numbers)
            texts_alone, _ = torch.ops.hardbatch.attention(q[num_context:].detach(), k, v, bounds, *numbers)
            torch.testing.assert_close(texts_alone, out[num_context:], rtol=0, atol=1e-6)  # a kept context
        else:
            out = attention._by_length(q, k, v, bounds, num_context, null_weight, 0.3, window)
        out.backward(gradient)
        results.append((out, q.grad, k.grad, v.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # null scores are computed in float32


@pytest.mark.usefixtures("flash_on_cpu")
def test_the_layers_compile_without_breaks_and_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(attention, "_uses_flash", lambda _: True)
    torch._dynamo.reset()
    counters.clear()
    _, packed = pair_of_backbones("nomic_bert")
    for layer in packed.layers:
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ([5, 9], [3, 3, 8, 20], [50, 1, 2], [4] * 9):
        monkeypatch.setitem(globals(), "LENGTHS", tuple(lengths))
        ids = torch.randint(5, 100, (sum(lengths),))
        packed_row(packed, torch.randn(6, HIDDEN).double(), ids).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_refuses_a_mask() -> None:
    states = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="no attention mask"):
        attention.packed_attention(
            torch.nn.Identity(), states, states, states, torch.ones(1), bounds=torch.tensor([0, 3]), longest=3
        )
