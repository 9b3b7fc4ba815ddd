"""Decode image files of any kind to upright RGB or greyscale pixels.

* EXIF orientation is applied, and the first of several frames is used.
* Transparent pixels are blended with white; 16-bit and floating-point samples are scaled to bytes.
* DICOM and JPEG XL need packages of the extras `medical` and `jxl`.
* CMYK, Lab and embedded colour profiles are converted to sRGB.

An image that cannot be read raises `ImageError` with the reason. Pillow's warnings are silenced.
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
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from vitcli.dicom import is_dicom, read_dicom
from vitcli.errors import VitcliError, printable
from vitcli.pixels import Mode, PixelFormat, as_format, convert_pixels, has_wide_samples

Box = tuple[int, int, int, int]  # left, top, right, bottom
ImageInput = str | os.PathLike[str] | bytes | BinaryIO | Image.Image

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".apng", ".avif", ".bmp", ".dcm", ".dib", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif",
    ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".jxl", ".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm",
    ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
})
# fmt: on
MAX_PIXELS = 256_000_000
REFUSED_FORMATS = frozenset({"EPS"})  # Pillow would run Ghostscript on an untrusted file
JXL_STARTS = (b"\xff\x0a", b"\0\0\0\x0cJXL ")  # a bare codestream, a container (ISO 18181-2)
# First bytes of camera raw: Canon CR2, CR3; Fujifilm; Olympus; Panasonic (ExifTool's tag names).
RAW_START = re.compile(rb"II\*\0.{4}CR|.{4}ftypcrx |FUJIFILMCCD-RAW|IIR[OS]|MMOR|IIU\0", re.DOTALL)
CONVERT = "convert it to JPEG or PNG first"
RAW_SUFFIXES = frozenset({".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"})
JPEG_SCALES = (8, 4, 2)  # libjpeg decodes 8x8 blocks at 1/8, 1/4 or 1/2 of the size at little cost
ORIENTATION_TAG = 0x0112  # EXIF
METADATA_WITH_ORIENTATION = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPED_AXES = {5, 6, 7, 8}  # orientations in which a row of the file is a column of the image
_PILLOW_FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class ImageError(VitcliError):
    """An image that cannot be read: its printable `name`, and the `reason` without the name."""

    def __init__(self, name: str, reason: str, hint: str | None = None) -> None:
        super().__init__(f"cannot read `{name}`: {reason}", hint)
        self.name = name
        self.reason = reason


def read_image(
    source: ImageInput,
    mode: Mode | PixelFormat = "RGB",
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Image.Image:
    """Decode an image to an upright image in `mode` without metadata; `source` does not change.

    Args:
        source: a path, the bytes of a file, a binary file object or a Pillow image.
        mode: "RGB" or "L" (greyscale), or a `PixelFormat` with a window for wide samples.
        max_pixels: limit on the pixels that an image declares, checked before memory is allocated.
        name: the name in errors; None takes the path.

    Raises:
        ImageError: the image cannot be read.
    """
    with open_image(source, mode, max_pixels, name) as image:
        return image.whole()


@contextmanager
def open_image(
    source: ImageInput,
    mode: Mode | PixelFormat = "RGB",
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Iterator["LazyImage"]:
    """Open an image, in a `with` block, to decode only a part of it; see `read_image`."""
    with _identified(source, max_pixels, name) as (image, file, found):
        with _failures_of(found):
            is_jpeg = isinstance(image, JpegImageFile) and image.format == "JPEG"
            again = file if is_jpeg else None
            opened = LazyImage(image, as_format(mode), found, again, borrowed=file is None)
        yield opened


def read_wide_samples(source: ImageInput, name: str | None = None) -> NDArray[Any] | None:
    """(Y, X) samples of 16 bits, 32 bits or floats as they are stored; None for an 8-bit image.

    Only the header of an 8-bit image is read. DICOM samples are those of the modality.

    Raises:
        ImageError: the image cannot be read.
    """
    with _identified(source, MAX_PIXELS, name) as (image, _, found), _failures_of(found):
        return np.array(image) if has_wide_samples(image) else None


@contextmanager
def _identified(
    source: ImageInput, max_pixels: int, name: str | None
) -> Iterator[tuple[Image.Image, BinaryIO | None, str]]:
    """Yield the image, its file (None if the caller gave a Pillow image), and its name."""
    # `warnings.catch_warnings` is not thread-safe, so the filter stays; it matches only `PIL.*`.
    if _PILLOW_FILTER not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    if isinstance(source, Image.Image):
        name = name or printable(getattr(source, "filename", "") or "an image in memory")
        _check_size(source.width, source.height, max_pixels, name)
        yield source, None, name
    elif isinstance(source, str | os.PathLike):
        name = name or printable(source)
        with _open_file(source, name) as file:
            yield _identify(file, name, max_pixels), file, name
    elif isinstance(source, bytes | bytearray | memoryview):
        name, file = name or f"{len(source)} bytes", io.BytesIO(source)
        yield _identify(file, name, max_pixels), file, name
    else:
        name = name or printable(str(getattr(source, "name", "a file object")))
        file = io.BytesIO(source.read())
        yield _identify(file, name, max_pixels), file, name


class LazyImage:
    """An open image that decodes, rotates and converts only the requested part.

    A JPEG is decoded at the first request, at 1/2, 1/4 or 1/8 of its size if that is enough. A
    224-pixel crop of a 12-megapixel photograph then takes a fraction of the time and memory. Every
    other format is decoded when it is opened.

    `size` is the (width, height) of the whole upright image. `file` is given for a JPEG, to read it
    again at another scale. If `borrowed`, the caller owns `image` and results are copies.
    """

    def __init__(
        self,
        image: Image.Image,
        wanted: PixelFormat,
        name: str,
        file: BinaryIO | None = None,
        borrowed: bool = False,
    ) -> None:
        self.wanted = wanted
        self.name = name
        self._source = image
        self._file = file
        self._borrowed = borrowed
        self._decoded: dict[int, Image.Image] = {}
        stored = self._decode(1) if file is None else image
        self._orientation = _orientation(stored)
        self.size = self._upright_size(stored)

    def whole(self) -> Image.Image:
        """Return the whole image at full size; a second call may return the same object."""
        return self.part((0, 0, *self.size))

    def part(self, box: Box, at_least: tuple[int, int] | None = None) -> Image.Image:
        """Return the part in `box`, given in pixels of the whole upright image.

        A JPEG may be decoded at a smaller scale, as long as this part still has the (width,
        height) `at_least`. Without `at_least` every pixel is decoded.
        """
        width, height = box[2] - box[0], box[3] - box[1]
        ratio = min(width / at_least[0], height / at_least[1]) if at_least and self._file else 1
        scale = next((s for s in JPEG_SCALES if s <= ratio), 1)
        stored = self._decode(scale)
        size = self._upright_size(stored)
        if scale > 1:
            box = _scaled_box(box, scale, size)
        with _failures_of(self.name):
            result = stored
            if box != (0, 0, *size):
                result = result.crop(_stored_box(box, size, self._orientation))
            result = convert_pixels(result, self.wanted)
            if self._orientation in TRANSPOSE_OF_ORIENTATION:
                result = result.transpose(TRANSPOSE_OF_ORIENTATION[self._orientation])
        if result is stored and self._borrowed:
            result = result.copy()
        result.info = {}  # an orientation or a profile in it would be applied a second time
        return result

    def pixels(self, box: Box, at_least: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """(Y, X) or (Y, X, 3): the same part as a new array."""
        return np.array(self.part(box, at_least))

    def _upright_size(self, stored: Image.Image) -> tuple[int, int]:
        return stored.size[::-1] if self._orientation in SWAPPED_AXES else stored.size

    def _decode(self, scale: int) -> Image.Image:
        """Decode at 1/`scale` of each side, rounded up, in the orientation and mode of the file."""
        if scale in self._decoded:
            return self._decoded[scale]
        with _failures_of(self.name):
            image = self._source
            if self._decoded:  # Pillow decodes an open file only once
                assert self._file is not None
                self._file.seek(0)
                image = _identify_by_pillow(self._file, self.name, self._file.read(512))
            if scale > 1:
                assert isinstance(image, JpegImageFile)
                # Pillow takes the smallest decoding that still has this size, which is 1/`scale`.
                image.draft(None, (image.width // scale, image.height // scale))
            image.load()
            if has_wide_samples(image):  # the white level depends on the whole image
                image = convert_pixels(image, self.wanted)
        self._decoded[scale] = image
        return image


def _scaled_box(box: Box, scale: int, size: tuple[int, int]) -> Box:
    """Convert `box` to the image reduced by `scale` to (width, height) `size`, within half a pixel.

    The size of the box is rounded, so it never falls below the size that the scale was chosen for.
    """
    width, height = round((box[2] - box[0]) / scale), round((box[3] - box[1]) / scale)
    left = min(round(box[0] / scale), size[0] - width)
    top = min(round(box[1] / scale), size[1] - height)
    return left, top, left + width, top + height


def _stored_box(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Convert `box` of the upright image of (width, height) `size` to pixels of the file."""
    left, top, right, bottom = box
    if orientation in SWAPPED_AXES:
        left, top, right, bottom = top, left, bottom, right
        size = size[1], size[0]
    # The flips that remain after the axes are swapped: EXIF 2.3, table 4.6.4.
    if orientation in {2, 3, 7, 8}:
        left, right = size[0] - right, size[0] - left
    if orientation in {3, 4, 6, 7}:
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def _open_file(path: str | os.PathLike[str], name: str) -> BinaryIO:
    try:
        mode = Path(path).stat().st_mode
        if stat.S_ISDIR(mode):
            closed = not os.access(path, os.R_OK | os.X_OK)
            denied = " without read permission" if closed else ""
            raise ImageError(name, f"it is a folder{denied}")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
            raise ImageError(name, "it is not a regular file")
        return open(path, "rb")
    except FileNotFoundError:
        if Path(path).is_symlink():
            target = printable(Path(path).readlink())
            raise ImageError(name, f"it is a link to `{target}`, which does not exist") from None
        raise ImageError(name, "the file does not exist", "check the path") from None
    except (OSError, ValueError) as error:
        raise ImageError(name, getattr(error, "strerror", None) or str(error)) from None


