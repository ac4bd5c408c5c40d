"""Finds, checks and builds everything that a training needs before its first step, or restores it from a checkpoint."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from hardbatch.pipeline.artifacts.files import as_user_error
from hardbatch.pipeline.artifacts.lock import lock
from hardbatch.pipeline.errors import ConfigError
from hardbatch.trainer.backbone import build_encoder, find_backbone, ignored_modules, initial_encoder
from hardbatch.trainer.batch import Tokenizer, load_tokenizer
from hardbatch.trainer.checkpoint import TrainState, check_resumable, load_optimizer, read_state
from hardbatch.trainer.collection import Collection, load_collection
from hardbatch.trainer.config import TrainConfig
from hardbatch.trainer.context import CONTEXT_FILE, ContextDocuments, draw_from_shards
from hardbatch.trainer.export import refuse_foreign
from hardbatch.trainer.gradcache import GradCache, StepConfig
from hardbatch.trainer.memory import MemoryNeeds, bytes_per_token, choose_chunk_tokens, free_memory, memory_line
from hardbatch.trainer.model import Encoder
from hardbatch.trainer.order import BatchOrder
from hardbatch.trainer.ranks import Ranks
from hardbatch.trainer.shards import Shards, open_shards


@dataclass(kw_only=True)
class Training:
    """A training that is about to continue at `state`."""

    config: TrainConfig
    ranks: Ranks
    shards: Shards
    order: BatchOrder
    encoder: Encoder
    tokenizer: Tokenizer
    model_files: dict[str, bytes]
    """Tokenizer and context documents by file name, for checkpoints; on the main rank only."""
    context: ContextDocuments
    """Documents of the export's default context; on the main rank only."""
    optimizer: torch.optim.AdamW
    collections: list[Collection]
    state: TrainState
    notices: list[str]
    memory: MemoryNeeds
    chunk_tokens: int
    """Tokens that are computed at once: --chunk-tokens, or what `auto` found."""

    @property
    def step_size(self) -> int:
        """Batches in a step: W · A."""
        return self.ranks.world_size * self.config.accumulate

    @property
    def autocast(self) -> torch.dtype | None:
        """The type of autocast; None is float32 throughout."""
        return autocast_dtype(self.config.precision, self.ranks.device)

    def facts(self) -> dict[str, Any]:
        """What all ranks must agree on before the first step."""
        state = self.state
        where = {"step": state.step, "batch": state.position, "end": state.end_position, "step size": self.step_size}
        return {**where, "shards": state.shards_key, "settings": state.settings}

    def gradients(self) -> GradCache:
        """The computation of losses and gradients."""
        config = self.config
        step = StepConfig(
            chunk_tokens=self.chunk_tokens,
            temperature=config.temperature,
            sequence_dropout=config.sequence_dropout,
            no_context_rate=config.no_context_rate,
            seed=config.seed,
            autocast=self.autocast,
            pad_id=self.tokenizer.pad_id,
        )
        return GradCache(self.encoder, step)


@contextlib.contextmanager
def lock_output(output: Path) -> Iterator[None]:
    """Makes the folder `output`, and keeps other trainings out of it for the body.

    Raises:
        ConfigError: The folder cannot be made.
        LockedError: Another training writes to it.
    """
    with contextlib.ExitStack() as stack:
        try:
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(output / ".training.lock"))
        except OSError as error:
            raise as_user_error(error) or ConfigError(f"--output {output}: {error.strerror}") from None
        yield


