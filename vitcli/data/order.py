"""Which image comes when: functions of the seed and the place in the stream, with no state."""

from functools import lru_cache

import numpy as np

from vitcli.data.sets import Integers


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
