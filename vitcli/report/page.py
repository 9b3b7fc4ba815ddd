"""A report as one HTML file: sections of text, facts, tables, pictures and thumbnails.

All pictures are inside the file, so that it can be mailed and opens without a network. Text is
escaped: names of files and classes come from the user, and a name such as `<script>` stays text.
"""

import base64
import io
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from PIL import Image, ImageOps

from vitcli.errors import VitcliError, printable
from vitcli.files import writing
from vitcli.progress import Watcher
from vitcli.run import describe_environment

REPORT_FILE = "report.html"
TEMPLATE = "page.html"
THUMBNAIL_SIDE = 224  # px, which is sharp on a phone at half of that in CSS pixels
MAX_PIXELATED = 64  # px: smaller images are shown as squares of colour, not blurred


class Cell(NamedTuple):
    """A cell of a table: its text, and the number by which the column sorts, if any."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Paragraph:
    """Text; words in backticks are set as code."""

    text: str
    kind: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class Listed:
    """A list of lines."""

    lines: Sequence[str]
    kind: ClassVar[str] = "listed"


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    rows: Sequence[tuple[str, Any]]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Table:
    """A table, which sorts by any column where scripts run; numbers are on the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    sortable: bool = True
    kind: ClassVar[str] = "table"
    limited: ClassVar[int] = 30  # rows; a longer table scrolls in a box of its own

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows, with numbers as cells that sort by their value."""
        return [[_to_cell(value) for value in row] for row in self.rows]


@dataclass(frozen=True)
class Matrix:
    """Counts with rows and columns of classes; `shares` in 0..1 are their shades."""

    rows: Sequence[str]
    columns: Sequence[str]
    counts: Sequence[Sequence[int]]
    shares: Sequence[Sequence[float]]
    kind: ClassVar[str] = "matrix"


@dataclass(frozen=True)
class Picture:
    """A PNG file, or a chart as SVG markup, with its caption."""

    content: bytes | str
    caption: str
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Charts:
    """Charts with titles of their own, side by side where the screen is wide enough."""

    pictures: Sequence[Picture]
    kind: ClassVar[str] = "charts"


@dataclass(frozen=True)
class Thumbnail:
    """A small image as a data URI, with lines of text and the path of the image."""

    source: str
    lines: Sequence[str]
    path: str
    pixelated: bool = False

    @property
    def short_path(self) -> str:
        """The end of `path`, which fits under a thumbnail."""
        return end_of_path(self.path)


@dataclass(frozen=True)
class Gallery:
    """Thumbnails in rows, under a title."""

    title: str
    thumbnails: Sequence[Thumbnail]
    kind: ClassVar[str] = "gallery"


@dataclass(frozen=True)
class Code:
    """Text of a file or a command, as it is."""

    text: str
    kind: ClassVar[str] = "code"


Block = Paragraph | Listed | Facts | Table | Matrix | Picture | Charts | Gallery | Code


@dataclass(frozen=True)
class PageSection:
    """A heading and its blocks; `folded` sections open with a click."""

    title: str
    blocks: Sequence[Block]
    folded: bool = False


@dataclass
class Page:
    """A report.

    Attributes:
        headline: (name, value, remark) of the most important figures.
        warnings: lines that a reader must see before the figures.
    """

    title: str
    summary: str = ""
    headline: Sequence[tuple[str, str, str]] = ()
    sections: list[PageSection] = field(default_factory=list)
    warnings: Sequence[str] = ()

    def render(self) -> str:
        """The HTML text."""
        shown = [section for section in self.sections if section.blocks]
        return _template().render(
            title=self.title,
            summary=self.summary,
            headline=self.headline,
            warnings=self.warnings,
            sections=shown,
        )

    def write(self, path: Path) -> None:
        """Write the page atomically.

        Raises:
            VitcliError: the file cannot be written.
        """
        with writing(path) as temporary:
            temporary.write_text(self.render(), encoding="utf-8")


def write_report(path: Path, make: Callable[[], Page], watch: Watcher) -> None:
    """Write the page that `make` returns; a failure is a warning, and the results stay.

    A report repeats what other files of the command hold, so it must not cost them.
    """
    try:
        make().write(path)
    except Exception as error:
        reason = error.message if isinstance(error, VitcliError) else repr(error)
        watch.warn(f"`{path}` is not written: {reason}; all other results are complete")


def provenance_section(known: Mapping[str, Any] | None = None) -> PageSection:
    """The command, its time, the versions and the machine; `known` is a run's provenance."""
    facts = known or describe_environment()
    libraries = facts.get("libraries") or {}
    rows = [
        ("vitcli", f"{facts.get('vitcli')}, commit {facts.get('commit') or 'unknown'}"),
        ("started" if known else "written", facts.get("time")),
        ("Python", facts.get("python")),
        ("libraries", ", ".join(f"{k} {v}" for k, v in libraries.items() if v)),
        ("machine", f"{facts.get('platform')}, {facts.get('cpu_count')} CPU cores"),
        *((name, facts.get(name)) for name in ("cpu", "gpu", "device", "precision", "processes")),
    ]
    known_rows = [(name, value) for name, value in rows if value not in (None, "")]
    return PageSection("Provenance", [Code(command_line(facts.get("argv"))), Facts(known_rows)])


