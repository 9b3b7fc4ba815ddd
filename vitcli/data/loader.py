"""Batches: which image comes when, made by threads ahead of the model.

Nothing here has a state to save. Order is a function of (seed, epoch), augmentation of (seed,
epoch, index), and the position is the number of images seen: the same batches for any number of
threads, and for any number of processes taken together.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitcli.data.ahead import Pool, WorkAhead
from vitcli.data.augment import image_rng
from vitcli.data.decode import ImageError, Mode
from vitcli.data.sets import ImageSet, Integers, Pixels
from vitcli.data.transforms import Preprocess, channels_first
from vitcli.errors import VitcliError

MAX_WORKERS = 16


@dataclass(frozen=True)
class Batch:
    """Images with what is known about them.

    Args:
        images: (V*B, C, Y, X) uint8; all first views, then all second views.
        labels: (B,) int64.
        indices: (B,) int64, which images of the set these are.
        epochs: (B,) int64, in which epoch each is shown; 0 in evaluation.
        broken: a line for each image that could not be read and is not here.
        factors: what a generator knows about its pictures, each (V*B, ...), view-major.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    epochs: Tensor
    broken: tuple[str, ...] = ()
    factors: Mapping[str, Tensor] = field(default_factory=dict)

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
        )

    def to(self, device: torch.device) -> "Batch":
        """The same with images, labels and factors on `device`."""
        if device.type == "cpu":
            return self
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            factors={name: x.to(device, non_blocking=True) for name, x in self.factors.items()},
        )


