"""Figures of a model over a held-out split while it trains; every readable image counts once."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitcli.data.batch import Batch, onto
from vitcli.data.image_set import ImageSet
from vitcli.data.loader import eval_batches
from vitcli.errors import VitcliError
from vitcli.evals.multilabel import measure_labels
from vitcli.progress import Watcher
from vitcli.vit import Model

EVAL_BATCH_SIZE = 256

Outcome = tuple[int, int, int]  # which image, its class, the class that was predicted


@torch.inference_mode()
def run_validation(
    model: Model,
    images: ImageSet,
    accelerator: Any,
    watch: Watcher,
    broken: dict[str, str],
    limit: int | None = None,
    outcomes: list[Outcome] | None = None,
) -> dict[str, float]:
    """Top-1 accuracy and cross-entropy; mean average precision where images have several labels.

    Each process takes its own part, and the number of processes changes nothing. What cannot be
    read is noted in `broken`.

    Args:
        limit: of the images, about so many, to see how fast it is.
        outcomes: is filled with what this process predicted, instead of what it held.

    Raises:
        VitcliError: no image can be read.
    """
    outputs = _outputs(model, images, accelerator, watch, broken)
    if limit is not None:
        outputs = islice(outputs, max(1, limit // (EVAL_BATCH_SIZE * accelerator.num_processes)))
    if images.targets is not None:
        return _multi_label_metrics(model, outputs, accelerator)
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    if outcomes is not None:
        outcomes.clear()
    for logits, batch in outputs:
        loss = _loss(model, logits, batch.labels)
        predicted = logits.argmax(dim=1)
        correct = (predicted == batch.labels).sum()
        if outcomes is not None:
            rows = (batch.indices, batch.labels.cpu(), predicted.cpu())
            outcomes += list(zip(*(row.tolist() for row in rows), strict=True))
        sums += torch.stack([loss.double(), correct.double(), sums.new_tensor(len(logits))])
    loss_sum, correct_sum, count = accelerator.reduce(sums, reduction="sum").tolist()
    if not count:
        raise _no_readable_image()
    return {"loss": loss_sum / count, "accuracy": correct_sum / count, "images": count}


def _loss(model: Model, logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K), (B,) -> the sum of the losses () that the head was trained under."""
    if model.head_activation == "softmax":
        return nn.functional.cross_entropy(logits, labels, reduction="sum")
    targets = nn.functional.one_hot(labels, logits.shape[1]).float()
    return nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")


def _multi_label_metrics(
    model: Model, outputs: Iterator[tuple[Tensor, Batch]], accelerator: Any
) -> dict[str, float]:
    """Ranking needs all scores at once: n x K float32 are held, and those of all processes."""
    scores, targets, loss = [], [], 0.0
    for logits, batch in outputs:
        scores.append(model.probabilities(logits).float().cpu().numpy())
        targets.append(batch.labels.cpu().numpy())
        wanted = batch.labels.float()
        loss += float(
            nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        )
    parts = [(scores, targets, loss)]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        parts = gather_object(parts)
    if not any(scores for scores, _, _ in parts):
        raise _no_readable_image()
    found = measure_labels(
        np.concatenate([x for scores, _, _ in parts for x in scores]),
        np.concatenate([x for _, targets, _ in parts for x in targets]),
    )
    loss = sum(part[2] for part in parts) / found.images
    return {"loss": loss, "map": found.map, "micro_f1": found.micro_f1, "images": found.images}


def _outputs(
    model: Model,
    images: ImageSet,
    accelerator: Any,
    watch: Watcher,
    broken: dict[str, str],
) -> Iterator[tuple[Tensor, Batch]]:
    """((B, K) logits, their batch) of this process's part."""
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
        for batch in onto(batches, accelerator.device):
            for line in batch.broken:
                name, _, reason = line.rpartition(": ")
                broken[name] = reason
            if not len(batch):
                continue
            with accelerator.autocast():
                logits = model(preprocess.normalize(batch.images)).float()  # (B, K)
            yield logits, batch
            bar.advance(len(logits))


def _no_readable_image() -> VitcliError:
    return VitcliError(
        "no image of the test split could be read", "`vitcli patchify IMAGE` says why of each"
    )
