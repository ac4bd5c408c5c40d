"""The size of chunks, what memory they take, and what is said when it was too much."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hardbatch.pipeline.errors import HardbatchError
from hardbatch.trainer.attention import PACKED
from hardbatch.trainer.memory import (
    CHUNK_TOKENS_ON_CPU,
    DeviceMemoryError,
    MemoryNeeds,
    bytes_per_token,
    choose_chunk_tokens,
    memory_line,
    naming_the_flag,
)
from hardbatch.trainer.model import new_backbone
from tests.models import VOCABULARY_SIZE
from tests.trainer_models import tiny_config

NEEDS = MemoryNeeds(num_weights=10_000_000, bytes_per_token=500_000, longest_text_tokens=1_024)
CPU = torch.device("cpu")


def kept_for_backward(backbone, tokens_NT):
    """Bytes that autograd keeps of a forward pass under bfloat16, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # holds the tensor, so that no place is used twice
        return tensor

    mask_NT = torch.ones_like(tokens_NT)
    mask_NT[0, -1] = 0  # as in a padded piece
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        backbone(input_ids=tokens_NT, attention_mask=mask_NT)
    return sum(num_bytes for num_bytes, _ in kept.values())


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet", "nomic_bert", "roberta"])
def test_the_estimate_is_near_what_a_layer_keeps(model_type):
    """Two depths are compared, which leaves embeddings and the copies of single weights out."""
    num_texts, length = 8, 96
    tokens_NT = torch.randint(5, VOCABULARY_SIZE, (num_texts, length), generator=torch.Generator().manual_seed(0))
    configs = [tiny_config(model_type, hidden_size=128, num_layers=layers) for layers in (1, 5)]
    for config in configs:
        setattr(config, "hidden_dim" if model_type == "distilbert" else "intermediate_size", 512)
    kept = [kept_for_backward(new_backbone(config).train(), tokens_NT) for config in configs]
    weights = sum(p.numel() for p in new_backbone(configs[0]).parameters() if p.dim() > 1)
    deeper = sum(p.numel() for p in new_backbone(configs[1]).parameters() if p.dim() > 1)
    measured = (kept[1] - kept[0] - 2 * (deeper - weights)) / tokens_NT.numel() / 4  # bfloat16 copies of weights

    config = configs[0]
    attention = config._attn_implementation
    estimated = bytes_per_token(config, longest_text_tokens=length, autocast=torch.bfloat16, attention=attention)
    assert attention == ("eager" if model_type == "mpnet" else "sdpa")
    assert 0.8 < estimated / measured < 1.6, (estimated, measured)


def test_the_estimate_at_the_width_that_was_measured():
    config = tiny_config("nomic_bert", hidden_size=768, num_layers=12)
    config.intermediate_size = 3_072
    estimated = bytes_per_token(config, longest_text_tokens=1_024, autocast=torch.bfloat16)
    assert estimated / 12 == pytest.approx(44.2 * 1_024 + 2 * 1_024, rel=0.01)
    assert bytes_per_token(config, longest_text_tokens=1_024, autocast=None) == 2 * estimated
    eager = bytes_per_token(config, longest_text_tokens=1_024, autocast=torch.bfloat16, attention="eager")
    assert eager - estimated == 12 * 8 * 4 * 1_024  # layers, bytes, heads, places
    packed = bytes_per_token(config, longest_text_tokens=1_024, autocast=torch.bfloat16, attention=PACKED)
    assert estimated - packed == 12 * 2 * 1_024  # a row of the mask in each layer


def test_auto_is_what_the_memory_holds():
    gib = 2**30
    tokens = choose_chunk_tokens("auto", NEEDS, 40 * gib)
    assert tokens % 1_024 == 0
    assert 0.8 < (NEEDS.chunk_bytes(tokens) + NEEDS.fixed_bytes()) / (40 * gib) <= 0.9
    large = replace(NEEDS, num_weights=1_000_000_000)  # 14.9 GiB, of which a larger GPU needs no more
    assert choose_chunk_tokens("auto", large, 80 * gib) > 2 * choose_chunk_tokens("auto", large, 40 * gib) > 0
    assert choose_chunk_tokens("auto", NEEDS, 40 * gib - 10**6) == tokens
    assert choose_chunk_tokens("auto", NEEDS, gib // 10) == 1_024  # one text at least
    assert choose_chunk_tokens(77, NEEDS, 40 * gib) == 77


def test_auto_on_the_cpu_is_a_fixed_number():
    assert choose_chunk_tokens("auto", NEEDS, None) == CHUNK_TOKENS_ON_CPU == 256 * (64 + 64)


def test_the_line_tells_tokens_and_memory():
    line = memory_line(32_768, NEEDS)
    assert line.startswith("chunks of at most 32,768 tokens, about 15.26 GiB, beside 0.15 GiB of weights")


@pytest.mark.parametrize(
    ("chunk_tokens", "advice"),
    [(32_768, "give --chunk-tokens 16384 in place of 32768"), (2_047, "give a smaller --max-length, --context-size")],
)
def test_out_of_memory_names_the_flag(chunk_tokens, advice):
    with pytest.raises(DeviceMemoryError) as caught, naming_the_flag(CPU, chunk_tokens, NEEDS):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more lines")
    assert isinstance(caught.value, HardbatchError) and caught.value.exit_code == 1
    assert advice in str(caught.value) and "\n" not in str(caught.value)


def test_out_of_memory_tells_what_a_gpu_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 78 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    with pytest.raises(DeviceMemoryError) as caught, naming_the_flag(torch.device("cuda", 1), 4_096, NEEDS):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    assert "78.0 of 80.0 GiB in use on cuda:1, NVIDIA H100 80GB HBM3" in str(caught.value)


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match="a fault of ours"), naming_the_flag(CPU, 1, NEEDS):
        raise RuntimeError("a fault of ours")
