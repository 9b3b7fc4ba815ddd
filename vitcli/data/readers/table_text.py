"""The rows of a text table: encodings, separators, quotes, comments and missing headers.

The standard library parses them, because table libraries guess types. So labels stay as they are
written (`01`, `NA`), and file names need not be UTF-8.
"""

import codecs
import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vitcli.data.readers.folder import is_image_name
from vitcli.decode import IMAGE_SUFFIXES
from vitcli.errors import VitcliError, counted, printable, quoted
from vitcli.files import parse_json

SEPARATORS = "\t,;|"
SAMPLE_LINES = 50  # lines that decide on the separator
EXCEL_SEPARATOR = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # Excel reads it in the first line
# `n01440764/10026.JPEG 0`: an image name, blanks, and the rest of the line.
LISTED_IMAGE = re.compile(
    rf"(?P<path>.*?({'|'.join(re.escape(s) for s in sorted(IMAGE_SUFFIXES))}))( +(?P<label>.*))?",
    re.IGNORECASE,
)
ZERO_ONE = re.compile(r"-?[01](\.0*)?")


@dataclass
class TextTable:
    """The columns and rows of a table.

    Attributes:
        header: column names; `column_1`, `column_2` … if the table has none.
        rows: column -> cell; cells beyond the header are a list under the key None.
        named: True if the first line names the columns.
    """

    header: list[str]
    rows: Iterator[Mapping[Any, Any]]
    named: bool = True


def read_text_table(
    path: Path, notes: list[str], is_data: Callable[[Sequence[str]], bool]
) -> TextTable:
    """The table in a text file: JSON lines (`.jsonl`), or lines of cells.

    Args:
        path: the file.
        notes: receives a message about comments and a missing header.
        is_data: tells whether the cells of the first line are data although none is an image name.

    Raises:
        VitcliError: the file cannot be read, is empty, or has an unclosed quote.
    """
    shown = printable(path)
    if path.suffix.lower() == ".jsonl":
        rows = _json_rows(path)
        first_row = next(rows, None)
        if first_row is None:
            raise _no_rows(shown)
        return TextTable(list(first_row), chain([first_row], rows))
    records = _records(path, notes)
    first = next(records, None)
    if first is None:
        raise _no_rows(shown)
    named = not any(map(is_image_text, first)) and not is_data(first)
    if named:
        header = [name.strip() for name in first]
    else:
        header = [f"column_{number}" for number in range(1, len(first) + 1)]
        notes.append(f"{shown}: the first line is data, so the columns are {quoted(header)}")
        records = chain([first], records)
    return TextTable(header, (_row(header, cells) for cells in records), named)


def is_image_text(cell: str) -> bool:
    """True for the path or the URL of an image."""
    cell = cell.strip()
    try:
        path = urlsplit(cell).path if "://" in cell else cell
    except ValueError:  # `http://[::1/x`
        return False
    return is_image_name(path.replace("\\", "/").rpartition("/")[2])


def _no_rows(shown: str) -> VitcliError:
    return VitcliError(f"`{shown}` has no rows", "write a header and one row per image")


def _row(header: Sequence[str], cells: Sequence[str]) -> dict[Any, Any]:
    row: dict[Any, Any] = dict(zip(header, cells, strict=False))
    if extra := [cell for cell in cells[len(header) :] if cell.strip()]:
        row[None] = extra
    return row


