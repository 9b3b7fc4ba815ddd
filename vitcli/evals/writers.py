"""Write predictions as CSV, JSON lines and parquet, row by row, in constant memory."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcli.errors import VitcliError
from vitcli.files import writing

# One object of `predict --json`: path, label, probability, top, error, and optional columns; or
# path, value, error.
PredictionRow = dict[str, Any]
WriteRow = Callable[[PredictionRow], object]
COLUMNS = ("path", "label", "probability", "top", "error")
LABELS_COLUMN = "labels"  # if the model has a threshold per class
NUMBER_COLUMNS = ("path", "value", "error")  # of a regression
# Endings that say which format a file has; another format under such a name would mislead.
FORMAT_OF = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet", ".tsv": "tsv"}
FORMAT_OF |= dict.fromkeys((".xlsx", ".xls", ".ods"), "a spreadsheet")
# A row group is written at once: large enough to compress, small enough for memory.
ROW_GROUP_SIZE = 4096  # rows of a parquet row group


@dataclass(frozen=True)
class OutputFiles:
    """The files that the same rows are written to; None for a format that is not wanted."""

    csv: Path | None = None
    jsonl: Path | None = None
    parquet: Path | None = None

    def __post_init__(self) -> None:
        for kind in ("csv", "jsonl", "parquet"):
            path = getattr(self, kind)
            if path is not None and FORMAT_OF.get(path.suffix.lower(), kind) != kind:
                raise VitcliError(
                    f"`--{kind} {path}`: the name ends in `{path.suffix}`, but the file would be "
                    f"{kind}",
                    f"use `--{kind} {path.with_suffix('.' + kind)}`",
                )
        for path in self.paths:
            if path.is_dir():
                raise VitcliError(
                    f"`{path}` is a folder", f"give the name of a file, such as `{path / 'out'}`"
                )
            if not path.parent.is_dir():
                raise VitcliError(
                    f"cannot write `{path}`: `{path.parent}` is not a folder",
                    "create the folder first",
                )
            if self.paths.count(path) > 1:
                raise VitcliError(f"two output files have the name `{path}`", "rename one of them")

    @property
    def paths(self) -> list[Path]:
        """All wanted files, in a fixed order."""
        return [path for path in (self.csv, self.jsonl, self.parquet) if path is not None]

    def write(
        self, rows: Callable[[], Iterable[PredictionRow]], columns: Sequence[str], top: int = 1
    ) -> None:
        """Write every file atomically; `rows` is called once for each file.

        A CSV has two further columns for each class after the best one, up to the `top`-th.
        """
        writers = ((_csv, self.csv), (_jsonl, self.jsonl), (_parquet, self.parquet))
        ranked = [f"{name}_{n}" for n in range(2, top + 1) for name in ("label", "probability")]
        for writer, path in writers:
            if path is not None:
                with writer(path, [*columns, *ranked] if writer is _csv else columns) as write_row:
                    for row in rows():  # read again from the log: no list of all rows
                        write_row(row)


def _utf8(path: str) -> str:
    """A path that every file can hold: bytes that are not UTF-8 become escapes."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@contextmanager
def _csv(path: Path, columns: Sequence[str]) -> Iterator[WriteRow]:
    with (
        writing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()

        def write(row: PredictionRow) -> None:
            # `top` and `labels` are lists, which a CSV cell can hold only as JSON. Booleans are as
            # in JSON, and csv writes None as an empty cell.
            cells = {k: str(v).lower() if isinstance(v, bool) else v for k, v in row.items()}
            for name in {"top", "labels"} & row.keys():
                cells[name] = json.dumps(row[name], ensure_ascii=False)
            # A spreadsheet cannot read JSON.
            for number, one in enumerate((row.get("top") or [])[1:], 2):
                cells |= {f"{name}_{number}": one[name] for name in ("label", "probability")}
            writer.writerow({**cells, "path": _utf8(row["path"])})

        yield write


@contextmanager
def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[WriteRow]:
    with writing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        yield lambda row: file.write(json.dumps(row) + "\n")


@contextmanager
def _parquet(path: Path, columns: Sequence[str]) -> Iterator[WriteRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    entry = pa.struct([("label", pa.string()), ("probability", pa.float64())])
    types = {
        "probability": pa.float64(),
        "value": pa.float64(),
        "top": pa.list_(entry),
        "labels": pa.list_(pa.string()),
        "abstained": pa.bool_(),
        "ood": pa.float64(),
        "ood_distance": pa.float64(),
    }
    # A fixed schema: types guessed from the first rows fail when a column starts with nulls.
    schema = pa.schema([(name, types.get(name, pa.string())) for name in columns])
    group: list[PredictionRow] = []
    with (
        writing(path) as temporary,
        temporary.open("wb") as file,
        pq.ParquetWriter(file, schema) as writer,
    ):

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            group.clear()

        def write(row: PredictionRow) -> None:
            group.append({**row, "path": _utf8(row["path"])})
            if len(group) >= ROW_GROUP_SIZE:
                flush()

        yield write
        flush()
