"""Attention over packed rows: texts one after the other, without padding and without a mask.

    row        [null? | c_1 … c_M | text_1 | text_2 | …]
    context    each of the first C tokens (the null token and the context) reads those C tokens
    text       each token of a text reads those C tokens and its own text

One row serves a whole chunk of texts: the context is computed once for all of them, not once per
text. If a context of J documents has only M, the null token stands for all J − M null vectors. They
are equal in every layer, so one key whose score is raised by log(J − M) weighs as much as J − M
copies of it.

transformers calls `packed_attention` under the name `PACKED`. The keyword arguments `bounds`,
`longest` and so on of a backbone's `forward` reach it through every layer. transformers makes no mask
for an attention function that it does not know, so it never waits for a GPU to inspect one.

On CUDA in bf16 or fp16, both parts of the softmax run on torch's flash kernels. Elsewhere, texts of
the same length, which are neighbours in a row that is sorted by length, go through torch's
`scaled_dot_product_attention` together, without padding and with both parts at once.

An export carries a copy of this file.

Shapes: T tokens of the row, C of them context, N texts, L tokens of a text, S = C + L, H heads, D dimension of a head.
"""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

# The copy in an export has names of its own: an older copy must not replace what a training uses.
_NAMESPACE = "hardbatch" if __name__.startswith("hardbatch.") else __name__.replace(".", "_")
PACKED = f"{_NAMESPACE}_packed"
_CONTEXT_SPLITS = 8  # sequences of the backward pass over the context; see `_context_backward`


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    bounds: Tensor,
    longest: int,
    num_context: int = 0,
    null_weight: int = 0,
    num_carried: int = 0,
    context_states: dict[torch.nn.Module, tuple[Tensor, Tensor]] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Computes the attention of one packed row, in the form that transformers expects of an attention function.

    Args:
        module: The attention layer.
        query, key, value: (1, H, T, D).
        attention_mask: Must be None; `bounds` takes its place.
        bounds: int32 (N + 1), on the device of the row: text i is tokens `bounds[i]` to `bounds[i + 1]` of the text
            tokens, which begin after the context.
        longest: Tokens of the longest text, or more.
        num_context: C, the tokens at the beginning of the row that every token reads.
        null_weight: How many null vectors the first token of the row stands for; 0 if it is not a null token.
        num_carried: The tokens at the beginning of each text that a sliding window never hides: a context that the
            text carries itself.
        context_states: Keys and values of the context by layer. A layer that is not in it adds those of this row; a
            layer that is in it reads them, and the row has no tokens of the context. For inference only.
        scaling: Factor of the scores; None for 1 / sqrt(D).
        dropout: Rate of attention dropout. The flash kernels have none, so they are not used with it.
        sliding_window: As ModernBERT passes it, one more than the distance at which a token still reads another of
            its text. The context is always visible.

    Returns:
        The output (1, T, H, D), and None in the place of attention weights.

    Raises:
        ValueError: For a mask.
    """
    if attention_mask is not None:
        raise ValueError("packed rows take no attention mask")
    q_THD, k_THD, v_THD = (_heads_last(tensor) for tensor in (query, key, value))
    scale = q_THD.shape[-1] ** -0.5 if scaling is None else scaling
    window = -1 if sliding_window is None else sliding_window - 1

    if context_states is not None:
        if module in context_states:
            k_CHD, v_CHD = context_states[module]
            k_THD, v_THD = torch.cat([k_CHD, k_THD]), torch.cat([v_CHD, v_THD])
        else:
            context_states[module] = k_THD[:num_context].clone(), v_THD[:num_context].clone()

    if dropout or not _uses_flash(q_THD) or (num_carried and window >= 0):
        out_THD = _by_length(
            q_THD,
            k_THD,
            v_THD,
            bounds,
            num_context,
            null_weight,
            scale,
            window,
            num_carried=num_carried,
            dropout=dropout,
        )
    else:
        out_THD, _lse = _attention(q_THD, k_THD, v_THD, bounds, longest, num_context, null_weight, scale, window)
    return out_THD[None], None


AttentionInterface.register(PACKED, packed_attention)


def _uses_flash(states: Tensor) -> bool:
    return states.is_cuda and states.dtype in (torch.bfloat16, torch.float16)


def _heads_last(states: Tensor) -> Tensor:
    """Turns (1, H, T, D) into (T, H, D), in the type of autocast, which rotary embeddings may have left."""
    states_THD = states[0].transpose(0, 1).contiguous()
    if states.is_cuda and torch.is_autocast_enabled("cuda"):
        return states_THD.to(torch.get_autocast_dtype("cuda"))
    return states_THD


def _num_context_queries(q_THD: Tensor, k_THD: Tensor, num_context: int) -> int:
    """Returns how many queries of the context the row has: C of them, or none if its keys come from elsewhere."""
    return len(q_THD) - (len(k_THD) - num_context)


# ------------------------------------------------------------------------------------------------- flash kernels, CUDA


@torch.library.custom_op(f"{_NAMESPACE}::attention", mutates_args=())
def _attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    bounds: Tensor,
    longest: int,
    num_context: int,
    null_weight: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Computes the parts of the softmax separately and merges them.

    It is a custom operator for two reasons. torch.compile does not look inside, and the backward
    pass is our own: that of torch's varlen attention drops the gradient of the sum, which a merge
    under autograd would need.

    Returns:
        The output (T, H, D), and the logarithm of the sum of the softmax (H, T, float32).
    """
    lead = _num_context_queries(q_THD, k_THD, num_context)
    text_out, text_lse = _flash(
        q_THD[lead:], k_THD[num_context:], v_THD[num_context:], bounds, bounds, longest, longest, scale, window
    )
    if num_context == 0:
        return text_out, text_lse

    first = 1 if null_weight else 0
    parts: list[tuple[Tensor, Tensor]] = []
    if num_context > first:
        size, context = num_context - first, slice(first, num_context)
        bounds_q, bounds_k = _ends(len(q_THD), q_THD), _ends(size, q_THD)
        parts.append(_flash(q_THD, k_THD[context], v_THD[context], bounds_q, bounds_k, len(q_THD), size, scale, -1))
    if null_weight:
        null_lse = _null_scores(q_THD, k_THD, scale, null_weight)
        parts.append((v_THD[:1].expand_as(q_THD), null_lse))
    out, lse = parts[0] if len(parts) == 1 else _merge(*parts[0], *parts[1])
    merged_out, merged_lse = _merge(out[lead:], lse[:, lead:], text_out, text_lse)
    return torch.cat([out[:lead], merged_out]), torch.cat([lse[:, :lead], merged_lse], 1)


