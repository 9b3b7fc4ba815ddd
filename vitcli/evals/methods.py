"""The classifiers of `vitcli fewshot` on frozen features, under one interface."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vitcli.config.schema import FewshotSection
from vitcli.evals.fewshot import Choice, RidgePath, choose_l2, ridge_head
from vitcli.evals.knn import Neighbors
from vitcli.evals.probe import LOGISTIC_L2, ClassMeans, Logistic, choose_logistic_l2
from vitcli.evals.ridge import DEFAULT_L2, Floats, Ints

Predict = Callable[[ArrayLike], Ints]
Head = tuple[Floats, Floats]  # (K, D) weight, (K,) bias


@dataclass(frozen=True)
class Fitted:
    """A classifier.

    Attributes:
        predict: (n, D) features -> (n,) classes.
        head: makes the dense layer with the same predictions; None where there is none.
        l2: the strength of its penalty; None where it has none.
        choice: how the strength was chosen, where it was.
        others: for `path`, the same of every strength.
        notes: what the user should know, one line each.
    """

    predict: Predict
    head: Callable[[], Head] | None
    l2: float | None = None
    choice: Choice | None = None
    others: Mapping[float, Predict] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


Method = Callable[[Any, Ints, int, FewshotSection, int], Fitted]


def fit_ridge(x: Any, y: Ints, num_classes: int, section: FewshotSection, seed: int) -> Fitted:
    """Least squares in closed form; `auto` and `path` choose the strength by leave-one-out."""
    path = RidgePath(x, y, num_classes)
    choice = choose_l2(path) if isinstance(section.l2, str) else None
    l2 = choice.l2 if choice else float(section.l2 or DEFAULT_L2)
    others: dict[float, Predict] = {}
    if choice and section.l2 == "path":

        def of(strength: float) -> Predict:
            # Fitted when it is asked for, one after another: each may be as large as a head.
            return lambda test: path.fit(strength).predict(test)

        others = {strength: of(strength) for strength in choice.strengths}
    notes: tuple[str, ...] = ()
    if choice and choice.accuracies is None:
        notes = (f"one image a class: none can be left out, and l2 stays {l2:g}",)
    return Fitted(path.fit(l2).predict, lambda: ridge_head(path, l2), l2, choice, others, notes)


def fit_knn(x: Any, y: Ints, num_classes: int, section: FewshotSection, seed: int) -> Fitted:
    """Nearest neighbours: nothing is fitted, and nothing that a head could be."""
    near = Neighbors(x, y, num_classes, section.neighbors, section.temperature)
    return Fitted(near.predict, None)


def fit_logistic(x: Any, y: Ints, num_classes: int, section: FewshotSection, seed: int) -> Fitted:
    """Logistic regression; `auto` and `path` choose the strength on held-out training images."""
    choice = None
    if isinstance(section.l2, str):
        choice = choose_logistic_l2(x, y, num_classes, seed=seed)
    l2 = choice.l2 if choice else float(section.l2 or LOGISTIC_L2)
    found = Logistic(x, y, num_classes, l2, seed=seed)
    others: dict[float, Predict] = {}
    if choice and section.l2 == "path":

        def of(strength: float) -> Predict:
            return lambda test: Logistic(x, y, num_classes, strength, seed=seed).predict(test)

        others = {strength: of(strength) for strength in choice.strengths}
    notes = [] if found.converged else ["logistic regression did not converge: a larger `--l2`"]
    if choice and choice.accuracies is None:
        notes.append(f"one image a class: none can be held out, and l2 stays {l2:g}")
    return Fitted(found.predict, found.linear, l2, choice, others, tuple(notes))


def fit_mean(x: Any, y: Ints, num_classes: int, section: FewshotSection, seed: int) -> Fitted:
    """The nearest class mean."""
    found = ClassMeans(x, y, num_classes)
    return Fitted(found.predict, found.linear)


METHODS: dict[str, Method] = {
    "ridge": fit_ridge,
    "knn": fit_knn,
    "logistic": fit_logistic,
    "mean": fit_mean,
}


def accuracy(predict: Predict, x: Any, y: Ints) -> float:
    """The share of right answers, 0..1."""
    return float(np.mean(predict(x) == y))
