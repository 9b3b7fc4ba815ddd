"""Splits: which split a file name means, and seeded fractions, folds and slices of the images."""

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vitcli.config.schema import DataSection
from vitcli.data.stratify import Integers, fold_of, spread_slice, stratified_split
from vitcli.errors import VitcliError, counted, printable, unknown
from vitcli.hub.split_names import (
    SPLITS,
    file_splits,
    folder_splits,
    is_container,
    split_of_paths,
)

T = TypeVar("T")
MAX_EXPANDED = 300_000  # names that one notation may mean; LAION-5B has 231,349 shards
MAX_DEPTH = 4  # folders within folders that are searched for shards or parquet files
AUTO = "auto"
VALIDATION_FRACTION, MIN_VALIDATION, MAX_VALIDATION = 0.1, 20, 5000  # of `auto`
GROUP_COLUMN = "group"  # a column of this name is used without a setting
BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")
SLICE = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<first>\d+%?)?:(?P<last>\d+%?)?\])?")


def split_of(file: Path) -> str | None:
    """The split that a file's name begins with, or None."""
    return file_splits([file.stem])[0]


def splits_of(files: Sequence[Path], root: Path | None = None) -> list[str | None]:
    """The split of each file of a dataset, by its folders below `root`, else by its name.

    Args:
        root: None takes the folder that holds all files.
    """
    if root is None:
        root = Path(os.path.commonpath([file.parent.absolute() for file in files]))
    paths = [file.absolute().relative_to(root.absolute()).as_posix() for file in files]
    return split_of_paths(paths)


def expand_braces(notation: str) -> Iterator[str]:
    """`a-{8..10}.tar` -> `a-8.tar`, …; `{08..10}` keeps the zeros; `{x,y}` means both.

    Raises:
        VitcliError: these are more than `MAX_EXPANDED` names.
    """
    names = [notation]
    counts = (len(_brace_parts(*found.groups())) for found in BRACES.finditer(notation))
    if math.prod(counts) > MAX_EXPANDED:
        raise _too_many(notation)
    while any(BRACES.search(name) for name in names):
        expanded: list[str] = []
        for name in names:
            found = BRACES.search(name)
            parts = _brace_parts(*found.groups()) if found else [name]
            before, after = (name[: found.start()], name[found.end() :]) if found else ("", "")
            if len(expanded) + len(parts) > MAX_EXPANDED:
                raise _too_many(notation)
            expanded += [before + part + after for part in parts]
        names = expanded
    yield from names


def _too_many(notation: str) -> VitcliError:
    return VitcliError(
        f"`{printable(notation[:80])}` means more than {MAX_EXPANDED:,} files",
        "give fewer numbers in `{000..099}`, or name a folder",
    )


def _brace_parts(first: str | None, last: str | None, listed: str | None) -> list[str]:
    if first is None or last is None:
        return (listed or "").split(",")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    low, high = sorted((int(first), int(last)))
    high = min(high, low + MAX_EXPANDED)  # one more than is allowed
    return [f"{n:0{width}}" for n in range(low, high + 1)]


def files_with_suffix(folder: Path, suffix: str, depth: int = MAX_DEPTH) -> list[Path]:
    """The files in `folder`, else in its folders for splits, else in `data/` or its kind."""
    if not folder.is_dir() or not depth:
        return []
    inside: list[Path] = []
    below: list[str] = []
    # Folders without permission, and links to themselves, hold no shards.
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(suffix):
                inside.append(folder / entry.name)
            elif entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and _leads_in(entry)):
                below.append(entry.name)
    if inside:
        return sorted(inside)
    splits = folder_splits(below)
    wrappers = [name for name in sorted(below) if is_container(name) or name == folder.name]
    for chosen in (sorted(splits), *([name] for name in wrappers)):
        parts = (files_with_suffix(folder / name, suffix, depth - 1) for name in chosen)
        if found := [file for part in parts for file in part]:
            return found
    return []


def _leads_in(link: "os.DirEntry[str]") -> bool:
    with suppress(OSError):
        return link.is_dir()
    return False


def in_split_order(parts: Mapping[str, T]) -> dict[str, T]:
    """The entries for train, validation and test, in this order."""
    return {name: parts[name] for name in SPLITS if name in parts}


@dataclass
class SplitIndices:
    """Which images go into which split.

    Attributes:
        parts: new split -> (original split, (n,) indices into it, or None for all of it).
        notes: a message for each decision.
        record: the decisions as plain values.
        groups: original split -> (n,) numbers, equal for images that stay together.
    """

    parts: dict[str, tuple[str, Integers | None]]
    notes: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Integers] = field(default_factory=dict)


def divides(splits: Collection[str], settings: DataSection, *, whole: bool = False) -> bool:
    """True if `split_images` divides the images of a split."""
    if settings.train_split is not None or settings.test_split is not None:
        return True
    fraction = settings.validation_fraction
    cuts = "validation" not in splits if fraction == AUTO else bool(fraction)
    asked = settings.folds is not None or cuts
    return not whole and (asked or set(splits) == {"train"})


