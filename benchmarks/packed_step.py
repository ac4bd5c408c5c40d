"""The training step on packed rows, which benchmarks/gpu.py measures against the step on padded texts.

Both stages run with the attention of `hardbatch.trainer.attention`: the texts of a chunk stand in one row, one after
the other and without padding.

Letters in shapes: N texts of a batch, M and J context documents, H width of the second stage, D dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class PackedStep:
    """Loss and gradients of a batch on packed rows, as `GradCache` gives them on padded texts.

    Args:
        encoder: The trainer's encoder, whose two backbones use packed attention.
        autocast: The dtype to compute in, or None for float32.
        shared: Whether all texts of a chunk read one context, which reads only itself. Otherwise each text carries its
            own copy of the context, as in the paper.
        chunk_tokens: Tokens of a chunk. If the whole batch fits in one chunk, there is no second forward pass.
    """

    def __init__(self, encoder: Any, autocast: torch.dtype | None, *, shared: bool, chunk_tokens: int) -> None:
        self._first, self._second = encoder.first_stage_model, encoder.second_stage_model
        self._autocast, self._shared, self._chunk_tokens = autocast, shared, chunk_tokens

    def backward(self, batch: Any, context_rows_M: Tensor) -> Tensor:
        """Add the gradients of a batch, whose context is the documents `context_rows_M`, and return the loss."""
        from hardbatch.trainer.loss import info_nce
        from hardbatch.trainer.tokens import concat

        texts = concat(batch.sides)
        carried = 0 if self._shared else len(context_rows_M)
        text_chunks = chunks_of(texts.lengths_N, self._chunk_tokens, carried)
        context_lengths_M = batch.documents.lengths_N[context_rows_M]
        context_chunks = [context_rows_M[chunk] for chunk in chunks_of(context_lengths_M, self._chunk_tokens, 0)]
        whole = len(text_chunks) == len(context_chunks) == 1

        with torch.set_grad_enabled(whole):
            context_MH = torch.cat([self._embed_context(batch.documents, chunk) for chunk in context_chunks])
            embeddings_ND = torch.cat([self._embed(texts, chunk, context_MH) for chunk in text_chunks])

        leaf_ND = embeddings_ND if whole else embeddings_ND.requires_grad_()
        size = len(batch.queries)
        equivalent_BB = batch.equivalent_BB.to(leaf_ND.device)
        loss = info_nce(leaf_ND[:size], leaf_ND[size : 2 * size], equivalent_BB, temperature=0.02).value
        loss.backward()
        if whole:
            return loss.detach()

        # The second forward pass, chunk by chunk: the gradients of the embeddings go through the second stage to the
        # context vectors, and from those through the first stage.
        context_MH.requires_grad_()
        for chunk in text_chunks:
            self._embed(texts, chunk, context_MH).backward(leaf_ND.grad[chunk[0] : chunk[-1] + 1])
        done = 0
        for chunk in context_chunks:
            gradient = context_MH.grad[done : done + len(chunk)]
            self._embed_context(batch.documents, chunk).backward(gradient)
            done += len(chunk)
        return loss.detach()

    def _embed_context(self, documents: Any, rows: Tensor) -> Tensor:
        """Return the context vectors of some documents."""
        ids, lengths = gather(documents, rows)
        stage = self._first
        with self._autocasting(ids.device):
            hidden = run_row(stage.backbone, stage.backbone.get_input_embeddings()(ids), lengths, 0)
            pooled = mean_of_texts(hidden, lengths)
            unit = pooled * torch.rsqrt(pooled.pow(2).mean(-1, keepdim=True) + 1e-12)
            return stage.head(unit).float()

    def _embed(self, texts: Any, rows: Tensor, context_JH: Tensor) -> Tensor:
        """Return the normalised embeddings of some texts."""
        ids, lengths = gather(texts, rows)
        backbone, size = self._second.backbone, len(context_JH)
        with self._autocasting(ids.device):
            states = torch.cat([context_JH, backbone.get_input_embeddings()(ids).float()])
            if self._shared:
                hidden = run_row(backbone, states, lengths, size)[size:]
            else:
                # Each text carries its own copy of the context. With two context vectors and texts of 1 and 2 tokens,
                # the states c0 c1 a b b are taken in the order 0 1 2 0 1 3 4, of which 2 3 4 are the texts.
                context = torch.arange(size)
                parts = torch.arange(size, size + len(ids)).split(lengths.tolist())
                index = torch.cat([piece for part in parts for piece in (context, part)])
                is_text = (index >= size).nonzero().squeeze(1)
                moved = states[index.to(ids.device)]
                hidden = run_row(backbone, moved, lengths + size, 0, carried=size)[is_text.to(ids.device)]
            return F.normalize(mean_of_texts(hidden, lengths), dim=-1)

    def _autocasting(self, device: torch.device) -> Any:
        return torch.autocast(device.type, dtype=self._autocast, enabled=self._autocast is not None)


def chunks_of(lengths_N: Tensor, chunk_tokens: int, carried: int) -> list[Tensor]:
    """Split consecutive texts into chunks of about `chunk_tokens` tokens, counting `carried` more for each text."""
    ends = (lengths_N + carried).cumsum(0)
    number = (ends - 1) // chunk_tokens
    return list(torch.arange(len(lengths_N)).split(number.bincount(minlength=1)[number.unique()].tolist()))


def gather(tokens: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids of the texts `rows`, one after the other, and their lengths, which are on the CPU."""
    lengths = tokens.lengths_N[rows]
    starts = (tokens.lengths_N.cumsum(0) - tokens.lengths_N)[rows]
    index = starts.repeat_interleave(lengths) + places_in_texts(lengths)
    return tokens.ids[index.to(tokens.ids.device, non_blocking=True)], lengths


