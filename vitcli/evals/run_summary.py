"""Several runs together: a ranking with tests, or a summary over cross-validation folds."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from vitcli.evals.comparison import Pair, holm
from vitcli.evals.intervals import LEVEL, Interval, wilson_interval

# Figures by which runs are ranked, the first that all have; True if more is better.
RANKED_BY = {"accuracy": True, "map": True, "mae": False}
FOLD_SETTINGS = {"data.fold", "train.seed", "data.name"}  # may differ between folds of one recipe


@dataclass(frozen=True)
class RankedRun:
    """One run in a ranking.

    Attributes:
        p_value: of the test against the best run, corrected for all comparisons; None without.
        verdict: in words; empty for the best run.
    """

    run: str
    value: float
    p_value: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class RunRanking:
    """Runs from the best to the worst, all measured on the same images.

    Attributes:
        metric: the figure that they are ranked by.
        comparisons: number of tests; with more than one, p-values have Holm's correction.
        verdict: whether the best run is really better, in one sentence.
    """

    metric: str
    runs: tuple[RankedRun, ...]
    comparisons: int
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "correction": "holm" if self.comparisons > 1 else None}


def rank_runs(
    runs: Sequence[str],
    results: Mapping[str, Sequence[float | None]],
    compare: Callable[[int, int], Pair],
) -> RunRanking | str:
    """Rank runs, or say why they cannot be ranked.

    Args:
        results: figure -> its value in each run.
        compare: the paired comparison of two runs by their numbers, or why there is none.
    """
    # A figure that one run lacks would rank the others only.
    known = {name: results.get(name, [None]) for name in RANKED_BY}
    metric = next((name for name, values in known.items() if None not in values), None)
    if metric is None:
        return "the runs have no accuracy, mean average precision or error in common"
    values = [float(value) for value in results[metric] if value is not None]
    sign = 1 if RANKED_BY[metric] else -1
    # A stable sort: runs of equal value keep the order of the command line.
    order = sorted(range(len(runs)), key=lambda i: -sign * values[i])
    pairs = {pair: compare(*pair) for pair in combinations(range(len(runs)), 2)}
    # Runs on other images have figures, too, but their order would say nothing.
    if reasons := [pair for pair in pairs.values() if isinstance(pair, str)]:
        return reasons[0]
    # All pairs and not only those with the best run: which one is best is seen from the same data.
    raw = [getattr(pair, "p_value", math.nan) for pair in pairs.values()]
    adjusted = dict(zip(pairs, holm(raw), strict=True))
    best, *others = order
    ranked = [RankedRun(runs[best], values[best])]
    for i in others:
        p = adjusted[min(best, i), max(best, i)]
        real = p < 1 - LEVEL
        shown = "worse than the best run" if real else "no real difference from the best run"
        ranked.append(RankedRun(runs[i], values[i], p, f"{shown}, p = {p:.2g}"))
    return RunRanking(metric, tuple(ranked), len(pairs), _verdict(ranked, len(pairs)))


def _verdict(ranked: Sequence[RankedRun], comparisons: int) -> str:
    best, *others = ranked
    equal = [one.run for one in others if one.p_value is not None and one.p_value >= 1 - LEVEL]
    correction = f" (Holm's correction for {comparisons} comparisons)" if comparisons > 1 else ""
    if not equal:
        return f"{best.run} is better than the other runs on images like these{correction}"
    if len(equal) == len(others):
        return f"these images show no real difference between {best.run} and the others{correction}"
    return (
        f"these images show no real difference between {best.run} and {', '.join(equal)}; it is "
        f"better than the others{correction}"
    )


@dataclass(frozen=True)
class FoldRun:
    """What the summary needs to know of a run on one fold.

    Attributes:
        split: the split that is the fold: `validation`, or `test` if there is no other.
        figures: metrics of the images of the fold; with the key `images`.
        total: number of images of all folds.
        images: content of each of them -> how often it occurs; None if it is not recorded.
    """

    run: str
    folds: int
    fold: int
    seed: int
    split: str
    figures: Mapping[str, float]
    total: int
    images: Counter[str] | None


@dataclass(frozen=True)
class FoldSummary:
    """Figures over the k folds of one split of a dataset.

    Attributes:
        split: the split of each run that is its fold.
        images: number of images of all folds together; each is predicted once.
        figures: name -> (mean, sample standard deviation) over the folds.
        accuracy: share of right predictions of all images; None for other kinds of labels.
        interval: its 95 % interval.
    """

    folds: int
    seed: int
    split: str
    images: int
    figures: dict[str, tuple[float, float]]
    accuracy: float | None
    interval: Interval | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        facts = asdict(self)
        facts["figures"] = {k: {"mean": m, "std": s} for k, (m, s) in self.figures.items()}
        pooled = {"accuracy": facts.pop("accuracy"), "interval": facts.pop("interval")}
        return {**facts, "pooled": {**pooled, "method": "wilson"} if self.interval else None}


def summarise_folds(runs: Sequence[FoldRun], differing: Sequence[str]) -> FoldSummary | str:
    """The summary of all folds of one split, or why these runs are not that.

    Args:
        differing: settings in which the runs differ.
    """
    # The first reason is the one that a user can act on: settings, then folds, then the data.
    first = runs[0]
    if others := sorted(set(differing) - FOLD_SETTINGS - {"data.folds", "data.split_seed"}):
        return f"the runs differ in `{'`, `'.join(others)}`, not only in their fold"
    if counts := sorted({one.folds for one in runs} - {first.folds}):
        return f"the runs have {first.folds} and {counts[0]} folds (`data.folds`)"
    if seeds := sorted({one.seed for one in runs} - {first.seed}):
        return (
            f"the folds were drawn with the seeds {first.seed} and {seeds[0]} (`data.split_seed`)"
        )
    # A fold that counts twice, or not at all, would make the pooled accuracy that of other data.
    by_fold: dict[int, str] = {}
    for one in runs:
        if one.fold in by_fold:
            return f"fold {one.fold} has two runs: `{by_fold[one.fold]}` and `{one.run}`"
        by_fold[one.fold] = one.run
    if missing := sorted(set(range(first.folds)) - by_fold.keys()):
        text = ", ".join(map(str, missing))
        word, verb = ("fold", "has") if len(missing) == 1 else ("folds", "have")
        return f"{word} {text} of {first.folds} (counted from 0) {verb} no run"
    if reason := _other_data(runs):
        return reason
    numbers = np.array([one.figures["images"] for one in runs])
    names = [k for k in first.figures if all(k in one.figures for one in runs) and k != "images"]
    table = {name: np.array([one.figures[name] for one in runs]) for name in names}
    accuracy, interval, total = None, None, int(numbers.sum())
    if "accuracy" in table:
        # The figures are shares: a count of right images is whole again after rounding.
        right = np.rint(table["accuracy"] * numbers).sum()
        accuracy = float(right / total)
        interval = wilson_interval(accuracy, total)
    figures = {k: (float(v.mean()), float(v.std(ddof=1))) for k, v in table.items()}
    return FoldSummary(first.folds, first.seed, first.split, total, figures, accuracy, interval)


def _other_data(runs: Sequence[FoldRun]) -> str | None:
    """Why the runs do not hold the parts of one dataset; None if they do."""
    first = runs[0]
    for one in runs[1:]:
        # Runs of earlier versions have no list of images; then the number has to do.
        same = one.total == first.total
        if first.images is not None and one.images is not None:
            same = first.images == one.images
        if not same or one.split != first.split:
            return f"`{first.run}` and `{one.run}` have other data"
    return None
