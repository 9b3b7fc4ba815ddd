"""Metrics of a model on a held-out split during training. Every readable image counts once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from vitcli.config.schema import TrainSection
from vitcli.data.batch import Batch, move_to_device
from vitcli.data.image_set import ImageSet
from vitcli.data.loader import eval_batches
from vitcli.data.source import Source
from vitcli.devices import FittingForward
from vitcli.errors import VitcliError
from vitcli.evals.class_averages import class_shares
from vitcli.evals.features import extract
from vitcli.evals.fewshot.protocol import draw_shots
from vitcli.evals.fewshot.ridge import RidgePath
from vitcli.evals.regression import regression_metrics
from vitcli.evals.scoring import THRESHOLD, multi_label_metrics
from vitcli.progress import Watcher
from vitcli.run import Run
from vitcli.train.agreement import gather
from vitcli.weights.loaded import LoadedModel

# Images per batch. On a CPU the feature maps of a small batch stay in the cache (recipes/LOG.md).
CPU_EVAL_BATCH, GPU_EVAL_BATCH = 64, 256

# Index of the image, its class, the predicted class, the probability of the prediction, and that of
# the class. For a regression: index, number, predicted number.
Outcome = tuple[int, int, int, float, float] | tuple[int, float, float]


def eval_batch_size(device: torch.device) -> int:
    """Images per batch and process of an evaluation during training."""
    return CPU_EVAL_BATCH if device.type == "cpu" else GPU_EVAL_BATCH


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
    """Top-1 accuracy and cross-entropy, mean average precision for multi-label images, or errors.

    Each process evaluates its own part. The number of processes does not change the result.

    Args:
        broken: collects the images that cannot be read, with the reason.
        limit: stop after about this many images; used to measure the speed.

    Raises:
        VitcliError: no image can be read.
    """
    outputs = _outputs(model, images, accelerator, watch, broken)
    if limit is not None:
        at_once = eval_batch_size(accelerator.device) * accelerator.num_processes
        num_batches = max(1, limit // at_once)
        outputs = islice(outputs, num_batches)
    if images.targets is not None:
        return Validation(_validate_multi_label(model, images, outputs, accelerator))
    if model.is_regression:
        return _validate_numbers(model, images, outputs, accelerator)
    # Sums in fp64, because in fp32 a count stops to grow at 2^24.
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    # (3, K) per class: images that are recognised, images, images that are said to be of it.
    counts = sums.new_zeros(3, model.config.num_classes)
    outcomes: list[Outcome] = []
    for logits, batch in outputs:
        loss = _sum_of_losses(model, logits, batch.labels)
        # As in `evaluate`: a softmax, also for a head of sigmoids.
        shares = (logits / model.temperature).softmax(dim=1)
        predicted = logits.argmax(dim=1)
        correct = (predicted == batch.labels).sum()
        chances = [shares.gather(1, which[:, None])[:, 0] for which in (predicted, batch.labels)]
        columns = [batch.indices, *(c.cpu() for c in (batch.labels, predicted, *chances))]
        outcomes += list(zip(*(column.tolist() for column in columns), strict=True))
        sums += torch.stack([loss.double(), correct.double(), sums.new_tensor(len(logits))])
        hits = predicted[predicted == batch.labels]
        for row, classes in zip(counts, (hits, batch.labels, predicted), strict=True):
            row += torch.bincount(classes, minlength=len(row))
    loss_sum, correct_sum, count = accelerator.reduce(sums, reduction="sum").tolist()
    if not count:
        raise _no_readable_image(images)
    metrics = {"loss": loss_sum / count, "accuracy": correct_sum / count, "images": count}
    metrics |= _macro_metrics(*accelerator.reduce(counts, reduction="sum").cpu().numpy())
    return Validation(metrics, outcomes)


def with_fewshot(
    validate: Callable[..., Validation] | None,
    source: Source,
    split: str,
    section: TrainSection,
) -> Callable[..., Validation]:
    """`validate`, and the few-shot accuracy of the frozen features on the same images.

    The shots are those that `vitcli.fewshot(..., seed=0)` draws. Figure 4 of the paper reports the
    best such accuracy of a run.

    Raises:
        VitcliError: the images have no single labels, none are held out, or the run has a budget.
    """
    train: Any = source.splits["train"]
    faults = {
        "needs held-out images": not split,
        "takes time that `train.budget` does not reserve": section.budget is not None,
        "draws single-label images from the whole training split, which this data does not allow": (
            not isinstance(train, ImageSet) or train.targets is not None or train.values is not None
        ),
    }
    for fault in [text for text, applies in faults.items() if applies]:
        raise VitcliError(f"`train.fewshot_shots` {fault}", "remove `train.fewshot_shots`")
    # The same shots at every evaluation: the accuracies of a run then differ by its weights only.
    held_out, classes = source.splits[split], len(train.classes)
    drawn = train.subset(draw_shots(train.labels, section.fewshot_shots, 0, classes))

    def both(model: LoadedModel) -> Validation:
        found = validate(model) if validate is not None else Validation({})
        known, test = (extract(model, images) for images in (drawn, held_out))
        ridge = RidgePath(known.outputs, known.labels, classes).fit()
        accuracy = float((ridge.predict(test.outputs) == test.labels).mean())
        return replace(found, metrics={**found.metrics, "fewshot_accuracy": accuracy})

    return both


def metric_names(model: LoadedModel, multi_label: bool, section: TrainSection) -> list[str]:
    """The metrics of an evaluation between steps, except for the number of images."""
    names = ["loss", "accuracy", "balanced_accuracy", "macro_f1"]
    if model.is_regression:
        names = ["loss", "mae", "rmse", "r2"]
    elif multi_label:
        names = ["loss", "map", "micro_f1", "macro_f1"]
    fewshot = ["fewshot_accuracy"] if section.fewshot_shots is not None else []
    return [*(names if model.config.num_classes else []), *fewshot]


def best_fewshot(run: Run) -> dict[str, Any]:
    """The last and the best few-shot accuracy of a run, with step and split; {} without any."""
    # The paper's early stopping: "the best validation accuracy achieved during training" (4.3).
    found = [
        (value, record["step"], name.split("/")[0])
        for record in run.records()
        for name, value in record.items()
        if name.endswith("/fewshot_accuracy")
    ]
    if not found:
        return {}
    best = max(value for value, _, _ in found)
    step = next(step for value, step, _ in found if value == best)
    last, _, split = found[-1]
    best_facts = {"best_fewshot_accuracy": best, "best_fewshot_step": step}
    return {"fewshot_accuracy": last, **best_facts, "fewshot_split": split}


def _macro_metrics(right: Any, images: Any, chosen: Any) -> dict[str, float]:
    """Means over the classes with images, from counts (K,) as `class_shares` takes them."""
    shares, present = class_shares(right, images, chosen), images > 0
    names = {"balanced_accuracy": "recall", "macro_f1": "f1"}
    return {name: float(shares[of][present].mean()) for name, of in names.items()}


def _sum_of_losses(model: LoadedModel, logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K), (B,) -> the sum () of the cross-entropies that belong to the head's activation.

    Every objective is validated by it, so that runs with different objectives can be compared.
    """
    if model.head_activation == "softmax":
        return cross_entropy(logits, labels, reduction="sum")
    targets = one_hot(labels, logits.shape[1]).float()
    return binary_cross_entropy_with_logits(logits, targets, reduction="sum")