def places_in_texts(lengths: Tensor) -> Tensor:
    """Return the place of each token in its own text: lengths 1 and 3 give 0 0 1 2."""
    return torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)


def run_row(backbone: Any, states: Tensor, lengths: Tensor, num_context: int, *, carried: int = 0) -> Tensor:
    """Return the hidden states of one packed row.

    Args:
        backbone: The model of a stage.
        states: Input embeddings of the row: `num_context` shared ones, then the texts.
        lengths: Tokens of each text, on the CPU.
        num_context: Context vectors at the start of the row, which all texts read.
        carried: Context vectors at the start of each text. They stand at position 0, and so does the first token.
    """
    positions = (places_in_texts(lengths) - carried).clamp(min=0)
    positions = torch.cat([torch.zeros(num_context, dtype=torch.long), positions])
    return backbone(
        inputs_embeds=states[None],
        position_ids=positions[None].to(states.device, non_blocking=True),
        bounds=F.pad(lengths.cumsum(0), (1, 0)).int().to(states.device, non_blocking=True),
        longest=int(lengths.max()),
        num_context=num_context,
    ).last_hidden_state[0]


def mean_of_texts(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean over the tokens of each text, in float32."""
    on_device = lengths.to(hidden.device, non_blocking=True)
    return torch.segment_reduce(hidden.float(), "mean", lengths=on_device, axis=0, unsafe=True)


def layers_of(backbone: Any) -> Any:
    return backbone.layers if hasattr(backbone, "layers") else backbone.encoder.layer


def take_gradients(encoder: Any) -> dict[str, Tensor]:
    """Move the gradients out of the encoder: return one for each parameter that has one, and leave None behind."""
    found = {name: p.grad.flatten().double() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad(set_to_none=True)
    return found


def cosine_of_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the cosine over the parameters that have a gradient in both."""
    names = sorted(one.keys() & other.keys())
    product = sum(float(one[name] @ other[name]) for name in names)
    norms = [math.sqrt(sum(float(side[name] @ side[name]) for name in names)) for side in (one, other)]
    return product / (norms[0] * norms[1])


def step_flops(encoder: Any, batch: Any, *, shared: bool) -> float:
    """Return the FLOPs of a forward and backward pass over real tokens.

    They are six for each weight and token, and twelve for each layer, unit of width and attention score. With a shared
    context its tokens are computed once for the batch, and a text of T tokens has T·(J + T) scores.
    """
    size = encoder.config.context_size
    config = encoder.backbone_config
    lengths = torch.cat([tokens.lengths_N for tokens in batch.sides]).double()
    context = batch.documents.lengths_N[:size].double()
    if shared:
        tokens = lengths.sum() + size
        scores = (lengths * (size + lengths)).sum() + size**2
    else:
        tokens = (lengths + size).sum()
        scores = (lengths + size).pow(2).sum()

    def weights(stage: Any) -> int:
        return sum(p.numel() for name, p in stage.named_parameters() if "embeddings" not in name and p.dim() > 1)

    attention = 12 * config.num_hidden_layers * config.hidden_size
    first = 6 * weights(encoder.first_stage_model) * context.sum() + attention * context.pow(2).sum()
    return float(6 * weights(encoder.second_stage_model) * tokens + attention * scores + first)
