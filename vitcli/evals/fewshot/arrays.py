"""Conversion of features to arrays, and passes over many rows in parts that fit in memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ABSENT_CLASS_LOGIT = 100.0  # by how much a class without images is below all others
PART_VALUES = 2**23  # float64 numbers that a pass over rows holds at a time


def to_array(values: Any) -> NDArray[Any]:
    """A tensor (any device, any dtype) or anything array-like -> an array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        # NumPy has no bfloat16, so convert in torch.
        return np.asarray(values.double() if values.is_floating_point() else values)
    return np.asarray(values)


def to_float64(values: Any) -> Floats:
    """Anything array-like as float64."""
    return np.asarray(to_array(values), dtype=np.float64)


def to_int64(values: Any) -> Ints:
    """Anything array-like as int64."""
    return np.asarray(to_array(values), dtype=np.int64)


def row_parts(x: NDArray[Any], *widths: int) -> Iterator[slice]:
    """Slices of the rows of `x`; `widths` are those of further arrays with the same rows."""
    step = rows_per_part(max(x.shape[1], *widths, 1))
    yield from (slice(start, start + step) for start in range(0, len(x), step))


def rows_per_part(width: int) -> int:
    """Rows of `width` values that fit into one part."""
    return max(1, PART_VALUES // max(width, 1))


def mean_and_std(x: NDArray[Any]) -> tuple[Floats, Floats]:
    """(n, D) -> (D,), (D,): in two passes, since a sum of squares loses digits to a large mean."""
    mean = np.asarray(sum(to_float64(x[rows]).sum(axis=0) for rows in row_parts(x))) / len(x)
    squares = sum(((to_float64(x[rows]) - mean) ** 2).sum(axis=0) for rows in row_parts(x))
    return mean, np.sqrt(np.asarray(squares) / len(x))


def class_sums(rows: Floats, labels: Ints, num_classes: int) -> Floats:
    """(n, D), (n,) -> (K, D): the sum of the rows of each class."""
    from scipy.sparse import csr_array

    # One sparse product instead of a loop over classes or an (n, K) one-hot matrix.
    n = len(labels)
    members = csr_array((np.ones(n), (labels, np.arange(n))), shape=(num_classes, n))
    return np.asarray(members @ rows)


def evenly_spaced(indices: Ints, max_count: int) -> Ints:
    """Return at most `max_count` of the indices, evenly spaced from the first on."""
    count = min(max_count, len(indices))
    return indices[np.arange(count) * len(indices) // max(count, 1)]


def argmax_linear(features: Any, weight: Floats, bias: Floats) -> Ints:
    """(n, D) -> (n,): the largest output of a linear layer, without all (n, K) outputs at once."""
    x = to_array(features)
    parts = [
        (to_float64(x[rows]) @ weight.T + bias).argmax(axis=1) for rows in row_parts(x, len(weight))
    ]
    return np.concatenate(parts).astype(np.int64)
