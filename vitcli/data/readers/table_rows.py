"""The cells of one table that are used: paths, labels, splits and groups."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitcli.data.labels import has_label
from vitcli.data.readers.columns import (
    Columns,
    check_label,
    flag_value,
    label_of_columns,
    plain_cell,
)
from vitcli.data.readers.path_cells import PathCells
from vitcli.errors import VitcliError, printable


class TableRows:
    """The cells that are used of one table. Equal texts share one object; rows are not kept.

    Args:
        path: the table.
        header: its columns.
        columns: those that are read.
        to_path: from a path cell to a path.
        default: the split of rows that name none.
    """

    def __init__(
        self,
        path: Path,
        header: list[str],
        columns: Columns,
        to_path: PathCells,
        default: str,
    ) -> None:
        self.shown, self.header = printable(path), header
        self.columns, self.default = columns, default
        self.to_path, self.root = to_path, to_path.root
        self.paths: list[bytes] = []
        self.labels: list[Any] = []
        self.splits: list[Any] = []
        self.groups: list[Any] = []
        self.without_path = 0
        self._distinct: dict[Any, Any] = {}

    def add(self, row: Mapping[Any, Any]) -> None:
        """Append a row, or count it if it has no path."""
        path = row.get(self.columns.image)
        if not has_label(path):
            self.without_path += 1
            return
        if None in row:
            raise VitcliError(
                f"`{self.shown}`: the row of `{printable(str(path))}` has more cells than the "
                f"header has columns (`{printable(str(row[None][0]))}`)",
                'quote a cell that holds the separator of the columns: `a.jpg,"cat,dog"`',
            )
        self.paths.append(_path_bytes(self.to_path(path)))
        labels = [row.get(name) for name in self.columns.labels]
        for label in labels:
            check_label(self.shown, str(path), label)
        several = tuple(map(plain_cell, labels))
        self.labels.append(self._shared(labels[0] if len(labels) == 1 else several))
        splits = tuple(plain_cell(row.get(name)) for name in self.columns.splits)
        self.splits.append(self._shared(splits))
        if self.columns.group is not None:
            self.groups.append(self._shared(plain_cell(row.get(self.columns.group))))

    def _shared(self, cell: Any) -> Any:
        try:
            return self._distinct.setdefault(cell, cell)
        except TypeError:  # a list in JSON lines
            return cell

    def label_cells(self) -> list[Any]:
        """One cell per row: of several label columns the first, or the classes with a 1."""
        names = self.columns.labels
        if not names:
            return [""] * len(self.paths)
        if len(names) == 1:
            return self.labels
        distinct = dict.fromkeys(self.labels)
        if not self.columns.one_hot:
            place = names.index(label_of_columns(self.shown, names, distinct))
            return [cells[place] for cells in self.labels]
        classes: dict[Any, list[str]] = {}
        for cells in distinct:
            flags = [flag_value(cell) for cell in cells]
            if None in flags:
                at = flags.index(None)
                raise VitcliError(
                    f"`{self.shown}`: column `{names[at]}` holds `{cells[at]}`, which is neither 0 "
                    "nor 1",
                    "name the label column, or the columns of 0 and 1, one per class: "
                    f"`--set data.label_column={names[0]},{names[-1]}`",
                )
            classes[cells] = [name for name, flag in zip(names, flags, strict=True) if flag]
        return [classes[cells] for cells in self.labels]


def _path_bytes(path: str) -> bytes:
    """A path as the system stores it; a lone surrogate comes from no byte and names no file."""
    try:
        return os.fsencode(path)
    except UnicodeEncodeError:
        return path.encode("utf-8", "backslashreplace")
