"""What a classifier said of each image, from its logits, in blocks that fit in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

BLOCK = 2**22  # logits in float64 at a time
NONE = -1


@dataclass(frozen=True)
class Outcomes:
    """Of n images.

    Attributes:
        outputs: K, how many classes could be answered.
        predicted: (n,) the output with the highest logit.
        confidence: (n,) its probability.
        correct: (n,) whether it is a right one.
        ahead: (n,) how many outputs score higher than the best of the right ones.
        loss: (n,) minus the logarithm of the probability of the right ones together, in nats.
    """

    outputs: int
    predicted: Ints
    confidence: NDArray[np.float64]
    correct: Bools
    ahead: Ints
    loss: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.predicted)

    @property
    def in_five(self) -> Bools:
        """(n,) whether a right one is among the best min(5, K): fewer than five score higher."""
        return self.ahead < min(5, self.outputs)


def judge(logits: Floats, answers: ArrayLike, temperature: float = 1.0) -> Outcomes:
    """(n, K) logits -> what became of each image.

    Args:
        answers: (n,) the right output of each image, or (n, M) where several are right, filled up
            with -1; at least one of each image.
        temperature: what the logits are divided by before the softmax.
    """
    right = as_answers(answers)
    n, k = logits.shape
    predicted, ahead = np.empty(n, np.int64), np.empty(n, np.int64)
    confidence, loss = np.empty(n), np.empty(n)
    for part in blocks(n, k):
        z = logits[part].astype(np.float64)
        of = right[part]
        best = taken(z, of).max(axis=1, keepdims=True)
        predicted[part] = z.argmax(axis=1)
        ahead[part] = (z > best).sum(axis=1)
        log_p = log_softmax(z / temperature)
        confidence[part] = np.exp(log_p.max(axis=1))
        loss[part] = -_log_sum(taken(log_p, of))
    correct = (right == predicted[:, None]).any(axis=1)
    return Outcomes(k, predicted, confidence, correct, ahead, loss)


def best_among(logits: Floats, outputs: Sequence[int] | Ints) -> Ints:
    """(n, K) logits -> (n,) the output with the highest of those in `outputs`."""
    chosen = np.unique(np.asarray(outputs, dtype=np.int64))
    best = np.empty(len(logits), np.int64)
    for part in blocks(*logits.shape):
        best[part] = chosen[logits[part][:, chosen].argmax(axis=1)]
    return best


def as_answers(answers: ArrayLike) -> Ints:
    """(n,) or (n, M) -> (n, M)."""
    right = np.asarray(answers, dtype=np.int64)
    return right[:, None] if right.ndim == 1 else right


def filled_up(sets: Sequence[Sequence[int]]) -> Ints:
    """Sets of outputs -> (n, M), each filled up with -1."""
    wide = max((len(one) for one in sets), default=1)
    table = np.full((len(sets), max(wide, 1)), NONE, dtype=np.int64)
    for row, one in zip(table, sets, strict=True):
        row[: len(one)] = one
    return table


def blocks(n: int, k: int) -> Iterator[slice]:
    """The rows 0..n in parts of about BLOCK values."""
    rows = max(1, BLOCK // max(k, 1))
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def taken(values: Floats, answers: Ints) -> NDArray[np.float64]:
    """(n, K), (n, M) -> (n, M): the values of the answers, minus infinity where there is none."""
    found = np.take_along_axis(values, np.maximum(answers, 0), axis=1)
    return np.where(answers == NONE, -np.inf, found)


def log_softmax(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, K) -> (n, K), in nats."""
    shifted = z - z.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _log_sum(log_p: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, M) -> (n,): the logarithm of the sum; exact where there is one summand."""
    if log_p.shape[1] == 1:
        return log_p[:, 0]
    top = log_p.max(axis=1, keepdims=True)
    return np.asarray(top[:, 0] + np.log(np.exp(log_p - top).sum(axis=1)))
