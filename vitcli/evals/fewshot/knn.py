"""Weighted nearest neighbours: how good features are before anything is fitted to them."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from vitcli.evals.fewshot.ridge import Ints, ints, to_array

NEIGHBORS = 20
TEMPERATURE = 0.07
PART = 2**25  # similarities in memory at once


class Neighbors:
    """The k nearest of `features` (n, D) vote with their labels (n,), weighted by similarity.

    DINO's protocol (Caron et al., 2021; eval_knn.py): cosine similarity s, each vote counts
    exp(s / temperature), k = 20, temperature 0.07. Of fewer than k images all vote.
    """

    def __init__(
        self,
        features: ArrayLike,
        labels: ArrayLike,
        num_classes: int,
        neighbors: int = NEIGHBORS,
        temperature: float = TEMPERATURE,
    ) -> None:
        self.features = unit(features)  # (n, D)
        self.labels = torch.from_numpy(ints(labels))
        self.num_classes, self.temperature = num_classes, temperature
        self.neighbors = min(neighbors, len(self.labels))

    def predict(self, features: ArrayLike) -> Ints:
        """(m, D) -> (m,): the class with the most votes."""
        x = to_array(features)
        step = max(1, PART // max(len(self.features), self.num_classes))
        parts = [self._vote(unit(x[i : i + step])) for i in range(0, len(x), step)]
        return np.concatenate(parts)

    def _vote(self, x: Tensor) -> Ints:
        near, which = (x @ self.features.T).topk(self.neighbors, dim=1)  # (m, k)
        # All weights of an image have a factor in common, which is taken out: exp stays in range.
        weights = ((near - near[:, :1]) / self.temperature).exp()
        votes = torch.zeros(len(x), self.num_classes)
        votes.scatter_add_(1, self.labels[which], weights)  # (m, K)
        return np.asarray(votes.argmax(dim=1).numpy(), dtype=np.int64)


def unit(features: ArrayLike) -> Tensor:
    """(n, D) -> (n, D) float32, each row of length 1."""
    return F.normalize(torch.from_numpy(np.array(to_array(features), dtype=np.float32)), dim=1)
