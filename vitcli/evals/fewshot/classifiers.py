"""The few-shot methods, and the fit of one classifier for each number of shots and each seed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitcli.config.schema import FewshotSection
from vitcli.data.image_set import ImageSet
from vitcli.errors import counted, quoted
from vitcli.evals.features import Extracted
from vitcli.evals.fewshot.arrays import Floats, Ints
from vitcli.evals.fewshot.knn import NearestNeighbors
from vitcli.evals.fewshot.logistic import LOGISTIC_L2, LinearProbe, choose_logistic_l2
from vitcli.evals.fewshot.methods import METHODS
from vitcli.evals.fewshot.nearest_mean import NearestMean
from vitcli.evals.fewshot.protocol import draw_shots
from vitcli.evals.fewshot.ridge import RIDGE_L2, L2Choice, RidgePath, choose_ridge_l2, ridge_head
from vitcli.progress import Watcher

Predict = Callable[[ArrayLike], Ints]
Head = tuple[Floats, Floats]  # (K, D) weight, (K,) bias
Shots = int | str  # images per class, or `all`


class Classifier(Protocol):
    """Anything fitted that predicts (n,) classes from (n, D) features."""

    def predict(self, features: ArrayLike) -> Ints: ...


@dataclass(frozen=True)
class FittedClassifier:
    """A classifier of one draw.

    Attributes:
        predict: (n, D) features -> (n,) classes.
        make_head: makes a linear layer with the same predictions; None if there is none.
        l2, choice: L2 regularisation and how it was chosen; None where this does not apply.
        by_l2: for `l2 = path`, the predictions of every candidate.
        notes: warnings for the user.
    """

    predict: Predict
    make_head: Callable[[], Head] | None
    l2: float | None = None
    choice: L2Choice | None = None
    by_l2: Mapping[float, Predict] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def fit_ridge(
    x: Any, y: Ints, num_classes: int, section: FewshotSection, seed: int
) -> FittedClassifier:
    """Ridge regression in closed form; l2 is chosen by leave-one-out."""
    path = RidgePath(x, y, num_classes)
    choice = choose_ridge_l2(path) if isinstance(section.l2, str) else None
    l2 = choice.l2 if choice else float(section.l2 or RIDGE_L2)
    fitted = FittedClassifier(path.fit(l2).predict, lambda: ridge_head(path, l2))
    return _with_l2(fitted, section, l2, choice, path.fit)


def fit_logistic(
    x: Any, y: Ints, num_classes: int, section: FewshotSection, seed: int
) -> FittedClassifier:
    """Logistic regression; l2 is chosen by cross-validation."""
    choice = None
    if isinstance(section.l2, str):
        choice = choose_logistic_l2(x, y, num_classes, seed=seed)
    l2 = choice.l2 if choice else float(section.l2 or LOGISTIC_L2)
    probe = LinearProbe(x, y, num_classes, l2, seed=seed)
    notes = (
        () if probe.converged else ("logistic regression did not converge; use a larger `--l2`",)
    )
    fitted = FittedClassifier(probe.predict, probe.linear, notes=notes)
    return _with_l2(
        fitted, section, l2, choice, lambda l2: LinearProbe(x, y, num_classes, l2, seed=seed)
    )


def _with_l2(
    fitted: FittedClassifier,
    section: FewshotSection,
    l2: float,
    choice: L2Choice | None,
    fit: Callable[[float], Classifier],
) -> FittedClassifier:
    """Add the facts about l2."""

    def predict_at(candidate: float) -> Predict:
        # Fitted when it is tested, one after another: each may be as large as a head.
        return lambda test: fit(candidate).predict(test)

    by_l2: dict[float, Predict] = {}
    if choice is not None and section.l2 == "path":
        by_l2 = {candidate: predict_at(candidate) for candidate in choice.candidates}
    notes = fitted.notes
    if choice is not None and choice.accuracies is None:
        notes += (f"with one image per class none can be left out, so l2 stays {l2:g}",)
    return replace(fitted, l2=l2, choice=choice, by_l2=by_l2, notes=notes)


def fit_knn(
    x: Any, y: Ints, num_classes: int, section: FewshotSection, seed: int
) -> FittedClassifier:
    """Nearest neighbours; no linear layer has the same predictions."""
    neighbors = NearestNeighbors(x, y, num_classes, section.neighbors, section.temperature)
    return FittedClassifier(neighbors.predict, None)


def fit_nearest_mean(
    x: Any, y: Ints, num_classes: int, section: FewshotSection, seed: int
) -> FittedClassifier:
    """The nearest class mean."""
    means = NearestMean(x, y, num_classes)
    return FittedClassifier(means.predict, means.linear)


@dataclass
class FewshotAccuracies:
    """Results of all draws; each list has one element per seed.

    Attributes:
        accuracies: shots -> test accuracy, 0..1.
        l2_values: shots -> l2; empty if the method has none.
        choices: shots -> how l2 was chosen; empty if it was given.
        paths: shots -> for each candidate of l2 a list of test accuracies.
        l2: of the last classifier.
        head: of seed 0 and the most shots; None if the method has none.
    """

    accuracies: dict[Shots, list[float]] = field(default_factory=dict)
    l2_values: dict[Shots, list[float]] = field(default_factory=dict)
    choices: dict[Shots, list[L2Choice]] = field(default_factory=dict)
    paths: dict[Shots, list[list[float]]] = field(default_factory=dict)
    l2: float | None = None
    head: Head | None = None

    def add(self, shots: Shots, fitted: FittedClassifier, test: Extracted) -> None:
        """Test a classifier and record it."""

        def accuracy(predict: Predict) -> float:
            return float(np.mean(predict(test.outputs) == test.labels))

        self.accuracies.setdefault(shots, []).append(accuracy(fitted.predict))
        if fitted.l2 is None:
            return
        self.l2 = fitted.l2
        self.l2_values.setdefault(shots, []).append(fitted.l2)
        if fitted.choice is not None:
            self.choices.setdefault(shots, []).append(fitted.choice)
        if fitted.by_l2:
            path = self.paths.setdefault(shots, [[] for _ in fitted.by_l2])
            for seeds, predict in zip(path, fitted.by_l2.values(), strict=True):
                seeds.append(accuracy(predict))


def evaluate_draws(
    train: Extracted,
    test: Extracted,
    draws: Mapping[tuple[Shots, int], NDArray[np.int64]],
    num_classes: int,
    section: FewshotSection,
    watch: Watcher,
) -> FewshotAccuracies:
    """Fit and test one classifier for every draw."""
    results, fit = FewshotAccuracies(), resolve_name(METHODS[section.method].fit)
    # The head that is stored is the best documented one: seed 0 and the most shots.
    largest = max(draws, key=lambda key: (key[1] == 0, len(draws[key])))
    warned: set[str] = set()  # warn once, not for every seed
    with watch.progress("classifiers", len(draws)) as bar:
        for (shots, seed), drawn in draws.items():
            fitted = fit(*_select(train, drawn), num_classes, section, seed)
            results.add(shots, fitted, test)
            for line in set(fitted.notes) - warned:
                watch.warn(f"`--shots {shots}`: {line}")
            warned |= set(fitted.notes)
            if (shots, seed) == largest and fitted.make_head is not None:
                results.head = fitted.make_head()
            bar.advance()
    return results


def _select(train: Extracted, drawn: NDArray[np.int64]) -> tuple[Any, NDArray[np.int64]]:
    """Features and labels of the drawn images that could be read."""
    if len(drawn) >= len(train.indices) and (np.diff(drawn) > 0).all():
        return train.outputs, train.labels  # all images: do not copy what may be gigabytes
    # `train` holds the images of all draws that could be read, in ascending order.
    places = np.searchsorted(train.indices, drawn)
    places = np.minimum(places, len(train.indices) - 1)
    rows = places[train.indices[places] == drawn]
    return train.outputs[rows], train.labels[rows]


def draw_all(
    train: ImageSet, section: FewshotSection, num_classes: int, watch: Watcher
) -> dict[tuple[Shots, int], NDArray[np.int64]]:
    """(shots, seed) -> image indices."""
    counts = np.bincount(train.labels, minlength=num_classes)
    most = max((s for s in section.shots if isinstance(s, int)), default=0)
    if short := [name for name, n in zip(train.classes, counts, strict=True) if n < most]:
        watch.warn(
            f"{counted(len(short), 'class has', 'classes have')} fewer than {most} images, which "
            f"are all used: {quoted(short, 3)}"
        )
    return {
        (shots, seed): draw_shots(train.labels, shots, seed, num_classes)
        if isinstance(shots, int)
        else np.arange(len(train))
        for shots in dict.fromkeys(section.shots)
        # `all` has nothing to draw, so one seed is enough.
        for seed in range(section.seeds if isinstance(shots, int) else 1)
    }
