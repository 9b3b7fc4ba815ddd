"""Running a model over a whole set, once, in order."""

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
from vitcli.data.batch import onto
from vitcli.data.image_set import ImageSet
from vitcli.data.loader import eval_batches
from vitcli.devices import join_processes, pick_device, resolve_precision
from vitcli.errors import VitcliError
from vitcli.progress import Quiet, Watcher
from vitcli.weights.load import require_preprocess
from vitcli.weights.loaded import LoadedModel

PIXEL_SIDE = 32  # pixels of a larger image are averaged down to this for the raw-pixel baseline


@dataclass(frozen=True)
class Extracted:
    """What came out for the images that could be read, in their order.

    Attributes:
        outputs: (n, F) float32: features, or logits.
        labels: (n,), or (n, K) ones and zeros of images with several labels.
        indices: (n,): which images of the set these are.
        pixels: (n, D) float32 of the raw-pixel baseline, or None.
        broken: the images that could not be read, described.
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
    what: str = "features",
    batch_size: int = 128,
    precision: str = "auto",
    device: torch.device | None = None,
    workers: int | None = None,
    with_pixels: bool = False,
    watch: Watcher | None = None,
    label: str = "features",
) -> Extracted:
    """`features` or `logits` of every readable image of `images`, in order.

    Args:
        model: stays in eval mode on `device`.
        images: read in order, each once.
        what: `features` (what the head reads) or `logits`.
        precision: `auto` is fp32 (see `autocast`).
        with_pixels: also keep the normalised pixels, averaged down to 32 pixels a side.

    Raises:
        VitcliError: no image can be read, the model's preprocessing is not known, a batch size
            below 1, or outputs that are not finite.
    """
    world_size = processes()[1]
    outputs, labels, indices, pixels = [], [], [], []
    broken: list[str] = []
    passes = run_over(
        model,
        images,
        what=what,
        batch_size=batch_size,
        precision=precision,
        device=device,
        workers=workers,
        with_pixels=with_pixels,
    )
    with (watch or Quiet()).progress(label, len(images)) as bar:
        for part in passes:
            broken += part.broken
            if len(part.labels):
                outputs.append(part.outputs)
                labels.append(part.labels)
                indices.append(part.indices)
                if part.pixels is not None:
                    pixels.append(part.pixels)
            bar.advance(len(part.labels) + len(part.broken))
    # Contiguous parts, so that joined in the order of the ranks they are the whole in order.
    parts = _gathered((outputs, labels, indices, pixels, broken), world_size)
    outputs, labels, indices, pixels, broken = ([x for p in parts for x in p[i]] for i in range(5))
    if not outputs:
        raise none_readable(len(images), broken)
    return Extracted(
        np.concatenate(outputs),
        np.concatenate(labels),
        np.concatenate(indices).astype(np.int64),
        np.concatenate(pixels) if pixels else None,
        tuple(broken),
    )


def check_finite(finite: bool, model: LoadedModel) -> None:
    """Raises a VitcliError that names `model` where what it gave is not `finite`."""
    if not finite:
        name = f"`{model.load_report.source}`" if model.load_report else "the model"
        raise VitcliError(
            f"{name} gives numbers that are not finite",
            hint="its weights are damaged or diverged, or fp16 is too narrow for them "
            "(`--precision fp32`)",
        )


def run_over(
    model: LoadedModel,
    images: ImageSet,
    *,
    what: str = "features",
    batch_size: int = 128,
    precision: str = "auto",
    device: torch.device | None = None,
    workers: int | None = None,
    with_pixels: bool = False,
) -> Iterator[Extracted]:
    """What `extract` puts together, batch by batch: this process's part of the images.

    Args:
        what: also `pixels`, for which the model computes nothing.

    Raises:
        VitcliError: as `extract`.
    """
    if batch_size < 1:
        raise VitcliError(f"`--batch-size` is {batch_size}", "it is the images at once, 1 or more")
    preprocess = require_preprocess(model)
    device = device or pick_device()
    rank, world_size = processes()
    model = model.to(device).eval()
    runs: dict[str, Callable[[Tensor], Tensor]] = {"features": model.features, "pixels": _baseline}
    run = runs.get(what, model)
    batches = eval_batches(
        images,
        preprocess,
        batch_size=batch_size,
        workers=workers,
        rank=rank,
        world_size=world_size,
        pin_memory=device.type == "cuda",
    )
    for batch in onto(batches, device):
        x = preprocess.normalize(batch.images)  # (B, C, Y, X)
        with torch.inference_mode(), autocast(precision, device):
            y = run(x) if len(batch.labels) else x.flatten(1)
        check_finite(bool(y.isfinite().all()), model)
        yield Extracted(
            y.float().cpu().numpy(),
            batch.labels.cpu().numpy(),
            batch.indices.numpy(),
            _baseline(x).cpu().numpy() if with_pixels and len(batch.labels) else None,
            batch.broken,
        )


def none_readable(count: int, broken: Sequence[str]) -> VitcliError:
    """The error for a set of which no image can be read."""
    reason = f": {broken[0]}" if broken else ""
    return VitcliError(
        f"none of {count} images can be read{reason}",
        "`vitcli patchify IMAGE` shows one as it is read",
    )


def processes() -> tuple[int, int]:
    """(rank, number) of the processes that a launcher started for this command; (0, 1) alone."""
    if launch.size() == 1:
        return 0, 1
    state = join_processes(pick_device())
    return state.process_index, state.num_processes


def _gathered(part: tuple[list[Any], ...], world_size: int) -> list[tuple[list[Any], ...]]:
    if world_size == 1:
        return [part]
    parts: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(parts, part)
    return parts


def _baseline(x: Tensor) -> Tensor:
    """(B, C, Y, X) -> (B, D): the pixels as features, no more than 32 rows and columns of them."""
    size = min(x.shape[2], PIXEL_SIDE), min(x.shape[3], PIXEL_SIDE)
    if size != tuple(x.shape[2:]):
        x = F.adaptive_avg_pool2d(x, size)
    return x.flatten(1)  # (B, C*Y*X)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context that computes in `precision`.

    `auto` is fp32 here, unlike in training: a figure should not depend on the machine that it was
    measured on. bf16 is two to three times as fast where the hardware has it, and moves a few
    predictions in ten thousand.

    Raises:
        VitcliError: no such precision on this device.
    """
    resolved = "fp32" if precision == "auto" else resolve_precision(precision, device)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return nullcontext() if resolved == "fp32" else torch.autocast(device.type, dtypes[resolved])
