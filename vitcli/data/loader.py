"""Which image comes when: functions of the seed and the place in the stream, with no state.

Batches: which image comes when, made by threads ahead of the model.

Nothing here has a state to save. Order is a function of (seed, epoch), augmentation of (seed,
epoch, index), mixing of (seed, position), and the position is the number of images seen: the same
batches for any number of threads, and for any number of processes taken together.
"""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
import torch

from vitcli.data.augment.mixing import Mix, mixes_pairs, sample_mix
from vitcli.data.augment.policies import AugmentSettings
from vitcli.data.augment.transform import image_rng
from vitcli.data.batch import Batch, empty_images, make_batch, targets_of
from vitcli.data.image_set import AnyPicture, ImageSet, Integers, Pixels
from vitcli.data.prefetch import Pool, WorkAhead
from vitcli.decode import ImageError, Mode
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess, as_array


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


def repeated(start: int, count: int, batch_size: int, repeats: int) -> tuple[Integers, Integers]:
    """Positions start..start+count-1 where every batch shows each of its images `repeats` times.

    The images of a batch come once after another, then all again, so that neighbours differ.

    Returns:
        (count,) the position in the stream of different images, and (count,) how often the image
        was shown before in its batch.
    """
    batch, offset = np.divmod(np.arange(start, start + count, dtype=np.int64), batch_size)
    again, place = np.divmod(offset, batch_size // repeats)
    return batch * (batch_size // repeats) + place, again


MAX_WORKERS = 16


class Transform(Protocol):
    """A training transform, such as `TrainTransform`."""

    preprocess: Preprocess

    def view(self, picture: AnyPicture, rng: np.random.Generator) -> Pixels:
        """(C, Y, X): a random view of the model's size."""


def default_workers(world_size: int = 1) -> int:
    """Threads for one of `world_size` processes: a core is left for the model."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(MAX_WORKERS, (cores or 1) // world_size - 1))


def check_batch(batch_size: int, world_size: int, repeats: int, mixes: bool) -> None:
    """Whether a batch divides among processes, by repeats and into pairs that are mixed.

    Raises:
        VitcliError: it does not; the hint names a size that does.
    """
    each = batch_size // world_size
    if batch_size % world_size:
        raise VitcliError(
            f"a batch of {batch_size} images does not divide among {world_size} processes",
            f"`--batch-size {max(1, each) * world_size}` does",
        )
    if mixes and each % 2:
        raise VitcliError(
            f"mixing takes the images of a process in pairs, and {each} are not even",
            f"`--batch-size {(each + 1) * world_size}` makes them so",
        )
    if batch_size % repeats:
        raise VitcliError(
            f"a batch of {batch_size} images does not show each of its images {repeats} times",
            f"`--batch-size {max(1, batch_size // repeats) * repeats}` does",
        )


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
        repeats: how often a batch shows each of its images, each time augmented anew.
        strength: says how images of a batch are mixed; not at all by default.
        pin_memory: for a GPU; see `batch.onto`.

    Raises:
        VitcliError: the batch size does not divide among the processes, into pairs to be mixed, or
            by `repeats`.
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
        repeats: int = 1,
        augment: AugmentSettings = None,
        pin_memory: bool = False,
    ) -> None:
        mixes = augment is not None and mixes_pairs(augment)
        check_batch(batch_size, world_size, repeats, mixes)
        assert transform is not None or hasattr(images, "batch")
        assert repeats == 1 or not hasattr(images, "batch")
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
        self.repeats = repeats
        self.augment = augment if mixes else None
        self.pin_memory = pin_memory
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

    def _my_positions(self, start: int) -> tuple[Integers, Integers, Integers]:
        """Epoch and index of each image of this process, and how often the batch had it before."""
        size = self.batch_size // self.world_size
        first, n = start + self.rank * size, len(self.images)
        if self.repeats == 1:
            return *positions(first, size, n, self.seed), np.zeros(size, dtype=np.int64)
        stream, again = repeated(first, size, self.batch_size, self.repeats)
        low = int(stream.min())
        epochs, indices = positions(low, int(stream.max()) - low + 1, n, self.seed)
        return epochs[stream - low], indices[stream - low], again

    def _my_mix(self, start: int) -> Mix | None:
        """How the images of this process are mixed in the batch that begins at `start`."""
        if self.augment is None:
            return None
        assert self.image_size is not None
        whole = sample_mix(self.seed, start, self.batch_size, self.image_size, self.augment)
        size = self.batch_size // self.world_size
        return whole.part(self.rank * size, (self.rank + 1) * size)

    def _make_whole(self, start: int, pool: Pool) -> Callable[[], Batch]:
        """A batch from a set that makes batches."""
        epochs, indices, _ = self._my_positions(start)

        def make() -> Batch:
            drawn, labels, factors = self.images.batch(
                epochs, indices, self.image_size, self.seed, self.views
            )
            images = torch.as_tensor(drawn)
            images = images.pin_memory() if self.pin_memory else images
            batch = make_batch(images, labels, indices, epochs)
            factors = {k: torch.as_tensor(v) for k, v in factors.items()}
            return replace(batch, factors=factors, mix=self._my_mix(start))

        return pool(make)

    def _make(self, start: int, pool: Pool) -> Callable[[], Batch]:
        """A batch read and transformed picture by picture, in parts that threads share."""
        assert self.transform is not None
        preprocess, transform = self.transform.preprocess, self.transform
        epochs, indices, again = self._my_positions(start)
        shown = indices.copy()
        shape = (self.views, len(indices), preprocess.num_channels, *preprocess.image_size)
        flat = empty_images((shape[0] * shape[1], *shape[2:]), self.pin_memory)  # (V*B, C, Y, X)
        images = flat.numpy().reshape(shape)  # (V, B, C, Y, X), a view of it

        def randomness(i: int) -> list[np.random.Generator]:
            first = int(again[i]) * self.views
            epoch, index = int(epochs[i]), int(indices[i])
            return [image_rng(self.seed, epoch, index, first + view) for view in range(self.views)]

        def views_of(i: int, rngs: list[np.random.Generator], picture: AnyPicture) -> None:
            for view, rng in enumerate(rngs):
                images[view, i] = transform.view(picture, rng)

        def make(part: Integers) -> list[str]:
            met: list[str] = []
            # All at once: between pixels it takes twice the time, which stored sets would feel.
            rngs = [randomness(i) for i in part.tolist()]
            for i, mine in zip(part.tolist(), rngs, strict=True):
                use = partial(views_of, i, mine)
                shown[i] = self._with_readable(int(indices[i]), preprocess.mode, use, met)
            return met

        parts = np.array_split(np.arange(len(indices)), max(1, min(self.workers, len(indices))))
        waiting = [pool(partial(make, part)) for part in parts]

        def gather() -> Batch:
            met = [name for wait in waiting for name in wait()]
            labels = targets_of(self.images, shown)
            batch = make_batch(flat, labels, shown, epochs, dict.fromkeys(met))
            return replace(batch, mix=self._my_mix(start))

        return gather

    def _with_readable(
        self, index: int, mode: Mode, use: Callable[[AnyPicture], None], met: list[str]
    ) -> int:
        """Call `use` with the picture, or with the next readable one of its class; its index."""
        for candidate in self._class_from(index):
            if candidate in self._unreadable:
                met.append(self.images.describe(candidate))
                continue
            try:
                with self.images.open(candidate, mode) as picture:
                    use(picture)
                return candidate
            except ImageError as error:
                if self.strict:
                    raise
                met.append(error.name)
                with self._lock:
                    self.broken[error.name] = error.reason
                    self._unreadable.add(candidate)
        label = int(self.images.labels[index])
        which = f"of class `{self.images.classes[label]}`" if label >= 0 else "without a label"
        raise VitcliError(
            f"none of the images {which} can be read",
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
    pin_memory: bool = False,
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
        pin_memory: for a GPU; see `batch.onto`.
    """
    count = len(images) if limit is None else min(limit, len(images))
    chosen = np.arange(count, dtype=np.int64) * len(images) // max(count, 1)
    mine = np.array_split(chosen, world_size)[rank]
    workers = default_workers(world_size) if workers is None else workers

    def make(start: int, pool: Pool) -> Callable[[], Batch]:
        indices = mine[start : start + batch_size]
        shape = (len(indices), preprocess.num_channels, *preprocess.image_size)
        whole = empty_images(shape, pin_memory)  # (B, C, Y, X)
        pixels = whole.numpy()  # a view of it
        good = np.ones(len(indices), dtype=bool)

        def read(part: Integers) -> list[str]:
            met = []
            for i in part:
                try:
                    image = images.read(int(indices[i]), preprocess.mode)
                    pixels[i] = as_array(preprocess.fit(image))
                except ImageError as error:
                    good[i] = False
                    met.append(f"{error.name}: {error.reason}")
            return met

        parts = np.array_split(np.arange(len(indices)), max(1, min(workers, len(indices))))
        waiting = [pool(partial(read, part)) for part in parts]

        def gather() -> Batch:
            met = [line for wait in waiting for line in wait()]
            kept, left = (whole, indices) if good.all() else (whole[good], indices[good])
            labels = targets_of(images, left)
            return make_batch(kept, labels, left, np.zeros_like(left), met)

        return gather

    return WorkAhead(make, range(0, len(mine), batch_size), workers)
