"""Divide labelled images by class and by seed; copies and groups stay together.

Without groups, every function gives the same images as before groups existed, so that old runs find
their test images.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
# Third word of the seed of `spread_order`, so that its random stream is not the one of
# `stratified_split`, which is seeded by (seed, class).
SPREAD_STREAM = 2


@dataclass
class Units:
    """What a split may not divide: single images, or groups of them (copies, one patient …).

    Args:
        labels: (n,) class of each image.
        groups: (n,) equal for images of one unit, -1 for a single image; None: all are single.

    Attributes:
        which: (n,) the unit of each image, numbered by first appearance.
        sizes: (U,) images per unit.
        strata: (U,) the class by which a unit is divided: of its classes the one in fewest units.
    """

    labels: Integers
    groups: Integers | None = None

    def __post_init__(self) -> None:
        n = len(self.labels)
        self.which, self.sizes, self.strata = np.arange(n), np.ones(n, dtype=np.int64), self.labels
        if self.groups is None:
            return
        single = -1 - np.arange(n)  # images in no group
        groups = np.where(self.groups < 0, single, self.groups)
        _, first, group = np.unique(groups, return_index=True, return_inverse=True)
        if len(first) == n:
            return
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        self.which = rank[group]
        self.sizes = np.bincount(self.which)
        classes, label = np.unique(self.labels, return_inverse=True)
        pairs = np.unique(np.stack([self.which, label], axis=1), axis=0)  # (unit, class)
        units_of_class = np.bincount(pairs[:, 1])
        order = np.lexsort((pairs[:, 1], units_of_class[pairs[:, 1]], pairs[:, 0]))
        _, rarest = np.unique(pairs[order, 0], return_index=True)
        self.strata = classes[pairs[order[rarest], 1]]

    def images(self, units: Integers) -> Integers:
        """The images of some units, ascending."""
        return np.flatnonzero(np.isin(self.which, units))

    def take(self, units: Integers, count: int) -> Integers:
        """Units from the front with `count` images together, or as many as fit; at least one."""
        if self.sizes[units].max() == 1:
            return units[:count]
        taken, total = [], 0
        for unit in units:
            if total + self.sizes[unit] <= count:
                taken.append(unit)
                total += self.sizes[unit]
        return np.array(taken) if taken else units[[np.argmin(self.sizes[units])]]


def stratified_split(
    labels: Integers, fraction: float, seed: int, groups: Integers | None = None
) -> tuple[Integers, Integers]:
    """(indices that stay, indices held out): `fraction` of each class, at least one image.

    Each class of two or more images has at least one on both sides. A single image stays. With
    `groups` the same holds of groups: none is divided, and a class in one group only stays.
    """
    units = Units(labels, groups)
    held_out = []
    for label in np.unique(units.strata):
        members = np.flatnonzero(units.strata == label)
        if len(members) < 2:
            continue
        n = int(units.sizes[members].sum())
        count = min(max(round(n * fraction), 1), n - 1)
        rng = np.random.default_rng((seed, int(label) % 2**32))
        held_out.append(units.take(rng.permutation(members), count))
    chosen = np.concatenate(held_out) if held_out else np.array([], dtype=np.int64)
    aside = units.images(_with_every_class(units, chosen))
    return np.setdiff1d(np.arange(len(labels)), aside), aside


def _with_every_class(units: Units, chosen: Integers) -> Integers:
    """The chosen units without those that a class needs to have any training image."""
    if len(units.sizes) == len(units.labels):
        return chosen
    stays = ~np.isin(units.which, chosen)
    for label in np.setdiff1d(units.labels, units.labels[stays]):
        if label in units.labels[~np.isin(units.which, chosen)]:
            continue
        with_class = np.intersect1d(units.which[units.labels == label], chosen)
        chosen = np.setdiff1d(chosen, with_class[[np.argmin(units.sizes[with_class])]])
    return chosen


def spread_order(labels: Integers, seed: int) -> Integers:
    """(n,) an order of the images in which every class is spread evenly.

    So any slice of it holds each class in its share, up to one image, and slices that do not
    overlap share no image. The order within a class is random.
    """
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rng = np.random.default_rng((seed, int(label) % 2**32, SPREAD_STREAM))
        place[rng.permutation(members)] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place, kind="stable")


def spread_slice(
    labels: Integers, seed: int, first: int, last: int, groups: Integers | None = None
) -> Integers:
    """The images from `first` to `last` in `spread_order`, ascending; no group is divided.

    A group belongs to the slice in which its first image would be.
    """
    units = Units(labels, groups)
    order = spread_order(units.strata, seed)
    start = np.cumsum(units.sizes[order]) - units.sizes[order]
    return units.images(order[(start >= first) & (start < last)])


def fold_of(
    labels: Integers, folds: int, fold: int, seed: int, groups: Integers | None = None
) -> tuple[Integers, Integers]:
    """(training indices, held-out indices) of fold number `fold` of `folds`."""
    n = len(labels)
    held_out = spread_slice(labels, seed, fold * n // folds, (fold + 1) * n // folds, groups)
    return np.setdiff1d(np.arange(n), held_out), held_out