def command_line(argv: Sequence[str] | None) -> str:
    """The command as a user types it."""
    program, *arguments = argv or ("vitcli",)
    path = Path(program)
    # `python -m vitcli` has the path of __main__.py in place of a name.
    name = "vitcli" if path.name in ("vitcli", "__main__.py") else program
    return shlex.join([name, *arguments])


def end_of_path(path: str) -> str:
    """The file and its folder; `row 7 of` stays before them."""
    row = re.match(r"(?:(?:row|image) \d+ of )?", path)
    assert row is not None  # it matches nothing as well
    return row[0] + "/".join(path[row.end() :].split("/")[-2:])


def thumbnail(image: Image.Image, lines: Sequence[str], path: str) -> Thumbnail:
    """The image, small, with lines of text below, and the end of its path."""
    image = image.convert("RGB")
    pixelated = max(image.size) <= MAX_PIXELATED
    if not pixelated:
        image = ImageOps.contain(image, (THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    kind = "png" if pixelated else "jpeg"
    image.save(file, format=kind, quality=82)
    return Thumbnail(_data_uri(file.getvalue(), kind), lines, path, pixelated)


def _to_cell(value: Any) -> Cell:
    if isinstance(value, Cell):
        return value
    if isinstance(value, int | float):
        return Cell(f"{value:,}" if isinstance(value, int) else f"{value:.3f}", value)
    return Cell("-" if value is None else str(value))


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _png_uri(content: bytes) -> str:
    return _data_uri(content, "png")


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    def escaped(value: Any) -> Any:
        # Control codes would be invisible or end the page early; they become `\n`, `\x00`.
        return value if isinstance(value, Markup) else printable(str(value))

    def code(text: str) -> Markup:
        """Escaped text, with `words` in backticks as <code>."""
        parts = [Markup.escape(printable(part)) for part in text.split("`")]
        if len(parts) % 2 == 0:  # a backtick without its partner
            return Markup("`").join(parts)
        pairs = (part if i % 2 == 0 else Markup("<code>{}</code>").format(part)
                 for i, part in enumerate(parts))  # fmt: skip
        return Markup("").join(pairs)

    def lines(text: str) -> Markup:
        return Markup("\n").join(Markup.escape(printable(line)) for line in text.split("\n"))

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=escaped,
    )
    environment.filters |= {"png": _png_uri, "code": code, "lines": lines}
    environment.filters["svg"] = Markup  # charts.py has escaped its text
    environment.tests["bytes"] = lambda value: isinstance(value, bytes)
    return environment.get_template(TEMPLATE)
