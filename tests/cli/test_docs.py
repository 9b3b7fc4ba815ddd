"""The documentation site: generated pages, links and navigation."""

import importlib.util
import re
from pathlib import Path

import pytest
from typer.main import get_command

from vitcli.cli.app import app

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs/pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_has_a_page_with_its_options(site):
    made, commands = site.pages(), get_command(app).commands
    for name, command in commands.items():
        page = made[f"reference/commands/{name}.md"]
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert f"`{', '.join(parameter.opts)}`" in page, (name, parameter.name)
        assert f"vitcli {name}" in page


def test_every_recipe_has_a_page_with_its_settings_and_its_results(site):
    from vitcli.commands.recipes import run, text

    made = dict(site.recipe_pages())
    assert len(made) == len(run().rows)
    for row in run().rows:
        page = made[f"reference/recipes/{row.name}.md"]
        assert text(row.name).strip() in page and (row.cost or "The cost depends") in page
        assert ("## Results" in page) != (site.NOT_MEASURED in page)
    # The figure is in RESULTS.md only; the name of its section is in the header of the recipe.
    assert "99.26 ± 0.42 %" in made["reference/recipes/finetune_digits.md"]
    assert site.NOT_MEASURED in made["reference/recipes/paper_vit_b16_i1k.md"]


def test_the_results_that_a_recipe_names_exist(site):
    from vitcli.commands.recipes import run, text
    from vitcli.config.recipe import header

    for row in run().rows:
        expected = header(text(row.name)).get("Expect", "")
        if expected.startswith("recipes/RESULTS.md"):
            assert site.results_of(row.name, expected), row.name


def test_links_of_the_site_lead_somewhere(site):
    """Every link of every page, generated or not, names another page or a file of recipes/."""
    made = site.pages()
    for path in (ROOT / "docs").rglob("*.md"):
        source = path.relative_to(ROOT).as_posix()
        made[site.address_of(source)] = site.site_links(path.read_text(encoding="utf-8"), source)
    for address, text in made.items():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target:
                found = (ROOT / address).parent / target
                inside = found.resolve().relative_to(ROOT).as_posix()
                assert inside in made or (ROOT / inside).is_file(), (address, target)


def test_every_setting_is_on_the_page_of_settings(site):
    from vitcli.config.schema import SECTIONS

    page = site.settings_page()
    for name, section in SECTIONS.items():
        for key, field in section.model_fields.items():
            assert f"`{name}.{key}`" in page
            assert field.description, f"{name}.{key} has no help"
            assert len(field.description.split()) <= 30


def test_every_page_is_in_the_navigation(site):
    made = site.pages()

    def addresses(entry):
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [address for part in parts for address in addresses(part)]

    written = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert sorted(addresses(site.navigation(made))) == sorted({*made, *written})


def test_lists_written_by_hand_are_complete():
    from vitcli.data.readers import READERS
    from vitcli.evals.fewshot.methods import METHODS
    from vitcli.train.objectives import OBJECTIVES
    from vitcli.train.optimizers import OPTIMIZERS
    from vitcli.weights.formats import FORMATS

    lists = {
        "train.md": [*OBJECTIVES, *OPTIMIZERS],
        "fewshot.md": [f"`{name}`" for name in METHODS],
        "weights.md": [f"`{name}`" for name in FORMATS],
        "data.md": [key for key in READERS if ":" in key],
    }
    for page, names in lists.items():
        text = (ROOT / "docs/how-to" / page).read_text(encoding="utf-8")
        assert not [name for name in names if name not in text], page