def split_images(
    labels: Mapping[str, Integers],
    settings: DataSection,
    shown: str,
    *,
    whole: bool = False,
    groups: Mapping[str, Integers] | None = None,
) -> SplitIndices:
    """The splits that `settings` ask for, made from those that the data has.

    First the named slices are taken. Then the training images give a fold; or a fraction for
    testing if there is no test split, and a fraction for validation if it is asked for. A class
    keeps its share in every part.

    Args:
        labels: split -> (n,) class of each image; any integer is a class.
        settings: the `[data]` section.
        shown: the name of the data in messages.
        whole: take slices only.
        groups: split -> (n,) numbers; images with the same number stay together. Default: all
            numbers are different.

    Raises:
        VitcliError: an unknown split, overlapping slices, too few images for the folds, or
            validation images that exist already.
    """
    found = SplitIndices({name: (name, None) for name in labels}, groups=groups or {})
    if settings.train_split is not None or settings.test_split is not None:
        _take_slices(found, labels, settings, shown)
    if whole:
        return found
    if "train" not in found.parts:
        if settings.folds is not None or settings.validation_fraction not in (None, 0.0, AUTO):
            raise VitcliError(
                f"`{shown}` has no training images, which `data.folds` and "
                "`data.validation_fraction` divide",
                "name the training images: `--set data.train_split=NAME`",
            )
        return found
    if settings.folds is not None:
        _hold_out_fold(found, labels, settings, shown)
        return found
    if set(found.parts) == {"train"} and settings.test_fraction > 0:
        _hold_out_test(found, labels, settings, shown)
    if settings.validation_fraction:
        _hold_out_validation(found, labels, settings, shown)
    return found


@dataclass(frozen=True)
class Slice:
    """`train[:98%]`: a split and the start and end of a slice, as text."""

    name: str
    first: str | None
    last: str | None

    def bounds(self, n: int) -> tuple[int, int]:
        """(start, stop) in a split of n images."""
        return _position(self.first or "0", n), _position(self.last or "100%", n)


def parse_slice(text: str) -> Slice:
    """`train`, `train[:98%]`, `test[100:]`.

    Raises:
        VitcliError: the text has another form.
    """
    found = SLICE.fullmatch(text.strip())
    if found is None:
        raise VitcliError(
            f"`{text}` is not a split or a slice of a split",
            "write, for example, `train`, `train[:98%]` or `train[98%:]`",
        )
    return Slice(found["name"], found["first"], found["last"])


def _position(text: str, n: int) -> int:
    if text.endswith("%"):
        return min(n, round(n * int(text[:-1]) / 100))
    return min(n, int(text))


def _take_slices(
    found: SplitIndices, labels: Mapping[str, Integers], settings: DataSection, shown: str
) -> None:
    """Replace `train` and `test` by the named slices."""
    seed = settings.split_seed
    chosen: dict[str, tuple[str, Integers | None]] = {}
    taken: dict[str, Integers] = {}
    for role, text in (("train", settings.train_split), ("test", settings.test_split)):
        if text is None:
            continue
        part = parse_slice(text)
        if part.name not in labels:
            hint = unknown("split", part.name, labels).hint
            raise VitcliError(f"`{shown}` has no split `{part.name}`", hint)
        n = len(labels[part.name])
        first, last = part.bounds(n)
        if last <= first:
            raise VitcliError(
                f"`data.{role}_split` = `{text}` selects none of the {n:,} images of `{part.name}`",
                "choose a larger slice",
            )
        indices = spread_slice(labels[part.name], seed, first, last, found.groups.get(part.name))
        if part.name in taken and len(np.intersect1d(taken[part.name], indices)):
            raise VitcliError(
                f"`{settings.train_split}` and `{text}` share images",
                "choose slices that do not overlap, such as `train[:90%]` and `train[90%:]`",
            )
        taken[part.name] = indices
        whole = (first, last) == (0, n)
        chosen[role] = (part.name, None if whole else indices)
        found.record[f"{role}_split"] = text
        if not whole:
            found.notes.append(
                f"{shown}: the {role} split is `{text}`: {len(indices):,} of {n:,} images, "
                f"{'stratified by class, ' if _of_classes(labels[part.name]) else ''}seed {seed}"
            )
    if "test" not in chosen:  # the other splits of the data stay
        used = {name for name, _ in chosen.values()}
        chosen |= {k: v for k, v in found.parts.items() if k not in used and k != "train"}
    elif "train" not in chosen and "train" in found.parts:
        name, indices_or_all = chosen["test"]
        if name == "train":  # train on the images that the test slice leaves
            rest = np.setdiff1d(np.arange(len(labels[name])), taken[name])
            if indices_or_all is not None and len(rest):
                chosen["train"] = ("train", rest)
        else:
            chosen["train"] = found.parts["train"]
    found.record["seed"] = seed
    found.parts = in_split_order(chosen)


