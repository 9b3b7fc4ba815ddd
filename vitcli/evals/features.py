"""Run a model over a whole split, once, in order, and collect features or logits."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitcli import distributed as launch
from vitcli.data.augment.test_time import views_of
from vitcli.data.batch import move_to_device
from vitcli.data.image_set import ImageSet
from vitcli.data.loader import eval_batches
from vitcli.devices import (
    FittingForward,
    allow_tf32,
    join_processes,
    pick_device,
    resolve_precision,
)
from vitcli.errors import VitcliError
from vitcli.progress import Quiet, Watcher
from vitcli.weights.load import require_preprocess
from vitcli.weights.loaded import LoadedModel

# Raw pixels show how much of an accuracy needs no features at all.
MAX_PIXEL_SIDE = 32  # the raw-pixel baseline averages larger images down to this size


@dataclass(frozen=True)
class Extracted:
    """Outputs for the images that could be read, in their order.

    Attributes:
        outputs: (n, F) float32, features or logits.
        labels: (n,) classes or numbers, or (n, K) zeros and ones of multi-label images.
        indices: (n,) images of the split.
        pixels: (n, D) float32 raw-pixel baseline, or None.
        broken: descriptions of the images that could not be read.
    """

    outputs: NDArray[np.float32]
    labels: NDArray[Any]
    indices: NDArray[np.int64]
    pixels: NDArray[np.float32] | None
    broken: tuple[str, ...]


def extract(
    model: LoadedModel,
    images: ImageSet,
    *,
    output: str = "features",
    batch_size: int = 128,
    precision: str = "auto",
    with_pixels: bool = False,
    tta: str | None = None,
    watch: Watcher | None = None,
    label: str = "features",
) -> Extracted:
    """Compute `features` or `logits` of every readable image of `images`, in order.

    Args:
        model: put into eval mode on the device that `pick_device` chooses.
        output: `features` (the input of the head) or `logits`; of a regression, standardised.
        precision: `auto` is fp32, see `autocast`.
        with_pixels: also return the normalised pixels, averaged down to 32 pixels per side.
        tta: average the probabilities of several views (`EVALUATION_VIEWS`); for `logits`.
        label: title of the progress bar.
    """
    outputs, labels, indices, pixels = [], [], [], []
    broken: list[str] = []
    batches = extract_batches(
        model,
        images,
        output=output,
        batch_size=batch_size,
        precision=precision,
        with_pixels=with_pixels,
        tta=tta,
    )
    with (watch or Quiet()).progress(label, len(images)) as bar:
        for part in batches:
            broken += part.broken
            if len(part.labels):
                outputs.append(part.outputs)
                labels.append(part.labels)
                indices.append(part.indices)
                if part.pixels is not None:
                    pixels.append(part.pixels)
            bar.advance(len(part.labels) + len(part.broken))
    # Every image counts once: no rank pads its part, so parts may differ in length by a batch.
    # Each rank reads a contiguous part, so joining in the order of the ranks restores the order.
    parts = gather_from_ranks((outputs, labels, indices, pixels, broken))
    outputs, labels, indices, pixels, broken = ([x for p in parts for x in p[i]] for i in range(5))
    if not outputs:
        raise no_image_readable(len(images), broken)
    return Extracted(
        np.concatenate(outputs),
        np.concatenate(labels),
        np.concatenate(indices).astype(np.int64),
        np.concatenate(pixels) if pixels else None,
        tuple(broken),
    )


def extract_batches(
    model: LoadedModel,
    images: ImageSet,
    *,
    output: str = "features",
    batch_size: int = 128,
    precision: str = "auto",
    with_pixels: bool = False,
    tta: str | None = None,
) -> Iterator[Extracted]:
    """Batches of what `extract` returns, for the images of this process.

    `output` may also be `pixels`; the model then computes nothing.
    """
    if batch_size < 1:
        raise VitcliError(f"`--batch-size` is {batch_size}", "give a number of images, 1 or more")
    assert output == "logits" or tta is None, "features have no mean"
    preprocess = require_preprocess(model)
    preprocess.check_batch(min(batch_size, len(images)))
    device = pick_device()
    rank, world_size = rank_and_world_size()
    model = model.to(device).eval()
    forward: dict[str, Callable[[Tensor], Tensor]] = {
        "features": model.features,
        "logits": model.network,
        "pixels": _pixel_features,
    }
    compute, views = FittingForward(forward[output]), views_of(tta)
    batches = eval_batches(
        images,
        preprocess,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        pin_memory=device.type == "cuda",
    )
    # `move_to_device` copies to a GPU in a stream of its own, beside the computation.
    for batch in move_to_device(batches, device):
        x = preprocess.normalize(batch.images)  # (B, C, Y, X)
        with torch.inference_mode(), autocast(precision, device):
            # A batch without a readable image still reports which images are broken.
            shown = views.of_crop(x) if len(batch.labels) else ()
            outputs = [compute(view) for view in shown] or [x.flatten(1)]
            y = outputs[0] if len(outputs) == 1 else model.mean_logits(outputs)
        # Check every batch: one NaN makes a mean, a covariance or a ridge solution NaN.
        check_finite(bool(y.isfinite().all()), model)
        yield Extracted(
            y.float().cpu().numpy(),  # NumPy has no bfloat16
            batch.labels.cpu().numpy(),
            batch.indices.numpy(),
            _pixel_features(x).cpu().numpy() if with_pixels and len(batch.labels) else None,
            batch.errors,
        )


def check_finite(finite: bool, model: LoadedModel) -> None:
    """Raise a VitcliError that names `model` if its outputs are not `finite`."""
    if not finite:
        name = f"`{model.load_report.source}`" if model.load_report else "the model"
        raise VitcliError(
            f"the outputs of {name} are not finite",
            hint="try `--precision fp32`; if that does not help, the weights are damaged or the "
            "training diverged",
        )


def no_image_readable(count: int, broken: Sequence[str]) -> VitcliError:
    """The error for a split without a readable image."""
    reason = f": {broken[0]}" if broken else ""
    return VitcliError(
        f"none of {count} images can be read{reason}",
        "look at one of them with `vitcli patchify IMAGE`",
    )


def rank_and_world_size() -> tuple[int, int]:
    """Rank of this process and number of processes of this command; (0, 1) without a launcher."""
    if launch.world_size() == 1:
        return 0, 1  # no process group to join
    state = join_processes(pick_device())
    return state.process_index, state.num_processes


def gather_from_ranks(part: Any) -> list[Any]:
    """The `part` of every rank, in the order of the ranks."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return [part]
    parts: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(parts, part)
    return parts


def _pixel_features(x: Tensor) -> Tensor:
    """(B, C, Y, X) -> (B, D): pixels as features, of at most 32 rows and columns."""
    size = min(x.shape[2], MAX_PIXEL_SIDE), min(x.shape[3], MAX_PIXEL_SIDE)
    if size != tuple(x.shape[2:]):
        x = F.adaptive_avg_pool2d(x, size)
    return x.flatten(1)  # (B, D)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context that computes in `precision`."""
    # Unlike in training, `auto` is fp32: a metric must not depend on the machine. bf16 is two to
    # three times as fast where the hardware has it; it changes a few predictions in 10,000.
    allow_tf32(False)
    resolved = "fp32" if precision == "auto" else resolve_precision(precision, device)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return nullcontext() if resolved == "fp32" else torch.autocast(device.type, dtypes[resolved])
