"""Suite files: tasks on which one model is measured in the same way, in groups, with a mean."""

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
from vitcli.errors import VitcliError, unknown

FOLDER = "suites"  # in the folder of the recipes
ADDRESSES = ("hf:", "builtin:", "http:", "https:", "gs:")  # DATA that is not a relative path


class SelectSection(Section):
    """Choose settings on training images only, as VTAB does (Zhai et al., 2019).

    Every combination of `grid` (dotted name -> values) is trained on `train` and measured on
    `validation`, both slices of the training images. The best one is used for the task.
    """

    train: str
    validation: str
    grid: dict[str, tuple[Any, ...]] = Field(min_length=1)

    @field_validator("grid")
    @classmethod
    def _check_values(cls, grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        if empty := [key for key, values in grid.items() if not values]:
            raise ValueError(f"no values for {', '.join(empty)}")
        return grid

    def combinations(self) -> list[dict[str, Any]]:
        """Every combination, as dotted name -> value."""
        return [
            dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())
        ]


class TaskSection(Section):
    """One dataset, or one model of a suite that pretrains.

    Attributes:
        data: DATA; None for that of the suite.
        published: accuracies in percent, by the name of the publication.
    """

    name: str = Field(min_length=1)
    group: str = ""
    data: str | None = None
    settings: Settings = Field(default_factory=dict)
    published: dict[str, float] = Field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name of its run."""
        # Safe on every file system, and never hidden or empty.
        return re.sub(r"[^\w.-]+", "-", self.name.lower()).strip("-.") or "task"


class Suite(Section):
    """A suite file.

    Attributes:
        method: `finetune`, with `recipe`; `fewshot`, with `shots` images per class; or `pretrain`,
            with both: each task trains its own model from `recipe`, which is then few-shot
            evaluated on `fewshot_data` (on the task's own data if that is None).
        data: DATA of the tasks that name none.
        settings: for every task; the settings of a task override them.
        published: published means in percent, under the same names as in the tasks.
    """

    name: str
    description: str = ""
    method: Literal["finetune", "fewshot", "pretrain"] = "finetune"
    recipe: str | None = None
    data: str | None = None
    fewshot_data: str | None = None
    shots: PositiveInt = 5
    settings: Settings = Field(default_factory=dict)
    select: SelectSection | None = None
    published: dict[str, float] = Field(default_factory=dict)
    tasks: tuple[TaskSection, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        folders = [task.folder for task in self.tasks]
        if repeated := sorted({name for name in folders if folders.count(name) > 1}):
            raise ValueError(f"two tasks have the run name {', '.join(repeated)}")
        if self.recipe is not None and self.method == "fewshot":
            raise ValueError("`recipe` belongs to the method `finetune`, not to `fewshot`")
        if self.method == "pretrain" and (self.recipe is None or self.select is not None):
            raise ValueError("the method `pretrain` needs `recipe`, and takes no `select`")
        if self.fewshot_data is not None and self.method != "pretrain":
            raise ValueError("`fewshot_data` belongs to the method `pretrain`")
        if without := [t.name for t in self.tasks if (t.data or self.data) is None]:
            raise ValueError(f"no `data` for {', '.join(without)}, and none for the suite")
        return self


def suite_files() -> dict[str, Path]:
    """The installed suites: name -> file."""
    return {path.stem: path for path in sorted((recipes_folder() / FOLDER).glob("*.toml"))}


def load_suite(name: str) -> tuple[Suite, Path]:
    """Load an installed suite by its name, or a suite file; return it and its path."""
    path = Path(name)
    if not (name.endswith(".toml") or "/" in name):
        files = suite_files()
        if name not in files:
            raise unknown("suite", name, files)
        path = files[name]
    elif not path.is_file():
        raise VitcliError(
            f"no suite file `{name}`",
            f"give an existing file, or one of the suites {', '.join(suite_files())}",
        )
    try:
        suite = check(Suite, read_toml(path), f"suite `{name}`")
    except VitcliError as error:
        hint = f"`{suite_files()['vtab1k']}` is an example"
        raise VitcliError(error.message, hint) from None
    return suite, path


def task_data(data: str, path: Path) -> str:
    """DATA as a suite file `path` has it; a path is relative to the file."""
    return data if data.startswith(ADDRESSES) else str(path.parent / data)


@dataclass(frozen=True)
class TaskResult:
    """The result of one task.

    Attributes:
        accuracy: on the images of `split`, 0..1.
        images: number of these images.
        chosen: settings that `select` chose, as dotted name -> value.
    """

    accuracy: float
    images: int
    run: str
    chosen: Mapping[str, Any]
    split: str = "test"


def task_result(result: Mapping[str, Any], run: str, chosen: Mapping[str, Any]) -> TaskResult:
    """Read the result.json of a `finetune` or `fewshot` run."""
    if result.get("command") == "fewshot":
        # The task counts the most shots, where several were measured.
        shots = max(result["shots"], key=lambda n: float("inf") if n == "all" else int(n))
        accuracy = result["shots"][shots]["accuracy"]["mean"]
        split = result.get("split", "test")
        return TaskResult(accuracy, result["test_images"], run, chosen, split)
    figures = result.get("figures", {})
    if "accuracy" not in figures or "images" not in figures:
        raise VitcliError(f"`{run}` has no test accuracy", "a task needs single-label test images")
    split = figures.get("split", "test")
    return TaskResult(figures["accuracy"], int(figures["images"]), run, chosen, split)


def group_means(suite: Suite, accuracies: Mapping[str, float]) -> dict[str, float]:
    """Group -> mean accuracy, for groups in which every task has an accuracy."""
    groups: dict[str, list[str]] = {}
    for task in suite.tasks:
        groups.setdefault(task.group, []).append(task.name)
    return {
        # No mean over a part of a group: it could not be compared with published means.
        group: fmean(accuracies[name] for name in names)
        for group, names in groups.items()
        if group and all(name in accuracies for name in names)
    }


def published_results(suite: Suite) -> Iterator[tuple[str, dict[str, float], float | None]]:
    """(publication, task -> accuracy in percent, mean or None)."""
    names = [*suite.published, *(name for task in suite.tasks for name in task.published)]
    for name in dict.fromkeys(names):
        figures = {t.name: t.published[name] for t in suite.tasks if name in t.published}
        # A published mean has more digits than the mean of rounded accuracies.
        mean = suite.published.get(name)
        if mean is None and len(figures) == len(suite.tasks):
            mean = fmean(figures.values())
        yield name, figures, mean
