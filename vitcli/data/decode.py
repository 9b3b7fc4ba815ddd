"""Any picture file -> an upright picture in RGB or grey with the pixels that its author saw.

Orientation is applied, alpha lies on white, 16-bit and floating-point samples are scaled, CMYK and
colour profiles are brought to sRGB, of several frames the first counts. What cannot be read is an
`ImageError` with the reason; nothing is printed and no warning escapes.
"""

import io
import os
import re
import stat
import struct
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageCms, ImageFile

from vitcli.errors import VitcliError

Mode = Literal["RGB", "L"]
ImageInput = str | os.PathLike[str] | bytes | BinaryIO | Image.Image

MAX_PIXELS = 256_000_000
# Pillow would start Ghostscript on a file that somebody else wrote.
REFUSED_FORMATS = frozenset({"EPS"})
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
_PILLOW_IS_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


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


def printable(path: str | bytes | os.PathLike[str]) -> str:
    r"""A path on one line: bytes that are not UTF-8 as `\xe9`, control characters as `\n`."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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
    _quiet_pillow()
    if isinstance(source, Image.Image):
        name = name or printable(getattr(source, "filename", "") or "a picture in memory")
        result = _finish(source, mode, max_pixels, name)
        return _without_metadata(result.copy() if result is source else result)
    if isinstance(source, str | os.PathLike):
        name = name or printable(source)
        with _open_file(source, name) as file:
            return _decode(file, mode, max_pixels, name)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source), mode, max_pixels, name or f"{len(source)} bytes")
    name = name or printable(str(getattr(source, "name", "a file object")))
    return _decode(io.BytesIO(source.read()), mode, max_pixels, name)


def _quiet_pillow() -> None:
    """Have Pillow's warnings ignored: what matters in them is an error or handled here.

    `warnings.catch_warnings` is not safe in threads, so the filter stays; it names only `PIL.*`.
    """
    if _PILLOW_IS_QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _open_file(path: str | os.PathLike[str], name: str) -> BinaryIO:
    try:
        kind = Path(path).stat().st_mode
        if stat.S_ISDIR(kind):
            raise ImageError(name, "it is a folder")
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


def _decode(file: BinaryIO, mode: Mode, max_pixels: int, name: str) -> Image.Image:
    try:
        with _identify(file, name) as image:
            return _without_metadata(_finish(image, mode, max_pixels, name))
    except ImageError:
        raise
    except Exception as error:  # Pillow's readers raise nearly every kind on damaged files
        raise ImageError(name, _reason(error)) from None


def _identify(file: BinaryIO, name: str) -> ImageFile.ImageFile:
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


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if "truncated" in text.lower():
        return f"the file is cut off before its end ({text})"
    if isinstance(error, OSError | SyntaxError | ValueError):
        return f"its data are damaged ({text})"
    return f"its data are damaged ({type(error).__name__}: {text})"


def _finish(image: Image.Image, mode: Mode, max_pixels: int, name: str) -> Image.Image:
    """Load, turn upright, convert; the same object where nothing is to be done."""
    if image.width * image.height > max_pixels:
        raise ImageError(
            name,
            f"it declares {image.width} x {image.height} pixels, more than the limit of "
            f"{max_pixels:,}",
            "make it smaller first",
        )
    if image.width == 0 or image.height == 0:
        raise ImageError(name, f"it declares {image.width} x {image.height} pixels")
    try:
        image.load()
        turn = TURNS.get(_orientation(image))
        result = _convert(image, mode)
    except Exception as error:
        raise ImageError(name, _reason(error)) from None
    return result if turn is None else result.transpose(turn)


def _without_metadata(image: Image.Image) -> Image.Image:
    image.info = {}  # an orientation or profile left here would be applied a second time
    return image


def _orientation(image: Image.Image) -> int:
    """The EXIF (or XMP) orientation 1..8; 1 when there is none or it is garbage."""
    if not METADATA_WITH_ORIENTATION & image.info.keys():
        return 1  # TIFF, which has none of these, is turned by Pillow while it loads
    try:
        value = image.getexif().get(ORIENTATION_TAG)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


def _convert(image: Image.Image, mode: Mode) -> Image.Image:
    """Pixels of any Pillow mode -> `mode`; the same object where nothing is to be done."""
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        return _scale_samples(image).convert(mode)
    alpha = None
    if image.mode in {"P", "PA", "LA", "La", "RGBA", "RGBa"} or "transparency" in image.info:
        image = _with_straight_alpha(image)
        alpha = image.getchannel("A")
        if alpha.getextrema() == (255, 255):
            alpha = None
    image = _to_srgb(image)
    if alpha is not None:
        opaque = image.convert("RGB")
        image = Image.new("RGB", image.size, (255, 255, 255))
        image.paste(opaque, mask=alpha)
    return image if image.mode == mode else image.convert(mode)


def _with_straight_alpha(image: Image.Image) -> Image.Image:
    """LA or RGBA, not premultiplied."""
    if image.mode == "La":
        return image.convert("LA")
    if image.mode in {"LA", "RGBA"}:
        return image
    if image.mode == "1":
        image = image.convert("L")  # carries its transparent level along
    return image.convert("RGBA")


def _scale_samples(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or floating point -> L; a transparent level becomes white.

    32-bit integers count as 16 bits where nothing lies above; floats as 0..1, else 0..255, else
    0..65535.
    """
    samples = np.asarray(image)
    key = image.info.get("transparency")
    values = np.nan_to_num(samples.astype(np.float32), nan=0.0, posinf=np.inf, neginf=0.0)
    finite = values[np.isfinite(values)]
    top = float(finite.max()) if finite.size else 0.0
    if image.mode == "F":
        white = 1.0 if top <= 2.0 else 255.0 if top <= 255.0 else max(65535.0, top)
    else:
        white = 65535.0 if top <= 65535.0 else float(np.iinfo(np.int32).max)
    grey = np.clip(np.rint(values * (255.0 / white)), 0, 255).astype(np.uint8)
    if isinstance(key, int):
        grey[samples == key] = 255
    return Image.fromarray(grey)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Through the embedded colour profile to sRGB; without one, or with a bad one, as it is."""
    colour = _drop_alpha(image) if image.mode in {"RGBA", "LA"} else image
    if image.mode == "LAB":
        return _apply(ImageCms.buildTransform(*_lab_to_srgb(), "LAB", "RGB"), image)
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or colour.mode not in {"RGB", "L", "CMYK"}:
        return colour
    try:
        transform = _profile_transform(profile, colour.mode)
        return colour if transform is None else _apply(transform, colour)
    except Exception:  # a damaged profile, or one for other channels: most viewers ignore it too
        return colour


def _drop_alpha(image: Image.Image) -> Image.Image:
    """RGBA -> RGB, LA -> L: the colours as stored, without blending."""
    bands = image.split()[:-1]
    return Image.merge("RGB", bands) if len(bands) == 3 else bands[0]


def _apply(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    result = ImageCms.applyTransform(image, transform)
    assert result is not None
    return result


def _lab_to_srgb() -> tuple[Any, Any]:
    return ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")


@lru_cache(maxsize=32)
def _profile_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From an ICC profile to sRGB; None where it is sRGB already."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode == "RGB" and "sRGB" in (opened.profile.profile_description or ""):
        return None
    return ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
