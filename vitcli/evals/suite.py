"""A suite: tasks on which one model is measured the same way, in groups, with a mean."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from vitcli.config.recipe import check, read_toml, recipes_folder
from vitcli.config.schema import Section, Settings
from vitcli.errors import VitcliError, nearest

FOLDER = "suites"  # among the recipes
ELSEWHERE = ("hf:", "builtin:", "http:", "https:", "gs:")
KINDS = ("finetune", "fewshot")


class SelectSection(Section):
    """How settings are chosen, on training images alone.

    Every combination of `grid` (dotted name -> values) learns from `train` and is measured on
    `validation`, both slices of the training images; the best one then does the task.
    """

    train: str
    validation: str
    grid: dict[str, tuple[Any, ...]] = Field(min_length=1)

    @field_validator("grid")
    @classmethod
    def _values(cls, grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        if empty := [key for key, values in grid.items() if not values]:
            raise ValueError(f"no values for {', '.join(empty)}")
        return grid

    def choices(self) -> list[dict[str, Any]]:
        """Every combination, dotted name -> value."""
        return [
            dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())
        ]


class TaskSection(Section):
    """One data set. `published` are accuracies in percent of others, by what is to stand above."""

    name: str = Field(min_length=1)
    group: str = ""
    data: str
    settings: Settings = Field(default_factory=dict)
    published: dict[str, float] = Field(default_factory=dict)

    @property
    def folder(self) -> str:
        """What its run is called."""
        return re.sub(r"[^\w.-]+", "-", self.name.lower()).strip("-.") or "task"


class Suite(Section):
    """A suite file.

    Attributes:
        method: `finetune`, with `recipe`, or `fewshot`, with `shots` images a class.
        settings: for every task; those of a task are laid over them.
        published: means of others in percent, by the names that the tasks' figures have.
    """

    name: str
    description: str = ""
    method: Literal["finetune", "fewshot"] = "finetune"
    recipe: str | None = None
    shots: PositiveInt = 5
    settings: Settings = Field(default_factory=dict)
    select: SelectSection | None = None
    published: dict[str, float] = Field(default_factory=dict)
    tasks: tuple[TaskSection, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _apart(self) -> Self:
        folders = [task.folder for task in self.tasks]
        if twice := sorted({name for name in folders if folders.count(name) > 1}):
            raise ValueError(f"two tasks would be called {', '.join(twice)}")
        if self.recipe is not None and self.method != "finetune":
            raise ValueError("`recipe` is for `finetune`, and the method is `fewshot`")
        return self


def suite_files() -> dict[str, Path]:
    """The suites of this installation, by name."""
    return {path.stem: path for path in sorted((recipes_folder() / FOLDER).glob("*.toml"))}


def load_suite(name: str) -> tuple[Suite, Path]:
    """A suite by the name of one that is shipped or by a file, and where it lies.

    Folders and tables that it names are found from where it lies.

    Raises:
        VitcliError: there is none, it is not TOML, or every mistake in it.
    """
    path = Path(name)
    if not (name.endswith(".toml") or "/" in name):
        files = suite_files()
        if name not in files:
            close = nearest(name, list(files))
            hint = f"did you mean `{close}`?" if close else f"a file, or one of {', '.join(files)}"
            raise VitcliError(f"no suite `{name}`", hint)
        path = files[name]
    elif not path.is_file():
        raise VitcliError(
            f"no suite file `{name}`", f"a file, or one of {', '.join(suite_files())}"
        )
    try:
        suite = check(Suite, read_toml(path), f"suite `{name}`")
    except VitcliError as error:
        hint = f"`{suite_files()['vtab1k']}` is an example"
        raise VitcliError(error.message, hint) from None
    return suite, path


def data_of(task: TaskSection, path: Path) -> str:
    """DATA of a task of the suite file at `path`."""
    if task.data.startswith(ELSEWHERE):
        return task.data
    return str(path.parent / task.data)


@dataclass(frozen=True)
class Outcome:
    """One task done.

    Attributes:
        accuracy: in 0..1 on the task's test images.
        images: test images.
        chosen: what `select` chose, dotted name -> value.
    """

    accuracy: float
    images: int
    run: str
    chosen: Mapping[str, Any]


def outcome_of(result: Mapping[str, Any], run: str, chosen: Mapping[str, Any]) -> Outcome:
    """What the result.json of a `finetune` or `fewshot` run says.

    Raises:
        VitcliError: it has no accuracy: images with several labels, or no test images.
    """
    if result.get("command") == "fewshot":
        shots = max(result["shots"], key=lambda n: float("inf") if n == "all" else int(n))
        return Outcome(
            result["shots"][shots]["accuracy"]["mean"], result["test_images"], run, chosen
        )
    figures = result.get("figures", {})
    if "accuracy" not in figures or "images" not in figures:
        raise VitcliError(
            f"`{run}` has no test accuracy", "a task has test images of one class each"
        )
    return Outcome(figures["accuracy"], int(figures["images"]), run, chosen)


def group_means(suite: Suite, accuracies: Mapping[str, float]) -> dict[str, float]:
    """Group -> mean of its tasks, for the groups of which every task has a figure."""
    groups: dict[str, list[str]] = {}
    for task in suite.tasks:
        groups.setdefault(task.group, []).append(task.name)
    return {
        group: fmean(accuracies[name] for name in names)
        for group, names in groups.items()
        if group and all(name in accuracies for name in names)
    }


def published(suite: Suite) -> Iterator[tuple[str, dict[str, float], float | None]]:
    """(name, task -> accuracy in percent, mean or None) for each of the others' columns."""
    names = [*suite.published, *(name for task in suite.tasks for name in task.published)]
    for name in dict.fromkeys(names):
        figures = {t.name: t.published[name] for t in suite.tasks if name in t.published}
        mean = suite.published.get(name)
        if mean is None and len(figures) == len(suite.tasks):
            mean = fmean(figures.values())
        yield name, figures, mean