class _Lines:
    """The lines of a file without comments; counts lines and comments."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.number = 0
        self.comments = 0

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            self.number += 1
            if is_comment(line):
                self.comments += 1
            else:
                yield line


def is_comment(line: str) -> bool:
    """True for `# text`; a first column that is called `#` is no comment."""
    return line.startswith("#") and line[1:2] not in SEPARATORS


def _records(path: Path, notes: list[str]) -> Iterator[list[str]]:
    """The cells of each line that is not blank."""
    with _open_text(path) as file:
        lines = _Lines(file)
        sample = list(islice((line.rstrip("\r\n") for line in lines if line.strip()), SAMPLE_LINES))
        file.seek(0)
        lines.number = lines.comments = 0
        if not sample:
            return
        content: Iterator[str] = iter(lines)
        forced = EXCEL_SEPARATOR.fullmatch(sample[0].strip())
        if forced:
            sample = sample[1:] or [""]
            next(content)
        separator = forced[1] if forced else find_separator(sample)
        if separator is None:
            # A header of several words, such as `path label split`, gives the number of columns.
            width = 2 if LISTED_IMAGE.fullmatch(sample[0]) else len(sample[0].split())
            yield from (_listed(line.strip(), width) for line in content if line.strip())
        else:
            # If every separator of the first line has a space behind it (`path, label`), so do
            # those of the other lines.
            spaced = sample[0].count(separator) == sample[0].count(f"{separator} ") > 0
            quote = "'" if sample[0].startswith("'") else '"'
            reader = csv.reader(
                content,
                delimiter=separator,
                quotechar=quote,
                skipinitialspace=spaced,
                strict=True,
            )
            try:
                yield from (cells for cells in reader if any(map(str.strip, cells)))
            except csv.Error as error:
                raise VitcliError(
                    f"line {lines.number} of `{printable(path)}` is not a row of a table: {error}",
                    "write a header and one row per image, separated by commas; close each quote",
                ) from None
        if lines.comments:
            skipped = counted(lines.comments, "line that starts", "lines that start")
            notes.append(f"{printable(path)}: skipped {skipped} with `#`")


def find_separator(sample: Sequence[str]) -> str | None:
    """The separator of the cells; None if the lines are lists such as `path label`.

    It must divide the first line, and it is the one with which most lines have as many cells as
    the first. Of equals it is the one that comes first in the line.
    """
    if all(_is_listed(line) for line in sample):
        return None
    shares: dict[str, float] = {}
    for separator in sorted(SEPARATORS, key=sample[0].find):
        counts = [_count_cells(line, separator) for line in sample]
        if counts[0] > 1:
            shares[separator] = sum(count == counts[0] for count in counts) / len(counts)
    return max(shares, key=lambda separator: shares[separator]) if shares else None


def _is_listed(line: str) -> bool:
    found = LISTED_IMAGE.fullmatch(line)
    return found is not None and found["label"] is not None and not set(found["path"]) & {*"\t,;|"}


def _count_cells(line: str, separator: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=separator)))
    except csv.Error:
        return 0


def _listed(line: str, width: int) -> list[str]:
    """`a b.jpg red fox` -> [`a b.jpg`, `red fox`]; zeros and ones behind a path are columns."""
    found = LISTED_IMAGE.fullmatch(line)
    if found is None:
        return line.rsplit(maxsplit=max(1, width - 1))
    if found["label"] is None:
        return [line]
    parts = found["label"].split()
    flags = len(parts) > 1 and all(map(ZERO_ONE.fullmatch, parts))
    if flags or (width > 2 and len(parts) == width - 1):
        return [found["path"], *parts]
    return [found["path"], found["label"]]


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
                fault = "is not a JSON object"
            except ValueError as error:
                row, fault = None, f"is not JSON: {error}"
            if not isinstance(row, dict):
                raise VitcliError(
                    f"line {number} of `{printable(path)}` {fault}",
                    'write one object per line, such as {"path": "a.jpg", "label": "cat"}',
                )
            yield row


def _open_text(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # Excel writes it
        # "utf-8-sig" drops a byte-order mark; "surrogateescape" keeps names that are not UTF-8.
        return path.open(
            encoding="utf-16" if utf16 else "utf-8-sig",
            errors="replace" if utf16 else "surrogateescape",
            newline="",
        )
    except OSError as error:
        raise VitcliError(
            f"cannot read `{printable(path)}`: {error.strerror}", "check the file permissions"
        ) from None