def start_training(config: TrainConfig, ranks: Ranks, checkpoint: Path | None, notices: list[str]) -> Training:
    """Opens shards and evaluation folders, and builds the model or loads it from `checkpoint`.

    Waits for no other rank.

    Args:
        config: The settings.
        ranks: The processes of the training.
        checkpoint: What `find_checkpoint` returned on the main rank, which has verified every byte.
        notices: Lines for the log, to which this function adds.

    Raises:
        ConfigError: The settings do not fit the shards, the model or the checkpoint.
        InputError: An evaluation folder is wrong.
        IntegrityError: Shards or weights are damaged.
    """
    shards = open_shards(config.shards)
    collections = [load_collection(folder) for folder in evaluation_folders(config, shards)]
    names = [collection.name for collection in collections]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--eval: two folders are named {name}, and their metrics would mix; rename one")
    refuse_foreign(export_folder(config.output))
    precision = "bf16" if autocast_dtype(config.precision, ranks.device) else "fp32"
    if config.attention.startswith("flash") and precision == "fp32":
        raise ConfigError(f"--attention {config.attention} computes in bf16 only; give --precision bf16")
    settings = config.trajectory() | {"precision": precision}
    order = shards.order(seed=config.seed, similar_lengths=config.similar_lengths)
    step_size = ranks.world_size * config.accumulate
    order.step_at(0, step_size)  # refuses an epoch of less than one step
    if checkpoint is not None:
        state = read_state(checkpoint)
        check_resumable(checkpoint, state, shards_key=shards.key, settings=settings)
        folder, encoder = checkpoint, initial_encoder(config, checkpoint, flag="--resume", verified=True)
        notices.append(f"resuming from {checkpoint}, step {state.step:,}, batch {state.position:,}")
    else:
        folder = config.init_from or find_backbone(config.backbone)
        if config.init_from is None and (ignored := ignored_modules(folder)):
            notices.append(
                f"warning: --backbone {config.backbone} has {' and '.join(ignored)}, which this training leaves out; "
                "it pools by the mean over tokens, so the model starts worse than it is"
            )
        encoder = (
            initial_encoder(config, folder, flag="--init-from", verified=not ranks.is_main)  # every rank reads them
            if config.init_from
            else build_encoder(config, folder)
        )
        state = _fresh_state(config, shards, order, step_size, settings)
        if state.warmup_batches >= state.end_position:
            notices.append(
                f"the warm-up of {config.warmup_steps:,} steps is longer than this training, so the learning rate "
                "never reaches its peak; give a smaller --warmup-steps"
            )
    tokenizer = load_tokenizer(
        folder,
        max_length_tokens=config.max_length,
        vocab_size=encoder.backbone_config.vocab_size,
        hard_negatives=config.hard_negatives,
        same_answer=config.positives == "same-answer",
    )
    if config.hard_negatives and not shards.with_negatives:
        raise ConfigError(
            f"--hard-negatives {config.hard_negatives}: {config.shards} has no hard negatives; leave it out"
        )
    if config.positives == "same-answer":
        notices.append(_describe_positives(shards))

    if ranks.device.type == "cuda" and (rate := packed_attention_dropout(encoder)):
        notices.append(
            f"warning: packed rows are slow with attention dropout ({rate:g}), which the fused kernels do not have; "
            "give --dropout 0"
        )

    memory = _memory_needs(config, encoder, autocast_dtype(config.precision, ranks.device))
    chunk_tokens = choose_chunk_tokens(config.chunk_tokens, memory, free_memory(ranks.device))
    encoder = encoder.to(ranks.device).train()
    optimizer = build_optimizer(encoder, config)
    if checkpoint is not None:
        load_optimizer(checkpoint, encoder, optimizer)

    context = ContextDocuments()
    model_files = _files_of_tokenizer(folder) if ranks.is_main else {}
    if ranks.is_main and encoder.config.context_size:
        context = draw_from_shards(shards, encoder.config.context_size, seed=config.seed)
        model_files[CONTEXT_FILE] = context.to_bytes()
    return Training(
        config=config,
        ranks=ranks,
        shards=shards,
        order=order,
        encoder=encoder,
        tokenizer=tokenizer,
        model_files=model_files,
        context=context,
        optimizer=optimizer,
        collections=collections,
        state=state,
        notices=notices,
        memory=memory,
        chunk_tokens=chunk_tokens,
    )


def packed_attention_dropout(encoder: Encoder) -> float:
    """Returns the rate of attention dropout if rows are packed, otherwise 0."""
    if not encoder.second_stage_model.is_packed:
        return 0.0
    names = ("attention_probs_dropout_prob", "attention_dropout")  # the latter in distilbert and modernbert
    return max(float(getattr(encoder.backbone_config, name, 0.0)) for name in names)


def _describe_positives(shards: Shards) -> str:
    """Says how many positives --positives same-answer adds; a warning if there are none.

    Raises:
        ConfigError: The shards do not say which documents have the same answer.
    """
    rates_I = shards.index.same_answer_rates_I
    if not shards.with_positives or rates_I is None:
        raise ConfigError(
            f"--positives same-answer: {shards.path} has no positive_slots, which shards have since format version 3; "
            "run the pipeline again to make new shards, or give --positives own"
        )

    num_with = np.count_nonzero(rates_I)
    if num_with == 0:
        return (
            f"warning: --positives same-answer changes nothing: 0 of {len(rates_I):,} batches have positive slots, so "
            "the own document is the only positive of each query"
        )
    mean = 1 + rates_I.mean() * (shards.batch_size - 1)
    return f"{mean:.3f} positives a query; {num_with:,} of {len(rates_I):,} batches have positive slots"


