"""Paths of images as a user gives them (files, folders, globs, lists of paths), as a stream."""

import glob
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from vitcli.data.readers.folder import walk_images
from vitcli.errors import VitcliError, printable

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")  # DATA of other commands
STDIN = "-"
READ_AT_ONCE = 1 << 16
MOST_MISSING = 10_000  # paths that are looked at for one that exists, before the work


class Listing:
    """Paths of images in the order given, found while one iterates; missing ones stay in.

    A folder gives its images in the order of their bytes, one folder's names in memory at a time; a
    list gives a line at a time; the matches of a glob are listed and sorted first.

    Args:
        paths: images, folders, globs.
        source: a file that lists more of them, one a line or ended by NUL; `-` is stdin.

    Attributes:
        total: how many there are, where that is known without looking.
        repeats: whether one can iterate again; stdin is read once.
    """

    def __init__(self, paths: Sequence[str], source: str | os.PathLike[str] | None = None) -> None:
        self.paths = list(paths)
        self.source = None if source is None else os.fspath(source)
        self.repeats = self.source != STDIN
        plain = self.source is None and not any(map(_spreads, self.paths))
        self.total = len(self.paths) if plain else None
        self._begun: list[str] = []
        self._rest: Iterator[str] | None = None

    def __iter__(self) -> Iterator[str]:
        if self._rest is not None:
            return chain(self._begun, self._rest)
        return self._found()

    def look(self) -> list[str]:
        """The first paths, up to one that exists and may be an image; stdin still gives them."""
        paths = iter(self)
        begun: list[str] = []
        for path in paths:
            begun.append(path)
            # os.path, because it answers False for impossible names where pathlib raises.
            if len(begun) == MOST_MISSING or not (_is_table(path) or not os.path.exists(path)):  # noqa: PTH110
                break
        if not self.repeats:
            self._begun, self._rest = begun, paths
        return begun

    def _found(self) -> Iterator[str]:
        for path in self.paths:
            yield from expand(path)
        if self.source is not None:
            with _list_file(self.source) as stream:
                for path in listed(stream):
                    yield from expand(path)


def find_images(
    paths: Sequence[str | os.PathLike[str]], source: str | os.PathLike[str] | None = None
) -> Listing:
    """Images, folders and globs, and those that the file `source` lists; see `Listing`.

    Raises:
        VitcliError: nothing was given, nothing of it exists, or the folders hold no images.
    """
    listing = Listing([os.fspath(path) for path in paths], source)
    begun = listing.look()
    if not begun:
        raise _nothing(listing)
    if any(os.path.exists(path) and not _is_table(path) for path in begun[-1:]):  # noqa: PTH110
        return listing
    if all(map(_is_table, begun)):
        raise VitcliError(
            f"`{printable(begun[0])}` is a table, not an image",
            f"`predict` takes images, folders and globs; for labelled data there is `vitcli "
            f"evaluate {printable(begun[0])}`, and `--from FILE` takes a list of paths",
        )
    if len(begun) < MOST_MISSING and not any(map(os.path.exists, begun)):
        shown = ", ".join(f"`{printable(path)}`" for path in begun[:3])
        raise VitcliError(
            f"no such image: {shown}",
            hint="paths of images, folders, or quoted globs such as 'photos/**/*.jpg'",
        )
    return listing


def _nothing(listing: Listing) -> VitcliError:
    """What to say where there is no path at all."""
    for path in listing.paths:
        if os.path.isdir(path):  # noqa: PTH112
            hint = "hidden files and files that are no images don't count"
            if any(Path(path).glob("*.parquet")):
                hint = f"it holds parquet: `vitcli evaluate {printable(path)}` may be meant"
            return VitcliError(f"no images in `{printable(path)}`", hint)
    if listing.source is not None:
        where = "stdin" if listing.source == STDIN else f"`{printable(listing.source)}`"
        return VitcliError(f"{where} lists no images", "one path a line, or ended by NUL")
    return VitcliError(
        "no images given",
        hint="paths of images, folders, quoted globs such as 'photos/**/*.jpg', or `--from FILE`",
    )


def expand(path: str) -> Iterator[str]:
    """A path as given -> the images that it stands for; what does not exist stays itself."""
    if os.path.isdir(path):  # noqa: PTH112
        before = str(Path(path) / "x")[:-1]
        for name in walk_images(Path(path), strict=False):
            yield before + name
    elif _spreads(path):
        matches = sorted(glob.glob(path, recursive=True), key=os.fsencode)
        yield from [match for match in matches if Path(match).is_file()] or [path]
    else:
        yield path


def listed(stream: BinaryIO) -> Iterator[str]:
    """The paths in a list: one a line, or ended by NUL as `find -print0` does; none is empty."""
    end, rest, first = b"", b"", True
    while chunk := stream.read1(READ_AT_ONCE):  # type: ignore[attr-defined]  # of every reader
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
            "`--from` takes a file with one path a line, or `-` for stdin",
        ) from None
    with stream:
        yield stream


def _spreads(path: str) -> bool:
    """Whether it may stand for several images."""
    return os.path.isdir(path) or (glob.has_magic(path) and not os.path.lexists(path))  # noqa: PTH112


def _is_table(path: str) -> bool:
    return Path(path).suffix.lower() in TABLES