@_attention.register_fake
def _(q_THD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_THD), q_THD.new_empty(q_THD.shape[1], q_THD.shape[0], dtype=torch.float32)


@torch.library.custom_op(f"{_NAMESPACE}::attention_backward", mutates_args=())
def _attention_backward(
    gradient_THD: Tensor,
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    bounds: Tensor,
    longest: int,
    num_context: int,
    null_weight: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of q, k and v from the backward pass of each part.

    Each part is given the output and the sum of the *whole* softmax, so that its probabilities are
    its share of the whole, as in ring attention. The gradients of q are sums over the parts; those
    of k and v belong to the part that has the key.
    """
    own = slice(num_context, None)
    dq_text, dk_text, dv_text = _flash_backward(
        *(gradient_THD[own], q_THD[own], k_THD[own], v_THD[own], out_THD[own], lse_HT[:, own].contiguous()),
        *(bounds, bounds, longest, longest, scale, window),
    )
    if num_context == 0:
        return dq_text, dk_text, dv_text

    first = 1 if null_weight else 0
    context = slice(first, num_context)
    dq = torch.zeros_like(q_THD)
    dk_parts, dv_parts = [], []
    if null_weight:
        dq_null, dk_null, dv_null = _null_backward(
            gradient_THD, q_THD, k_THD, v_THD, out_THD, lse_HT, scale, null_weight
        )
        dq += dq_null
        dk_parts.append(dk_null)
        dv_parts.append(dv_null)
    if num_context > first:
        dq_context, dk_context, dv_context = _context_backward(
            gradient_THD, q_THD, k_THD[context], v_THD[context], out_THD, lse_HT, scale
        )
        dq += dq_context
        dk_parts.append(dk_context)
        dv_parts.append(dv_context)
    dq[own] += dq_text
    return dq, torch.cat([*dk_parts, dk_text]), torch.cat([*dv_parts, dv_text])


@_attention_backward.register_fake
def _(gradient_THD: Tensor, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_THD), torch.empty_like(k_THD), torch.empty_like(v_THD)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_THD, k_THD, v_THD, bounds, *ctx.numbers = inputs
    ctx.save_for_backward(q_THD, k_THD, v_THD, *output, bounds)


def _backward(ctx: Any, gradient_THD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _attention_backward(gradient_THD.contiguous(), *ctx.saved_tensors, *ctx.numbers)
    return (*gradients, *[None] * 6)


_attention.register_autograd(_backward, setup_context=_keep_for_backward)


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds_q: Tensor,
    bounds_k: Tensor,
    longest_q: int,
    longest_k: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Returns the output (T, H, D) and the log-sum (H, T) of one part."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(q, k, v, bounds_q, bounds_k, longest_q, longest_k, 0.0, False, False),
        scale=scale,
        window_size_left=window,
        window_size_right=window,
    )
    return out, lse


def _flash_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds_q: Tensor,
    bounds_k: Tensor,
    longest_q: int,
    longest_k: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v of one part, given `out` and `lse` of the whole softmax."""
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        *(gradient, q, k, v, out, lse, bounds_q, bounds_k, longest_q, longest_k, 0.0, False, *no_dropout),
        scale=scale,
        window_size_left=window,
        window_size_right=window,
    )
    return dq, dk, dv


