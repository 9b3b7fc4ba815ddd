"""Many small pictures on one sheet, in rows with a name and with a caption under each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont, ImageOps

from vitcli.decode import ImageError

MARGIN = 160
LINE = 13  # pixels of a line of text
LETTER = 6.2  # of a letter's width, in the mean


@dataclass(frozen=True)
class Row:
    """Pictures beside each other.

    Attributes:
        title: before them, lines apart by a line break.
        images: which, for `read`.
        captions: of each picture, lines apart by a line break; none or one for each.
    """

    title: str
    images: Sequence[int]
    captions: Sequence[str] = field(default=())


def draw_sheet(
    rows: Sequence[Row], read: Callable[[int], Image.Image], *, columns: int, side: int
) -> Image.Image:
    """The sheet; a picture that cannot be read leaves its place empty.

    Args:
        read: a number of `Row.images` -> the picture; an ImageError of it is passed over.
        columns: pictures of a row.
        side: of a picture's place, in pixels.
    """
    lines = max((c.count("\n") + 1 for row in rows for c in row.captions), default=0)
    step = side + lines * LINE + (4 if lines else 0)
    sheet = Image.new("RGB", (MARGIN + columns * side, max(1, len(rows)) * step), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(10)
    for y, row in enumerate(rows):
        title = "\n".join(_cut(line, MARGIN - 12) for line in row.title.split("\n"))
        pen.multiline_text((6, y * step + side // 2 - 6), title, fill="black", font=font)
        for x, index in enumerate(row.images[:columns]):
            left = MARGIN + x * side
            try:
                picture = read(index)
            except ImageError:  # gone since it was looked at
                continue
            small = ImageOps.contain(picture, (side - 2, side - 2))
            sheet.paste(small, (left + 1, y * step + 1))
            if row.captions:
                text = "\n".join(_cut(line, side - 4) for line in row.captions[x].split("\n"))
                pen.multiline_text((left + 2, y * step + side), text, fill="black", font=font)
    return sheet


def _cut(text: str, width: float) -> str:
    """As much of a line as fits in so many pixels."""
    letters = int(width / LETTER)
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
