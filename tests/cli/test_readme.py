"""The README's commands are real: each is parsed by the program, the Python example runs."""

import re
import shlex
import shutil
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from support.docs import commands

from vitcli.cli.app import app
from vitcli.cli.main import run

ROOT = Path(__file__).parents[2]
DOCS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))
TEXTS = ("README.md", "recipes/README.md", "CONTRIBUTING.md", *DOCS)
README = (ROOT / "README.md").read_text(encoding="utf-8")


ALL = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", *DOCS)]
LINES = sorted({line for text in ALL for line in commands(text)})


def test_the_search_found_them():
    assert len(LINES) >= 15
    from typer.main import get_command

    assert {line.split()[1] for line in commands(README)} == set(get_command(app).commands)


@pytest.mark.parametrize("line", LINES)
def test_every_command_line_is_understood(line, monkeypatch):
    from typer.main import get_command

    words = shlex.split(line)[1:]
    if "--processes" in words:  # as one of the processes that it starts
        number = int(words[words.index("--processes") + 1])
        monkeypatch.setattr("vitcli.distributed.world_size", lambda: number)
    command = get_command(app)
    context = command.make_context("vitcli", words[:1], resilient_parsing=True)
    found = command.get_command(context, words[0])
    assert found is not None
    found.make_context(words[0], words[1:], parent=context)  # raises on an unknown option


@pytest.mark.parametrize("line", [line for line in LINES if "--set" in line or "--recipe" in line])
def test_the_settings_and_recipes_of_every_command_line_exist(line):
    from vitcli.config.recipe import load_data_check, load_recipe, parse_overrides

    words = shlex.split(line)[1:]
    pairs = list(pairwise(words))
    settings = parse_overrides([value for flag, value in pairs if flag == "--set"])
    recipe = next((value for flag, value in pairs if flag == "--recipe"), None)
    if words[0] in ("pretrain", "finetune"):
        name = recipe if recipe and not recipe.startswith("runs/") else words[0]
        load_recipe(name, settings, words[0])
    else:
        load_data_check(settings)


def test_the_first_two_commands_are_the_contracts():
    first, second = re.findall(r"^```\n(.*?)^```", README, flags=re.S | re.M)[:2]
    assert first.strip() == "pip install -e . && vitcli pretrain"
    assert second.strip() == "pip install -e '.[test]' && pytest"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "test" in extras["optional-dependencies"]


@pytest.mark.parametrize("name", TEXTS)
def test_links_to_files_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize(
    "name", re.findall(r"^((?:vitcli|recipes|docs|tests)/\w*/?)", README, flags=re.M)
)
def test_files_that_are_named_exist(name):
    assert (ROOT / name).exists()


def test_the_python_example_runs(here, capfd):
    assert run(["pretrain", "--steps", "2", "--batch-size", "8"]) == 0
    assert run(["finetune", "--steps", "2"]) == 0
    from PIL import Image

    Image.new("RGB", (40, 30), (200, 30, 30)).save("image.jpg")
    code = re.search(r"```python\n(.*?)```", README, flags=re.S).group(1)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].shape == (1, 10)
    assert names["rows"][0]["path"] == "image.jpg" and names["rows"][0]["error"] is None
    shutil.rmtree("runs")
