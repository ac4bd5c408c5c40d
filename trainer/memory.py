"""How many tokens go through the model at once, and how much memory that takes.

A training keeps 16 bytes for each weight (the float32 weight, its gradient and AdamW's two
moments). What the backward pass of a chunk needs comes on top and grows with the tokens of the
chunk, so that is what a chunk is bounded by.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hardbatch.pipeline.errors import HardbatchError
from hardbatch.trainer.attention import PACKED

CHUNK_TOKENS_ON_CPU = 32_768  # 256 texts of 64 tokens, each behind 64 tokens of context
BYTES_PER_WEIGHT = 16

# The rest is for fragments of the allocator, temporaries of a layer, the loss and the bfloat16
# copies of the weights.
_SHARE_FOR_CHUNKS = 0.85

# Rounding lets a run that is resumed with slightly less free memory compute the same chunks.
_ROUNDED_DOWN_TO = 1_024

_GIB = 2**30


class DeviceMemoryError(HardbatchError):
    """A step did not fit the memory of the GPU."""


@dataclass(frozen=True, kw_only=True)
class MemoryNeeds:
    """What a training needs of a device's memory."""

    num_weights: int
    bytes_per_token: int
    """Bytes that a chunk keeps for its backward pass, per computed token."""
    longest_text_tokens: int
    """Tokens of the longest text, its context included. No chunk can be smaller."""

    def chunk_bytes(self, chunk_tokens: int) -> int:
        """Returns the bytes of the largest chunk, its padding and context included."""
        return chunk_tokens * self.bytes_per_token

    def fixed_bytes(self) -> int:
        """Returns the bytes of weights, gradients and optimizer."""
        return self.num_weights * BYTES_PER_WEIGHT


def bytes_per_token(
    backbone: Any, *, longest_text_tokens: int, autocast: torch.dtype | None, attention: str = "sdpa"
) -> int:
    """Estimates the bytes that all layers keep for the backward pass, for each token.

    A layer of a backbone of width H and inner width I keeps about 27 · H + 8 · I bytes a token
    under bfloat16 autocast: 44 KiB at H = 768, I = 3,072, as measured with NomicBERT, whose gated
    MLP keeps more than others of that width. A padded piece adds a row of the attention mask, of
    `longest_text_tokens` at most, and eager attention the scores of each head in place of the fused
    kernel's sums. A packed row has neither. Everything doubles in float32.

    Args:
        backbone: The configuration of the backbone, as in transformers.
        longest_text_tokens: Tokens of the longest text, its context included.
        autocast: The type of autocast, None for float32 throughout.
        attention: The attention implementation, as transformers names it.
    """
    inner_width = getattr(backbone, "hidden_dim", None) or backbone.intermediate_size  # the former in distilbert
    in_layer = 27 * backbone.hidden_size + 8 * inner_width
    of_mask = 0 if attention == PACKED else 2 * longest_text_tokens
    of_scores = 8 * backbone.num_attention_heads * longest_text_tokens if attention == "eager" else 0

    scale = 1 if autocast is not None else 2
    return int(backbone.num_hidden_layers * scale * (in_layer + of_mask + of_scores))


def choose_chunk_tokens(asked: int | str, needs: MemoryNeeds, free_bytes: int | None) -> int:
    """Returns the tokens of a chunk: those that --chunk-tokens asks for, or for `auto` those that fit.

    Args:
        asked: A number of tokens, or auto.
        needs: What the training needs.
        free_bytes: Bytes of the device that are free before the model is loaded; None on the CPU.

    Returns:
        At least the tokens of the longest text, which a chunk holds whatever its size.
    """
    if not isinstance(asked, str):
        return asked
    if free_bytes is None:
        return max(CHUNK_TOKENS_ON_CPU, needs.longest_text_tokens)

    left = free_bytes - needs.fixed_bytes()
    tokens = int(left * _SHARE_FOR_CHUNKS) // needs.bytes_per_token
    return max(tokens // _ROUNDED_DOWN_TO * _ROUNDED_DOWN_TO, needs.longest_text_tokens)


def free_memory(device: torch.device) -> int | None:
    """Returns the free bytes of a GPU, None for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def memory_line(chunk_tokens: int, needs: MemoryNeeds) -> str:
    """Returns the line about memory that a training prints before it begins."""
    of_chunk, fixed = needs.chunk_bytes(chunk_tokens), needs.fixed_bytes()
    return (
        f"chunks of at most {chunk_tokens:,} tokens, about {of_chunk / _GIB:.2f} GiB, beside {fixed / _GIB:.2f} GiB of "
        "weights, gradients and optimizer"
    )


@contextlib.contextmanager
def naming_the_flag(device: torch.device, chunk_tokens: int, needs: MemoryNeeds) -> Iterator[None]:
    """Turns an out-of-memory error of the body into a DeviceMemoryError of one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise DeviceMemoryError(_explain(_memory_in_use(device), chunk_tokens, needs)) from None


def _memory_in_use(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    used, total = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
    return f"{used / _GIB:.1f} of {total / _GIB:.1f} GiB in use on {device}, {torch.cuda.get_device_name(device)}"


def _explain(in_use: str, chunk_tokens: int, needs: MemoryNeeds) -> str:
    half = chunk_tokens // 2
    if half >= needs.longest_text_tokens:
        advice = f"give --chunk-tokens {half} in place of {chunk_tokens}, and --resume auto if there is a checkpoint"
    else:
        advice = (
            f"--chunk-tokens {chunk_tokens} holds about one text of {needs.longest_text_tokens} tokens already, with "
            "its context; give a smaller --max-length, --context-size or --backbone"
        )
    return f"a step ran out of memory ({in_use}); {advice}"
