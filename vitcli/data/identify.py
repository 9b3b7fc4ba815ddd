"""Which of Pillow's readers takes a file, and why none does: everything before the pixels."""

import os
import re
import stat
import struct
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile

from vitcli.errors import VitcliError, printable

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