def _validate_multi_label(
    model: LoadedModel,
    images: ImageSet,
    outputs: Iterator[tuple[Tensor, Batch]],
    accelerator: Any,
) -> dict[str, float]:
    # Average precision ranks all images of a class, so every process needs all N x K scores.
    scores, targets, loss = [], [], 0.0
    for logits, batch in outputs:
        scores.append(model.probabilities(logits).float().cpu().numpy())
        targets.append(batch.labels.cpu().numpy())
        loss += float(
            binary_cross_entropy_with_logits(logits, batch.labels.float(), reduction="sum")
        )
    # `gather_object` and not `gather`: processes may have read different numbers of images.
    parts = [(scores, targets, loss)]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        parts = gather_object(parts)
    if not any(scores for scores, _, _ in parts):
        raise _no_readable_image(images)
    probabilities = np.concatenate([x for scores, _, _ in parts for x in scores])
    truth = np.concatenate([x for _, targets, _ in parts for x in targets])
    found, decided = multi_label_metrics(probabilities, truth), probabilities >= THRESHOLD
    loss = sum(part[2] for part in parts) / found.images
    metrics = {"loss": loss, "map": found.map, "micro_f1": found.micro_f1, "images": found.images}
    if truth.any():
        counts = ((decided & (truth == 1)).sum(0), truth.sum(0, dtype=np.int64), decided.sum(0))
        metrics["macro_f1"] = _macro_metrics(*counts)["macro_f1"]
    return metrics


def _validate_numbers(
    model: LoadedModel,
    images: ImageSet,
    outputs: Iterator[tuple[Tensor, Batch]],
    accelerator: Any,
) -> Validation:
    outcomes: list[Outcome] = []
    for standardised, batch in outputs:
        predicted = model.target_scale.restore(standardised)[:, 0]
        columns = (batch.indices, batch.labels, predicted)
        outcomes += list(zip(*(column.tolist() for column in columns), strict=True))
    every = gather(outcomes, accelerator)
    if not every:
        raise _no_readable_image(images)
    # In the order of the images, so that the sums do not depend on the number of processes.
    _, targets, values = np.array(sorted(every)).T
    found = regression_metrics(targets, values)
    # The loss of the training: of standardised numbers.
    metrics = {"loss": (found.rmse / model.target_scale.std) ** 2, "mae": found.mae}
    metrics |= {"rmse": found.rmse, "images": found.images}
    return Validation(metrics if found.r2 is None else {**metrics, "r2": found.r2}, outcomes)


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
        batch_size=eval_batch_size(accelerator.device),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
    compute = FittingForward(model.network)
    with watch.progress(images.name, len(images)) as bar:
        for batch in move_to_device(batches, accelerator.device):
            broken.update(batch.broken)
            if not len(batch):  # every image of it is broken
                continue
            with accelerator.autocast():
                logits = compute(preprocess.normalize(batch.images)).float()  # (B, K)
            yield logits, batch
            bar.advance(len(logits))  # after the `yield`: the caller is done with the batch


def _no_readable_image(images: ImageSet) -> VitcliError:
    return VitcliError(
        f"no image of the {images.name} split can be read",
        "`vitcli patchify IMAGE` gives the reason",
    )
