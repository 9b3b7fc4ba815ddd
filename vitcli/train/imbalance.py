"""Classes of different sizes: when `check` and training say so, and which setting they propose."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitcli.config.schema import Recipe
from vitcli.data.image_set import Integers
from vitcli.data.source import Source
from vitcli.errors import quoted
from vitcli.train.objectives import objective_class

IMBALANCED = 10.0  # ratio of the largest class to the smallest from which it is said
# The method that did best in recipes/RESULTS.md; for many labels that of Ridnik et al. (2021).
ONE_LABEL, MANY_LABELS = "objective.logit_adjustment=1", "objective.asymmetric_gammas=[0,4]"


@dataclass(frozen=True)
class ClassSizes:
    """The largest and the smallest class of a set, without classes that have no images.

    Attributes:
        names: their names.
        counts: their numbers of images.
        setting: what corrects the difference, as `--set` takes it.
    """

    names: tuple[str, str]
    counts: tuple[int, int]
    setting: str

    @classmethod
    def of(cls, counts: Integers, classes: Sequence[str], multi_label: bool) -> "ClassSizes | None":
        """From (K,) images per class; None if no class has an image."""
        present = np.flatnonzero(counts)
        if not len(present):
            return None
        ends = present[[counts[present].argmax(), counts[present].argmin()]].tolist()
        names, found = ([values[k] for k in ends] for values in (classes, counts.tolist()))
        setting = MANY_LABELS if multi_label else ONE_LABEL
        return cls((names[0], names[1]), (found[0], found[1]), setting)

    @property
    def ratio(self) -> float:
        """The size of the largest class divided by that of the smallest."""
        return self.counts[0] / self.counts[1]

    def describe(self) -> str:
        """One sentence with the numbers, and the setting to type."""
        (most, least), (large, small) = self.names, self.counts
        return (
            f"the largest class has {self.ratio:.0f} times as many images as the smallest "
            f"({quoted([most])} {large:,}, {quoted([least])} {small:,}); `--set {self.setting}` "
            "makes rare classes count as much"
        )


def imbalance_notes(recipe: Recipe, source: Source) -> list[str]:
    """A note if the classes differ much in size, and the recipe does nothing about it."""
    images: Any = source.splits["train"]
    section, kind = recipe.objective, objective_class(recipe.objective.name)
    given = (section.class_weights, section.focal_gamma, section.asymmetric_gammas)
    corrected = section.uses_class_counts or recipe.data.sampler != "shuffle" or any(given)
    without = images.kind != "images" or images.values is not None
    if corrected or without or not kind.supervised or kind.regression:
        return []
    sizes = ClassSizes.of(images.class_counts(), source.classes, source.multi_label)
    return [sizes.describe()] if sizes and sizes.ratio >= IMBALANCED else []
