"""Rows of a long prediction, kept as they come, so that the same command can go on with them.

The journal is a file of JSON lines beside the table that is to be: first what was asked for, then a
row a line, on its way to the disk before the row is handed on. The tables are made of it when the
last row is there, each whole or not at all, and the journal goes away. Tables in parquet have an
end that cannot be appended to; made this way they are the same bytes as without a break, whichever
the format.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from vitcli.errors import VitcliError, printable
from vitcli.evals.writers import Row, Tables

ENDING = ".part"
HEAD = "vitcli predict"  # the key of the first line


@dataclass
class Tally:
    """How many rows there were, of images that could not be read, and without an answer."""

    count: int = 0
    failed: int = 0
    abstained: int = 0

    def add(self, row: Row) -> None:
        """Count a row."""
        self.count += 1
        self.failed += row["error"] is not None
        self.abstained += bool(row.get("abstained"))


class Journal:
    """Rows that were written down.

    Args:
        path: the file.
        settings: what was asked for; a row of other settings would not fit the others.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = dict(settings)
        self._file: TextIO | None = None
        self._lines = 0

    def rows(self) -> Iterator[Row]:
        """The rows, read from the file."""
        with self.path.open("rb") as file:
            next(file, b"")
            for line in file:
                yield json.loads(line)

    def add(self, row: Row) -> None:
        """Write a row down; raises as `_writing` does."""
        assert self._file is not None
        with _writing(self.path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        self._lines += 1

    def remove(self) -> None:
        """The rows are elsewhere now."""
        self.path.unlink(missing_ok=True)

    def take_up(self, tally: Tally) -> None:
        """Count the whole rows of an interrupted run, and cut off what follows them.

        Raises:
            VitcliError: they were made with other settings, which are named.
        """
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                found = _whole(line)
                if number == 0:
                    _compare(self.path, found.get(HEAD) if found else None, self.settings)
                elif found is None or not found.keys() >= {"path", "error"}:
                    break  # half a line: the power went, or the disk was full
                else:
                    tally.add(found)
                end += len(line)
        self._lines = tally.count
        os.truncate(self.path, end)

    def after(self, files: Iterable[str], batch_size: int) -> tuple[Iterator[str], int]:
        """The files that are still to be looked at, and how many of their rows are here already.

        They begin with the batch that was broken off, so that every image is in the same company
        as without the break, and its figures are the same to the last bit.

        Raises:
            VitcliError: the files are not those of the rows.
        """
        rest = iter(files)
        held: list[str] = []
        for number, row in enumerate(self.rows()):
            file = next(rest, None)
            if file is None or file != row["path"]:
                there = f"`{printable(file)}`" if file is not None else "no more images"
                written = printable(row["path"])
                raise VitcliError(
                    f"`{self.path}`: row {number + 1} is of `{written}`; there is {there} now",
                    f"the images must be the same; to begin anew, remove `{self.path}`",
                )
            if number % batch_size == 0:
                held.clear()
            held.append(file)
        if self._lines % batch_size == 0:
            held.clear()
        return chain(held, rest), len(held)

    @contextmanager
    def _open(self) -> Iterator[None]:
        with self.path.open("a", encoding="utf-8", newline="") as self._file:
            try:
                yield
            finally:
                if self._lines == 0:
                    self.remove()


@contextmanager
def journal(
    table: Path, settings: Mapping[str, Any], tally: Tally, *, resume: bool
) -> Iterator[Journal]:
    """The journal of `table`, held for this process alone: new, or taken up with `resume`.

    It stays when the block is left before `remove`, if it has any row.

    Args:
        tally: counts the rows that are there already.

    Raises:
        VitcliError: another process writes it; it holds rows of this very command and `resume` is
            not set; it cannot be written.
    """
    path = _place(table)
    book = Journal(path, json.loads(json.dumps(settings)))
    with _alone(path, table):
        if resume and path.exists():
            book.take_up(tally)
        else:
            _refuse_to_lose(path, book.settings)
            with _writing(path):
                path.write_text(json.dumps({HEAD: book.settings}) + "\n", encoding="utf-8")
        with book._open():
            yield book


def finished(tables: Tables) -> bool:
    """Whether all of them are there, and no journal that says otherwise."""
    return not _place(tables.paths[0]).exists() and all(p.exists() for p in tables.paths)


def _place(table: Path) -> Path:
    return table.with_name(table.name + ENDING)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise VitcliError(
            f"cannot write `{path}`: {error.strerror}", "free some space or choose another place"
        ) from None


@contextmanager
def _alone(path: Path, table: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with _writing(path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise VitcliError(
                f"another process is writing `{table}`", "wait for it, or choose another name"
            ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _refuse_to_lose(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises where somebody most likely forgot `--resume`."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        found = _whole(next(file, b"")) or {}
        rows = sum(line.endswith(b"\n") for line in file)
    if rows and found.get(HEAD) == settings:
        raise VitcliError(
            f"`{path}` holds {rows:,} rows of this command, which was interrupted",
            f"`--resume` goes on with them; to begin anew, remove `{path}`",
        )


def _whole(line: bytes) -> dict[str, Any] | None:
    """The object on a line that came to its end."""
    with suppress(ValueError):
        if line.endswith(b"\n") and isinstance(found := json.loads(line), dict):
            return found
    return None


def _compare(path: Path, there: Any, here: Mapping[str, Any]) -> None:
    if not isinstance(there, dict):
        raise VitcliError(f"`{path}` is no journal of `vitcli predict`", "remove it to begin anew")
    differing = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
    if differing:
        raise VitcliError(
            f"the rows in `{path}` were made with other settings; these differ: "
            + ", ".join(f"`{key}`" for key in differing),
            f"give the first command again with `--resume`, or remove `{path}` to begin anew",
        )
