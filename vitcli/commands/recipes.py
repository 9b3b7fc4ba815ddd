"""`vitcli recipes`: list the recipes, or print one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcli.config.recipe import check, header, read_toml, recipe_files, recipe_path
from vitcli.config.schema import Recipe


@dataclass(frozen=True)
class RecipeRow:
    """One recipe of the list.

    Attributes:
        made_for: the data that the recipe was made for, if it leaves DATA to the user.
        cost: operations of the training run on that data: 6 FLOPs per multiply-add and image, as
            in Table 6 of the paper; None if it depends on DATA.
    """

    name: str
    command: str
    data: str | None
    model: str | None
    description: str
    made_for: str | None = None
    cost: str | None = None


@dataclass(frozen=True)
class RecipeList:
    """All recipes: general ones, the paper's, and reference implementations'."""

    rows: tuple[RecipeRow, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """The JSON of `recipes --json`."""
        return [vars(row) for row in self.rows]


def run() -> RecipeList:
    """Read and validate all recipes of this installation.

    Raises:
        VitcliError: a recipe is invalid.
    """
    return RecipeList(tuple(_row(name, path) for name, path in recipe_files().items()))


def _row(name: str, path: Path) -> RecipeRow:
    recipe = check(Recipe, read_toml(path), f"recipe `{name}`")
    said = header(path.read_text(encoding="utf-8"))
    return RecipeRow(
        name=name,
        command=recipe.command,
        data=recipe.data.name,
        model=recipe.model.name,
        description=recipe.description,
        made_for=said.get("Data"),
        cost=said.get("Cost"),
    )


def text(name: str) -> str:
    """The text of a recipe file, with its comments.

    Raises:
        VitcliError: the recipe does not exist.
    """
    return recipe_path(name).read_text(encoding="utf-8")


def settings(name: str) -> dict[str, Any]:
    """The settings of a recipe file as nested dicts.

    Raises:
        VitcliError: the recipe does not exist.
    """
    return read_toml(recipe_path(name))
