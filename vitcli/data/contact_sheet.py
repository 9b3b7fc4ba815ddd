"""Contact sheets: rows of small images, with a title per row and a caption under each image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont, ImageOps

from vitcli.decode import ImageError

MARGIN = 160
LINE_HEIGHT = 13  # px
LETTER_WIDTH = 6.2  # px, mean


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
    rows: Sequence[SheetRow], read: Callable[[int], Image.Image], *, columns: int, side: int
) -> Image.Image:
    """Draw the sheet; an image that cannot be read leaves its cell empty.

    Args:
        read: index in `SheetRow.images` -> image; its ImageErrors are ignored.
        columns: images per row.
        side: side of a cell in pixels.
    """
    lines = max((c.count("\n") + 1 for row in rows for c in row.captions), default=0)
    step = side + lines * LINE_HEIGHT + (4 if lines else 0)
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
            except ImageError:  # removed since the scan
                continue
            small = ImageOps.contain(picture, (side - 2, side - 2))
            sheet.paste(small, (left + 1, y * step + 1))
            if row.captions:
                text = "\n".join(_cut(line, side - 4) for line in row.captions[x].split("\n"))
                pen.multiline_text((left + 2, y * step + side), text, fill="black", font=font)
    return sheet


def _cut(text: str, width: float) -> str:
    """The line, shortened to `width` pixels."""
    letters = int(width / LETTER_WIDTH)
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
