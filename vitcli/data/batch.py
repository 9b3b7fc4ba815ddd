"""`Batch`: images with what is known about them, and their way to the device."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitcli.data.augment.mixing import Mix
from vitcli.data.image_set import Integers, Numbers, Pixels
from vitcli.errors import VitcliError


@dataclass(frozen=True)
class Batch:
    """Images with what is known about them.

    Attributes:
        images: (B, C, Y, X) uint8; memory may be channels-last.
        labels: (B,) int64 class numbers, (B, K) uint8 multi-hot targets, or (B,) float64 numbers.
        indices: (B,) int64, positions in the image set.
        epochs: (B,) int64, the epoch of each image; 0 in evaluation.
        broken: (name, reason) of each unreadable image.
        mix: how to mix the images in pairs, or None.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    epochs: Tensor
    broken: tuple[tuple[str, str], ...] = ()
    mix: Mix | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def errors(self) -> tuple[str, ...]:
        """`name: reason` of each unreadable image."""
        return tuple(f"{name}: {reason}" for name, reason in self.broken)

    def part(self, start: int, stop: int) -> "Batch":
        """The images `start` to `stop`, as a micro-batch."""
        if (start, stop) == (0, len(self)):
            return self
        return replace(
            self,
            images=self.images[start:stop],
            labels=self.labels[start:stop],
            indices=self.indices[start:stop],
            epochs=self.epochs[start:stop],
            mix=self.mix and self.mix.part(start, stop),
        )

    def tensors(self) -> list[Tensor]:
        """The tensors that a step reads: images, labels and mixing."""
        mixing = [self.mix.lam, self.mix.box] if self.mix else []
        return [self.images, self.labels, *mixing]

    def to(self, device: torch.device) -> "Batch":
        """Copy what a step reads to `device`; return `self` if it is already there."""
        if self.images.device == device or device.type == "cpu":
            return self
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            mix=self.mix and self.mix.to(device),
        )


def allocate_images(shape: tuple[int, ...], pin_memory: bool) -> Tensor:
    """(B, C, Y, X) uninitialised bytes, channels-last in memory, as decoders write them.

    A GPU copies from pinned memory in the background.
    """
    return torch.empty(
        shape, dtype=torch.uint8, pin_memory=pin_memory, memory_format=torch.channels_last
    )


def move_to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device`, still uint8, because a quarter of float32 is copied.

    On a GPU the copy runs in its own CUDA stream. If the caller asks for the next batch while a
    step still runs, the copy overlaps with that step. The images should be in pinned memory.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copies: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = batch.to(device)
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(copies)
        # Without this the allocator could reuse the memory for the next copy while the step reads.
        for tensor in moved.tensors():
            tensor.record_stream(compute)
        yield moved


def downsample(images: Tensor, size: int | None) -> Tensor:
    """(B, C, Y, X) -> (B, C, S, S): images averaged down to `size` pixels; None changes nothing.

    Most of what a small model learns from an image it learns at a quarter of the cost first
    (Touvron et al., 2019; Tan and Le, 2021).
    """
    if size is None:
        return images
    return F.interpolate(
        images, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )


def targets_of(images: Any, indices: Integers) -> Integers | Pixels | Numbers:
    """(B,) class numbers, (B, K) multi-hot targets of a multi-label set, or (B,) numbers."""
    values: Numbers | None = getattr(images, "values", None)
    if values is not None:
        return values[indices]
    targets: Pixels | None = getattr(images, "targets", None)
    labels: Integers = images.labels
    return labels[indices] if targets is None else targets[indices]


def make_batch(
    images: Pixels | Tensor,
    labels: Any,
    indices: Integers,
    epochs: Integers,
    broken: Iterable[tuple[str, str]] = (),
) -> Batch:
    """A `Batch` from arrays."""
    labels = np.asarray(labels)
    return Batch(
        torch.as_tensor(images),
        torch.as_tensor(
            labels.astype(np.int64) if labels.ndim == 1 and labels.dtype.kind in "iu" else labels
        ),
        torch.from_numpy(indices),
        torch.from_numpy(epochs),
        tuple(broken),
    )


def check_batch(batch_size: int, world_size: int, repeats: int = 1, mixes: bool = False) -> None:
    """Check that a batch divides by the processes, by `repeats`, and into pairs for mixing.

    Raises:
        VitcliError: it does not; the hint gives a batch size that does.
    """
    local = batch_size // world_size
    if batch_size % world_size:
        raise VitcliError(
            f"a batch of {batch_size} images does not divide among {world_size} processes",
            f"use `--batch-size {max(1, local) * world_size}`, which counts all processes together",
        )
    if mixes and local % 2:
        raise VitcliError(
            f"mixup and cutmix need an even number of images per process, not {local}",
            f"use `--batch-size {(local + 1) * world_size}`",
        )
    if batch_size % repeats:
        raise VitcliError(
            f"a batch of {batch_size} images does not divide by `augment.repeats` = {repeats}",
            f"use `--batch-size {max(1, batch_size // repeats) * repeats}`",
        )
