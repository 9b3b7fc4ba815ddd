"""The site's pages are README's text and the program's help, each in its place."""

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
        page = made[f"commands/{name}.md"]
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert f"`{', '.join(parameter.opts)}`" in page, (name, parameter.name)
        assert f"vitcli {name}" in page


def test_no_line_of_the_readme_is_lost(site):
    made = "\n".join(site.pages().values()).replace("](../", "](")
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    missing = [line for line in lines if not line.startswith("#") and line not in made]
    assert not missing


def test_links_of_moved_pages_lead_somewhere(site):
    made = site.pages()
    for address, text in made.items():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target:
                found = (ROOT / address).parent / target
                inside = found.resolve().relative_to(ROOT).as_posix()
                assert inside in made or found.resolve().exists(), (address, target)


def test_headings_inside_code_are_none(site):
    text = "a\n## one\nb\n```\n## two\n```\n## three\nc\n"
    assert list(site.sections(text, 2)) == ["", "one", "three"]


def test_every_page_is_in_the_navigation(site):
    made = site.pages()

    def addresses(entry):
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [address for part in parts for address in addresses(part)]

    assert sorted(addresses(site.navigation(made))) == sorted(made)