def _context_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of all q, and of k and v of the context, of the part whose keys are the context.

    The kernel runs in parallel over keys and sequences, and a context has few keys. Therefore the
    queries are cut into several sequences, each with a copy of the keys, and the gradients of the
    copies are added.
    """
    splits = min(_CONTEXT_SPLITS, len(q))
    rows = -(-len(q) // splits)
    bounds_q = torch.arange(splits + 1, device=q.device, dtype=torch.int32).mul_(rows).clamp_(max=len(q))
    bounds_k = torch.arange(splits + 1, device=q.device, dtype=torch.int32).mul_(len(k))
    dq, dk, dv = _flash_backward(
        *(gradient, q, k.repeat(splits, 1, 1), v.repeat(splits, 1, 1), out, lse),
        *(bounds_q, bounds_k, rows, len(k), scale, -1),
    )
    dk, dv = (copies.view(splits, *k.shape).float().sum(0).to(copies.dtype) for copies in (dk, dv))
    return dq, dk, dv


def _null_scores(q: Tensor, k: Tensor, scale: float, weight: int) -> Tensor:
    """Returns the scores (H, T, float32) of the null key, raised by the logarithm of its weight."""
    return (q.float() * k[:1].float()).sum(-1).T * scale + math.log(weight)


def _null_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, weight: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of all q, and of the null token's k and v (1, H, D), of the part whose only key it is."""
    gradient = gradient.float()
    p_TH1 = (_null_scores(q, k, scale, weight) - lse).exp().T[..., None]
    delta_TH1 = ((v[:1].float() - out.float()) * gradient).sum(-1, keepdim=True)
    score_TH1 = p_TH1 * delta_TH1 * scale
    dq = (score_TH1 * k[:1].float()).to(q.dtype)
    dk = (score_TH1 * q.float()).sum(0, keepdim=True).to(k.dtype)
    dv = (p_TH1 * gradient).sum(0, keepdim=True).to(v.dtype)
    return dq, dk, dv


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the output and the log-sum of one softmax over the keys of both parts."""
    lse = torch.logaddexp(lse_a, lse_b)
    share_a, share_b = ((part - lse).exp().T[..., None] for part in (lse_a, lse_b))
    return (out_a * share_a + out_b * share_b).to(out_b.dtype), lse


def _ends(length: int, like: Tensor) -> Tensor:
    """Returns the bounds (int32) of one sequence."""
    return torch.arange(2, dtype=torch.int32, device=like.device).mul_(length)


# ---------------------------------------------------------------------------------- texts by length, CPU and float32


def _by_length(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    bounds: Tensor,
    num_context: int,
    null_weight: int,
    scale: float,
    window: int,
    *,
    num_carried: int = 0,
    dropout: float = 0.0,
) -> Tensor:
    """Returns the output (T, H, D). Neighbours of the same length are computed together; no text is padded."""
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scale}
    same_length = [(length, len(list(group))) for length, group in groupby(bounds.diff().tolist())]
    sizes = [length * num_texts for length, num_texts in same_length]

    # `split` and not slices, each of which would have a gradient as long as the row.
    lead = _num_context_queries(q_THD, k_THD, num_context)
    q_CHD, *queries = torch.split(q_THD, [lead, *sizes])
    k_CHD, *keys = torch.split(k_THD, [num_context, *sizes])
    v_CHD, *values = torch.split(v_THD, [num_context, *sizes])
    k_HCD, v_HCD = k_CHD.transpose(0, 1), v_CHD.transpose(0, 1)
    outputs: list[Tensor] = []

    if lead:
        q_HCD = q_CHD.transpose(0, 1)
        bias = _bias(q_THD, num_context, 0, null_weight, -1, 0)
        context = F.scaled_dot_product_attention(q_HCD[None], k_HCD[None], v_HCD[None], attn_mask=bias, **options)
        outputs.append(context[0].transpose(0, 1))

    for (length, num_texts), *states in zip(same_length, queries, keys, values, strict=True):
        q_NHLD, k_NHSD, v_NHSD = (part.view(num_texts, length, *part.shape[1:]).transpose(1, 2) for part in states)
        if num_context:
            k_NHSD = torch.cat([k_HCD.expand(num_texts, -1, -1, -1), k_NHSD], 2)
            v_NHSD = torch.cat([v_HCD.expand(num_texts, -1, -1, -1), v_NHSD], 2)
        bias = _bias(q_THD, num_context, length, null_weight, window, num_carried)
        texts = F.scaled_dot_product_attention(q_NHLD, k_NHSD, v_NHSD, attn_mask=bias, **options)
        outputs.append(texts.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _bias(
    like: Tensor, num_context: int, length: int, null_weight: int, window: int, num_carried: int
) -> Tensor | None:
    """Returns what is added to the scores (1 or L, S) of a text; None if that is nothing."""
    if window < length - 1 and window >= 0:
        places_L = torch.arange(length, device=like.device)
        reads_LL = (places_L[:, None] - places_L).abs() <= window
        reads_LL |= (places_L < num_carried) | (places_L[:, None] < num_carried)
        bias = F.pad(reads_LL, (num_context, 0), value=True).to(like.dtype).log()
    elif null_weight:
        bias = like.new_zeros(1, num_context + length)
    else:
        return None
    if null_weight:
        bias[:, 0] += math.log(null_weight)
    return bias
