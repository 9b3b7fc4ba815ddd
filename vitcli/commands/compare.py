"""`vitcli compare`: finished runs beside each other."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vitcli.config.recipe import flat_settings
from vitcli.errors import VitcliError
from vitcli.evals.comparison import PairedAccuracy, compare_paired
from vitcli.run import OUTCOMES, Run

SEEDS = {"train.seed"}  # runs that differ in nothing else are repetitions


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other.

    Attributes:
        runs: their directories.
        settings: dotted name -> the value of each run, of those that differ; None is "not set".
        results: name -> the figure of each run, or None where it has none.
        paired: for each run but the first, it against the first; or the reason why not.
        seeds: where runs differ by their seed only, figure -> (mean, sample standard deviation).
    """

    runs: tuple[str, ...]
    settings: dict[str, list[Any]]
    results: dict[str, list[float | None]]
    paired: list[PairedAccuracy | str]
    seeds: dict[str, tuple[float, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object of `compare --json`."""
        pairs = [
            {"run": run, "against": self.runs[0], **_described(pair)}
            for run, pair in zip(self.runs[1:], self.paired, strict=True)
        ]
        seeds = {name: {"mean": mean, "std": std} for name, (mean, std) in self.seeds.items()}
        return {
            "runs": list(self.runs),
            "settings": self.settings,
            "results": self.results,
            "paired": pairs,
            "seeds": seeds,
        }


def _described(pair: PairedAccuracy | str) -> dict[str, Any]:
    return {"reason": pair} if isinstance(pair, str) else asdict(pair)


def run(paths: Sequence[Path]) -> Comparison:
    """Settings that differ, results, and a paired test of each run against the first.

    Args:
        paths: two or more finished runs of `pretrain` or `finetune`.

    Raises:
        VitcliError: fewer than two, or one that is no finished run.
    """
    if len(paths) < 2:
        raise VitcliError("one run has nothing to be compared with", "name two or more")
    runs = [_finished(path) for path in paths]
    recipes = [flat_settings(found.recipe()) for found in runs]
    keys = sorted({key for recipe in recipes for key in recipe})
    settings = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    settings = {key: values for key, values in settings.items() if _differ(values)}
    results = [found.result() for found in runs]
    figures = [{**_numbers(r), **_figures(r.get("figures", {}))} for r in results]
    names = [*dict.fromkeys(name for found in figures for name in found)]
    table = {name: [found.get(name) for found in figures] for name in names}
    first, *others = runs
    seeds: dict[str, tuple[float, float]] = {}
    if set(settings) == SEEDS:
        seeds = {name: _spread(values) for name, values in table.items() if None not in values}
    return Comparison(
        tuple(str(path) for path in paths),
        settings,
        table,
        [_pair(first, other) for other in others],
        seeds,
    )


def _finished(path: Path) -> Run:
    found = Run(path)
    if not found.recipe_file.is_file() or not found.finished:
        what = "has not finished" if found.recipe_file.is_file() else "is not a run"
        raise VitcliError(f"`{path}` {what}", "`compare` takes directories with a result.json")
    return found


def _differ(values: list[Any]) -> bool:
    return any(value != values[0] for value in values)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    wanted = {k: v for k, v in values.items() if isinstance(v, int | float)}
    return {k: float(v) for k, v in wanted.items() if not isinstance(v, bool)}


def _figures(values: dict[str, Any]) -> dict[str, float]:
    """Figures of the last evaluation; `images` of a result are those it trained on."""
    return {("test_images" if k == "images" else k): v for k, v in _numbers(values).items()}


def _spread(values: list[float | None]) -> tuple[float, float]:
    known = np.array(values, dtype=float)
    return float(known.mean()), float(known.std(ddof=1))


def _pair(first: Run, second: Run) -> PairedAccuracy | str:
    """The test of two runs, or why there is none."""
    data = [found.provenance().get("data", {}) for found in (first, second)]
    if data[0].get("fingerprint") != data[1].get("fingerprint"):
        return "other data, or another split of it"
    try:
        a, b = (load_file(found.path / OUTCOMES) for found in (first, second))
    except (OSError, SafetensorError):
        return "no outcomes of single images were kept"
    if any(not np.array_equal(a[name], b[name]) for name in ("index", "label")):
        return "measured on other images"
    return compare_paired(*(found["predicted"] == found["label"] for found in (a, b)))
