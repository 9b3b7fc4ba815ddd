"""The image paths that a user gives: files, folders, globs and lists of paths, as a stream."""

import glob
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from vitcli.data.readers import DATA_SUFFIXES
from vitcli.data.readers.folder import WalkReport, walk_images
from vitcli.errors import VitcliError, nearest_path, printable, quoted
from vitcli.files import is_url
from vitcli.preprocess import AnyImage

STDIN = "-"
READ_BYTES = 1 << 16
MAX_MISSING = 10_000  # paths that are checked for one that exists, before the work starts
PATHS_HINT = "give image files, folders, or quoted globs such as 'photos/**/*.jpg'"


class ImagePaths:
    """An iterable of images in the given order; paths that do not exist stay in it.

    Paths are found during the iteration: a folder yields its images sorted by their bytes, a list
    yields line by line. Only the matches of a glob are collected and sorted first.

    Args:
        paths: images, folders, globs, URLs; also images in memory, which pass unchanged.
        source: a file with more paths, separated by newlines or NUL; `-` is stdin.

    Attributes:
        total: the number of paths, if it is known without a search.
        repeatable: True if a second iteration is possible; stdin can be read only once.
        skipped: folder -> a line about its files that are no images by their names; it is complete
            after an iteration.
    """

    def __init__(
        self, paths: Sequence[AnyImage], source: str | os.PathLike[str] | None = None
    ) -> None:
        self.paths = list(paths)
        self.source = None if source is None else os.fspath(source)
        self.repeatable = self.source != STDIN
        plain = self.source is None and not any(map(_expands, self.paths))
        self.total = len(self.paths) if plain else None
        self.skipped: dict[str, str] = {}
        self._peeked: list[AnyImage] = []
        self._rest: Iterator[AnyImage] | None = None

    def __iter__(self) -> Iterator[Any]:  # only strings, unless images in memory were given
        if self._rest is not None:
            return chain(self._peeked, self._rest)
        return self._iterate()

    def peek(self) -> list[AnyImage]:
        """The first images, up to one that may be readable; they are not consumed."""
        paths = iter(self)
        peeked: list[AnyImage] = []
        for path in paths:
            peeked.append(path)
            if _may_be_image(path) or len(peeked) == MAX_MISSING:
                break
        if not self.repeatable:
            self._peeked, self._rest = peeked, paths
        return peeked

    def _iterate(self) -> Iterator[AnyImage]:
        for path in self.paths:
            yield from expand_path(path, self.skipped) if isinstance(path, str) else (path,)
        if self.source is not None:
            with _list_file(self.source) as stream:
                for path in read_path_list(stream):
                    yield from expand_path(path, self.skipped)


def find_images(
    paths: Sequence[AnyImage], source: str | os.PathLike[str] | None = None
) -> ImagePaths:
    """The images of `paths`, and those that the file `source` lists; see `ImagePaths`.

    Raises:
        VitcliError: there are no paths, none of them exists, or the folders hold no images.
    """
    plain = [os.fspath(p) if isinstance(p, os.PathLike) else p for p in paths]
    found = ImagePaths(plain, source)
    images = found.peek()
    if not images:
        raise _no_images(found)
    if _may_be_image(images[-1]):
        return found
    peeked = [str(path) for path in images]  # images in memory would have been found
    if all(map(_is_dataset_file, peeked)):
        raise VitcliError(
            f"`{printable(peeked[0])}` is a dataset, not an image",
            f"use `vitcli evaluate {printable(peeked[0])}` for labelled data, or `--from FILE` for "
            "a list of paths",
        )
    if len(peeked) < MAX_MISSING and not any(map(os.path.exists, peeked)):
        shown = quoted(peeked, 3)
        close = nearest_path(peeked[0])
        hint = f"did you mean `{printable(close)}`?" if close else PATHS_HINT
        raise VitcliError(f"no such image: {shown}", hint)
    return found


def _no_images(found: ImagePaths) -> VitcliError:
    """The error if there is no path at all."""
    for path in found.paths:
        if isinstance(path, str) and os.path.isdir(path):  # noqa: PTH112
            hint = "hidden files and files without an image suffix are skipped"
            if any(Path(path).glob("*.parquet")):
                hint = f"for its parquet files use `vitcli evaluate {printable(path)}`"
            return VitcliError(f"no images in `{printable(path)}`", hint)
    if found.source is not None:
        shown = "stdin" if found.source == STDIN else f"`{printable(found.source)}`"
        return VitcliError(f"{shown} lists no images", "write one path per line")
    return VitcliError("no images given", f"{PATHS_HINT}, or `--from FILE`")


def expand_path(path: str, skipped: dict[str, str] | None = None) -> Iterator[str]:
    """The images of a file, folder or glob; a path that does not exist yields itself.

    Args:
        skipped: receives a line for a folder with files that are no images by their names.
    """
    if os.path.isdir(path):  # noqa: PTH112
        before, report = str(Path(path) / "x")[:-1], WalkReport()
        for name in walk_images(Path(path), report, strict=False):
            yield before + name
        if report.other and skipped is not None:
            skipped[path] = (
                f"{report.describe_other(printable(path))}; `--from FILE` with a list of paths "
                "reads any file"
            )
    elif _expands(path):
        matches = sorted(glob.glob(path, recursive=True), key=os.fsencode)
        yield from [match for match in matches if Path(match).is_file()] or [path]
    else:
        yield path


def read_path_list(stream: BinaryIO) -> Iterator[str]:
    """The non-empty paths of a list: one per line, or ended by NUL as from `find -print0`."""
    end, rest, first = b"", b"", True
    while chunk := stream.read1(READ_BYTES):  # type: ignore[attr-defined]  # buffered readers have it
        rest += chunk.removeprefix(b"\xef\xbb\xbf") if first else chunk
        first = False
        end = end or (b"\0" if b"\0" in rest else b"\n" if b"\n" in rest else b"")
        if end:
            *whole, rest = rest.split(end)
            yield from map(os.fsdecode, filter(None, (_line(path, end) for path in whole)))
    if last := _line(rest, end or b"\n"):
        yield os.fsdecode(last)


def _line(path: bytes, end: bytes) -> bytes:
    return path.removesuffix(b"\r") if end == b"\n" else path


@contextmanager
def _list_file(source: str) -> Iterator[BinaryIO]:
    if source == STDIN:
        yield sys.stdin.buffer if sys.stdin is not None else io.BytesIO()
        return
    try:
        stream = Path(source).open("rb")  # noqa: SIM115
    except OSError as error:
        raise VitcliError(
            f"cannot read the list `{printable(source)}`: {error.strerror}",
            "give a file with one path per line after `--from`, or `-` for stdin",
        ) from None
    with stream:
        yield stream


def _may_be_image(path: AnyImage) -> bool:
    """True for an image in memory, a URL, and a file that exists and is no dataset."""
    if not isinstance(path, str) or is_url(path):
        return True
    # os.path, because it answers False for impossible names where pathlib raises.
    return os.path.exists(path) and not _is_dataset_file(path)  # noqa: PTH110


def _expands(path: AnyImage) -> bool:
    """True if the path can mean several images."""
    if not isinstance(path, str) or is_url(path):
        return False
    return os.path.isdir(path) or (glob.has_magic(path) and not os.path.lexists(path))  # noqa: PTH112


def _is_dataset_file(path: str) -> bool:
    return Path(path).suffix.lower() in DATA_SUFFIXES
