"""Weighted k-nearest-neighbour classification: nothing is fitted to the features."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from vitcli.evals.fewshot.arrays import Ints, to_array, to_int64

MAX_SIMILARITIES = 2**25  # in memory at a time


class NearestNeighbors:
    """The k nearest rows of `features` (n, D) vote for their labels (n,).

    The protocol of DINO (Caron et al., 2021; `eval_knn.py`): cosine similarity s, and a vote
    counts exp(s / temperature).
    """

    def __init__(
        self,
        features: ArrayLike,
        labels: ArrayLike,
        num_classes: int,
        neighbors: int = 20,
        temperature: float = 0.07,
    ) -> None:
        self.features = unit_rows(features)  # (n, D)
        self.labels = torch.from_numpy(to_int64(labels))
        self.num_classes, self.temperature = num_classes, temperature
        self.neighbors = min(neighbors, len(self.labels))

    def predict(self, features: ArrayLike) -> Ints:
        """(m, D) -> (m,): the class with the most votes."""
        x = to_array(features)
        step = max(1, MAX_SIMILARITIES // max(len(self.features), self.num_classes))
        parts = [self._vote(unit_rows(x[i : i + step])) for i in range(0, len(x), step)]
        return np.concatenate(parts)

    def _vote(self, x: Tensor) -> Ints:
        similarity, nearest = (x @ self.features.T).topk(self.neighbors, dim=1)  # (m, k)
        # Dividing all weights of an image by the largest changes no vote and prevents overflow.
        weights = ((similarity - similarity[:, :1]) / self.temperature).exp()
        votes = torch.zeros(len(x), self.num_classes)
        votes.scatter_add_(1, self.labels[nearest], weights)  # (m, K)
        return np.asarray(votes.argmax(dim=1).numpy(), dtype=np.int64)


def unit_rows(features: ArrayLike) -> Tensor:
    """(n, D) -> (n, D) float32, each row of length 1."""
    return F.normalize(torch.from_numpy(np.array(to_array(features), dtype=np.float32)), dim=1)
