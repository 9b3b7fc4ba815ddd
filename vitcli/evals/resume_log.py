"""The resume log of a long prediction, which contains its finished rows for `--resume`.

The log is a file of JSON lines in the folder of the first output file. The first line contains the
settings, each further line a row. Before each line stands a CRC-32 of all lines up to it, so that a
damaged, missing or moved row is noticed. A row is in the log before the caller gets it. After the
last row, the output files are written from the log and the log is removed.
"""

# Rows are not appended to the output files, because parquet ends in a footer and cannot be appended
# to. Files that are written at the end have the same bytes with and without an interruption.

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from vitcli.errors import VitcliError, counted, printable
from vitcli.evals.writers import COLUMNS, NUMBER_COLUMNS, OutputFiles, PredictionRow
from vitcli.files import exclusive, parse_json

SUFFIX = ".part"
KINDS = {
    "path": str, "label": str, "error": str, "probability": float, "top": list,
    "labels": list,
    "abstained": bool, "ood": float, "ood_distance": float, "value": float,
}  # fmt: skip
SETTINGS_KEY = "vitcli predict"  # the key of the first line
STAMP = re.compile(rb"^[0-9a-f]{8} ")


@dataclass
class PredictionCounts:
    """Number of rows, of unreadable images, and of images without a label."""

    count: int = 0
    failed: int = 0
    abstained: int = 0

    def add(self, row: PredictionRow) -> None:
        """Count a row."""
        self.count += 1
        self.failed += row["error"] is not None
        self.abstained += bool(row.get("abstained"))


class ResumeLog:
    """The log file `path` of a prediction with `settings`."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))  # comparable with settings that are read
        self._file: TextIO | None = None
        self._num_rows = 0
        self._crc: int | None = 0  # None in a log of an earlier version, which has none
        self.num_damaged = 0  # lines that `reopen` has cut off, because the first is damaged

    def start(self) -> None:
        """Write a new log without rows."""
        with _write_errors(self.path):
            line = self._line({SETTINGS_KEY: self.settings})
            self.path.write_text(line, encoding="utf-8", newline="")

    def _line(self, values: Mapping[str, Any]) -> str:
        text = json.dumps(values)
        if self._crc is None:
            return text + "\n"
        self._crc = zlib.crc32(text.encode(), self._crc)
        return f"{self._crc:08x} {text}\n"

    def rows(self) -> Iterator[PredictionRow]:
        """Read the rows."""
        with self.path.open("rb") as file:
            next(file, b"")
            for line in file:
                yield parse_json(STAMP.sub(b"", line))

    def add(self, row: PredictionRow) -> None:
        """Append a row."""
        assert self._file is not None
        with _write_errors(self.path):
            self._file.write(self._line(row))
            self._file.flush()  # so that a killed process loses no row that the caller has seen
        self._num_rows += 1

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    def reopen(self, counts: PredictionCounts) -> None:
        """Count the intact rows of an interrupted run, and cut off the rest of the file."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        self._crc = 0 if lines and STAMP.match(lines[0]) else None
        end = 0
        for number, line in enumerate(lines):
            found, crc = _parse_line(line), None
            if self._crc is not None:
                crc = zlib.crc32(STAMP.sub(b"", line).removesuffix(b"\n"), self._crc)
                if not line.startswith(f"{crc:08x} ".encode()):
                    found = None
            if number == 0:
                _check_settings(self.path, found and found.get(SETTINGS_KEY), self.settings)
            elif found is None or not _is_row(found):
                # A last line without its end is what a killed process leaves.
                self.num_damaged = sum(rest.endswith(b"\n") for rest in lines[number:])
                break
            else:
                counts.add(found)
            self._crc = crc
            end += len(line)
        self._num_rows = counts.count
        os.truncate(self.path, end)

    def remaining(self, files: Iterable[str], batch_size: int) -> tuple[Iterator[str], int]:
        """Return the files to predict, and how many of them have rows already."""
        # Start with the batch that was interrupted: batched matrix products round differently in
        # batches of another composition, and a resumed run must give the same bits.
        rest = iter(files)
        batch: list[str] = []
        for number, row in enumerate(self.rows()):
            file = next(rest, None)
            if file is None or file != row["path"]:
                now = f"image `{printable(file)}`" if file is not None else "no more images"
                raise VitcliError(
                    f"row {number + 1} of `{self.path}` belongs to "
                    f"`{printable(str(row['path']))}`, but "
                    f"the command now has {now} at this place",
                    f"give the same images, or remove `{self.path}` to start again",
                )
            if number % batch_size == 0:
                batch.clear()
            batch.append(file)
        if self._num_rows % batch_size == 0:
            batch.clear()
        return chain(batch, rest), len(batch)

    @contextmanager
    def _open(self) -> Iterator[None]:
        with self.path.open("a", encoding="utf-8", newline="") as self._file:
            try:
                yield
            finally:
                if self._num_rows == 0:  # an empty log would only block the next command
                    self.remove()


