"""Whether probabilities can be believed: calibration error, reliability, temperature."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitcli.errors import VitcliError
from vitcli.evals.scoring import NONE, as_answers, blocks, log_softmax, taken

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

ECE_BINS = 15
LARGEST = 1e4  # of a temperature and of its inverse


@dataclass(frozen=True)
class Reliability:
    """Images by the confidence of their answer, in bins of equal width; a bin holds its upper edge.

    Attributes:
        edges: (bins + 1,).
        images: (bins,) how many.
        confidence, accuracy: (bins,) means; NaN for an empty bin.
    """

    edges: Floats
    images: Ints
    confidence: Floats
    accuracy: Floats

    def to_json(self) -> list[dict[str, float | int]]:
        """A row for each bin that holds an image."""
        return [
            {
                "from": float(self.edges[i]),
                "to": float(self.edges[i + 1]),
                "images": int(self.images[i]),
                "confidence": float(self.confidence[i]),
                "accuracy": float(self.accuracy[i]),
            }
            for i in np.flatnonzero(self.images)
        ]


def bin_of(confidence: Floats, bins: int = ECE_BINS) -> Ints:
    """(n,) in 0..1 -> (n,) the number of the bin."""
    edges = np.linspace(0, 1, bins + 1)
    return np.clip(np.digitize(confidence, edges[1:-1], right=True), 0, bins - 1).astype(np.int64)


def calibration_error(
    confidence: Floats, correct: NDArray[np.bool_], bins: int = ECE_BINS
) -> float:
    """Expected calibration error: the mean of |accuracy - confidence| over equal-width bins,
    weighted by their images (Guo et al., 2017). A bin holds its upper edge.
    """
    gap = correct.astype(np.float64) - confidence
    sums = np.bincount(bin_of(confidence, bins), weights=gap, minlength=bins)
    return float(np.abs(sums).sum() / len(confidence))


def reliability(
    confidence: Floats, correct: NDArray[np.bool_], bins: int = ECE_BINS
) -> Reliability:
    """What the calibration error is made of."""
    place = bin_of(confidence, bins)
    images = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):  # of an empty bin
        means = [
            np.bincount(place, weights=values.astype(np.float64), minlength=bins) / images
            for values in (confidence, correct)
        ]
    return Reliability(np.linspace(0, 1, bins + 1), images.astype(np.int64), *means)


def fit_temperature(logits: Floats, answers: ArrayLike) -> float:
    """(n, K) logits and their (n,) or (n, M) right outputs -> the T of the least loss.

    Guo et al. (2017). The loss of softmax(b z) is convex in b = 1 / T, and its slope is the mean of
    z under the model minus z of the right output; T is where that is zero. Where every image is
    right the loss falls for ever, and the right outputs are wanted with n + 1 of n + 2 only, as
    Platt (1999) has it, so that no certainty comes of it.

    Raises:
        VitcliError: no T makes the logits better than a guess.
    """
    right = as_answers(answers)
    n, k = logits.shape
    doubt = 0.0 if _any_wrong(logits, right) else 1 / (n + 2)

    def slope(b: float) -> float:
        total = 0.0
        for part in blocks(n, k):
            z = logits[part].astype(np.float64)
            wanted = _expected_of(z, right[part], b)
            if doubt and k > 1:
                others = (z.sum(axis=1) - wanted) / (k - 1)
                wanted = (1 - doubt) * wanted + doubt * others
            total += float(((np.exp(log_softmax(b * z)) * z).sum(axis=1) - wanted).sum())
        return total / n

    return _root(slope)


def fit_temperature_labels(logits: Floats, targets: ArrayLike) -> float:
    """(n, K) logits and (n, K) ones and zeros -> the T of the least binary cross-entropy.

    Raises:
        VitcliError: no T makes the logits better than a guess.
    """
    y = np.asarray(targets, dtype=np.float64)
    n, k = logits.shape
    if np.array_equal(logits > 0, y > 0.5):  # as above
        y = (y * n + 1) / (n + 2)

    def slope(b: float) -> float:
        total = 0.0
        for part in blocks(n, k):
            z = logits[part].astype(np.float64)
            shares = 0.5 * (1 + np.tanh(0.5 * b * z))  # the logistic function, never overflowing
            total += float(((shares - y[part]) * z).sum())
        return total / n

    return _root(slope)


def _any_wrong(logits: Floats, right: Ints) -> bool:
    best = logits.argmax(axis=1)
    return bool((~(right == best[:, None]).any(axis=1)).any())


def _expected_of(z: NDArray[np.float64], right: Ints, b: float) -> NDArray[np.float64]:
    """(n, K), (n, M) -> (n,): the mean of z over the right outputs, as likely as the model says."""
    if right.shape[1] == 1:
        return taken(z, right)[:, 0]
    shares = np.exp(log_softmax(taken(b * z, right)))
    return np.asarray((shares * np.where(right == NONE, 0.0, taken(z, right.clip(0)))).sum(axis=1))


def _root(slope: Any) -> float:
    """1 / b for the b at which a slope that rises with b is zero."""
    from scipy.optimize import brentq

    low, high = 1 / LARGEST, LARGEST
    if slope(low) >= 0:
        raise VitcliError(
            "no temperature makes these logits better than a guess",
            "they say nothing about these images: see to the class names and the preprocessing",
        )
    if slope(high) <= 0:
        return 1 / high
    log_b = brentq(lambda x: slope(float(np.exp(x))), np.log(low), np.log(high), xtol=1e-10)
    return float(np.exp(-log_b))
