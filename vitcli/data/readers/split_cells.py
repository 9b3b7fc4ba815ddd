"""The split of each row of a table: cells of a split column, columns of yes and no, and folds."""

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from vitcli.config.schema import DataSection
from vitcli.data.labels import has_label, label_text
from vitcli.data.readers.columns import IGNORE, NO, SPLIT_FLAGS, YES, plain_name
from vitcli.errors import VitcliError, printable, quoted
from vitcli.hub.split_names import SPLIT_ALIASES

SPLIT_CELLS = {
    **SPLIT_ALIASES,
    "tr": "train",
    "trn": "train",
    "tst": "test",
    "publictest": "validation",
    "privatetest": "test",  # FER2013
}
FOLD = re.compile(r"(?:fold[ _-]?)?(\d+)(?:\.0)?", re.IGNORECASE)
MAX_FOLDS, MAX_SHOWN = 100, 10


def splits_of_rows(
    shown: str,
    columns: Sequence[str],
    counts: Mapping[tuple[Hashable, ...], int],
    settings: DataSection,
    default: str,
    notes: list[str],
    *,
    strict: bool,
) -> dict[tuple[Hashable, ...], str | None]:
    """Cells of the split columns -> train, validation, test, or None for rows to skip.

    Args:
        columns: the split columns.
        counts: their cells -> number of rows.
        default: the split of rows whose cells are empty.
        notes: receives what was used.
        strict: raise if folds need a choice; False ignores them, with a note.

    Raises:
        VitcliError: columns name different splits, or there are folds and none was chosen.
    """
    cells = {name: [_cell(row[place]) for row in counts] for place, name in enumerate(columns)}
    if settings.test_fold is not None:
        return _hold_out(shown, cells, counts, settings, notes)
    named = [name for name in columns if any(split_of_cell(cell) for cell in cells[name])]
    flags = [n for n in columns if plain_name(n) in SPLIT_FLAGS and {*cells[n]} <= YES | NO]
    if named:
        splits = {name: [split_of_cell(cell) for cell in cells[name]] for name in named}
        if any(splits[name] != splits[named[0]] for name in named):
            raise VitcliError(
                f"`{shown}` has {len(named)} columns that name different splits: {quoted(named)}",
                f"name one: `--set data.split_column={named[0]}`",
            )
        used = named[0]
        found = [s if cell else default for s, cell in zip(splits[used], cells[used], strict=True)]
        skipped: Counter[str] = Counter()
        for cell, split, count in zip(cells[used], found, counts.values(), strict=True):
            skipped[cell] += count if split is None else 0
        for text, count in skipped.items():
            if count:
                rows = f"{count:,} row{'s' if count > 1 else ''}"
                notes.append(f"{shown}: skipped {rows} of split `{printable(text)}`")
        notes.append(f"{shown}: column `{used}` gives the splits")
        return dict(zip(counts, found, strict=True))
    if flags:
        notes.append(f"{shown}: {quoted(flags)} gives the splits")
        # Rows without a yes are the test split if the only flag is `is_train`.
        other = "test" if [*map(plain_name, flags)] == ["is_train"] else default
        said = [[name for name in flags if cells[name][i] in YES] for i in range(len(counts))]
        return {
            row: SPLIT_FLAGS[plain_name(yes[0])] if yes else other
            for row, yes in zip(counts, said, strict=True)
        }
    for name in columns:
        _refuse_folds(shown, name, {*cells[name]} - {""}, notes, strict)
    return dict.fromkeys(counts, default)


def split_of_cell(cell: str) -> str | None:
    """`train`, `Training set`, `test_data` -> the split; None if the cell names none."""
    return SPLIT_CELLS.get(cell) or SPLIT_CELLS.get(re.sub(r"[ _-]?(set|split|data)$", "", cell))


def _cell(value: Any) -> str:
    return label_text(value).lower() if has_label(value) else ""


def _refuse_folds(shown: str, name: str, values: set[str], notes: list[str], strict: bool) -> None:
    """Numbered folds need a choice; other cells mean that the column is about something else."""
    ignored = f"{shown}: ignored `{name}`, which names no split"
    if not (2 <= len(values) <= MAX_FOLDS and all(map(FOLD.fullmatch, values))):
        notes.append(ignored)
        return
    numbers = sorted(values, key=lambda text: int(FOLD.fullmatch(text)[1]))  # type: ignore[index]
    folds = f"{len(numbers)} folds, `{numbers[0]}` to `{numbers[-1]}`"
    choice = f"`--set data.test_fold={numbers[0]}`"
    if strict:
        raise VitcliError(
            f"`{shown}`: column `{name}` holds {folds}, and none is chosen for testing",
            f"hold one out: {choice}; or ignore the column: `--set data.split_column={IGNORE}`",
        )
    notes.append(f"{ignored}: it holds {folds}; hold one out with {choice}")


def _hold_out(
    shown: str,
    cells: Mapping[str, Sequence[str]],
    counts: Mapping[tuple[Hashable, ...], int],
    settings: DataSection,
    notes: list[str],
) -> dict[tuple[Hashable, ...], str | None]:
    """The rows of `data.test_fold` are the test split, and all others the training split."""
    wanted = _cell(settings.test_fold)
    number = FOLD.fullmatch(wanted)

    def is_wanted(cell: str) -> bool:
        fold = FOLD.fullmatch(cell)
        same = fold is not None and number is not None and int(fold[1]) == int(number[1])
        return cell == wanted or same

    holding = [name for name in cells if any(map(is_wanted, cells[name]))]
    if len(holding) > 1:  # of `split` and `fold` the one that is called fold
        holding = [name for name in holding if "fold" in plain_name(name)] or holding
    if not holding:
        found = sorted({cell for column in cells.values() for cell in column if cell})
        has = f"it has {quoted(found, MAX_SHOWN)}" if found else "it has no such column"
        raise VitcliError(
            f"`{shown}` has no fold `{settings.test_fold}` ({has})",
            "name the column and one of its cells: `--set data.split_column=NAME --set "
            "data.test_fold=VALUE`",
        )
    if len(holding) > 1:
        raise VitcliError(
            f"`{shown}`: {quoted(holding)} hold `{settings.test_fold}`",
            f"name one: `--set data.split_column={holding[0]}`",
        )
    used = [is_wanted(cell) for cell in cells[holding[0]]]
    rows = sum(count for count, test in zip(counts.values(), used, strict=True) if test)
    notes.append(
        f"{shown}: fold `{settings.test_fold}` of column `{holding[0]}` is the test split: "
        f"{rows:,} of {sum(counts.values()):,} rows"
    )
    return {row: "test" if test else "train" for row, test in zip(counts, used, strict=True)}
