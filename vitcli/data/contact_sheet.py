"""Contact sheets: rows of small images, with a title per row and a caption under each image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont, ImageOps

from vitcli.decode import ImageError

MARGIN = 180  # px, for the titles of the rows
FONT_SIZE, LINE_HEIGHT = 13, 16  # px
LETTER_WIDTH = 7.4  # px, mean
TITLE_HEIGHT = 30  # px, of the title of the sheet


@dataclass(frozen=True)
class SheetRow:
    """One row of images.

    Attributes:
        title: text at the left; may have several lines.
        images: image indices, for `read`.
        captions: text under each image, which may have several lines; empty for no captions.
    """

    title: str
    images: Sequence[int]
    captions: Sequence[str] = field(default=())


def draw_sheet(
    rows: Sequence[SheetRow],
    read: Callable[[int], Image.Image],
    *,
    columns: int,
    side: int,
    title: str = "",
) -> Image.Image:
    """Draw the sheet; an image that cannot be read leaves its cell empty.

    Args:
        read: index in `SheetRow.images` -> image; its ImageErrors are ignored.
        columns: images per row.
        side: side of a cell in pixels.
        title: text above all rows.
    """
    lines = max((c.count("\n") + 1 for row in rows for c in row.captions), default=0)
    step = side + lines * LINE_HEIGHT + (4 if lines else 0)
    head = TITLE_HEIGHT if title else 0
    size = MARGIN + columns * side, head + max(1, len(rows)) * step
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    if title:
        pen.text((6, 7), _cut(title, size[0] - 12), fill="black", font=font)
    for number, row in enumerate(rows):
        top = head + number * step
        name = "\n".join(_cut(line, MARGIN - 12) for line in row.title.split("\n"))
        pen.multiline_text((6, top + side // 2 - 6), name, fill="black", font=font)
        for x, index in enumerate(row.images[:columns]):
            left = MARGIN + x * side
            try:
                picture = read(index)
            except ImageError:  # removed since the scan
                continue
            small = ImageOps.contain(picture, (side - 2, side - 2))
            sheet.paste(small, (left + 1, top + 1))
            if row.captions:
                text = "\n".join(_cut(line, side - 4) for line in row.captions[x].split("\n"))
                pen.multiline_text((left + 2, top + side), text, fill="black", font=font)
    return sheet


def _cut(text: str, width: float) -> str:
    """The line, shortened to `width` pixels."""
    letters = int(width / LETTER_WIDTH)
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
