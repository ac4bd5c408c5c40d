"""What `SentenceTransformerTrainer` needs to train on batches of `build_batches`: a batch sampler and a loss.

Shape letters: B slots of a batch, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler

from hardbatch.pipeline.arrays import Array
from hardbatch.trainer.loss import info_nce

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class MaskedBatches(Protocol):
    """What the loss reads of `batches.Batches`."""

    batch_size: int

    def false_negatives(self, number: int) -> Array: ...


class BatchSamplerMaker:
    """Makes the batch sampler when the trainer asks for it, as `SentenceTransformerTrainingArguments` expects.

    It fits every dataset that `Batches.to_dataset` made of batches of this size, so one will do for several.

    Args:
        batch_size: B.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size

    def __call__(
        self,
        dataset: Any,
        batch_size: int,
        drop_last: bool = False,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> WholeBatches:
        """Makes the sampler; raises ValueError if the dataset or the batch size is not that of the batches."""
        labels = np.asarray(dataset["label"]) if "label" in dataset.column_names else np.empty(0)
        is_whole = len(labels) % self._batch_size == 0 and np.array_equal(labels, np.arange(len(dataset)))
        if not is_whole or "equivalent_slots" in dataset.column_names:
            raise ValueError(
                f"the trainer's dataset must be batches.to_dataset(), whole: batches of {self._batch_size} rows, which "
                "its column `label` numbers, without the columns of masks=True; given "
                f"{len(dataset)} rows with the columns {dataset.column_names}"
            )
        if batch_size != self._batch_size:
            raise ValueError(
                f"per_device_train_batch_size is {batch_size}, but the batches hold {self._batch_size} pairs; set it "
                f"to {self._batch_size} (a model that runs on several GPUs of one process multiplies it: use torchrun)"
            )
        return WholeBatches(len(dataset) // batch_size, batch_size, seed)


class WholeBatches(BatchSampler):
    """All batches in an order drawn by (seed, epoch); slot s of batch i is row i·B + s.

    Ranks take turns. The last batches of an epoch's order that not every rank would get are left out, so all
    ranks do the same number of steps.
    """

    def __init__(self, num_batches: int, batch_size: int, seed: int) -> None:
        self._num_batches, self._seed, self._epoch = num_batches, seed, 0
        self.batch_size = batch_size
        self.drop_last = True
        self.sampler: Any = self  # accelerate sets the epoch of this attribute if there are several ranks

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        ranks = _num_ranks()
        return self._num_batches // ranks * ranks

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(self._num_batches)
        for number in order[: len(self)].tolist():
            yield list(range(number * self.batch_size, (number + 1) * self.batch_size))


def _num_ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


class MaskedInfoNCELoss(nn.Module):
    """InfoNCE from queries to documents, which leaves a batch's false negatives out (Eq. 4).

    Negatives are those of one batch; ranks do not exchange any.

    Args:
        model: The model that is trained.
        batches: The batches that it is trained on.
        temperature: Divides the cosines. At .05 a short fine-tuning gains more than at .02 (docs/quality.md).
    """

    def __init__(self, model: SentenceTransformer, batches: MaskedBatches, *, temperature: float = 0.05) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self._batches = batches

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The mean loss of the batch.

        Args:
            sentence_features: The tokens of the queries, and those of the documents.
            labels: The rows of `Batches.to_dataset` (int, B), which must be of one batch. None, in evaluation
                alone: the loss without masks, for a dataset of other pairs.
        """
        queries_BD, documents_BD = (
            F.normalize(self.model(features)["sentence_embedding"], dim=1) for features in sentence_features
        )
        mask_BB = self._mask(labels, len(queries_BD)).to(queries_BD.device)
        return info_nce(queries_BD, documents_BD, mask_BB, temperature=self.temperature).value

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says about the loss."""
        return {"temperature": self.temperature, "batch_size": self._batches.batch_size}

    def _mask(self, labels: Tensor | None, size: int) -> Tensor:
        if labels is None:
            if self.model.training:
                raise ValueError("the loss got no labels; train on batches.to_dataset(), whose labels number its rows")
            return torch.zeros((size, size), dtype=torch.bool)
        rows = labels.cpu().numpy()
        numbers, slots = np.divmod(rows, self._batches.batch_size)
        if len(np.unique(numbers)) != 1:
            raise ValueError(
                f"the loss got rows of {len(np.unique(numbers))} batches at a time; pass batch_sampler="
                f"batches.batch_sampler and per_device_train_batch_size={self._batches.batch_size} to the trainer"
            )
        return torch.from_numpy(self._batches.false_negatives(int(numbers[0]))[np.ix_(slots, slots)])