@contextmanager
def open_resume_log(
    output: Path, settings: Mapping[str, Any], counts: PredictionCounts, *, resume: bool
) -> Iterator[ResumeLog]:
    """Open the log of the output file `output` for this process alone.

    With `resume` an existing log is continued, and `counts` gets its rows. If the block ends before
    `remove`, a log with rows stays.
    """
    path = _log_path(output)
    log = ResumeLog(path, settings)

    # Two processes would interleave their rows in one log.
    def busy() -> VitcliError:
        return VitcliError(
            f"another process is writing `{output}`", "wait for it, or choose another file name"
        )

    with exclusive(path.with_name(f".{path.name}.lock"), busy):
        if resume and path.exists():
            log.reopen(counts)
        else:
            _check_not_forgotten(path, log.settings)
            log.start()
        with log._open():
            yield log


def is_finished(files: OutputFiles) -> bool:
    """Return True if every output file exists and no log is left."""
    return not _log_path(files.paths[0]).exists() and all(p.exists() for p in files.paths)


def _log_path(output: Path) -> Path:
    return output.with_name(output.name + SUFFIX)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise VitcliError(
            f"cannot write `{path}`: {error.strerror}", "free some space or choose another path"
        ) from None


def _check_not_forgotten(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise if the log has rows of this command: the user probably forgot `--resume`."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        found = _parse_line(next(file, b"")) or {}
        rows = sum(line.endswith(b"\n") for line in file)
    if rows and found.get(SETTINGS_KEY) == settings:
        raise VitcliError(
            f"`{path}` has {counted(rows, 'row', 'rows')} of this command, which was interrupted",
            f"continue with `--resume`, or remove `{path}` to start again",
        )


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the object on a complete line; None for a line that was cut off."""
    with suppress(ValueError):
        if line.endswith(b"\n") and isinstance(found := parse_json(STAMP.sub(b"", line)), dict):
            return found
    return None


def _is_row(found: Mapping[str, Any]) -> bool:
    """True if the values of a line have the types of a row."""
    columns = NUMBER_COLUMNS if "value" in found else COLUMNS
    if not set(columns) <= found.keys() <= KINDS.keys():
        return False
    if not all(value is None or isinstance(value, KINDS[key]) for key, value in found.items()):
        return False
    top = found.get("top", [])
    return top is not None and all(
        isinstance(one, dict)
        and one.keys() == {"label", "probability"}
        and isinstance(one["label"], str)
        and isinstance(one["probability"], float)
        for one in top
    )


def _check_settings(path: Path, logged: Any, settings: Mapping[str, Any]) -> None:
    if not isinstance(logged, dict):
        raise VitcliError(
            f"`{path}` is not a resume log of `vitcli predict`", f"remove `{path}` to start again"
        )
    keys = sorted(logged.keys() | settings.keys())
    if differing := [key for key in keys if logged.get(key) != settings.get(key)]:
        raise VitcliError(
            f"the rows in `{path}` were made with other settings: "
            + ", ".join(f"`{key}`" for key in differing),
            f"repeat the first command with `--resume`, or remove `{path}` to start again",
        )
