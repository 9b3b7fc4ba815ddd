"""Records of what a finished table of predictions was made of, for `predict --resume`.

A CSV has no place for them, so they are in vitcli's cache: one small file per table. A table
without a record, or that was changed since, is made again.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitcli.errors import VitcliError, printable
from vitcli.files import read_json, write_text
from vitcli.hub.http import cache_folder

MAX_RECORDS = 1000  # the oldest go first


class ImageDigest:
    """SHA-256 over the names, sizes and modification times of images, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def watching(self, images: Iterable[Any]) -> Iterator[Any]:
        """The same images; each is added before it is yielded, so before it is read."""
        for image in images:
            self.add(image)
            yield image

    def add(self, image: Any) -> None:
        """Add a path, with its size and time if the file exists; ignore images in memory."""
        if not isinstance(image, str | os.PathLike):  # tables are made of paths only
            return
        facts: tuple[int, ...] = ()
        with suppress(OSError, ValueError):  # an impossible name, or no such file
            found = os.stat(image)  # noqa: PTH116  # a Path costs more than the rest
            facts = (found.st_size, found.st_mtime_ns)
        self._hash.update(repr((image, *facts)).encode("utf-8", "surrogatepass"))

    def hexdigest(self) -> str:
        """The digest of the images so far."""
        return self._hash.hexdigest()


def record_tables(tables: Iterable[Path], settings: Mapping[str, Any], images: str) -> None:
    """Record what `tables` were made of: the settings that decide a row, and a digest of images.

    A cache that cannot be written is no error: the next `--resume` makes the tables again.
    """
    for table in tables:
        file = _record_file(table)
        record = {"table": _mark(table), "settings": dict(settings), "images": images}
        with suppress(OSError, VitcliError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(record) + "\n")
            records = sorted(file.parent.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
            for old in records[:-MAX_RECORDS]:
                old.unlink(missing_ok=True)


def is_recorded(tables: Iterable[Path]) -> bool:
    """True if each table has a record and is unchanged since."""
    return all(_read_record(table) for table in tables)


def check_finished(tables: Iterable[Path], settings: Mapping[str, Any], images: str) -> None:
    """Check that recorded tables were made of these images with these settings.

    Raises:
        VitcliError: a table was made of something else; the error says of what.
    """
    wanted = json.loads(json.dumps(settings))  # comparable with settings that are read
    for table in tables:
        record = _read_record(table)
        old = record.get("settings") or {}
        differing = sorted(k for k in {*old, *wanted} if old.get(k) != wanted.get(k))
        differing += ["images"] * (record.get("images") != images)
        if differing:
            names = ", ".join(f"`{name}`" for name in differing)
            raise VitcliError(
                f"`{printable(table)}` is finished, but it was made with other values of {names}",
                "leave out `--resume` to replace it, or name another file",
            )


def _record_file(table: Path) -> Path:
    name = hashlib.sha256(os.fsencode(table.resolve())).hexdigest()[:32]
    return cache_folder() / "tables" / f"{name}.json"


def _read_record(table: Path) -> dict[str, Any]:
    """The record of a table; {} without one, and if the table has changed since."""
    with suppress(OSError, ValueError):
        record = read_json(_record_file(table))
        if isinstance(record, dict) and record.get("table") == _mark(table):
            return record
    return {}


def _mark(table: Path) -> list[int]:
    found = table.stat()
    return [found.st_size, found.st_mtime_ns]
