"""Batches of a stream: as `TrainLoader` makes them, but in the order in which images arrive."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from vitcli.data.augment.mixing import mixes_pairs, sample_mix
from vitcli.data.augment.policies import AugmentSettings
from vitcli.data.augment.transform import image_rng
from vitcli.data.batch import Batch, empty_images
from vitcli.data.image_set import Pixels
from vitcli.data.loader import Transform, check_batch, default_workers
from vitcli.data.streaming import StreamSample, StreamSet
from vitcli.decode import ImageError, open_image
from vitcli.errors import VitcliError

AHEAD = 2  # batches that are decoded ahead


@dataclass(frozen=True)
class Shown:
    """One image that was read: its views, each (C, Y, X), its class, its place in the stream."""

    views: tuple[Pixels, ...]
    label: int
    place: int
    epoch: int


class StreamLoader:
    """The endless, seeded stream of a training set, cut into batches.

    An image that cannot be read is passed over; `broken` says which and why. A stream that begins
    at another position than 0 is another one, drawn from (seed, position).

    Args:
        images, transform, batch_size, seed, views, workers, rank, world_size, strict, strength: as
            in `TrainLoader`; each process reads shards of its own.

    Raises:
        VitcliError: the batch size does not divide, or there are fewer shards than processes.
    """

    def __init__(
        self,
        images: StreamSet,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        views: int = 1,
        workers: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        strict: bool = False,
        augment: AugmentSettings = None,
    ) -> None:
        mixes = augment is not None and mixes_pairs(augment)
        check_batch(batch_size, world_size, 1, mixes)
        if len(images.shards) < world_size:
            raise VitcliError(
                f"a stream of {len(images.shards)} files for {world_size} processes",
                "each reads files of its own: fewer processes, or more and smaller files",
            )
        self.images = images
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.views = views
        self.workers = max(1, default_workers(world_size) if workers is None else workers)
        self.rank = rank
        self.world_size = world_size
        self.strict = strict
        self.augment = augment if mixes else None
        self.broken: dict[str, str] = {}

    def batches(self, start_images: int, num_steps: int) -> Iterator[Batch]:
        """This process's part of `num_steps` batches of the stream that begins at `start_images`.

        Raises:
            VitcliError: a shard cannot be read, or no image of a whole epoch can.
            ImageError: an image cannot be read and `strict` is set.
        """
        size = self.batch_size // self.world_size
        with ThreadPoolExecutor(self.workers) as threads:
            shown = self._shown(start_images, threads, AHEAD * size)
            try:
                for step in range(num_steps):
                    start = start_images + step * self.batch_size
                    yield self._batch([next(shown) for _ in range(size)], start)
            finally:
                shown.close()
                threads.shutdown(cancel_futures=True)

    def _samples(self, start: int) -> Iterator[tuple[int, int, StreamSample]]:
        """(epoch, place in it, image) without end."""
        epoch = 0
        while True:
            count = -1
            seed = (self.seed, start, epoch)
            for count, sample in enumerate(self.images.epoch(seed, self.rank, self.world_size)):
                yield epoch, count, sample
            if count < 0:
                raise self._nothing()
            epoch += 1

    def _nothing(self) -> VitcliError:
        return VitcliError(
            f"the stream of {len(self.images.shards)} files has no labelled image that can be read",
            "`data.label_column` and `data.image_column` name what is not found",
        )

    def _shown(self, start: int, threads: ThreadPoolExecutor, ahead: int) -> Generator[Shown]:
        """The readable images in the order of the stream, decoded a few ahead."""
        waiting: deque[tuple[StreamSample, Future[Shown]]] = deque()
        readable = False
        for epoch, place, sample in self._samples(start):
            if epoch > AHEAD and not readable:
                raise self._nothing()
            waiting.append((sample, threads.submit(self._make, epoch, place, sample)))
            while len(waiting) >= ahead:
                done, future = waiting.popleft()
                try:
                    one = future.result()
                    readable = True
                    yield one
                except ImageError as error:
                    if self.strict:
                        raise
                    self.broken[done.name] = error.reason

    def _make(self, epoch: int, place: int, sample: StreamSample) -> Shown:
        index = place * self.world_size + self.rank
        mode = self.transform.preprocess.mode
        with open_image(sample.content, mode, name=sample.name) as picture:
            views = tuple(
                self.transform.view(picture, image_rng(self.seed, epoch, index, view))
                for view in range(self.views)
            )
        return Shown(views, sample.label, index, epoch)

    def _batch(self, shown: list[Shown], start: int) -> Batch:
        views = [one.views[view] for view in range(self.views) for one in shown]  # V*B
        images = empty_images((len(views), *views[0].shape), pin_memory=False)  # (V*B, C, Y, X)
        for i, pixels in enumerate(views):
            images.numpy()[i] = pixels
        mix = None
        if self.augment is not None:
            size = self.transform.preprocess.image_size
            whole = sample_mix(self.seed, start, self.batch_size, size, self.augment)
            mix = whole.part(self.rank * len(shown), (self.rank + 1) * len(shown))
        return Batch(
            images,
            torch.tensor([one.label for one in shown], dtype=torch.int64),
            torch.tensor([one.place for one in shown], dtype=torch.int64),
            torch.tensor([one.epoch for one in shown], dtype=torch.int64),
            mix=mix,
        )
