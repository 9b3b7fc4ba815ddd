"""`vitcli recipes`: list the recipes that are here, or print one."""

from dataclasses import dataclass
from typing import Any

from vitcli.config import Recipe, check, read_toml, recipe_path, recipes_folder


@dataclass(frozen=True)
class RecipeRow:
    """One line of the list."""

    name: str
    command: str
    data: str | None
    model: str | None
    description: str


@dataclass(frozen=True)
class RecipeList:
    """All recipes, by name."""

    rows: tuple[RecipeRow, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """A list of objects, see INTERFACE."""
        return [vars(row) for row in self.rows]


def run() -> RecipeList:
    """The recipes of this installation, each checked as it is read.

    Raises:
        VitcliError: one of them is wrong.
    """
    rows = []
    for path in sorted(recipes_folder().glob("*.toml")):
        recipe = check(Recipe, read_toml(path), f"recipe `{path.stem}`")
        rows.append(
            RecipeRow(
                path.stem, recipe.command, recipe.data.name, recipe.model.name, recipe.description
            )
        )
    return RecipeList(tuple(rows))


def text(name: str) -> str:
    """The recipe as its file has it, comments and all.

    Raises:
        VitcliError: no such recipe.
    """
    return recipe_path(name).read_text(encoding="utf-8")
