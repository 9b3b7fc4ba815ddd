"""A hook of MkDocs: the site's pages, made from the texts that the project has anyway.

README.md becomes a page a section; each command's page is its section of README.md and the help
that the program itself gives. So there is one text, and the tests of README.md are those of the
site.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMMANDS = "commands"  # the folder of their pages
# Files that are pages as they are, at the place that they have in the project.
AS_THEY_ARE = {
    "Recipes": "recipes/README.md",
    "Results": "recipes/RESULTS.md",
    "Log": "recipes/LOG.md",
    "Contributing": "CONTRIBUTING.md",
    "Changes": "CHANGELOG.md",
}


def sections(text: str, level: int) -> dict[str, str]:
    """Heading -> what stands under it, for the headings of one level; "" is what comes before."""
    found: dict[str, list[str]] = {"": []}
    title, fenced = "", False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if not fenced and line.startswith("#" * level + " "):
            title = line.strip("# ").strip()
            found[title] = []
        else:
            found[title].append(line)
    return {name: "\n".join(lines).strip() + "\n" for name, lines in found.items()}


def moved(text: str) -> str:
    """Links of a text of the project's root, for a page one folder further down."""
    return re.sub(r"\]\((?![a-z]+:|#|/)", "](../", text)


def cell(text: str) -> str:
    """A text in a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def options(command: Any) -> str:
    """The arguments and options of a command, as a table."""
    rows = []
    for parameter in command.params:
        names = getattr(parameter, "opts", [])
        positional = parameter.param_type_name == "argument"
        name = parameter.metavar or parameter.name if positional else ", ".join(names)
        shown = (
            "" if positional or parameter.is_flag or not parameter.default else parameter.default
        )
        default = f"`{shown}`" if isinstance(shown, (int, float, str)) and shown != "" else ""
        rows.append(f"| `{cell(name)}` | {cell(parameter.help or '')} | {cell(default)} |")
    return "\n".join(["| | | default |", "| --- | --- | --- |", *rows]) + "\n"


def command_pages(said: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(name, page) of each command of the program.

    Args:
        said: heading -> text of README's sections about commands, such as `evaluate, predict`.
    """
    from typer.main import get_command

    from vitcli.cli.app import app
    from vitcli.cli.options import fill_help

    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        fill_help(command)
        parts = [f"# vitcli {name}\n", inspect.cleandoc(command.help or "") + "\n"]
        for heading, text in said.items():
            if name in re.findall(r"[a-z]+", heading.partition(":")[0]):
                parts.append(moved(text))
        parts += ["## Arguments and options\n", options(command)]
        yield name, "\n".join(parts)


def pages() -> dict[str, str]:
    """Address of every page that is made -> its text."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    top = sections(readme, 2)
    about = sections(top.pop("Commands"), 3)
    made = {"index.md": "\n".join([top.pop(""), "## What one gets\n", top.pop("What one gets")])}
    made[f"{COMMANDS}/index.md"] = f"# Commands\n\n{moved(about.pop(''))}"
    for name, text in command_pages(about):
        made[f"{COMMANDS}/{name}.md"] = text
    for title, text in top.items():
        made[f"{slug(title)}.md"] = f"# {title}\n\n{text}"
    for file in AS_THEY_ARE.values():
        made[file] = (ROOT / file).read_text(encoding="utf-8")
    return made


def slug(title: str) -> str:
    """`Data and models` -> `data-and-models`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def navigation(made: dict[str, str]) -> list[Any]:
    """The order of the pages."""
    own = [page for page in made if "/" not in page and page not in AS_THEY_ARE.values()]
    commands = [page for page in made if page.startswith(f"{COMMANDS}/")]
    return [
        *(page for page in own if page == "index.md"),
        {"Commands": commands},
        *(page for page in own if page != "index.md"),
        *({title: page} for title, page in AS_THEY_ARE.items()),
    ]


def on_config(config: Any) -> Any:
    """MkDocs asks for the navigation first."""
    config["nav"] = navigation(pages())
    return config


def on_files(files: Any, config: Any) -> Any:
    """MkDocs asks which files there are: the pages, and the pictures and files that they name."""
    from mkdocs.structure.files import File

    made = pages()
    for address, text in made.items():
        files.append(File.generated(config, address, content=text))
    linked = {
        target
        for text in made.values()
        for target in re.findall(r"\]\((?:\.\./)?([\w./-]+)\)", text)
    }
    for path in sorted((ROOT / "recipes").rglob("*")):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and name not in made and (name in linked or path.suffix == ".svg"):
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files