def _identify(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """Open an image of any format, which need not be decoded yet, and check its size."""
    with _failures_of(name):
        head = file.read(512)
        if not head:
            raise ImageError(name, "the file is empty")
        if is_dicom(head):
            file.seek(0)
            try:
                return read_dicom(file, lambda x, y: _check_size(x, y, max_pixels, name))
            except ImageError:
                raise
            except VitcliError as error:
                raise ImageError(name, error.message, error.hint) from None
        if head.startswith(JXL_STARTS):
            _load_jpeg_xl(name)
        image = _identify_by_pillow(file, name, head)
        _check_size(image.width, image.height, max_pixels, name)
        return image


def _load_jpeg_xl(name: str) -> None:
    """Register the Pillow plugin for JPEG XL."""
    try:
        import pillow_jxl  # noqa: F401
    except ImportError:
        reason = "it is a JPEG XL image, and pillow-jxl-plugin is not installed"
        raise ImageError(name, reason, "`pip install 'vitcli[jxl]'`") from None


def _identify_by_pillow(file: BinaryIO, name: str, head: bytes) -> ImageFile.ImageFile:
    """Do what `Image.open` does, without its size check, which no argument can turn off."""
    tried: set[str] = set()
    complaint = ""
    for load_plugins in (Image.preinit, Image.init):
        load_plugins()
        for kind in [k for k in Image.ID if k not in tried and k not in REFUSED_FORMATS]:
            tried.add(kind)
            factory, accept = Image.OPEN[kind]
            try:
                accepted = accept(head[:16]) if accept else True
            except (IndexError, struct.error):  # the file is shorter than the plugin expects
                accepted = False
            if isinstance(accepted, str):
                complaint = accepted
            elif accepted:
                file.seek(0)
                try:
                    return factory(file, "")
                except (SyntaxError, IndexError, TypeError, struct.error):
                    if accept and not complaint:
                        complaint = f"the header says {kind}, but the content is not valid {kind}"
    raise ImageError(name, *_why_unknown(head, complaint, Path(name).suffix.lower()))


def _why_unknown(head: bytes, complaint: str, suffix: str) -> tuple[str, str | None]:
    """Return (reason, hint) for a file that no Pillow plugin reads, from its first bytes."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the image", "run `git lfs pull` to download the images"
    if b"<svg" in start:
        return "it is an SVG drawing, not a pixel image", "convert it to PNG first"
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, not an image", "the download failed; download the file again"
    if start.startswith(b"%pdf"):
        return "it is a PDF document, not an image", "convert its pages to PNG first"
    if start.startswith(b"%!ps"):
        return "it is a PostScript program, which is not executed", "convert it to PNG first"
    if re.match(rb"....ftyp(hei|hev|mif)", head, re.DOTALL):
        return "it is a HEIC image, which this Pillow does not read", CONVERT
    if complaint.endswith("support not installed"):  # AVIF, in a Pillow without its library
        return f"this Pillow does not read it ({complaint})", CONVERT
    is_tiff = head.startswith((b"II*\0", b"MM\0*"))  # NEF, ARW and DNG are TIFF files
    if RAW_START.match(head) or (is_tiff and suffix in RAW_SUFFIXES):
        return "it is a camera raw file, which Pillow does not read", CONVERT
    if complaint:
        return f"the file is damaged: {complaint}", None
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return (
            "it is text, not an image",
            "give an image file, or `--from FILE` for a list of paths",
        )
    return "Pillow does not know this image format", CONVERT


@contextmanager
def _failures_of(name: str) -> Iterator[None]:
    """Turn every exception into `ImageError`; damaged files make Pillow raise nearly any type."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(name, "there is not enough memory to decode it") from None
    except Exception as error:
        text, kind = str(error), type(error).__name__
        if not isinstance(error, OSError | SyntaxError | ValueError):
            text = f"{kind}: {text}" if text else kind
        fault = "cut off" if "truncated" in text.lower() else "damaged"
        raise ImageError(name, f"the file is {fault} ({text or kind})") from None


def _check_size(width: int, height: int, max_pixels: int, name: str) -> None:
    declared = f"it declares {width} x {height} pixels"
    if width * height > max_pixels:
        reason = f"{declared}, more than the limit of {max_pixels:,}"
        raise ImageError(name, reason, "reduce the image first")
    if width == 0 or height == 0:
        raise ImageError(name, declared)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF (or XMP) orientation, 1 to 8; 1 if there is none or it is invalid."""
    if not METADATA_WITH_ORIENTATION & image.info.keys():
        return 1  # a TIFF has none of these; Pillow rotates it when it loads the pixels
    try:
        value = image.getexif().get(ORIENTATION_TAG)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1
