"""Batches for training and evaluation, made by threads ahead of the model.

A loader has no state to save. Everything random is a function of numbers that a checkpoint has:

* order of the images: (seed, epoch), see `vitcli/data/sampler.py`
* augmentation of an image: (seed, epoch, index, repeat)
* mixup and cutmix of a batch: (seed, position)

The position is the number of images seen by all processes. So the batches are the same for any
number of threads, and for any number of processes taken together. A stream (`data.streaming`) is
the exception: it cannot start in its middle, so its order depends on the position it starts from.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch

from vitcli.data.augment.mixing import Mix, mixes_pairs, sample_mix
from vitcli.data.augment.policies import AugmentSettings, Rng
from vitcli.data.augment.transform import TrainTransform, image_rng
from vitcli.data.batch import Batch, allocate_images, check_batch, make_batch, targets_of
from vitcli.data.image_set import (
    AnyPicture,
    BatchSource,
    ImageSet,
    Integers,
    Pixels,
    Stream,
)
from vitcli.data.prefetch import Prefetcher, Submit, default_workers
from vitcli.data.sampler import make_sampler, repeated_positions
from vitcli.decode import ImageError, open_image
from vitcli.errors import VitcliError
from vitcli.pixels import PixelFormat
from vitcli.preprocess import Preprocess, as_array

STREAM_PREFETCH = 2  # batches of a stream that are decoded ahead


class TrainLoader:
    """The endless, seeded sequence of training batches.

    `images` is of one of three kinds (`images.kind`):

    * `ImageSet`, decoded image by image. An unreadable image is replaced by the next image of its
      class.
    * `BatchSource`, which makes whole batches itself.
    * `Stream`. An unreadable image is skipped.

    Args:
        images: the training set.
        transform: the training transform; None for a `BatchSource`.
        batch_size: images per step, summed over all processes.
        seed: seed of order, augmentation and mixing.
        workers: threads; 0 decodes in the calling thread, None chooses.
        rank, world_size: this process and the number of processes. Each process makes an equal,
            contiguous part of every batch.
        strict: raise `ImageError` for an unreadable image.
        image_size: (Y, X) of a `BatchSource`; default: that of the transform.
        repeats: showings of each image in a batch, each with its own augmentation.
        augment: resolved `[augment]` settings for mixup and cutmix; None: no mixing.
        pin_memory: allocate pinned memory, from which a GPU copies in the background.
        sampler: as `data.sampler`; it says which image is at which position.

    Attributes:
        broken: name -> reason of each unreadable image so far.

    Raises:
        VitcliError: the batch size does not divide as needed, or a stream has fewer files than
            there are processes.
    """

    def __init__(
        self,
        images: ImageSet | BatchSource | Stream,
        transform: TrainTransform | None,
        *,
        batch_size: int,
        seed: int,
        workers: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        strict: bool = False,
        image_size: tuple[int, int] | None = None,
        repeats: int = 1,
        augment: AugmentSettings = None,
        pin_memory: bool = False,
        sampler: str = "shuffle",
    ) -> None:
        mixes = augment is not None and mixes_pairs(augment)
        check_batch(batch_size, world_size, repeats, mixes)
        if images.kind == "stream" and len(images.shards) < world_size:
            raise VitcliError(
                f"the stream has {len(images.shards)} files for {world_size} processes, and each "
                "process reads its own files",
                "use fewer processes, or split the data into more files",
            )
        assert transform is not None or images.kind == "batches"
        assert repeats == 1 or images.kind == "images"
        self.images = images
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.workers = default_workers(world_size) if workers is None else workers
        self.rank = rank
        self.world_size = world_size
        self.strict = strict
        self.image_size = image_size or (transform.preprocess.image_size if transform else None)
        self.repeats = repeats
        self.augment = augment if mixes else None
        self.pin_memory = pin_memory
        self.sampler = None if images.kind == "stream" else make_sampler(sampler, images, seed)
        self.broken: dict[str, str] = {}
        self._unreadable: dict[int, tuple[str, str]] = {}  # index -> name, reason
        self._lock = threading.Lock()

    def batches(self, start_images: int, num_steps: int) -> Iterator[Batch]:
        """This process's part of `num_steps` batches, from position `start_images` on.

        The threads end when the iterator is exhausted or closed.

        Raises:
            VitcliError: a class, or a whole stream, has no readable image; a shard is unreadable.
            ImageError: an image is unreadable and `strict` is set.
        """
        images = self.images
        if images.kind == "stream":
            return self._stream_batches(images, start_images, num_steps)
        starts = (start_images + step * self.batch_size for step in range(num_steps))
        if images.kind == "batches":
            return Prefetcher(partial(self._draw_batch, images), starts, self.workers)
        return Prefetcher(partial(self._decode_batch, images), starts, self.workers)

    def _local_images(self, start: int) -> tuple[Integers, Integers, Integers]:
        """Epoch, index and number of earlier showings in the batch of this process's images."""
        assert self.sampler is not None
        size = self.batch_size // self.world_size
        first = start + self.rank * size
        if self.repeats == 1:
            return *self.sampler(first, size), np.zeros(size, dtype=np.int64)
        positions, repeat = repeated_positions(first, size, self.batch_size, self.repeats)
        low = int(positions.min())
        epochs, indices = self.sampler(low, int(positions.max()) - low + 1)
        return epochs[positions - low], indices[positions - low], repeat

    def _local_mix(self, start: int) -> Mix | None:
        """The mixing of this process's images in the batch at position `start`."""
        if self.augment is None:
            return None
        assert self.image_size is not None
        # Every process draws the mixing of the whole batch, so that their number changes nothing.
        whole = sample_mix(self.seed, start, self.batch_size, self.image_size, self.augment)
        size = self.batch_size // self.world_size
        return whole.part(self.rank * size, (self.rank + 1) * size)

    def _draw_batch(self, source: BatchSource, start: int, submit: Submit) -> Callable[[], Batch]:
        """A batch from a set that makes batches."""
        epochs, indices, _ = self._local_images(start)
        image_size = self.image_size
        assert image_size is not None

        def draw() -> Batch:
            drawn, labels = source.batch(epochs, indices, image_size, self.seed)
            images = torch.as_tensor(drawn)
            images = images.pin_memory() if self.pin_memory else images
            batch = make_batch(images, labels, indices, epochs)
            return replace(batch, mix=self._local_mix(start))

        return submit(draw)

    def _decode_batch(self, source: ImageSet, start: int, submit: Submit) -> Callable[[], Batch]:
        """A batch that is decoded and transformed image by image; the threads share its parts."""
        assert self.transform is not None
        transform, preprocess = self.transform, self.transform.preprocess
        epochs, indices, repeat = self._local_images(start)
        shown = indices.copy()  # differs from `indices` where an image is replaced
        shape = (len(indices), preprocess.num_channels, *preprocess.image_size)
        images = allocate_images(shape, self.pin_memory)
        pixels = images.numpy()  # (B, C, Y, X), the same memory

        def rng_of(i: int) -> Rng:
            return image_rng(self.seed, int(epochs[i]), int(indices[i]), int(repeat[i]))

        def write(i: int, rng: Rng, image: AnyPicture) -> None:
            pixels[i] = transform.view(image, rng)

        def fill(part: Integers) -> list[tuple[str, str]]:
            unreadable: list[tuple[str, str]] = []
            # All generators first: creating them between images takes twice the time, which is
            # noticeable with decoded images.
            rngs = [rng_of(i) for i in part.tolist()]
            for i, rng in zip(part.tolist(), rngs, strict=True):
                use = partial(write, i, rng)
                index, wanted = int(indices[i]), preprocess.pixel_format
                shown[i] = self._read_or_replace(source, index, wanted, use, unreadable)
            return unreadable

        parts = np.array_split(np.arange(len(indices)), max(1, min(self.workers, len(indices))))
        results = [submit(partial(fill, part)) for part in parts]

        def gather() -> Batch:
            unreadable = [entry for result in results for entry in result()]
            labels = targets_of(source, shown)
            batch = make_batch(images, labels, shown, epochs, dict.fromkeys(unreadable))
            return replace(batch, mix=self._local_mix(start))

        return gather

    def _read_or_replace(
        self,
        source: ImageSet,
        index: int,
        wanted: PixelFormat,
        use: Callable[[AnyPicture], None],
        unreadable: list[tuple[str, str]],
    ) -> int:
        """Call `use` with the image or the next readable one of its class; return its index."""
        for candidate in _same_class(source.labels, index):
            if candidate in self._unreadable:
                unreadable.append(self._unreadable[candidate])
                continue
            try:
                with source.open(candidate, wanted) as image:
                    use(image)
                return candidate
            except ImageError as error:
                if self.strict:
                    raise
                unreadable.append((error.name, error.reason))
                with self._lock:
                    self.broken[error.name] = error.reason
                    self._unreadable[candidate] = error.name, error.reason
        label = int(source.labels[index])
        which = f"of class `{source.classes[label]}`" if label >= 0 else "without a label"
        raise VitcliError(
            f"none of the images {which} can be read",
            f"check the files, for example {source.describe(index)}",
        )

    def _stream_batches(self, stream: Stream, start_images: int, num_steps: int) -> Iterator[Batch]:
        size = self.batch_size // self.world_size
        decoded = self._stream_images(stream, start_images, STREAM_PREFETCH * size - 1)
        for step in range(num_steps):
            epochs, indices, labels, pixels = zip(*islice(decoded, size), strict=True)
            images = allocate_images((len(pixels), *pixels[0].shape), self.pin_memory)
            for i, image in enumerate(pixels):
                images.numpy()[i] = image
            batch = make_batch(images, labels, np.array(indices), np.array(epochs))
            mix = self._local_mix(start_images + step * self.batch_size)
            yield replace(batch, mix=mix)

    def _stream_images(
        self, stream: Stream, start_images: int, prefetch: int
    ) -> Iterator[tuple[int, int, int, Pixels]]:
        """(epoch, index, label, pixels) of the readable images, in the order of the stream."""
        assert self.transform is not None
        transform, wanted = self.transform, self.transform.preprocess.pixel_format
        no_image = VitcliError(
            f"the stream of {len(stream.shards)} files has no labelled image that can be read",
            "name the columns with `--set data.image_column=NAME` and `data.label_column=NAME`",
        )

        def samples() -> Iterator[tuple[int, int, Any]]:
            for epoch in count():
                seed, number = (self.seed, start_images, epoch), -1
                shuffled = stream.epoch(seed, self.rank, self.world_size)
                for number, sample in enumerate(shuffled):
                    yield epoch, number * self.world_size + self.rank, sample
                if number < 0:
                    raise no_image

        def decode(epoch: int, index: int, sample: Any) -> Any:
            rng = image_rng(self.seed, epoch, index)
            try:
                with open_image(sample.content, wanted, name=sample.name) as image:
                    pixels = transform.view(image, rng)
            except ImageError as error:
                return epoch, index, error, None
            return epoch, index, sample.label, pixels

        any_readable = False
        workers = max(1, self.workers)
        for result in Prefetcher(
            lambda one, submit: submit(partial(decode, *one)), samples(), workers, prefetch
        ):
            if not isinstance(result[2], ImageError):
                any_readable = True
                yield result
            elif self.strict:
                raise result[2]
            elif result[0] > 0 and not any_readable:  # the whole first epoch was unreadable
                raise no_image
            else:
                self.broken[result[2].name] = result[2].reason


