"""A hook of MkDocs that adds generated pages to the files in this folder.

Generated: the start page from README.md, a page per command from the program's help, a page with
every setting from the schema, a page per recipe from its file and from RESULTS.md, and the texts
that are elsewhere in the repository. Links are written
for the repository, and `site_links` rewrites them for the site.
"""

import inspect
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMMANDS = "reference/commands"
SETTINGS = "reference/settings.md"
RECIPES = "reference/recipes"
RESULTS = "recipes/RESULTS.md"
FIELDS = r"(Follows|Run|Data|Cost|Expect|Then): "  # begin the facts in the header of a recipe
NOT_MEASURED = "The run of this recipe has not been made and measured here."
# Repository path -> address on the site, for texts outside of docs/.
OTHER_TEXTS = {
    "README.md": "index.md",
    "recipes/README.md": "recipes/README.md",
    "recipes/RESULTS.md": "recipes/RESULTS.md",
    "recipes/RECORDS.md": "recipes/RECORDS.md",
    "recipes/LOG.md": "recipes/LOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}


def cell(text: str) -> str:
    """A text inside a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def option_table(command: Any) -> str:
    """The arguments and options of a click command as a Markdown table."""
    rows = []
    for parameter in command.params:
        positional = parameter.param_type_name == "argument"
        flags = ", ".join(parameter.opts)
        name = (parameter.metavar or parameter.name) if positional else flags
        shown = "" if positional or parameter.is_flag else (parameter.default or "")
        default = f"`{shown}`" if isinstance(shown, int | float | str) and shown != "" else ""
        rows.append(f"| `{cell(name)}` | {cell(parameter.help or '')} | {cell(default)} |")
    return "\n".join(["| option | meaning | default |", "| --- | --- | --- |", *rows]) + "\n"


def command_pages() -> Iterator[tuple[str, str]]:
    """(address, Markdown) of each command of the program."""
    from typer.main import get_command

    from vitcli.cli.app import app
    from vitcli.cli.options import fill_help

    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        fill_help(command)
        text = inspect.cleandoc(command.help or "")
        page = f"# vitcli {name}\n\n{text}\n\n## Arguments and options\n\n{option_table(command)}"
        yield f"{COMMANDS}/{name}.md", page


def settings_page() -> str:
    """Every setting of the recipe schema: key, type, default, help."""
    from vitcli.commands.settings import setting_rows
    from vitcli.config.schema import SECTIONS

    parts = ["# Settings\n", "Set a key with `--set section.key=value` or in a recipe.\n"]
    for name, section in SECTIONS.items():
        parts.append(f"## {name}\n\n{inspect.cleandoc(section.__doc__ or '')}\n")
        rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for row in setting_rows([name]):
            default = "" if row.default is None else cell(f"`{row.default}`")
            rows.append(f"| `{row.key}` | {cell(row.type)} | {default} | {cell(row.meaning)} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def results_of(name: str, expected: str) -> list[str]:
    """The sections of RESULTS.md about a recipe: its name is in their title, or the recipe's
    header names them, as in `Expect: recipes/RESULTS.md, "Fine-tuning"`."""
    text = (ROOT / RESULTS).read_text(encoding="utf-8")
    _, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    named = re.findall(r'"([^"]+)"', expected)
    titles = [(one.partition("\n")[0], one) for one in sections]
    return [
        one.strip()
        for title, one in titles
        if f"`{name}`" in title or any(title == n or title.startswith(f"{n} (") for n in named)
    ]


def recipe_pages() -> Iterator[tuple[str, str]]:
    """(address, Markdown) of each recipe: its header, its cost, its results and its settings."""
    from vitcli.commands.recipes import run, text
    from vitcli.config.recipe import header, recipe_path

    for row in run().rows:
        file = text(row.name)
        comment = [
            line.removeprefix("#").removeprefix(" ")
            for line in file.split("\ncommand")[0].split("\n")
        ]
        first = next((i for i, line in enumerate(comment) if re.match(FIELDS, line)), len(comment))
        parts = [f"# {row.name}", "\n".join(comment[:first]).strip()]
        if first < len(comment):
            parts.append("\n".join(["```text", *comment[first:], "```"]))
        if row.cost is None:
            data = row.data or "DATA"
            parts.append(
                f"The cost depends on the data: `vitcli plan {row.name} {data}` prints it."
            )
        found = results_of(row.name, header(file).get("Expect", ""))
        parts.append("## Results" if found else NOT_MEASURED)
        parts += [f"### {one}" for one in found]
        source = recipe_path(row.name).relative_to(ROOT).as_posix()
        parts += [f"## Settings\n\nThis is [{source}]({source}):", f"```toml\n{file.strip()}\n```"]
        address = f"{RECIPES}/{row.name}.md"
        yield address, site_links("\n\n".join(parts) + "\n", "README.md", address)


def pages() -> dict[str, str]:
    """Address -> Markdown of every generated page."""
    made = {
        address: site_links((ROOT / path).read_text(encoding="utf-8"), path)
        for path, address in OTHER_TEXTS.items()
    }
    made |= dict(command_pages())
    made |= dict(recipe_pages())
    made[SETTINGS] = settings_page()
    return made


def address_of(path: str) -> str:
    """The address on the site of a file of the repository."""
    return OTHER_TEXTS.get(path, path.removeprefix("docs/"))


def site_links(text: str, path: str, address: str | None = None) -> str:
    """Rewrite the relative links of the repository file `path` for `address` on the site."""
    here = posixpath.dirname(address or address_of(path))

    def rewritten(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        if "://" in target or not target:
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        return f"]({posixpath.relpath(address_of(file), here or '.')}{anchor})"

    return re.sub(r"\]\(([^)#\s]*)(#[^)]*)?\)", rewritten, text)


def navigation(made: dict[str, str]) -> list[Any]:
    """The order of the pages."""

    def folder(name: str) -> list[str]:
        return [f"{name}/{p.name}" for p in sorted((ROOT / "docs" / name).glob("*.md"))]

    commands = [address for address in made if address.startswith(f"{COMMANDS}/")]
    recipes = [address for address in made if address.startswith(f"{RECIPES}/")]
    return [
        "index.md",
        {"Tutorials": folder("tutorials")},
        {"How-to guides": folder("how-to")},
        {"Concepts": folder("concepts")},
        {
            "Reference": [
                {"Commands": commands},
                SETTINGS,
                {"Recipes": ["recipes/README.md", *recipes]},
            ]
        },
        {"Results": ["recipes/RESULTS.md", "recipes/RECORDS.md", "recipes/LOG.md"]},
        "comparison.md",
        "faq.md",
        {"Project": ["CONTRIBUTING.md", "CHANGELOG.md"]},
    ]


def on_config(config: Any) -> Any:
    """Set the navigation before MkDocs reads the files."""
    config["nav"] = navigation(pages())
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and the recipes, records and pictures that pages link to."""
    from mkdocs.structure.files import File

    for address, text in pages().items():
        files.append(File.generated(config, address, content=text))
    for path in sorted((ROOT / "recipes").rglob("*")):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and path.suffix in (".toml", ".json", ".png", ".svg", ".py"):
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of the pages that are files in docs/."""
    source = f"docs/{page.file.src_uri}"
    return site_links(markdown, source) if (ROOT / source).is_file() else markdown
