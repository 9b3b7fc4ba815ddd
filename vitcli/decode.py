"""Which of Pillow's readers takes a file, and why none does: everything before the pixels.

Any picture file -> an upright picture in RGB or grey with the pixels that its author saw.

Orientation is applied; of several frames the first counts; `colour.py` says what becomes of alpha,
wide samples and profiles. What cannot be read is an `ImageError` with the reason; nothing is
printed and no warning escapes.
"""

import io
import os
import re
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from vitcli.errors import VitcliError, printable
from vitcli.pixel_modes import Mode, is_wide, to_mode

# Pillow would start Ghostscript on a file that somebody else wrote.
REFUSED_FORMATS = frozenset({"EPS"})


class ImageError(VitcliError):
    """A picture that cannot be read.

    Args:
        name: the picture, printable.
        reason: why, without the name.
        hint: what to do about it.
    """

    def __init__(self, name: str, reason: str, hint: str | None = None) -> None:
        super().__init__(f"cannot read `{name}`: {reason}", hint)
        self.name = name
        self.reason = reason


def open_file(path: str | os.PathLike[str], name: str) -> BinaryIO:
    try:
        kind = Path(path).stat().st_mode
        if stat.S_ISDIR(kind):
            closed = not os.access(path, os.R_OK | os.X_OK)
            raise ImageError(name, f"it is a folder{' that may not be read' if closed else ''}")
        if not stat.S_ISREG(kind):  # opening a pipe would wait for a writer
            raise ImageError(name, "it is not a regular file")
        return open(path, "rb")
    except FileNotFoundError:
        if Path(path).is_symlink():
            target = printable(Path(path).readlink())
            raise ImageError(name, f"it is a link to `{target}`, which does not exist") from None
        raise ImageError(name, "there is no such file", "check the path") from None
    except (OSError, ValueError) as error:
        raise ImageError(name, getattr(error, "strerror", None) or str(error)) from None


def identify(file: BinaryIO, name: str) -> ImageFile.ImageFile:
    """`Image.open` without its check of sizes, which warns and cannot be set per call."""
    head = file.read(512)
    if not head:
        raise ImageError(name, "the file is empty")
    tried: set[str] = set()
    complaint = ""
    for load_plugins in (Image.preinit, Image.init):
        load_plugins()
        for kind in [k for k in Image.ID if k not in tried and k not in REFUSED_FORMATS]:
            tried.add(kind)
            factory, accept = Image.OPEN[kind]
            accepted = accept(head[:16]) if accept else True
            if isinstance(accepted, str):
                complaint = accepted
            elif accepted:
                file.seek(0)
                try:
                    return factory(file, "")
                except (SyntaxError, IndexError, TypeError, struct.error):
                    if accept and not complaint:
                        complaint = f"it begins as {kind} and does not go on as such"
    raise ImageError(name, *_not_an_image(head, complaint))


