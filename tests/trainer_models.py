"""Tiny backbones and encoders with random weights, built offline, in the shapes that the trainer knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hardbatch.trainer.model import BACKBONES, Encoder, EncoderConfig, choose_attention, new_backbone
from tests.models import MAX_LENGTH_TOKENS, VOCABULARY_SIZE, minilm_folder

HIDDEN_SIZE = 32
CONTEXTUAL_TYPES = [name for name, family in BACKBONES.items() if family.reads_context]


def tiny_config(model_type: str = "bert", *, hidden_size: int = HIDDEN_SIZE, num_layers: int = 2) -> Any:
    """The configuration of a backbone of one of `hardbatch.trainer.model.BACKBONES`, without dropout."""
    from transformers import AutoConfig

    options: dict[str, dict[str, Any]] = {
        "distilbert": {"hidden_dim": 2 * hidden_size, "dropout": 0.0, "attention_dropout": 0.0},
        "nomic_bert": {"head_dim": hidden_size // 4},
        "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2, "pad_token_id": 0},
    }
    as_in_bert = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=128,
        **options.get(model_type, as_in_bert),
    )


def tiny_encoder(
    model_type: str = "bert",
    context_size: int = 4,
    *,
    max_length_tokens: int = MAX_LENGTH_TOKENS,
    pool_prompt: bool = True,
    hidden_size: int = HIDDEN_SIZE,
    num_layers: int = 2,
    seed: int = 0,
    attention: str = "auto",
    context_attention: str = "full",
) -> Encoder:
    """An encoder in evaluation mode; the same seed gives the same weights. `context_size` 0: a biencoder."""
    import torch

    config = EncoderConfig(
        context_size=context_size,
        max_length_tokens=max_length_tokens,
        pool_prompt=pool_prompt,
        context_attention=context_attention,
    )
    attention = choose_attention(attention, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = tiny_config(model_type, hidden_size=hidden_size, num_layers=num_layers)
        first = new_backbone(backbone, attention) if context_size else None
        encoder = Encoder(config, first, new_backbone(backbone, attention))
        if encoder.first_stage_model is not None:
            embeddings = encoder.second_stage_model.backbone.get_input_embeddings().weight
            encoder.first_stage_model.initialise_head(embeddings)
    return encoder.eval()


def tiny_backbone(folder: Path, model_type: str = "bert", *, seed: int = 0, **shape: int) -> Path:
    """Saves a backbone and a tokenizer of its kind in `folder`, for AutoModel and AutoTokenizer to load."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new_backbone(tiny_config(model_type, **shape)).save_pretrained(folder)
    save_tokenizer(folder, model_type)
    return folder


def save_tokenizer(folder: Path, model_type: str = "bert") -> Path:
    """Saves a tokenizer of the kind that the real models of a type have, with few tokens unless it is MiniLM's.

    The special tokens have the ids of the real ones. Skips the test if MiniLM's package is not installed.
    """
    from transformers import AutoTokenizer, MPNetTokenizer, RobertaTokenizer, XLMRobertaTokenizer

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if model_type == "roberta":
        trained = _trained("BPE", special)
        tokenizer = RobertaTokenizer(vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]])
    elif model_type in ("camembert", "xlm-roberta"):
        tokenizer = XLMRobertaTokenizer(vocab=[tuple(piece) for piece in _trained("Unigram", special)["vocab"]])
    else:
        tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
        if model_type == "mpnet":
            ids = tokenizer.get_vocab()
            words = [*special, *sorted(ids, key=ids.__getitem__)[100:10_000]]
            tokenizer = MPNetTokenizer(vocab={word: number for number, word in enumerate(words)})
    tokenizer.save_pretrained(folder)
    return folder


def _trained(kind: str, special: list[str]) -> dict[str, Any]:
    """The vocabulary of a subword model that is trained on this file, as the tokenizers library writes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(getattr(models, kind)())
    if kind == "BPE":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token=special[3])
    tokenizer.train_from_iterator(Path(__file__).read_text(encoding="utf-8").splitlines(), trainer)
    found: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return found


def save_model_folder(folder: Path, encoder: Encoder, *, prompts: dict[str, str] | None = None) -> Path:
    """Saves what readers of models need of a checkpoint: config.json, weights, tokenizer, prompts in state.json."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    weights = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(encoder.config_dict()), encoding="utf-8")
    if prompts is not None:
        (folder / "state.json").write_text(json.dumps({"prompts": prompts}), encoding="utf-8")
    return folder
