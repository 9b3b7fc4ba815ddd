"""Metrics of a model on a held-out split during training. Every readable image counts once."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from vitcli.data.batch import Batch, move_to_device
from vitcli.data.image_set import ImageSet
from vitcli.data.loader import eval_batches
from vitcli.errors import VitcliError
from vitcli.evals.scoring import multi_label_metrics
from vitcli.progress import Watcher
from vitcli.weights.loaded import LoadedModel

EVAL_BATCH_SIZE = 256

Outcome = tuple[int, int, int]  # index of the image, its class, the predicted class


@dataclass(frozen=True)
class Validation:
    """Metrics of all processes, and the predictions of this one (none for multi-label images)."""

    metrics: dict[str, float]
    outcomes: list[Outcome] = field(default_factory=list)


@torch.inference_mode()
def run_validation(
    model: LoadedModel,
    images: ImageSet,
    accelerator: Any,
    watch: Watcher,
    broken: dict[str, str],
    limit: int | None = None,
) -> Validation:
    """Top-1 accuracy and cross-entropy, or mean average precision for multi-label images.

    Each process evaluates its own part. The number of processes does not change the result.

    Args:
        broken: collects the images that cannot be read, with the reason.
        limit: stop after about this many images; used to measure the speed.

    Raises:
        VitcliError: no image can be read.
    """
    outputs = _outputs(model, images, accelerator, watch, broken)
    if limit is not None:
        num_batches = max(1, limit // (EVAL_BATCH_SIZE * accelerator.num_processes))
        outputs = islice(outputs, num_batches)
    if images.targets is not None:
        return Validation(_validate_multi_label(model, outputs, accelerator))
    # Sums in fp64, because in fp32 a count stops to grow at 2^24.
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    outcomes: list[Outcome] = []
    for logits, batch in outputs:
        loss = _sum_of_losses(model, logits, batch.labels)
        predicted = logits.argmax(dim=1)
        correct = (predicted == batch.labels).sum()
        columns = (batch.indices, batch.labels.cpu(), predicted.cpu())
        outcomes += list(zip(*(column.tolist() for column in columns), strict=True))
        sums += torch.stack([loss.double(), correct.double(), sums.new_tensor(len(logits))])
    loss_sum, correct_sum, count = accelerator.reduce(sums, reduction="sum").tolist()
    if not count:
        raise _no_readable_image()
    metrics = {"loss": loss_sum / count, "accuracy": correct_sum / count, "images": count}
    return Validation(metrics, outcomes)


def _sum_of_losses(model: LoadedModel, logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K), (B,) -> the sum () of the cross-entropies that belong to the head's activation.

    Every objective is validated by it, so that runs with different objectives can be compared.
    """
    if model.head_activation == "softmax":
        return cross_entropy(logits, labels, reduction="sum")
    targets = one_hot(labels, logits.shape[1]).float()
    return binary_cross_entropy_with_logits(logits, targets, reduction="sum")


def _validate_multi_label(
    model: LoadedModel, outputs: Iterator[tuple[Tensor, Batch]], accelerator: Any
) -> dict[str, float]:
    # Average precision ranks all images of a class, so every process needs all N x K scores.
    scores, targets, loss = [], [], 0.0
    for logits, batch in outputs:
        scores.append(model.probabilities(logits).float().cpu().numpy())
        targets.append(batch.labels.cpu().numpy())
        loss += float(
            binary_cross_entropy_with_logits(logits, batch.labels.float(), reduction="sum")
        )
    parts = [(scores, targets, loss)]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        parts = gather_object(parts)
    if not any(scores for scores, _, _ in parts):
        raise _no_readable_image()
    found = multi_label_metrics(
        np.concatenate([x for scores, _, _ in parts for x in scores]),
        np.concatenate([x for _, targets, _ in parts for x in targets]),
    )
    loss = sum(part[2] for part in parts) / found.images
    return {"loss": loss, "map": found.map, "micro_f1": found.micro_f1, "images": found.images}


def _outputs(
    model: LoadedModel,
    images: ImageSet,
    accelerator: Any,
    watch: Watcher,
    broken: dict[str, str],
) -> Iterator[tuple[Tensor, Batch]]:
    """((B, K) logits, their batch) of this process's part of the images."""
    preprocess = model.preprocess
    assert preprocess is not None
    batches = eval_batches(
        images,
        preprocess,
        batch_size=EVAL_BATCH_SIZE,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
    with watch.progress("test", len(images)) as bar:
        for batch in move_to_device(batches, accelerator.device):
            broken.update(batch.broken)
            if not len(batch):  # every image of it is broken
                continue
            with accelerator.autocast():
                logits = model(preprocess.normalize(batch.images)).float()  # (B, K)
            yield logits, batch
            bar.advance(len(logits))  # after the `yield`: the caller is done with the batch


def _no_readable_image() -> VitcliError:
    return VitcliError(
        "no image of the test split can be read", "`vitcli patchify IMAGE` gives the reason"
    )
