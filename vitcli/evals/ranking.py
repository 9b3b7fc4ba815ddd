"""How well scores rank the images of one class before all others: ROC-AUC and average precision.

One sort per class gives both figures, and the same figures without each image for their intervals.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.evals.intervals import LeaveOneOut

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Ranking:
    """n images by falling score. Images with equal scores share one threshold: a group.

    Attributes:
        order: (n,) images by falling score.
        hit: (n,) whether each of them, in this order, is of the class.
        starts, ends: (n,) the first place of its group, and the place after the last.
    """

    order: NDArray[np.int64]
    hit: NDArray[np.bool_]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, scores: Floats, targets: NDArray[Any]) -> "Ranking":
        """(n,) scores and (n,) targets of 0 and 1 -> their ranking."""
        n, order = len(scores), np.argsort(-scores, kind="stable")
        ranked = scores[order]
        # The order inside a group must not matter: a sort could favour the images of the class.
        changes = np.flatnonzero(ranked[1:] != ranked[:-1]) + 1
        starts, ends = np.append(0, changes), np.append(changes, n)
        sizes = ends - starts
        hit = np.asarray(targets[order] > 0)
        return cls(order, hit, np.repeat(starts, sizes), np.repeat(ends, sizes))

    @property
    def positives(self) -> int:
        """Number of images of the class."""
        return int(self.hit.sum())

    @property
    def found(self) -> NDArray[np.int64]:
        """(n,) images of the class from the top to the end of the group of each image."""
        return np.asarray(np.cumsum(self.hit)[self.ends - 1])

    def average_precision(self) -> float | None:
        """Average precision as scikit-learn computes it; None without an image of the class."""
        # The mean over the images of the class: each adds 1 / positives of recall at its threshold.
        return float((self.found / self.ends)[self.hit].mean()) if self.hit.any() else None

    def roc_auc(self) -> LeaveOneOut | None:
        """Area under the ROC curve, and without each image; None if all images are of one kind.

        The area is the share of pairs of an image of the class and another one that are in the
        right order; a tie counts half. Leaving out an image removes its pairs, which gives the
        variance of DeLong et al. (1988).
        """
        n, positives = len(self.hit), self.positives
        negatives = n - positives
        if not positives or not negatives:
            return None
        found = self.found
        above = np.append(0, np.cumsum(self.hit))[self.starts]  # images of the class, higher
        tied = found - above
        # Each image has the pairs with all images of the other kind; `right` counts its share.
        others_tied = self.ends - self.starts - tied
        others_below = negatives - (self.ends - found)
        right = np.where(self.hit, others_below + others_tied / 2, above + tied / 2)
        total = float(right[self.hit].sum())  # every pair once, seen from the image of the class
        # Without the last image of a kind the figure is undefined; that image then changes nothing.
        left = np.where(self.hit, (positives - 1) * negatives, positives * (negatives - 1))
        area = total / (positives * negatives)
        rest = np.divide(total - right, left, out=np.full(n, area), where=left > 0)
        without = np.empty(n)
        without[self.order] = rest
        return LeaveOneOut(area, without)

    def halved_average_precision(self) -> LeaveOneOut:
        """Average precision in which an image counts half at its own threshold; jackknife."""
        n, hit, total = len(self.hit), self.hit, self.positives
        found, seen = self.found - 0.5, self.ends - 0.5

        def sums(values: Floats) -> tuple[Floats, Floats]:
            """Sums over the groups before that of each image, and over its own and later ones."""
            before = np.append(0, np.cumsum(values))[self.starts]
            return before, values.sum() - before

        above, _ = sums(np.where(hit, found / seen, 0.0))
        # Without an image, one fewer is seen at its own threshold and at every later one.
        fewer = np.maximum(seen - 1, 0.5)
        _, below_negative = sums(np.where(hit, found / fewer, 0.0))
        lost = np.where(hit, np.maximum(found - 1, 0.0) / fewer, 0.0)
        _, below_positive = sums(lost)
        left_hit = (above + below_positive - lost) / max(total - 1, 1)
        without = np.empty(n)
        without[self.order] = np.where(hit, left_hit, (above + below_negative) / max(total, 1))
        whole = float(np.where(hit, found / seen, 0.0).sum() / max(total, 1))
        return LeaveOneOut(whole, without)


def mean_leave_out(parts: "list[LeaveOneOut]", n: int) -> LeaveOneOut:
    """The mean of figures on the same n images; NaN if there is none."""
    if not parts:
        return LeaveOneOut(math.nan, np.zeros(n))
    # The jackknife is linear: the mean without an image is the mean of the figures without it.
    count = len(parts)
    total = np.zeros(n)
    for part in parts:
        total += part.without
    return LeaveOneOut(sum(part.whole for part in parts) / count, total / count)


def leave_out_average_precision(scores: Floats, targets: NDArray[Any]) -> LeaveOneOut:
    """Mean average precision without each image, for an interval.

    The precision at an image of the class counts that image half. scikit-learn counts it in full,
    so that random scores of a rare class have an average precision far above its share of images;
    without it, the precision at the top is not defined. The jackknife removes most of the rest.

    Args:
        scores, targets: (n, K) scores, and targets of 0 and 1. Classes with fewer than two images
            do not take part.
    """
    columns = np.flatnonzero(targets.sum(axis=0) > 1)
    parts = [Ranking.of(scores[:, k], targets[:, k]).halved_average_precision() for k in columns]
    return mean_leave_out(parts, len(scores))
