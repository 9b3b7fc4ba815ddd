"""Figures that are averaged over classes, so that a rare class counts as much as a frequent one.

| figure | over classes | equal to scikit-learn's |
| --- | --- | --- |
| balanced accuracy | recall | `balanced_accuracy_score` |
| macro precision, recall, F1 | of the predicted class, or of the decisions | `average="macro"` |
| ROC-AUC | one class against all others; of two classes the second | `roc_auc_score` |
| mean average precision | one class against all others | `average_precision_score` |

Only classes with images take part. A figure that is not defined is None, and has a reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.evals.intervals import (
    MIN_POSITIVES,
    Interval,
    Intervals,
    LeaveOneOut,
    mean_of_intervals,
    wilson_interval,
)
from vitcli.evals.ranking import Ranking, mean_leave_out
from vitcli.evals.scoring import Floats, Ints, PerClass

Column = Callable[[int], tuple[Floats, NDArray[Any]]]
MACRO = ("precision", "recall", "f1")


@dataclass(frozen=True)
class ClassAverages:
    """Figures of a split that are averages over its classes.

    Attributes:
        values: name of a figure -> value; None if it is not defined.
        undefined: name of such a figure -> reason.
        intervals: their 95 % intervals.
        without_images: classes of the data that have no image in the split.
        per_class: class name -> precision, recall, F1, ROC-AUC, average precision, images.
        leave_out: the mean average precision that counts an image half at its own threshold.
    """

    values: dict[str, float | None]
    undefined: dict[str, str]
    intervals: Intervals
    without_images: tuple[str, ...]
    per_class: PerClass
    leave_out: LeaveOneOut

    def to_json(self) -> dict[str, Any]:
        """Values by their JSON keys."""
        return {
            **self.values,
            "undefined": self.undefined,
            "classes_without_images": list(self.without_images),
        }


@dataclass(frozen=True)
class Ranked:
    """ROC-AUC and average precision of every class, and their averages."""

    roc_auc: list[LeaveOneOut | None]
    average_precision: list[float | None]
    halved: list[LeaveOneOut | None]
    positives: Ints

    @property
    def leave_out(self) -> LeaveOneOut:
        """Mean of the halved average precisions."""
        n = next((len(one.without) for one in self.halved if one is not None), 0)
        return mean_leave_out([one for one in self.halved if one is not None], n)


def rank_classes(column: Column, num_classes: int) -> Ranked:
    """Rank the images of each class; `column(k)` gives (n,) scores and (n,) targets of class k."""
    areas, precisions, halved, positives = [], [], [], []
    for k in range(num_classes):
        ranking = Ranking.of(*column(k))
        positives.append(ranking.positives)
        areas.append(ranking.roc_auc())
        precisions.append(ranking.average_precision())
        halved.append(ranking.halved_average_precision() if ranking.positives > 1 else None)
    return Ranked(areas, precisions, halved, np.array(positives, dtype=np.int64))


def single_label_averages(
    labels: Ints,
    predicted: Ints,
    names: Sequence[str],
    column: Column,
    per_class: PerClass,
    *,
    binary: bool,
) -> ClassAverages:
    """Averages over the classes of single-label images.

    Args:
        labels, predicted: (n,) true and predicted classes; a prediction of K or more is a class
            that the data do not have.
        column: class -> (n,) its probabilities, and (n,) whether it is the true class.
        per_class: precision, recall, F1 and images of the classes that have images.
        binary: the model tells two classes apart, so that ROC-AUC is that of the second one.
    """
    counts = np.bincount(labels, minlength=len(names))
    present = np.flatnonzero(counts).tolist()
    ranked = rank_classes(column, len(names))
    # scikit-learn's macro average has 0 for a class that is only predicted. A model of 1,000
    # classes predicts many that the data do not have, so only classes with images count here.
    of = _macro_intervals(labels, predicted, present)
    chosen = np.bincount(predicted, minlength=len(names))
    per_class = {names[k]: _with_intervals(per_class[names[k]], int(chosen[k])) for k in present}
    values = _macro_values(per_class, [names[k] for k in present])
    # The same number; each has the name under which scikit-learn's users look for it.
    values = {"balanced_accuracy": values["macro_recall"], **values}
    of = {"balanced_accuracy": of["macro_recall"], **of}
    methods = {**dict.fromkeys(of, "score"), "per_class": "wilson"}
    intervals = Intervals(of, methods=methods)
    found = ClassAverages(
        values,
        {},
        intervals,
        tuple(names[k] for k in np.flatnonzero(counts == 0).tolist()),
        _with_rankings(per_class, names, ranked),
        ranked.leave_out,
    )
    # Without another class there is no pair to rank, and an average precision is 1 by definition.
    if len(present) == 1:
        reason = f"all images are of the class `{names[present[0]]}`"
        return _undefined(found, dict.fromkeys(("roc_auc", "map"), reason))
    # Both classes have the same area, up to ties: the probability of one is 1 minus that of the
    # other. scikit-learn takes the second, so equal probabilities near 1 are tied in the same way.
    found = _with_areas(found, names, ranked, [1] if binary else present)
    return _with_average_precision(found, names, ranked, len(labels))


def multi_label_averages(
    targets: NDArray[np.uint8],
    decided: NDArray[np.bool_],
    names: Sequence[str],
    column: Column,
    per_class: PerClass,
) -> ClassAverages:
    """Averages over the classes of multi-label images; `decided` (n, K) are the decisions."""
    present = np.flatnonzero(targets.any(axis=0)).tolist()
    ranked = rank_classes(column, len(names))
    chosen = decided.sum(axis=0)
    per_class = {
        k: _with_intervals(row, int(n))
        for (k, row), n in zip(per_class.items(), chosen, strict=True)
    }
    found = ClassAverages(
        {},
        {},
        Intervals({}),
        tuple(names[k] for k in np.flatnonzero(~targets.any(axis=0)).tolist()),
        _with_rankings(per_class, names, ranked),
        ranked.leave_out,
    )
    macro_names = [f"macro_{name}" for name in MACRO]
    if not present:
        reason = "no image has a label"
        return _undefined(found, dict.fromkeys([*macro_names, "roc_auc"], reason))
    of = _decision_intervals(targets[:, present] == 1, decided[:, present])
    methods = {**dict.fromkeys(of, "score"), "per_class": "wilson"}
    found = replace(
        found,
        values=_macro_values(per_class, [names[k] for k in present]),
        intervals=Intervals(of, methods=methods),
    )
    # A label that every image has cannot be ranked against images without it.
    defined = [k for k in present if ranked.roc_auc[k] is not None]
    if not defined:
        return _undefined(found, {"roc_auc": "every image has every label that occurs"})
    return _with_areas(found, names, ranked, defined)


def class_intervals(right: int, images: int, chosen: int) -> dict[str, Interval | None]:
    """Intervals of precision, recall and F1 of a class; None where no image says anything.

    Precision and recall are proportions, so they have Wilson's interval. F1 is 2 J / (1 + J), where
    J is the proportion of right images among those that are or are said to be of the class.

    Args:
        right, images, chosen: images of the class that are recognised, all of them, and images that
            are said to be of the class.
    """
    # F1 grows with J, so the ends of the interval of J give those of F1.
    union = images + chosen - right
    low, high = wilson_interval(right / union, union) if union else (0.0, 1.0)
    return {
        "precision": wilson_interval(right / chosen, chosen) if chosen else None,
        "recall": wilson_interval(right / images, images) if images else None,
        "f1": (2 * low / (1 + low), 2 * high / (1 + high)) if images else None,
    }


def _with_intervals(row: dict[str, Any], chosen: int) -> dict[str, Any]:
    """The figures of a class, and their intervals."""
    # A whole number again: the table holds shares only.
    right = round(row["precision"] * chosen)
    found = class_intervals(right, row["images"], chosen)
    return row | {f"{name}_interval": pair and list(pair) for name, pair in found.items()}


def _macro_values(per_class: PerClass, names: Sequence[str]) -> dict[str, float | None]:
    """Means over the classes `names`."""
    return {f"macro_{key}": float(np.mean([per_class[k][key] for k in names])) for key in MACRO}


def _undefined(found: ClassAverages, reasons: dict[str, str]) -> ClassAverages:
    """The same figures, and those of `reasons` as None."""
    nothing = dict.fromkeys(reasons)
    intervals = found.intervals.merged(Intervals(nothing, reasons))
    undefined = {**found.undefined, **reasons}
    return replace(
        found, values={**found.values, **nothing}, undefined=undefined, intervals=intervals
    )


def _with_areas(
    found: ClassAverages, names: Sequence[str], ranked: Ranked, chosen: Sequence[int]
) -> ClassAverages:
    """Add the mean ROC-AUC of the classes `chosen`, all of which have one."""
    parts = [one for k in chosen if (one := ranked.roc_auc[k]) is not None]
    n = len(parts[0].without)
    whole = mean_leave_out(parts, n)
    # The smaller side decides: 5 images of a class against 1,000 others say as little as 5.
    rarest = [min(int(ranked.positives[k]), n - int(ranked.positives[k])) for k in chosen]
    values = {**found.values, "roc_auc": whole.whole}
    least = int(np.argmin(rarest))
    if rarest[least] < MIN_POSITIVES:
        reason = _too_few(names[chosen[least]], rarest[least], n, ranked.positives[chosen[least]])
        added = Intervals({"roc_auc": None}, {"roc_auc": reason})
    else:
        # For a perfect ranking: as many images as a proportion with the same variance has.
        equal_variance = len(rarest) ** 2 / sum(1 / few for few in rarest)
        pair = whole.share_interval(equal_variance)
        added = Intervals({"roc_auc": pair}, methods={"roc_auc": whole.method})
    return replace(found, values=values, intervals=found.intervals.merged(added))


def _with_average_precision(
    found: ClassAverages, names: Sequence[str], ranked: Ranked, n: int
) -> ClassAverages:
    """Add the mean average precision of the classes with images."""
    defined = [one for one in ranked.average_precision if one is not None]
    values = {**found.values, "map": float(np.mean(defined))}
    present = np.flatnonzero(ranked.positives).tolist()
    rarest = min(present, key=lambda k: ranked.positives[k])
    count = int(ranked.positives[rarest])
    if count < MIN_POSITIVES:
        reason = _too_few(names[rarest], count, n, count)
        added = Intervals({"map": None}, {"map": reason})
    else:
        # Centred at the figure without the bias of few images, see `leave_out_average_precision`.
        pair = ranked.leave_out.share_interval(n)
        added = Intervals({"map": pair}, methods={"map": ranked.leave_out.method})
    return replace(found, values=values, intervals=found.intervals.merged(added))


def _too_few(name: str, few: int, n: int, positives: int) -> str:
    """The reason why a ranking has no interval: too few images of a class, or without it."""
    if few == positives:
        needed = f"an interval needs {MIN_POSITIVES} of each class"
        return f"the class {name} has {few} images, and {needed}"
    return f"{few} images are not of the class {name}, and an interval needs {MIN_POSITIVES}"


def _with_rankings(per_class: PerClass, names: Sequence[str], ranked: Ranked) -> PerClass:
    """The table with `roc_auc` and `average_precision` of each class."""
    # The table may lack classes: single-label rows exist for classes with images only.
    number = {name: k for k, name in enumerate(names)}
    table = {}
    for name, row in per_class.items():
        area = ranked.roc_auc[number[name]]
        table[name] = {
            "average_precision": ranked.average_precision[number[name]],
            "roc_auc": None if area is None else area.whole,
        } | row
    return table


def _macro_intervals(
    labels: Ints, predicted: Ints, present: Sequence[int]
) -> dict[str, Interval | None]:
    """Intervals of macro precision, recall and F1 of single-label images."""
    size = int(max(labels.max(), predicted.max())) + 1
    cells, times = np.unique(labels * size + predicted, return_counts=True)
    # Images of one cell of the confusion matrix are alike, so leave out one of each cell. It
    # changes the figures of the true class (a) and of the predicted one (b), and no others.
    a, b = np.divmod(cells, size)
    hit = (a == b).astype(np.int64)
    images, chosen = (np.bincount(values, minlength=size) for values in (labels, predicted))
    right = np.bincount(labels[labels == predicted], minlength=size)
    whole = class_shares(right, images, chosen)
    without_a = class_shares(right[a] - hit, images[a] - 1, chosen[a] - hit)
    without_b = class_shares(right[b] - hit, images[b] - hit, chosen[b] - 1)
    last = images[a] == 1  # its class has no image left, and leaves the mean
    count = np.maximum(len(present) - last, 1)
    results: dict[str, Interval | None] = {}
    for name in MACRO:
        values = whole[name]
        change = np.where(last, 0.0, without_a[name]) - values[a]
        change += np.where((hit == 0) & (images[b] > 0), without_b[name] - values[b], 0.0)
        without = np.repeat((values[present].sum() + change) / count, times)
        table = _limits(name, right[present], images[present], chosen[present])
        mean = LeaveOneOut(float(values[present].mean()), without)
        results[f"macro_{name}"] = mean_of_intervals(mean, values[present], table, images[present])
    return results


def _decision_intervals(
    targets: NDArray[np.bool_], decided: NDArray[np.bool_]
) -> dict[str, Interval | None]:
    """Intervals of macro precision, recall and F1 of (n, K) decisions; each class has images."""
    both = targets & decided
    right, images, chosen = (table.sum(axis=0) for table in (both, targets, decided))
    whole = class_shares(right, images, chosen)
    without = class_shares(right - both, images - targets, chosen - decided)
    results: dict[str, Interval | None] = {}
    for name in MACRO:
        values = whole[name]
        # Without its only image a class has no recall; the jackknife then leaves it as it is.
        rest = np.where(images > targets, without[name], values).mean(axis=1)
        table = _limits(name, right, images, chosen)
        mean = LeaveOneOut(float(values.mean()), rest)
        results[f"macro_{name}"] = mean_of_intervals(mean, values, table, images)
    return results


def class_shares(right: Ints, images: Ints, chosen: Ints) -> dict[str, Floats]:
    """Precision, recall and F1 from counts; 0 where nothing is counted, as in scikit-learn."""
    pairs = {"precision": (right, chosen), "recall": (right, images)}
    pairs["f1"] = (2 * right, images + chosen)
    return {
        name: np.divide(top, below, out=np.zeros(np.shape(top)), where=below > 0)
        for name, (top, below) in pairs.items()
    }


def _limits(name: str, right: Ints, images: Ints, chosen: Ints) -> list[Interval]:
    """The interval of each class; all of 0..1 where no image says anything."""
    rows = zip(right.tolist(), images.tolist(), chosen.tolist(), strict=True)
    return [class_intervals(*row)[name] or (0.0, 1.0) for row in rows]