def _train_part(
    found: SplitIndices, labels: Mapping[str, Integers]
) -> tuple[str, Integers, Integers, Integers | None]:
    """The current training images: (original split, indices into it, labels, groups)."""
    name, indices = found.parts["train"]
    indices = np.arange(len(labels[name])) if indices is None else indices
    groups = found.groups[name][indices] if name in found.groups else None
    return name, indices, labels[name][indices], groups


def _hold_out_fold(
    found: SplitIndices, labels: Mapping[str, Integers], settings: DataSection, shown: str
) -> None:
    folds, fold, seed = settings.folds, settings.fold, settings.split_seed
    assert folds is not None
    if "validation" in found.parts:
        raise VitcliError(
            f"`data.folds` holds images out, but `{shown}` already has validation images",
            "remove `data.validation_fraction`, or name the images with `data.train_split`",
        )
    name, indices, own, groups = _train_part(found, labels)
    count = len(own) if groups is None else len(np.unique(groups))
    if count < folds:
        what = "training images" if count == len(own) else "groups of training images"
        raise VitcliError(
            f"`{shown}` has {count} {what}, too few for {folds} folds",
            "choose a smaller `data.folds`",
        )
    keep, held_out = fold_of(own, folds, fold, seed, groups)
    role = "validation" if "test" in found.parts else "test"
    found.parts["train"], found.parts[role] = (name, indices[keep]), (name, indices[held_out])
    found.parts = in_split_order(found.parts)
    found.record |= {"folds": folds, "fold": fold, "seed": seed}
    found.notes.append(
        f"{shown}: fold {fold} of {folds} (0 to {folds - 1}) is the {role} split: "
        f"{len(held_out):,} of {len(own):,} training images, seed {seed}"
    )


def _hold_out_test(
    found: SplitIndices, labels: Mapping[str, Integers], settings: DataSection, shown: str
) -> None:
    fraction, seed = settings.test_fraction, settings.split_seed
    name, indices, own, groups = _train_part(found, labels)
    keep, held_out = stratified_split(own, fraction, seed, groups)
    found.parts["train"] = (name, indices[keep])
    if len(held_out):
        found.parts["test"] = (name, indices[held_out])
    found.record |= {"test_fraction": fraction, "seed": seed}
    held = counted(len(held_out), "images is", "images are", len(own))
    found.notes.append(
        f"{shown}: the data has no test split, so {held} held out for testing "
        f"({fraction:.0%}{_of_classes(own)}, seed {seed})"
    )
    classes, counts = np.unique(own, return_counts=True)
    undivided = np.setdiff1d(classes[counts > 1], own[held_out])
    if groups is not None and len(undivided):
        found.notes.append(
            f"{shown}: {counted(len(undivided), 'classes has', 'classes have', len(classes))} no "
            "test images, because the images are copies of one image or belong to too few groups"
        )


def _hold_out_validation(
    found: SplitIndices, labels: Mapping[str, Integers], settings: DataSection, shown: str
) -> None:
    fraction, seed = settings.validation_fraction, settings.split_seed
    name, indices, own, groups = _train_part(found, labels)
    if fraction == AUTO:
        fraction = 0.0 if "validation" in found.parts else auto_fraction(own)
        if not fraction:
            found.record["validation_fraction"] = 0.0
            return
    if "validation" in found.parts:
        raise VitcliError(
            f"`{shown}` already has validation images, and `data.validation_fraction` is set",
            "remove `data.validation_fraction`",
        )
    assert isinstance(fraction, float)
    keep, held_out = stratified_split(own, fraction, seed, groups)
    found.parts["train"] = (name, indices[keep])
    found.record |= {"validation_fraction": fraction, "seed": seed}
    if len(held_out):
        found.parts["validation"] = (name, indices[held_out])
        found.parts = in_split_order(found.parts)
    held = counted(len(held_out), "training images is", "training images are", len(own))
    found.notes.append(
        f"{shown}: {held} held out for validation "
        f"({100 * fraction:.3g}%{_of_classes(own)}, seed {seed})"
    )


def with_auto_validation(section: DataSection) -> DataSection:
    """The section with the validation fraction `auto`, unless it says how to hold images out."""
    if section.streaming or section.folds is not None or section.validation_fraction is not None:
        return section
    return section.model_copy(update={"validation_fraction": AUTO})


def auto_fraction(labels: Integers) -> float:
    """The validation fraction `auto` for these training labels; 0 if there are too few images.

    At least MIN_VALIDATION images, two per class on average; at most MAX_VALIDATION, for speed.
    """
    n, classes = len(labels), len(np.unique(labels))
    held_out = min(VALIDATION_FRACTION * n, MAX_VALIDATION)
    if held_out < max(MIN_VALIDATION, 2 * classes):
        return 0.0
    return round(held_out / n, 4)


def _of_classes(labels: Integers) -> str:
    """Numbers to predict have one class only, so nothing is stratified."""
    return " of each class" if len(np.unique(labels)) > 1 else ""