class Transform(Protocol):
    """A training transform, such as `TrainTransform`."""

    preprocess: Preprocess

    def view(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """A random view of the model's size."""


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> Integers:
    """(n,) the order in which epoch number `epoch` shows the images 0..n-1."""
    order = np.random.default_rng((seed, epoch)).permutation(n)
    order.flags.writeable = False  # it is cached
    return order


def positions(start: int, count: int, n: int, seed: int) -> tuple[Integers, Integers]:
    """Positions start..start+count-1 of the endless stream of a set of n images.

    Returns:
        (count,) the epoch and (count,) the index of the image at each position.
    """
    epochs, offsets = np.divmod(np.arange(start, start + count, dtype=np.int64), n)
    indices = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = epoch_order(n, seed, int(epoch))[offsets[here]]
    return epochs, indices


def default_workers(world_size: int = 1) -> int:
    """Threads for one of `world_size` processes: a core is left for the model."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(MAX_WORKERS, (cores or 1) // world_size - 1))


class TrainLoader:
    """The endless, seeded stream of a training set, cut into batches.

    A picture that cannot be read is replaced by the next one of its class; `broken` says which and
    why. A set that has a method `batch` (images from formulas) makes whole batches itself.

    Args:
        images: the training set.
        transform: picture and randomness -> view; may be None for a set with `batch`.
        batch_size: images of one step over all processes.
        seed: of order and augmentation.
        views: views of each image in a batch.
        workers: threads; 0 works inline, None chooses.
        rank, world_size: this process and the number of all; each makes an equal, contiguous part
            of every batch.
        strict: raise on a picture that cannot be read.
        image_size: (Y, X) asked of a set with `batch`; taken from `transform` by default.

    Raises:
        VitcliError: the batch size does not divide among the processes.
    """

    def __init__(
        self,
        images: Any,
        transform: Transform | None,
        *,
        batch_size: int,
        seed: int,
        views: int = 1,
        workers: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        strict: bool = False,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        if batch_size % world_size:
            raise VitcliError(
                f"a batch of {batch_size} images does not divide among {world_size} processes",
                f"`--batch-size {max(1, batch_size // world_size) * world_size}` does",
            )
        assert transform is not None or hasattr(images, "batch")
        self.images = images
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.views = views
        self.workers = default_workers(world_size) if workers is None else workers
        self.rank = rank
        self.world_size = world_size
        self.strict = strict
        self.image_size = image_size or (transform.preprocess.image_size if transform else None)
        self.broken: dict[str, str] = {}
        self._unreadable: set[int] = set()
        self._lock = threading.Lock()

    def batches(self, start_images: int, num_steps: int) -> Iterator[Batch]:
        """This process's part of `num_steps` batches, from the position `start_images` on.

        Threads work a few batches ahead; they end when the iterator is closed or used up.

        Raises:
            VitcliError: a class has no readable image left.
            ImageError: one cannot be read and `strict` is set.
        """
        starts = (start_images + step * self.batch_size for step in range(num_steps))
        make = self._make_whole if hasattr(self.images, "batch") else self._make
        return WorkAhead(make, starts, self.workers)

    def _my_positions(self, start: int) -> tuple[Integers, Integers]:
        size = self.batch_size // self.world_size
        return positions(start + self.rank * size, size, len(self.images), self.seed)

    def _make_whole(self, start: int, pool: Pool) -> Callable[[], Batch]:
        """A batch from a set that makes batches."""
        epochs, indices = self._my_positions(start)

        def make() -> Batch:
            images, labels, factors = self.images.batch(
                epochs, indices, self.image_size, self.seed, self.views
            )
            batch = _batch(images, labels, indices, epochs)
            return replace(batch, factors={k: torch.as_tensor(v) for k, v in factors.items()})

        return pool(make)

    def _make(self, start: int, pool: Pool) -> Callable[[], Batch]:
        """A batch read and transformed picture by picture, in parts that threads share."""
        assert self.transform is not None
        preprocess, transform = self.transform.preprocess, self.transform
        epochs, indices = self._my_positions(start)
        shown = indices.copy()
        shape = (self.views, len(indices), preprocess.num_channels, *preprocess.image_size)
        images = np.empty(shape, dtype=np.uint8)  # (V, B, C, Y, X)

        def make(part: Integers) -> list[str]:
            met: list[str] = []
            for i in part:
                epoch, index = int(epochs[i]), int(indices[i])
                image, shown[i] = self._read(index, preprocess.mode, met)
                for view in range(self.views):
                    rng = image_rng(self.seed, epoch, index, view)
                    images[view, i] = channels_first(transform.view(image, rng))
            return met

        parts = np.array_split(np.arange(len(indices)), max(1, min(self.workers, len(indices))))
        waiting = [pool(partial(make, part)) for part in parts]

        def gather() -> Batch:
            met = [name for wait in waiting for name in wait()]
            flat = images.reshape(-1, *shape[2:])  # (V*B, C, Y, X)
            return _batch(flat, self.images.labels[shown], shown, epochs, dict.fromkeys(met))

        return gather

    def _read(self, index: int, mode: Mode, met: list[str]) -> tuple[Image.Image, int]:
        """The picture, or the next readable one of its class, and its index."""
        for candidate in self._class_from(index):
            if candidate in self._unreadable:
                met.append(self.images.describe(candidate))
                continue
            try:
                return self.images.read(candidate, mode), candidate
            except ImageError as error:
                if self.strict:
                    raise
                met.append(error.name)
                with self._lock:
                    self.broken[error.name] = error.reason
                    self._unreadable.add(candidate)
        label = self.images.classes[int(self.images.labels[index])]
        raise VitcliError(
            f"none of the images of class `{label}` can be read",
            f"the first: {self.images.describe(index)}",
        )

    def _class_from(self, index: int) -> Iterator[int]:
        """`index`, then the others of its class in order, around the end once."""
        yield index
        members = np.flatnonzero(self.images.labels == self.images.labels[index])
        at = int(np.searchsorted(members, index))
        for member in np.roll(members, -at)[1:]:
            yield int(member)


def eval_batches(
    images: ImageSet,
    preprocess: Preprocess,
    *,
    batch_size: int,
    workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Every image once, in order; of several processes each takes a contiguous part.

    Images that cannot be read are left out and told in `broken`, so a batch may be short or empty.

    Args:
        images: the set.
        preprocess: the evaluation transform; normalisation is left to the caller.
        batch_size: images of one batch of this process.
        workers: threads; 0 works inline, None chooses.
        rank, world_size: this process and the number of all.
        limit: at most so many images, spread evenly over the set.
    """
    count = len(images) if limit is None else min(limit, len(images))
    chosen = np.arange(count, dtype=np.int64) * len(images) // max(count, 1)
    mine = np.array_split(chosen, world_size)[rank]
    workers = default_workers(world_size) if workers is None else workers

    def make(start: int, pool: Pool) -> Callable[[], Batch]:
        indices = mine[start : start + batch_size]
        shape = (len(indices), preprocess.num_channels, *preprocess.image_size)
        pixels = np.empty(shape, dtype=np.uint8)  # (B, C, Y, X)
        good = np.ones(len(indices), dtype=bool)

        def read(part: Integers) -> list[str]:
            met = []
            for i in part:
                try:
                    image = images.read(int(indices[i]), preprocess.mode)
                    pixels[i] = channels_first(preprocess.fit(image))
                except ImageError as error:
                    good[i] = False
                    met.append(f"{error.name}: {error.reason}")
            return met

        parts = np.array_split(np.arange(len(indices)), max(1, min(workers, len(indices))))
        waiting = [pool(partial(read, part)) for part in parts]

        def gather() -> Batch:
            met = [line for wait in waiting for line in wait()]
            kept, left = (pixels, indices) if good.all() else (pixels[good], indices[good])
            return _batch(kept, images.labels[left], left, np.zeros_like(left), met)

        return gather

    return WorkAhead(make, range(0, len(mine), batch_size), workers)


def _batch(
    images: Pixels | Tensor, labels: Any, indices: Integers, epochs: Integers, broken: Any = ()
) -> Batch:
    return Batch(
        torch.as_tensor(images),
        torch.as_tensor(np.asarray(labels, dtype=np.int64)),
        torch.from_numpy(indices),
        torch.from_numpy(epochs),
        tuple(broken),
    )
