"""A classifier for every number of shots and every seed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.config.schema import FewshotSection
from vitcli.data.image_set import ImageSet
from vitcli.evals.features import Extracted
from vitcli.evals.fewshot import Choice, draw
from vitcli.evals.methods import METHODS, Fitted, Head, accuracy
from vitcli.progress import Watcher

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
