"""Every recipe that is shipped: complete, explained, and one that runs."""

from pathlib import Path

import pytest

from vitcli.commands import finetune, pretrain
from vitcli.commands.recipes import run
from vitcli.config import Recipe, check, load_recipe, read_toml, recipes_folder

NUM_RECIPES = 5
FILES = sorted(recipes_folder().glob("*.toml"))


def test_the_glob_found_them_all():
    assert len(FILES) == NUM_RECIPES
    listed = {row["name"] for row in run().to_json()}
    assert listed == {path.stem for path in FILES}
    assert all(
        {"name", "command", "data", "model", "description"} == set(row) for row in run().to_json()
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_header_says_how_to_run_it(path):
    text = path.read_text()
    assert text.startswith("# ") and "# Run:" in text
    recipe = check(Recipe, read_toml(path), path.stem)
    assert recipe.description
    readme = (recipes_folder() / "README.md").read_text()
    assert f"`{path.stem}`" in readme


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_it_runs(path, here):
    """Two steps of the recipe as it is, on digits where it names no data."""
    recipe = load_recipe(path.stem)
    data = recipe.data.name or "builtin:digits"
    few = {"train": {"steps": 2, "batch_size": 8}}
    if recipe.command == "pretrain":
        if recipe.model.image_size == 224:
            few["model"] = {"image_size": 32, "depth": 1}
        result = pretrain.run(data, recipe=path.stem, settings=few)
    else:
        pretrain.run(settings={"train": {"steps": 1, "batch_size": 8}})
        result = finetune.run(data, recipe=path.stem, settings=few)
    assert result.steps == 2
    assert Path(result.run, "model.safetensors").is_file()
