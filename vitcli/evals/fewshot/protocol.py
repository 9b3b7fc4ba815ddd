"""The few-shot protocol of section 4.1 of the paper (`big_vision/evaluators/fewshot_lsr.py`)."""

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitcli.errors import VitcliError
from vitcli.evals.fewshot.arrays import Ints, to_float64, to_int64
from vitcli.evals.fewshot.ridge import RIDGE_L2, RidgePath, choose_ridge_l2


def draw_shots(labels: ArrayLike, shots: int | None, seed: int, num_classes: int) -> Ints:
    """Draw `shots` images of each class; all images of a smaller class, or if `shots` is None.

    Returns:
        Indices in the order of the classes.
    """
    # As in the reference, one generator permutes each class in turn. For the same seed, the draw
    # of fewer shots is therefore a part of the draw of more.
    rng = np.random.default_rng(seed)
    values = np.asarray(labels)
    orders = [rng.permutation(np.flatnonzero(values == c)) for c in range(num_classes)]
    return np.concatenate([order[:shots] for order in orders]).astype(np.int64)


def fewshot(
    features: ArrayLike,
    labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    shots: int = 5,
    seed: int = 0,
    l2: float | Literal["auto"] = RIDGE_L2,
) -> float:
    """Few-shot accuracy of features, in 0..1: draw shots, fit ridge regression, test it.

    Args:
        features: (n, D) features of the training images; an array or a tensor.
        labels: (n,) classes as integers from 0.
        test_features: (m, D).
        test_labels: (m,).
        shots: images per class.
        seed: the shots are drawn with `numpy.random.default_rng(seed)`, as in the reference.
        l2: L2 regularisation, 2^10 in the reference; `auto` chooses it by leave-one-out.

    Raises:
        VitcliError: shapes that do not fit, or values that are not finite.
    """
    # Public function: convert and check here, so that the solver can rely on it.
    x, test_x = to_float64(features), to_float64(test_features)
    y, test_y = to_int64(labels), to_int64(test_labels)
    _check_shapes(x, y, test_x, test_y)
    if shots < 1 or not (l2 == "auto" or (not isinstance(l2, str) and l2 > 0)):
        raise VitcliError(f"shots = {shots} and l2 = {l2}: both must be above 0")
    # A class may be in the test images only; it can never be predicted, but it counts as wrong.
    num_classes = int(max(y.max(), test_y.max())) + 1
    drawn = draw_shots(y, shots, seed, num_classes)
    path = RidgePath(x[drawn], y[drawn], num_classes)
    ridge = path.fit(choose_ridge_l2(path).l2 if l2 == "auto" else l2)
    return float(np.mean(ridge.predict(test_x) == test_y))


def _check_shapes(
    x: NDArray[Any], y: NDArray[Any], test_x: NDArray[Any], test_y: NDArray[Any]
) -> None:
    if x.ndim != 2 or test_x.ndim != 2 or x.shape[1] != test_x.shape[1]:
        shapes = f"{x.shape} and {test_x.shape}"
        raise VitcliError(f"features must be (n, D) with the same D: {shapes}")
    for name, a, b in (("labels", x, y), ("test_labels", test_x, test_y)):
        if b.shape != (len(a),):
            raise VitcliError(f"{len(a)} rows of features, but `{name}` has the shape {b.shape}")
        if not len(b) or b.min() < 0:
            raise VitcliError(f"`{name}` must be one or more integers from 0")
        if not np.isfinite(a).all():
            raise VitcliError(f"the features of `{name}` are not all finite")