def _memory_needs(config: TrainConfig, encoder: Encoder, autocast: torch.dtype | None) -> MemoryNeeds:
    longest, backbone = config.max_length + config.model_context_size, encoder.backbone_config
    return MemoryNeeds(
        num_weights=sum(parameter.numel() for parameter in encoder.parameters()),
        bytes_per_token=bytes_per_token(
            backbone, longest_text_tokens=longest, autocast=autocast, attention=backbone._attn_implementation
        ),
        longest_text_tokens=longest,
    )


def evaluation_folders(config: TrainConfig, shards: Shards) -> list[Path]:
    """The folders that --eval names. `holdout` stands for what the pipeline held out of these shards.

    Raises:
        ConfigError: Nothing was held out, or the shards were moved out of their workspace.
    """
    folders: list[Path] = []
    for given in config.eval:
        if str(given) != "holdout" or given.is_dir():
            folders.append(given)
            continue
        found = [shards.path.resolve().parent.parent / source / "holdout" for source in shards.pairs]
        found = [folder for folder in found if folder.is_dir()]
        if not found:
            raise ConfigError(
                f"--eval holdout: nothing was held out of {shards.path}, or its workspace is elsewhere; set holdout of "
                "a dataset in the manifest, or name folders"
            )
        folders += found
    return folders


def export_folder(output: Path) -> Path:
    """The folder of a training's export."""
    return output / "export"


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bfloat16, or None for float32; auto is bfloat16 if the hardware supports it. float16 would need loss scaling."""
    if precision == "auto":
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        on_cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if on_gpu or on_cpu else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


def _fresh_state(
    config: TrainConfig, shards: Shards, order: BatchOrder, step_size: int, settings: dict[str, Any]
) -> TrainState:
    """The state before the first step. Its schedule counts batches, so that the number of ranks may change."""
    end_position = config.epochs * order.epoch_length
    if config.max_steps is not None:
        epochs, steps = divmod(config.max_steps, order.epoch_length // step_size)
        end_position = min(end_position, epochs * order.epoch_length + steps * step_size)
    return TrainState(
        step=0,
        position=0,
        warmup_batches=config.warmup_steps * step_size,
        end_position=end_position,
        shards_key=shards.key,
        settings=settings,
        prompts=choose_prompts(shards),
        pairs=0,
        seconds=0.0,
    )


def _files_of_tokenizer(folder: Path) -> dict[str, bytes]:
    """The tokenizer as transformers saves it, by file name, so that it outlives the folder that it came from."""
    with tempfile.TemporaryDirectory() as saved:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(saved)
        return {path.name: path.read_bytes() for path in sorted(Path(saved).iterdir())}


def choose_prompts(shards: Shards) -> dict[str, str]:
    """The prompts of an export: `query` and `document`, which most batches have, and all others by their own name.

    A retrieval prompt (search_query) is preferred if the shards have one, because these two names are
    used for retrieval.
    """
    num_batches = np.bincount(shards.index.domains_I, minlength=len(shards.domains))
    used: Counter[tuple[str, str]] = Counter()
    for domain, number in zip(shards.domains, num_batches, strict=True):
        if domain in shards.prompts:  # `mixed` has the prompts of its pairs
            used[shards.prompts[domain]] += int(number)
    retrieval = [prompts for prompts in used if prompts[0].startswith("search_query")]
    query, document = retrieval[0] if retrieval else used.most_common(1)[0][0]
    named = {
        text.rstrip().rstrip(":"): text for prompts in sorted(used) for text in prompts if text.rstrip().rstrip(":")
    }
    return dict(sorted({**named, "query": query, "document": document}.items()))  # in the order of a checkpoint's JSON


def build_optimizer(encoder: Encoder, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only. The fused kernel took a sixth of the time on a CPU, for MiniLM."""
    matrices = [parameter for parameter in encoder.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in encoder.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def startup_summary(training: Training) -> list[str]:
    """The first lines of the log: shards, model, schedule and memory."""
    shards, state, encoder = training.shards, training.state, training.encoder
    stages = [stage for stage in (encoder.first_stage_model, encoder.second_stage_model) if stage is not None]
    sizes = " + ".join(f"{sum(parameter.numel() for parameter in stage.parameters()) / 1e6:.1f}M" for stage in stages)
    precision = "bf16 autocast" if training.autocast else "fp32"
    return [
        f"shards {shards.key}: {training.order.epoch_length:,} batches of {shards.batch_size} pairs an epoch, "
        f"{len(shards.domains)} domains",
        f"{encoder.config.architecture} model, {sizes} parameters, J = {encoder.config.context_size}, "
        f"{encoder.config.max_length_tokens} tokens; {training.ranks.world_size} ranks on "
        f"{training.ranks.device.type}, {precision}; batches {state.position:,} to {state.end_position:,}",
        memory_line(training.chunk_tokens, training.memory),
    ]
