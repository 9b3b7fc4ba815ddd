"""The classifiers of `vitcli fewshot` on frozen features, under one interface.

A classifier for every number of shots and every seed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitcli.config.schema import FewshotSection
from vitcli.data.image_set import ImageSet
from vitcli.evals.features import Extracted
from vitcli.evals.fewshot.knn import Neighbors
from vitcli.evals.fewshot.logistic import LOGISTIC_L2, ClassMeans, Logistic, choose_logistic_l2
from vitcli.evals.fewshot.protocol import Choice, choose_l2, draw, ridge_head
from vitcli.evals.fewshot.ridge import DEFAULT_L2, Floats, Ints, RidgePath
from vitcli.progress import Watcher

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


Shots = int | str  # images a class, or `all`


@dataclass
class Trials:
    """What came out; lists have one entry for each seed.

    Attributes:
        accuracies: shots -> accuracy on the test images, 0..1.
        strengths: shots -> l2; empty where the method has none.
        choices: shots -> how it was chosen; empty where it was given.
        paths: shots -> accuracy of each strength that was tried, each a list over seeds.
        l2: of the last classifier.
        head: of seed 0 and the most shots; None of a method that makes none.
    """

    accuracies: dict[Shots, list[float]] = field(default_factory=dict)
    strengths: dict[Shots, list[float]] = field(default_factory=dict)
    choices: dict[Shots, list[Choice]] = field(default_factory=dict)
    paths: dict[Shots, list[list[float]]] = field(default_factory=dict)
    l2: float | None = None
    head: Head | None = None


def fit_all(
    support: Extracted,
    tested: Extracted,
    draws: Mapping[tuple[Shots, int], NDArray[np.int64]],
    num_classes: int,
    section: FewshotSection,
    watch: Watcher,
) -> Trials:
    """Fit and test a classifier for every draw."""
    found, fit = Trials(), METHODS[section.method]
    largest = max(draws, key=lambda key: (key[1] == 0, len(draws[key])))
    told: set[str] = set()
    with watch.progress("classifiers", len(draws)) as bar:
        for (shots, seed), chosen in draws.items():
            x, y = _drawn(support, chosen)
            fitted = fit(x, y, num_classes, section, seed)
            found.accuracies.setdefault(shots, []).append(
                accuracy(fitted.predict, tested.outputs, tested.labels)
            )
            _note_strength(found, fitted, shots, tested)
            for line in set(fitted.notes) - told:
                watch.warn(f"`--shots {shots}`: {line}")
            told |= set(fitted.notes)
            if (shots, seed) == largest and fitted.head is not None:
                found.head = fitted.head()
            bar.advance()
    return found


def _drawn(support: Extracted, chosen: NDArray[np.int64]) -> tuple[Any, NDArray[np.int64]]:
    """Features and labels of the drawn images; those that could not be read are left out."""
    if len(chosen) >= len(support.indices) and (np.diff(chosen) > 0).all():
        return support.outputs, support.labels  # all there are: no copy of what may be gigabytes
    places = np.searchsorted(support.indices, chosen)
    places = np.minimum(places, len(support.indices) - 1)
    rows = places[support.indices[places] == chosen]
    return support.outputs[rows], support.labels[rows]


def _note_strength(found: Trials, fitted: Fitted, shots: Shots, tested: Extracted) -> None:
    """Add the strength, how it was chosen, and what the others give."""
    if fitted.l2 is None:
        return
    found.l2 = fitted.l2
    found.strengths.setdefault(shots, []).append(fitted.l2)
    if fitted.choice is not None:
        found.choices.setdefault(shots, []).append(fitted.choice)
    if fitted.others:
        by_strength = found.paths.setdefault(shots, [[] for _ in fitted.others])
        for seeds, predict in zip(by_strength, fitted.others.values(), strict=True):
            seeds.append(accuracy(predict, tested.outputs, tested.labels))


def draw_all(
    train: ImageSet, section: FewshotSection, num_classes: int, watch: Watcher
) -> dict[tuple[Shots, int], NDArray[np.int64]]:
    """(shots, seed) -> the images; fewer shots of a seed are a part of more."""
    counts = np.bincount(train.labels, minlength=num_classes)
    most = max((s for s in section.shots if isinstance(s, int)), default=0)
    if short := [name for name, n in zip(train.classes, counts, strict=True) if n < most]:
        shown = ", ".join(short[:3]) + (" …" if len(short) > 3 else "")
        watch.warn(f"{len(short)} classes have fewer than {most} images; all are used: {shown}")
    return {
        (shots, seed): draw(train.labels, shots, seed, num_classes)
        if isinstance(shots, int)
        else np.arange(len(train))
        for shots in dict.fromkeys(section.shots)
        for seed in range(section.seeds if isinstance(shots, int) else 1)
    }
