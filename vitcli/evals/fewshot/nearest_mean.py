"""Nearest-class-mean classification of frozen features."""

import numpy as np
from numpy.typing import ArrayLike

from vitcli.evals.calibration import fit_score_temperature
from vitcli.evals.fewshot.arrays import (
    ABSENT_CLASS_LOGIT,
    Floats,
    Ints,
    argmax_linear,
    class_sums,
    evenly_spaced,
    row_parts,
    rows_per_part,
    to_array,
    to_float64,
    to_int64,
)
from vitcli.evals.fewshot.knn import unit_rows


class NearestMean:
    """Predicts the class whose mean of unit-length features has the highest cosine similarity.

    The prediction is linear in the features, up to their length, so a linear layer computes it.

    Attributes:
        means: (K, D), each of length 1; 0 for a class without images.
    """

    def __init__(self, features: ArrayLike, labels: ArrayLike, num_classes: int) -> None:
        self.x, self.labels, self.num_classes = to_array(features), to_int64(labels), num_classes
        self.sums = np.zeros((num_classes, self.x.shape[1]))
        for rows in row_parts(self.x):
            z = unit_rows(self.x[rows]).double().numpy()
            self.sums += class_sums(z, self.labels[rows], num_classes)
        self.counts = np.bincount(self.labels, minlength=num_classes)
        # Normalise the sum: its direction is that of the mean, whatever the number of images.
        self.means = _normalised(self.sums)

    def predict(self, features: ArrayLike) -> Ints:
        """(n, D) -> (n,)."""
        return argmax_linear(features, *self._cosine_head())

    def linear(self) -> tuple[Floats, Floats]:
        """(K, D) weight and (K,) bias of a linear layer with the same predictions."""
        # One temperature makes logits of the similarities. It is fitted on the similarity to
        # means that leave the image itself out; it is 1 if every class has a single image.
        weight, bias = self._cosine_head()
        max_rows = rows_per_part(max(self.x.shape[1], self.num_classes))
        rows = evenly_spaced(np.flatnonzero(self.counts[self.labels] >= 2), max_rows)
        temperature = 1.0
        if len(rows):
            temperature = fit_score_temperature(self._left_out_scores(rows), self.labels[rows])
        # The layer sees features of any length: divide by their mean length.
        some = to_float64(self.x[evenly_spaced(np.arange(len(self.x)), max_rows)])
        length = float(np.linalg.norm(some, axis=1).mean()) or 1.0
        return weight / (temperature * length), bias

    def _left_out_scores(self, rows: Ints) -> Floats:
        """(m, K): cosine of each of these images with the means of the other images."""
        z, y = unit_rows(self.x[rows]).double().numpy(), self.labels[rows]
        scores = z @ self.means.T
        scores[np.arange(len(rows)), y] = (z * _normalised(self.sums[y] - z)).sum(axis=1)
        return np.asarray(scores)

    def _cosine_head(self) -> tuple[Floats, Floats]:
        return self.means, np.where(self.counts > 0, 0.0, -ABSENT_CLASS_LOGIT)


def _normalised(rows: Floats) -> Floats:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1.0))
