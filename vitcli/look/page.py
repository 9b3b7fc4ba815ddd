"""One HTML page with everything inside: it can be mailed, and opens without a network."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vitcli.errors import printable

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; background: #fff; }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; opacity: .8; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto; }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
"""


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, pictures with captions, and a table whose first row is its head."""

    title: str
    text: str = ""
    pictures: Sequence[tuple[str, bytes]] = ()
    table: Sequence[Sequence[Any]] = field(default=())


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return file.getvalue()


def figure_png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page as text."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escaped(title)}</h1><p>{escaped(lead)}</p>",
        *(line for section in sections for line in _section(section)),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _section(section: Section) -> list[str]:
    lines = [f"<section><h2>{escaped(section.title)}</h2>"]
    if section.text:
        lines.append(f"<p>{escaped(section.text)}</p>")
    for caption, content in section.pictures:
        data = base64.b64encode(content).decode("ascii")
        shown = escaped(caption)
        lines.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{shown}">'
            f"<figcaption>{shown}</figcaption></figure>"
        )
    if section.table:
        head, *rows = section.table
        lines.append("<table><thead>" + _row("th", head) + "</thead><tbody>")
        lines += [_row("td", row) for row in rows]
        lines.append("</tbody></table>")
    return [*lines, "</section>"]


def _row(tag: str, cells: Sequence[Any]) -> str:
    inside = "".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in cells)
    return f"<tr>{inside}</tr>"


def escaped(value: Any) -> str:
    """Text that stands for itself in HTML, on one line."""
    return html.escape(printable(str(value)))