def _same_class(labels: Integers, index: int) -> Iterator[int]:
    """`index`, then the later images of its class, then the earlier ones."""
    yield index
    members = np.flatnonzero(labels == labels[index])
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
    """Every image once, in order; each process takes a contiguous part.

    Unreadable images are left out and listed in `Batch.broken`, so a batch may be short or empty.

    Args:
        images: the set.
        preprocess: the evaluation transform; the caller normalises on the device.
        batch_size: images per batch of this process.
        workers, rank, world_size, pin_memory: as in `TrainLoader`.
        limit: evaluate at most this many images, spread evenly over the set.
    """
    num_images = len(images) if limit is None else min(limit, len(images))
    chosen = np.arange(num_images, dtype=np.int64) * len(images) // max(num_images, 1)
    local = np.array_split(chosen, world_size)[rank]
    workers = default_workers(world_size) if workers is None else workers

    def make(start: int, submit: Submit) -> Callable[[], Batch]:
        indices = local[start : start + batch_size]
        shape = (len(indices), preprocess.num_channels, *preprocess.image_size)
        batch_images = allocate_images(shape, pin_memory)  # (B, C, Y, X)
        pixels = batch_images.numpy()  # the same memory
        readable = np.ones(len(indices), dtype=bool)

        def fill(part: Integers) -> list[tuple[str, str]]:
            failures = []
            for i in part:
                try:
                    image = images.read(int(indices[i]), preprocess.pixel_format)
                    pixels[i] = as_array(preprocess.fit(image))
                except ImageError as error:
                    readable[i] = False
                    failures.append((error.name, error.reason))
            return failures

        parts = np.array_split(np.arange(len(indices)), max(1, min(workers, len(indices))))
        results = [submit(partial(fill, part)) for part in parts]

        def gather() -> Batch:
            failures = [entry for result in results for entry in result()]
            kept, left = batch_images, indices
            if not readable.all():
                kept, left = batch_images[readable], indices[readable]
            labels = targets_of(images, left)
            return make_batch(kept, labels, left, np.zeros_like(left), failures)

        return gather

    return Prefetcher(make, range(0, len(local), batch_size), workers)
