"""Samplers: which training image stands at which position, as a function of the seed.

A sampler has no state. A run that resumes asks for the positions from where it stopped, and each of
several processes for its own part of them.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Protocol

import numpy as np

from vitcli.data.image_set import BatchSource, ImageSet, Integers

# Exponent q of `data.sampler`: a class of n images is drawn in proportion to n^q (Kang et al.,
# 2020, "Decoupling representation and classifier", equation 1).
POWERS = {"square_root": 0.5, "class_balanced": 0.0}
# Fifth word of a seed, which separates the streams of random numbers; see `mixing.MIX_STREAM`.
ORDER_STREAM, ROUND_STREAM = 2, 3


class Sampler(Protocol):
    """(start, count) -> for the positions start..start+count-1, how often the image was shown
    before, and its index; (count,) each. Augmentation depends on both, so that no image is shown
    twice in the same way."""

    def __call__(self, start: int, count: int) -> tuple[Integers, Integers]: ...


def make_sampler(name: str, images: ImageSet | BatchSource, seed: int) -> Sampler:
    """The sampler `name` of `data.sampler` for a training set."""
    if name not in POWERS:
        return partial(images_at, num_images=len(images), seed=seed)
    return ClassSampler(images.labels, seed, POWERS[name])


@lru_cache(maxsize=4)
def epoch_order(num_images: int, seed: int, epoch: int) -> Integers:
    """(n,) the order in which an epoch shows the images 0..n-1; a function of (seed, epoch)."""
    order = np.random.default_rng((seed, epoch)).permutation(num_images)
    order.flags.writeable = False  # callers share the cached array
    return order


def images_at(start: int, count: int, num_images: int, seed: int) -> tuple[Integers, Integers]:
    """(count,) epochs and (count,) indices of the images at the positions start..start+count-1."""
    return _look_up(start, count, num_images, partial(epoch_order, num_images, seed))


def _look_up(
    start: int, count: int, size: int, draws: Callable[[int], Integers]
) -> tuple[Integers, Integers]:
    """(count,) epochs, and (…, count) draws at these positions; `draws(epoch)` is (…, size)."""
    epochs, offsets = np.divmod(np.arange(start, start + count, dtype=np.int64), size)
    # Epochs only grow, so that the parts follow each other.
    parts = [draws(int(epoch))[..., offsets[epochs == epoch]] for epoch in np.unique(epochs)]
    return epochs, np.concatenate(parts, axis=-1)


class ClassSampler:
    """Draws each class in a fixed proportion, and the images of a class equally often.

    The draws are not independent. After any number of epochs, a class was drawn as often as it
    should be, up to one image. The images of a class come in rounds, each in a new order, and a
    round goes on in the next epoch. So every image of a large class has its turn.

    Args:
        labels: (n,) class of each image; an epoch has n draws.
        seed: seed of the order.
        power: a class of m images is drawn in proportion to m^power.
    """

    def __init__(self, labels: Integers, seed: int, power: float) -> None:
        self.seed, self.size = seed, len(labels)
        _, counts = np.unique(labels, return_counts=True)
        order = np.argsort(labels, kind="stable")
        self.members = np.split(order, np.cumsum(counts)[:-1])
        share = counts.astype(np.float64) ** power
        self.ends = np.cumsum(share) / share.sum()
        self.ends[-1] = 1.0  # not 1 - 1e-16: an epoch has exactly n draws
        self.epoch = lru_cache(maxsize=4)(self._epoch)

    def __call__(self, start: int, count: int) -> tuple[Integers, Integers]:
        """See `Sampler`."""
        _, (rounds, indices) = _look_up(start, count, self.size, self.epoch)
        return rounds, indices

    def drawn(self, epochs: int) -> Integers:
        """(K,) how often each class is drawn in the first `epochs` epochs."""
        # The ends of the classes on a line of all draws are rounded, and not their numbers of
        # draws, so that these add up. 0.5: an end on a whole number must not depend on rounding.
        ends = np.floor(epochs * self.size * self.ends + 0.5).astype(np.int64)
        return np.diff(ends, prepend=0)

    def _epoch(self, epoch: int) -> Integers:
        """(2, n) the round and the index of each draw of an epoch."""
        draws = []
        before, after = self.drawn(epoch), self.drawn(epoch + 1)
        for label, members in enumerate(self.members):
            rounds, offsets = np.divmod(np.arange(before[label], after[label]), len(members))
            for number in np.unique(rounds):
                key = (self.seed, label, int(number), 0, ROUND_STREAM)
                order = np.random.default_rng(key).permutation(members)
                chosen = order[offsets[rounds == number]]
                draws.append(np.stack([np.full_like(chosen, number), chosen]))
        key = (self.seed, epoch, 0, 0, ORDER_STREAM)
        order = np.random.default_rng(key).permutation(self.size)
        return np.concatenate(draws, axis=1)[:, order]


def repeated_positions(
    start: int, count: int, batch_size: int, repeats: int
) -> tuple[Integers, Integers]:
    """Positions under repeated augmentation (Hoffer et al. 2020), `repeats` times in each batch.

    The images of a batch come once in a row, then again in a row, so that mixing never pairs an
    image with itself.

    Returns:
        (count,) the positions without repeats, and (count,) the number of earlier showings of the
        image in its batch.
    """
    batch, offset = np.divmod(np.arange(start, start + count, dtype=np.int64), batch_size)
    repeat, position = np.divmod(offset, batch_size // repeats)
    return batch * (batch_size // repeats) + position, repeat
