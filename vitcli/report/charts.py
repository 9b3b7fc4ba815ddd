"""Charts: matplotlib figures in one style, as PNG files and as SVG that follows the page's colours.

The figures use the colours below. In SVG these become CSS variables of the page, so that a chart is
legible on a light and on a dark page.
"""

import io
import re
import warnings
from pathlib import Path
from typing import IO, Any

from vitcli.errors import printable
from vitcli.files import writing

BLUE, ORANGE, GREEN, GREY, LINE = "#2f6db3", "#b9541a", "#2c8053", "#7d8590", "#b0b0b0"
PAGE_COLOURS = {
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
    GREY: "var(--grey)",
    LINE: "var(--line)",
    "#000000": "currentColor",
    "#ffffff": "var(--paper)",
}


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches."""
    # Not through pyplot: it keeps global state, and chooses a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, file: Path | IO[bytes], dpi: int = 120) -> None:
    """Write a figure as PNG with literal text: a name such as `$5` is not a formula."""
    _take_text_literally(figure)
    with warnings.catch_warnings(action="ignore"):
        # matplotlib warns of a script that its font lacks; such a class name becomes boxes.
        figure.savefig(file, format="png", dpi=dpi)


def save_atomically(figure: Any, path: Path) -> None:
    """Write a figure as a PNG file.

    Raises:
        VitcliError: the file cannot be written.
    """
    with writing(path) as temporary:
        save_figure(figure, temporary)


def to_svg(figure: Any, name: str) -> str:
    """The figure as an <svg> element for a page: its text is escaped and stays text.

    Args:
        name: different for each chart of a page, because their elements have names of their own.
    """
    import matplotlib

    _take_text_literally(figure)
    file = io.StringIO()
    # `none` writes text as text, in the font of the page. The salt decides the names of elements.
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": printable(name)}),
        warnings.catch_warnings(action="ignore"),
    ):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for useless in ("<metadata>.*?</metadata>", "<style .*?</style>", "<!--.*?-->"):
        text = re.sub(useless, "", text, flags=re.DOTALL)
    used = set(re.findall(r"#(\w+)", text))
    # Only inside of tags: what stands between them was written by the user.
    return re.sub("<[^>]*>", lambda tag: _page_tag(tag[0], used), text)


def _page_tag(tag: str, used: set[str]) -> str:
    """A tag of matplotlib as a page needs it: without sizes and unused names, in its colours."""
    tag = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", tag)
    if tag.startswith("<svg"):
        tag = re.sub(r' (width|height|version|xmlns(:\w+)?)="[^"]*"', "", tag)
    tag = re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda m: PAGE_COLOURS.get(m[0], m[0]), tag)
    return tag.replace("xlink:", "")


def _take_text_literally(figure: Any) -> None:
    from matplotlib.text import Text

    axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
    # matplotlib writes the powers of ten of a logarithmic axis as formulas.
    powers = {
        label for a in axes if a.get_scale() == "log" for label in a.get_ticklabels(which="both")
    }
    for text in figure.findobj(Text):
        text.set_parse_math(text in powers)
        if not text.get_text().isprintable():  # control codes, or bytes that are not UTF-8
            text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
