"""Rows -> CSV, JSON lines and parquet, a row at a time, so that memory does not grow."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcli.errors import VitcliError
from vitcli.files import replacing

# One object of `predict --json`: path, label, probability, top, error, and what was asked for.
Row = dict[str, Any]
Sink = Callable[[Row], object]
COLUMNS = ("path", "label", "probability", "top", "error")
GROUP_ROWS = 4096  # of a row group in parquet


@dataclass(frozen=True)
class Tables:
    """The files that the same rows are written to.

    Attributes:
        csv, jsonl, parquet: paths; None for no such file.

    Raises:
        VitcliError: one of them is a folder or lies in none, or two are the same.
    """

    csv: Path | None = None
    jsonl: Path | None = None
    parquet: Path | None = None

    def __post_init__(self) -> None:
        for path in self.paths:
            if path.is_dir():
                raise VitcliError(f"`{path}` is a folder", "the table is a file: give its name too")
            if not path.parent.is_dir():
                raise VitcliError(
                    f"cannot write `{path}`: `{path.parent}` is no folder", "make it first"
                )
            if self.paths.count(path) > 1:
                raise VitcliError(f"two tables are to be `{path}`", "give each its own name")

    @property
    def paths(self) -> list[Path]:
        """Of all that are wanted, in a fixed order."""
        return [path for path in (self.csv, self.jsonl, self.parquet) if path is not None]

    def write(self, rows: Callable[[], Iterable[Row]], columns: Sequence[str]) -> None:
        """Write every table whole or not at all; `rows` is called once for each.

        Raises:
            VitcliError: one cannot be written.
        """
        makers = ((_csv, self.csv), (_jsonl, self.jsonl), (_parquet, self.parquet))
        for make, path in makers:
            if path is not None:
                with make(path, columns) as sink:
                    for row in rows():
                        sink(row)


def _plain(path: str) -> str:
    """A path as text that every file can hold: bytes that are no UTF-8 are escaped."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _cell(value: Any) -> Any:
    """A value as it stands in a CSV file: as in JSON, nothing for null."""
    return str(value).lower() if isinstance(value, bool) else value


@contextmanager
def _csv(path: Path, columns: Sequence[str]) -> Iterator[Sink]:
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()

        def write(row: Row) -> None:
            top = json.dumps(row["top"], ensure_ascii=False)
            cells = {name: _cell(value) for name, value in row.items()}
            writer.writerow({**cells, "path": _plain(row["path"]), "top": top})

        yield write


@contextmanager
def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[Sink]:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        yield lambda row: file.write(json.dumps(row) + "\n")


@contextmanager
def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Sink]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    entry = pa.struct([("label", pa.string()), ("probability", pa.float64())])
    kinds = {
        "probability": pa.float64(),
        "top": pa.list_(entry),
        "abstained": pa.bool_(),
        "ood": pa.float64(),
        "ood_distance": pa.float64(),
    }
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
    held: list[Row] = []
    with (
        replacing(path) as temporary,
        temporary.open("wb") as file,
        pq.ParquetWriter(file, schema) as writer,
    ):

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(held, schema=schema))
            held.clear()

        def write(row: Row) -> None:
            held.append({**row, "path": _plain(row["path"])})
            if len(held) >= GROUP_ROWS:
                flush()

        yield write
        flush()