def _not_an_image(head: bytes, complaint: str) -> tuple[str, str | None]:
    """(reason, hint) for content that no reader takes, by its first bytes."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the picture", "`git lfs pull` fetches the pictures"
    if b"<svg" in start:
        return "it is an SVG drawing, not a pixel image", "convert it to PNG first"
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, not an image", "the download failed: fetch the file again"
    if start.startswith(b"%pdf"):
        return "it is a PDF document, not an image", "convert its pages to PNG first"
    if start.startswith(b"%!ps"):
        return "it is a PostScript file, which is not run", "convert it to PNG first"
    if re.match(rb"....ftyp(hei|hev|mif)", head, re.DOTALL):
        return "it is a HEIC picture, which this Pillow does not read", "convert it to JPEG first"
    if complaint:
        return f"it is damaged: {complaint}", None
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return "it is text, not an image", None
    return "it is not an image of a kind that Pillow reads", None


def reason_of(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if "truncated" in text.lower():
        return f"the file is cut off before its end ({text})"
    if isinstance(error, OSError | SyntaxError | ValueError):
        return f"its data are damaged ({text})"
    return f"its data are damaged ({type(error).__name__}: {text})"


__all__ = [
    "MAX_PIXELS",
    "Box",
    "ImageError",
    "ImageInput",
    "Mode",
    "Picture",
    "open_image",
    "read_image",
]

Box = tuple[int, int, int, int]
ImageInput = str | os.PathLike[str] | bytes | BinaryIO | Image.Image

MAX_PIXELS = 256_000_000
ORIENTATION_TAG = 0x0112
METADATA_WITH_ORIENTATION = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {5, 6, 7, 8}
# What libjpeg can leave out of a JPEG's 8x8 blocks at almost no cost (Pillow offers these).
JPEG_SCALES = (8, 4, 2)
_PILLOW_IS_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def read_image(
    source: ImageInput, mode: Mode = "RGB", max_pixels: int = MAX_PIXELS, name: str | None = None
) -> Image.Image:
    """The picture, upright, in `mode`, free of metadata; `source` is left as it was.

    Args:
        source: a path, the bytes of a file, a binary file object or a Pillow picture.
        mode: "RGB" or "L" (grey).
        max_pixels: a picture that declares more is refused before memory is taken for it.
        name: what errors call it; the path by default.

    Raises:
        ImageError: it cannot be read; names the picture and the reason.
    """
    with open_image(source, mode, max_pixels, name) as picture:
        return picture.whole()


@contextmanager
def open_image(
    source: ImageInput, mode: Mode = "RGB", max_pixels: int = MAX_PIXELS, name: str | None = None
) -> Iterator["Picture"]:
    """The picture as something to take a part of, inside a `with`; otherwise as `read_image`."""
    _quiet_pillow()
    if isinstance(source, Image.Image):
        name = name or printable(getattr(source, "filename", "") or "a picture in memory")
        _check_size(source, max_pixels, name)
        yield Picture(source, mode, name, borrowed=True)
    elif isinstance(source, str | os.PathLike):
        name = name or printable(source)
        with open_file(source, name) as file:
            yield _open(file, mode, max_pixels, name)
    elif isinstance(source, bytes | bytearray | memoryview):
        yield _open(io.BytesIO(source), mode, max_pixels, name or f"{len(source)} bytes")
    else:
        name = name or printable(str(getattr(source, "name", "a file object")))
        yield _open(io.BytesIO(source.read()), mode, max_pixels, name)


class Picture:
    """An open picture, of which only what is needed is decoded, turned and converted.

    A JPEG waits until a part of it is asked for, and is then decoded at 1/2, 1/4 or 1/8 of its size
    if that is enough: a 12-megapixel photograph for a 224-pixel crop takes a fraction of the time
    and memory. Every other kind is decoded when it is opened.

    Args:
        image: Pillow's; a JPEG not yet decoded.
        mode: that is wanted.
        name: what errors call it.
        file: where a JPEG can be read again for another scale.
        borrowed: whether `image` is somebody else's and must not be handed out itself.

    Attributes:
        size: (width, height), whole and upright.

    Raises:
        ImageError: it is damaged.
    """

    def __init__(
        self,
        image: Image.Image,
        mode: Mode,
        name: str,
        file: BinaryIO | None = None,
        borrowed: bool = False,
    ) -> None:
        self.mode: Mode = mode
        self.name = name
        self._source = image
        self._file = file
        self._borrowed = borrowed
        self._decoded: dict[int, Image.Image] = {}
        if file is None:
            stored = self._stored(1)
            self._turn = _orientation(stored)
        else:
            stored = image
            self._turn = _orientation(image)
        self.size = stored.size[::-1] if self._turn in SIDEWAYS else stored.size

    def whole(self) -> Image.Image:
        """The picture at its own size; asked again, perhaps the same object.

        Raises:
            ImageError: it is damaged.
        """
        return self.part((0, 0, *self.size))

    def part(self, box: Box, at_least: tuple[int, int] | None = None) -> Image.Image:
        """What is in `box` = (left, top, right, bottom), in whole, upright pixels.

        Args:
            box: inside the picture.
            at_least: (width, height): a JPEG may be decoded at a smaller scale as long as this part
                is still so large. Without it every pixel is there.

        Raises:
            ImageError: it is damaged.
        """
        width, height = box[2] - box[0], box[3] - box[1]
        most = min(width / at_least[0], height / at_least[1]) if at_least and self._file else 1
        scale = next((s for s in JPEG_SCALES if s <= most), 1)
        stored = self._stored(scale)
        size = stored.size[::-1] if self._turn in SIDEWAYS else stored.size
        if scale > 1:
            box = scaled_box(box, scale, size)
        try:
            cut = stored
            if box != (0, 0, *size):
                cut = stored.crop(stored_box(box, size, self._turn))
            result = to_mode(cut, self.mode)
            if self._turn in TURNS:
                result = result.transpose(TURNS[self._turn])
        except Exception as error:
            raise ImageError(self.name, reason_of(error)) from None
        if result is stored and self._borrowed:
            result = result.copy()
        result.info = {}  # an orientation or profile left here would be applied a second time
        return result

    def pixels(self, box: Box, at_least: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """(Y, X) or (Y, X, 3): the same as an array of its own."""
        return np.array(self.part(box, at_least))

    def _stored(self, scale: int) -> Image.Image:
        """The decoded pixels, of 1/`scale` the sides, rounded up, not turned nor converted."""
        if scale in self._decoded:
            return self._decoded[scale]
        try:
            image = self._source
            if self._decoded:  # Pillow decodes an open file once
                assert self._file is not None
                self._file.seek(0)
                image = identify(self._file, self.name)
            if scale > 1:
                assert isinstance(image, JpegImageFile)
                # Pillow takes the largest scale that still gives this size, which is `scale`.
                image.draft(None, (image.width // scale, image.height // scale))
            image.load()
            if is_wide(image):  # what is white depends on the whole picture
                image = to_mode(image, self.mode)
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(self.name, reason_of(error)) from None
        self._decoded[scale] = image
        return image


def scaled_box(box: Box, scale: int, size: tuple[int, int]) -> Box:
    """`box` on the same picture of 1/`scale` the sides, which has (width, height) `size`.

    Moved by up to half a pixel there; as large as before up to rounding, so never below the size
    that the scale was chosen for.
    """
    width, height = round((box[2] - box[0]) / scale), round((box[3] - box[1]) / scale)
    left = min(round(box[0] / scale), size[0] - width)
    top = min(round(box[1] / scale), size[1] - height)
    return left, top, left + width, top + height


def stored_box(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Where `box` of the upright picture of (width, height) `size` lies before it is turned."""
    left, top, right, bottom = box
    if orientation in SIDEWAYS:
        left, top, right, bottom = top, left, bottom, right
        size = size[1], size[0]
    # After an exchange of the axes the flips that are left, as stored: EXIF 2.3, table 4.6.4.
    if orientation in {2, 3, 7, 8}:
        left, right = size[0] - right, size[0] - left
    if orientation in {3, 4, 6, 7}:
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def _quiet_pillow() -> None:
    """Have Pillow's warnings ignored: what matters in them is an error or handled here.

    `warnings.catch_warnings` is not safe in threads, so the filter stays; it names only `PIL.*`.
    """
    if _PILLOW_IS_QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _open(file: BinaryIO, mode: Mode, max_pixels: int, name: str) -> Picture:
    try:
        image = identify(file, name)
        _check_size(image, max_pixels, name)
        waits = isinstance(image, JpegImageFile) and image.format == "JPEG"
        return Picture(image, mode, name, file if waits else None)
    except ImageError:
        raise
    except Exception as error:  # Pillow's readers raise nearly every kind on damaged files
        raise ImageError(name, reason_of(error)) from None


def _check_size(image: Image.Image, max_pixels: int, name: str) -> None:
    if image.width * image.height > max_pixels:
        raise ImageError(
            name,
            f"it declares {image.width} x {image.height} pixels, more than the limit of "
            f"{max_pixels:,}",
            "make it smaller first",
        )
    if image.width == 0 or image.height == 0:
        raise ImageError(name, f"it declares {image.width} x {image.height} pixels")


def _orientation(image: Image.Image) -> int:
    """The EXIF (or XMP) orientation 1..8; 1 when there is none or it is garbage."""
    if not METADATA_WITH_ORIENTATION & image.info.keys():
        return 1  # TIFF, which has none of these, is turned by Pillow while it loads
    try:
        value = image.getexif().get(ORIENTATION_TAG)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1
