"""A batch of images with what is known about them, and its way to the device."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitcli.data.augment.mixing import Mix
from vitcli.data.image_set import Integers, Pixels


@dataclass(frozen=True)
class Batch:
    """Images with what is known about them.

    Args:
        images: (V*B, C, Y, X) uint8; all first views, then all second views. In memory the
            channels may lie last.
        labels: (B,) int64; (B, K) uint8 ones and zeros where an image has several.
        indices: (B,) int64, which images of the set these are.
        epochs: (B,) int64, in which epoch each is shown; 0 in evaluation.
        broken: a line for each image that could not be read and is not here.
        factors: what a generator knows about its pictures, each (V*B, ...), view-major.
        mix: how the images are to be mixed with their neighbours, if at all.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    epochs: Tensor
    broken: tuple[str, ...] = ()
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    mix: Mix | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> "Batch":
        """The images `start` to `stop`, with all their views."""
        if (start, stop) == (0, len(self)):
            return self
        views = len(self.images) // len(self)

        def cut(x: Tensor) -> Tensor:
            by_view = x.reshape(views, len(self), *x.shape[1:])  # (V, B, ...)
            return by_view[:, start:stop].flatten(0, 1)

        return replace(
            self,
            images=cut(self.images),
            labels=self.labels[start:stop],
            indices=self.indices[start:stop],
            epochs=self.epochs[start:stop],
            factors={name: cut(factor) for name, factor in self.factors.items()},
            mix=self.mix and self.mix.part(start, stop),
        )

    def tensors(self) -> list[Tensor]:
        """What a step reads: images, labels, factors and mixing."""
        mixing = [self.mix.lam, self.mix.box] if self.mix else []
        return [self.images, self.labels, *self.factors.values(), *mixing]

    def to(self, device: torch.device) -> "Batch":
        """The same with what a step reads on `device`; where it is there already, nothing moves."""
        if self.images.device == device or device.type == "cpu":
            return self
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            factors={name: x.to(device, non_blocking=True) for name, x in self.factors.items()},
            mix=self.mix and self.mix.to(device),
        )


def empty_images(shape: tuple[int, ...], pin_memory: bool) -> Tensor:
    """(B, C, Y, X) bytes to be filled, in memory with the channels last, as decoders give them.

    Pinned ones a GPU fetches by itself while other work goes on.
    """
    return torch.empty(
        shape, dtype=torch.uint8, pin_memory=pin_memory, memory_format=torch.channels_last
    )


def onto(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device`, as bytes.

    To a GPU they are copied in a stream of their own: whoever asks for the next batch while the
    last step still runs there has it copied beside that step. Their images should be pinned.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    beside: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for batch in batches:
        with torch.cuda.stream(beside):
            moved = batch.to(device)
        here = torch.cuda.current_stream(device)
        here.wait_stream(beside)
        for tensor in moved.tensors():  # their memory is taken again only when `here` is done
            tensor.record_stream(here)
        yield moved


def targets_of(images: Any, indices: Integers) -> Integers | Pixels:
    """(B,) class numbers, or (B, K) ones and zeros of a set whose images have several labels."""
    several: Pixels | None = getattr(images, "targets", None)
    labels: Integers = images.labels
    return labels[indices] if several is None else several[indices]


def make_batch(
    images: Pixels | Tensor,
    labels: Any,
    indices: Integers,
    epochs: Integers,
    broken: Iterable[str] = (),
) -> Batch:
    """A batch of what threads have put together; see there."""
    labels = np.asarray(labels)
    return Batch(
        torch.as_tensor(images),
        torch.as_tensor(labels if labels.ndim == 2 else labels.astype(np.int64)),
        torch.from_numpy(indices),
        torch.from_numpy(epochs),
        tuple(broken),
    )
