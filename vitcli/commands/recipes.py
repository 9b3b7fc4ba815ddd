"""`vitcli recipes`: list the recipes that are here, or print one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcli.config.recipe import check, header, read_toml, recipe_files, recipe_path
from vitcli.config.schema import Recipe


@dataclass(frozen=True)
class RecipeRow:
    """One line of the list.

    Attributes:
        made_for: the data that the recipe was made for, where it leaves DATA to the user.
        cost: of the whole training run on these data: 6 floating-point operations a multiply-add
            and image, as Table 6 of the paper counts; None where it depends on DATA.
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
    """All recipes: our own, the paper's, other people's; by name within each."""

    rows: tuple[RecipeRow, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """A list of objects, see INTERFACE."""
        return [vars(row) for row in self.rows]


def run() -> RecipeList:
    """The recipes of this installation, each checked as it is read.

    Raises:
        VitcliError: one of them is wrong.
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
    """The recipe as its file has it, comments and all.

    Raises:
        VitcliError: no such recipe.
    """
    return recipe_path(name).read_text(encoding="utf-8")
