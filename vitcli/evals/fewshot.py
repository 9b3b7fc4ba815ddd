"""Few-shot linear evaluation in closed form: section 4.1 of the paper, big_vision's protocol.

Standardise each feature with the drawn images' mean and std, append a constant feature of 100 for
the bias, ridge regression to targets of -1 and +1, and the class with the largest score wins
(`big_vision/evaluators/fewshot_lsr.py`). Everything is computed in float64: the constant gives the
normal matrix an eigenvalue of 10^4 n, beside which float32 loses the small ones.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitcli.errors import VitcliError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BIAS = 100.0  # the value of the constant feature: its weight is then almost unregularised
STD_FLOOR = 1e-5
DEFAULT_L2 = 1024.0


@dataclass(frozen=True)
class Ridge:
    """A fitted classifier; scores are `[standardised features, 100] @ weights`.

    Attributes:
        weights: (D+1, K), the last row belongs to the constant feature.
        mean, std: (D,), of the images it was fitted on; std already has 1e-5 added.
    """

    weights: Floats
    mean: Floats
    std: Floats

    def scores(self, features: ArrayLike) -> Floats:
        """(n, D) -> (n, K): regression scores, whose largest is the prediction."""
        x = (_floats(features) - self.mean) / self.std  # (n, D)
        return np.asarray(x @ self.weights[:-1] + BIAS * self.weights[-1])

    def linear(self, temperature: float = 1.0) -> tuple[Floats, Floats]:
        """(K, D) weight and (K,) bias of the dense layer that gives scores / temperature."""
        weight = self.weights[:-1].T / self.std  # (K, D)
        bias = BIAS * self.weights[-1] - weight @ self.mean
        return weight / temperature, bias / temperature


def draw(labels: ArrayLike, shots: int, seed: int, num_classes: int) -> Ints:
    """Indices of `shots` images of each class, in class order; all there are of a smaller class.

    One generator permutes every class in turn, so that for the same seed fewer shots are always
    the first of more.
    """
    rng = np.random.default_rng(seed)
    values = np.asarray(labels)
    orders = [rng.permutation(np.flatnonzero(values == c)) for c in range(num_classes)]
    return np.concatenate([order[:shots] for order in orders]).astype(np.int64)


def fit(features: ArrayLike, labels: ArrayLike, num_classes: int, l2: float = DEFAULT_L2) -> Ridge:
    """Ridge regression on all of `features` (n, D) and `labels` (n,).

    With n rows and D + 1 columns the smaller of the two matrices is decomposed: X^T X when
    n >= D + 1, else X X^T.
    """
    x = _floats(features)
    mean, std = x.mean(axis=0), x.std(axis=0) + STD_FLOOR
    a = _with_bias((x - mean) / std)  # (n, D+1)
    y = _targets(labels, num_classes)  # (n, K)
    if len(a) >= a.shape[1]:
        values, vectors = np.linalg.eigh(a.T @ a)
        weights = vectors @ ((vectors.T @ (a.T @ y)) / (values + l2)[:, None])
    else:
        values, vectors = np.linalg.eigh(a @ a.T)
        weights = a.T @ (vectors @ ((vectors.T @ y) / (values + l2)[:, None]))
    return Ridge(weights, mean, std)


def fewshot(
    features: ArrayLike,
    labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    shots: int = 5,
    seed: int = 0,
    l2: float = DEFAULT_L2,
) -> float:
    """Accuracy (0..1) on the test features of a classifier fitted on `shots` images per class.

    Args:
        features: (n, D), tensors or arrays, of the images to draw from.
        labels: (n,) integers from 0.
        test_features: (m, D).
        test_labels: (m,).
        shots: images per class.
        seed: of the draw, `numpy.random.default_rng(seed)` as the reference has it.
        l2: strength of the ridge penalty, 2^10 in the reference.

    Raises:
        VitcliError: lengths or widths that do not fit, or values that are not finite.
    """
    x, y, test_x, test_y = (
        _floats(features),
        _ints(labels),
        _floats(test_features),
        _ints(test_labels),
    )
    _check(x, y, test_x, test_y, shots, l2)
    num_classes = int(max(y.max(), test_y.max())) + 1
    chosen = draw(y, shots, seed, num_classes)
    ridge = fit(x[chosen], y[chosen], num_classes, l2)
    return float(np.mean(ridge.scores(test_x).argmax(axis=1) == test_y))


def leave_one_out(
    features: ArrayLike, labels: ArrayLike, num_classes: int, l2: float = DEFAULT_L2
) -> Floats:
    """(n, K): the score of each image from a fit without it, in closed form.

    y_i - (y_i - s_i) / (1 - h_ii) with the hat matrix H = X (X^T X + l2)^-1 X^T; mean and std stay
    those of all images.
    """
    x = _floats(features)
    a = _with_bias((x - x.mean(axis=0)) / (x.std(axis=0) + STD_FLOOR))
    y = _targets(labels, num_classes)
    values, vectors = np.linalg.eigh(a @ a.T) if len(a) <= a.shape[1] else _left_vectors(a)
    shrunk = vectors * (np.clip(values, 0, None) / (np.clip(values, 0, None) + l2))
    hat = np.einsum("ij,ij->i", shrunk, vectors)  # (n,)
    scores = shrunk @ (vectors.T @ y)  # (n, K)
    return np.asarray(y - (y - scores) / (1 - hat)[:, None])


def _left_vectors(a: Floats) -> tuple[Floats, Floats]:
    left, singular, _ = np.linalg.svd(a, full_matrices=False)
    return singular**2, left


def fit_temperature(scores: Floats, labels: ArrayLike) -> float:
    """The T for which softmax(scores / T) gives the true labels the largest likelihood.

    Targets are Platt's, (n + 1) / (n + 2) for the true class, so that scores which are right
    throughout do not ask for certainty. Where no T helps, it ends at the scores' own spread over
    the classes.
    """
    y = _ints(labels)
    n, k = scores.shape
    targets = np.full((n, k), 1 / (n + 2) / max(k - 1, 1))
    targets[np.arange(n), y] = (n + 1) / (n + 2)
    spread = float(scores.std(axis=1).mean()) or 1.0

    def loss(log_t: float) -> float:
        z = scores / np.exp(log_t)
        z = z - z.max(axis=1, keepdims=True)
        return float(np.mean(np.log(np.exp(z).sum(axis=1)) - (targets * z).sum(axis=1)))

    # Golden-section search: convex in 1/T, so with one minimum in log T.
    low, high = float(np.log(spread) - 7), float(np.log(spread))
    ratio = (5**0.5 - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def fit_head(
    features: ArrayLike, labels: ArrayLike, num_classes: int, l2: float = DEFAULT_L2
) -> tuple[Floats, Floats]:
    """(K, D) weight and (K,) bias of a dense layer: the ridge classifier with its temperature.

    Ridge scores only promise an order; one temperature, fitted on leave-one-out scores, turns
    them into probabilities and changes no prediction. With one image of a class there is nothing
    to leave out, and the scores' spread over the classes stands in.
    """
    ridge = fit(features, labels, num_classes, l2)
    counts = np.bincount(_ints(labels), minlength=num_classes)
    if counts[counts > 0].min() >= 2:
        scores = leave_one_out(features, labels, num_classes, l2)
        temperature = fit_temperature(scores, labels)
    else:
        temperature = float(ridge.scores(features).std(axis=1).mean()) or 1.0
    return ridge.linear(temperature)


def _targets(labels: ArrayLike, num_classes: int) -> Floats:
    return np.asarray(2.0 * (_ints(labels)[:, None] == np.arange(num_classes)) - 1.0)


def _with_bias(x: Floats) -> Floats:
    return np.pad(x, ((0, 0), (0, 1)), constant_values=BIAS)


def _array(values: Any) -> NDArray[Any]:
    """A tensor on any device, in any type, or something array-like -> an array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        return np.asarray(values.double() if values.is_floating_point() else values)
    return np.asarray(values)


def _floats(values: Any) -> Floats:
    return np.asarray(_array(values), dtype=np.float64)


def _ints(values: Any) -> Ints:
    return np.asarray(_array(values), dtype=np.int64)


def _check(x: Floats, y: Ints, test_x: Floats, test_y: Ints, shots: int, l2: float) -> None:
    if x.ndim != 2 or test_x.ndim != 2 or x.shape[1] != test_x.shape[1]:
        raise VitcliError(f"features must be (n, D), both of one D: {x.shape} and {test_x.shape}")
    for name, a, b in (("labels", x, y), ("test_labels", test_x, test_y)):
        if b.shape != (len(a),):
            raise VitcliError(f"{len(a)} feature rows, but `{name}` has the shape {b.shape}")
        if not len(b) or b.min() < 0:
            raise VitcliError(f"`{name}` must be one or more integers from 0 on")
        if not np.isfinite(a).all():
            raise VitcliError(f"the features that belong to `{name}` are not all finite")
    if shots < 1 or l2 <= 0:
        raise VitcliError(f"shots = {shots} and l2 = {l2}: both must be above 0")
