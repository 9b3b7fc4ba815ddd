"""`vitcli compare`: settings and results of finished runs, with a paired test."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vitcli.config.recipe import flat_settings
from vitcli.errors import VitcliError, quoted
from vitcli.evals.comparison import Pair, compare_errors, compare_paired, pair_json
from vitcli.evals.run_summary import (
    FoldRun,
    FoldSummary,
    RunRanking,
    rank_runs,
    summarise_folds,
)
from vitcli.progress import Quiet, Watcher
from vitcli.run import OUTCOMES, Run
from vitcli.train.recorded_images import ROWS_FILE, read_rows
from vitcli.weights.store import check_seal

SEED_SETTINGS = {"train.seed"}  # runs that differ in nothing else are repetitions


@dataclass(frozen=True)
class RunComparison:
    """Runs beside each other.

    Attributes:
        runs: run directories.
        settings: dotted name -> value of each run, for settings that differ; None is "not set".
        results: name -> figure of each run; None if the run does not have it.
        splits: the split of the figures of each run; figures of another split than that of the
            first run have its name in front.
        paired: for each run but the first, the test against the first, or why there is none.
        seeds: figure -> (mean, sample standard deviation), if the runs differ only in their seed.
        ranking: the runs by their main figure with tests, or why there is no ranking; None for
            repetitions and for folds, which are not compared with each other.
        folds: the summary of cross-validation folds, or why there is none; None for other runs.
    """

    runs: tuple[str, ...]
    settings: dict[str, list[Any]]
    results: dict[str, list[float | None]]
    paired: list[Pair]
    seeds: dict[str, tuple[float, float]] = field(default_factory=dict)
    splits: tuple[str | None, ...] = ()
    ranking: RunRanking | str | None = None
    folds: FoldSummary | str | None = None

    def to_json(self) -> dict[str, Any]:
        """The object of `compare --json`."""
        pairs = [
            {"run": run, "against": self.runs[0], **pair_json(pair)}
            for run, pair in zip(self.runs[1:], self.paired, strict=True)
        ]
        seeds = {name: {"mean": mean, "std": std} for name, (mean, std) in self.seeds.items()}
        return {
            "runs": list(self.runs),
            "settings": self.settings,
            "results": self.results,
            "splits": list(self.splits),
            "paired": pairs,
            "seeds": seeds,
            "ranking": _json_or_reason(self.ranking),
            "folds": _json_or_reason(self.folds),
        }


def run(paths: Sequence[Path], watch: Watcher | None = None) -> RunComparison:
    """Compare settings and results of runs, and test each run against the first.

    Args:
        paths: two or more finished runs of `pretrain` or `finetune`. A note names the paths that
            are not runs; they are left out, so that `runs/*` can be compared.

    Raises:
        VitcliError: fewer than two runs, or a run that has not finished.
    """
    if len(paths) < 2:
        raise VitcliError("`compare` needs at least two runs", "give two or more run directories")
    foreign = [path for path in paths if not Run(path).recipe_file.is_file()]
    if foreign and len(paths) - len(foreign) >= 2:
        paths = [path for path in paths if path not in foreign]
        names = quoted(map(str, foreign), 3)
        (watch or Quiet()).note(f"left out, because they are not runs: {names}")
    runs = [_finished_run(path) for path in paths]
    recipes = [flat_settings(found.recipe()) for found in runs]
    keys = sorted({key for recipe in recipes for key in recipe})
    settings = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    settings = {
        key: values for key, values in settings.items() if any(v != values[0] for v in values)
    }
    results = [found.result() for found in runs]
    splits = [reported_split(found) for found in runs]
    figures = [
        {**_numbers(r), **_held_out_figures(r.get("figures", {}), split, splits[0])}
        for r, split in zip(results, splits, strict=True)
    ]
    columns = [*dict.fromkeys(name for found in figures for name in found)]
    table = {name: [found.get(name) for found in figures] for name in columns}
    seeds: dict[str, tuple[float, float]] = {}
    if set(settings) == SEED_SETTINGS:
        for name, values in table.items():
            if None not in values:
                known = np.array(values, dtype=float)
                seeds[name] = float(known.mean()), float(known.std(ddof=1))
    first, *others = runs
    paired = [_compare(first, other) for other in others]
    names_of_runs = tuple(str(path) for path in paths)
    folds = _fold_summary(runs, recipes, list(settings))
    ranking = None
    if folds is None and not seeds:
        ranking = rank_runs(names_of_runs, table, lambda i, j: _compare(runs[i], runs[j]))
    return RunComparison(
        names_of_runs, settings, table, paired, seeds, tuple(splits), ranking, folds
    )


def _json_or_reason(found: RunRanking | FoldSummary | str | None) -> dict[str, Any] | None:
    if isinstance(found, str):
        return {"reason": found}
    return None if found is None else found.to_json()


def _fold_summary(
    runs: Sequence[Run], recipes: Sequence[dict[str, Any]], differing: Sequence[str]
) -> FoldSummary | str | None:
    """The summary over folds; None unless every run holds out a fold, and not all the same one."""
    found = [_fold_of(run, recipe) for run, recipe in zip(runs, recipes, strict=True)]
    folds = [one for one in found if one is not None]
    if len(folds) < len(runs) or len({one.fold for one in folds}) == 1:
        return None
    return summarise_folds(folds, differing)


def _fold_of(run: Run, recipe: dict[str, Any]) -> FoldRun | None:
    """The fold of a run; None if it holds out none."""
    data = run.provenance().get("data", {})
    if recipe.get("data.folds") is None or not {"fold", "images"} <= data.keys():
        return None
    # With a test split of its own, the fold is the validation split.
    result = run.result()
    split = "validation" if "validation" in data["images"] else "test"
    both = (result.get("validation"), result.get("figures"))
    figures: dict[str, Any] = next(
        (one for one in both if one and one.get("split", split) == split), {}
    )
    if "images" not in figures:  # a run without a classifier has no figures of the fold
        return None
    rows = [row for row in read_rows(run.path / ROWS_FILE) if row.split in ("train", split)]
    return FoldRun(
        run=str(run.path),
        folds=int(data["folds"]),
        fold=int(data["fold"]),
        seed=int(data["seed"]),
        split=split,
        figures=_numbers(figures),
        total=sum(count for name, count in data["images"].items() if name in ("train", split)),
        images=Counter(row.content for row in rows) or None,
    )


def reported_split(run: Run) -> str | None:
    """The split of the figures of a run; None if it held out no images.

    Earlier versions do not record it. They reported the validation images, if there were any.
    """
    figures = run.result().get("figures")
    known = figures.get("split") if isinstance(figures, dict) else None
    if known is not None:
        return str(known)
    counts = run.provenance().get("data", {}).get("images", {})
    return next((name for name in ("validation", "test") if name in counts), None)


def _finished_run(path: Path) -> Run:
    found = Run(path)
    if not found.recipe_file.is_file() or not found.finished:
        what = "has not finished" if found.recipe_file.is_file() else "is not a run"
        raise VitcliError(f"`{path}` {what}", "give run directories that have a result.json")
    return found


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
    return {k: float(v) for k, v in numbers.items() if not isinstance(v, bool)}


def _held_out_figures(
    values: dict[str, Any], split: str | None, first: str | None
) -> dict[str, float]:
    """Figures of the last evaluation. `images` of the whole result counts training images."""
    front = "" if split == first else f"{split}_"
    return {
        (f"{split or 'test'}_images" if k == "images" else front + k): v
        for k, v in _numbers(values).items()
    }


def _compare(first: Run, second: Run) -> Pair:
    """The paired test of two runs, or why there is none."""
    data = [found.provenance().get("data", {}) for found in (first, second)]
    # The content is that of the images; the fingerprint is that of their names and sizes.
    key = "content" if all(found.get("content") for found in data) else "fingerprint"
    if data[0].get(key) != data[1].get(key):
        return "other data, or another split of the data"
    splits = reported_split(first), reported_split(second)
    if splits[0] != splits[1]:
        return f"measured on other images: the {splits[0]} and the {splits[1]} split"
    files = [found.path / OUTCOMES for found in (first, second)]
    try:
        for file in files:
            if file.is_file():
                check_seal(file)
        a, b = map(load_file, files)
    except (OSError, SafetensorError):
        return "a run has no predictions of single images"
    truth = "target" if "target" in a else "label"  # of a regression, of a classifier
    if any(name not in b or not np.array_equal(a[name], b[name]) for name in ("index", truth)):
        return "measured on other images"
    if truth == "target":
        return compare_errors(*(np.abs(found["predicted"] - found[truth]) for found in (a, b)))
    return compare_paired(*(found["predicted"] == found["label"] for found in (a, b)))
