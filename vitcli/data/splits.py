"""What the names of files and folders say about splits.

Which images are learned from and which are set aside: shares, folds and slices, all seeded.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from vitcli.errors import VitcliError, nearest

T = TypeVar("T")

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
# As a whole word also what the Hub's own loader takes for one.
WORDS = {**SPLIT_NAMES, "dev": "validation"}
WORD = re.compile(r"(?<![a-z])(" + "|".join(sorted(WORDS, key=len, reverse=True)) + r")(?![a-z])")


def split_of(file: Path) -> str | None:
    """The split that the name of a file begins with; None where it begins otherwise."""
    name = file.stem.lower()
    starts = [start for start in sorted(SPLIT_NAMES, key=len) if name.startswith(start)]
    return SPLIT_NAMES[starts[-1]] if starts else None


def splits_of(files: Sequence[Path], root: Path) -> list[str | None]:
    """The split of each file of one set, by the first of these that tells any.

    The folder it lies in, below `root` (`train/000.tar`); how its name begins
    (`train-000.tar`); and, where that makes some of them training images, a word in it
    (`imagenet-train-000.tar` beside `imagenet-val-000.tar`).
    """
    inside = [
        WORDS.get(file.parent.name.lower()) if file.parent != root else None for file in files
    ]
    if any(inside):
        return inside
    begins = [split_of(file) for file in files]
    if any(begins):
        return begins
    words = [WORD.search(file.stem.lower()) for file in files]
    found = [WORDS[word[1]] if word else None for word in words]
    return found if "train" in found else begins


def files_ending(folder: Path, ending: str) -> list[Path]:
    """The files that end so in `folder`, else in its `data/`, else in folders named as splits."""
    inside = sorted(folder.glob(f"*{ending}")) or sorted(folder.glob(f"data/*{ending}"))
    if inside:
        return inside
    below = folder.iterdir() if folder.is_dir() else ()
    found = (sub.glob(f"*{ending}") for sub in below if sub.name.lower() in WORDS)
    return sorted(file for files in found for file in files)


def in_split_order(parts: Mapping[str, T]) -> dict[str, T]:
    """What there is of train, validation and test, in this order."""
    return {name: parts[name] for name in SPLITS if name in parts}


Integers = NDArray[np.int64]

# Behind (seed, class), the stream of `stratified_split`.
SPREAD = 2
SLICE = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<first>\d+%?)?:(?P<last>\d+%?)?\])?")


class Wanted(Protocol):
    """The part of `Request` that is about splits."""

    @property
    def shown(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def test_fraction(self) -> float: ...
    @property
    def validation_fraction(self) -> float | None: ...
    @property
    def folds(self) -> int | None: ...
    @property
    def fold(self) -> int: ...
    @property
    def train_split(self) -> str | None: ...
    @property
    def test_split(self) -> str | None: ...


@dataclass
class Division:
    """Which images go where.

    Attributes:
        parts: new split -> (the split it is taken from, (n,) indices there; None: all of it).
        notes: a line for each thing that was decided.
        record: the same as plain values.
    """

    parts: dict[str, tuple[str, Integers | None]]
    notes: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)


def divide(labels: Mapping[str, Integers], wanted: Wanted) -> Division:
    """The splits that `wanted` asks for, out of those that the data has.

    In this order: named slices; folds of the training images; else a share of them as test where
    there is no test, and a share as validation where one is asked for.

    Args:
        labels: split -> (n,) class of each image; any number stands for a class.
        wanted: what the user asked for.

    Raises:
        VitcliError: a split that is not there, slices that overlap, a fold or validation images
            that would be asked for twice.
    """
    done = Division({name: (name, None) for name in labels})
    if wanted.train_split is not None or wanted.test_split is not None:
        _slice(done, labels, wanted)
    if "train" not in done.parts:
        _refuse_without_train(wanted)
        return done
    if wanted.folds is not None:
        _fold(done, labels, wanted)
        return done
    if set(done.parts) == {"train"} and wanted.test_fraction > 0:
        _set_aside_test(done, labels, wanted)
    if wanted.validation_fraction is not None:
        _set_aside_validation(done, labels, wanted)
    return done


def stratified_split(labels: Integers, fraction: float, seed: int) -> tuple[Integers, Integers]:
    """(indices to keep, indices set aside): `fraction` of each class, at least one on each side.

    A class of a single image stays on the first side.
    """
    aside = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            continue
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        rng = np.random.default_rng((seed, int(label) % 2**32))
        aside.append(rng.permutation(members)[:count])
    chosen = np.sort(np.concatenate(aside)) if aside else np.array([], dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def spread_order(labels: Integers, seed: int) -> Integers:
    """(n,) an order in which every class is spread evenly over the whole.

    So whatever is cut out of it has every class in its share, up to one image, and parts that do
    not overlap have no image in common. Within a class the order is random.
    """
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rng = np.random.default_rng((seed, int(label) % 2**32, SPREAD))
        place[rng.permutation(members)] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place, kind="stable")


def fold_of(labels: Integers, folds: int, fold: int, seed: int) -> tuple[Integers, Integers]:
    """(indices to learn from, indices held out) of fold number `fold` of `folds`."""
    order, n = spread_order(labels, seed), len(labels)
    first, last = fold * n // folds, (fold + 1) * n // folds
    held = np.sort(order[first:last])
    return np.setdiff1d(np.arange(n), held), held


@dataclass(frozen=True)
class Slice:
    """`train[:98%]`: a split of the data and where the slice begins and ends."""

    name: str
    first: str | None
    last: str | None

    def bounds(self, n: int) -> tuple[int, int]:
        """Positions in a split of n images, as Python's slices have them."""
        return _position(self.first or "0", n), _position(self.last or "100%", n)


def parse_slice(text: str) -> Slice:
    """`train`, `train[:98%]`, `test[100:]`.

    Raises:
        VitcliError: not of that form.
    """
    found = SLICE.fullmatch(text.strip())
    if found is None:
        raise VitcliError(
            f"`{text}` is no split and no slice of one", "such as `train`, `train[:98%]`"
        )
    return Slice(found["name"], found["first"], found["last"])


def _position(text: str, n: int) -> int:
    if text.endswith("%"):
        return min(n, round(n * int(text[:-1]) / 100))
    return min(n, int(text))


def _slice(done: Division, labels: Mapping[str, Integers], wanted: Wanted) -> None:
    """Only the slices that are named, as `train` and `test`."""
    chosen: dict[str, tuple[str, Integers | None]] = {}
    taken: dict[str, Integers] = {}
    for role, text in (("train", wanted.train_split), ("test", wanted.test_split)):
        if text is None:
            continue
        cut = parse_slice(text)
        if cut.name not in labels:
            close = nearest(cut.name, list(labels))
            hint = f"there are {', '.join(f'`{name}`' for name in labels)}"
            raise VitcliError(
                f"`{wanted.shown}` has no split `{cut.name}`",
                f"did you mean `{close}`?" if close else hint,
            )
        n = len(labels[cut.name])
        first, last = cut.bounds(n)
        if last <= first:
            raise VitcliError(
                f"`data.{role}_split` = `{text}` holds no image of the {n:,} of `{cut.name}`",
                "give it more",
            )
        whole = (first, last) == (0, n)
        mine = np.sort(spread_order(labels[cut.name], wanted.seed)[first:last])
        if cut.name in taken and len(np.intersect1d(taken[cut.name], mine)):
            raise VitcliError(
                f"`{wanted.train_split}` and `{text}` have images in common",
                "`train[:90%]` and `train[90%:]` have none",
            )
        taken[cut.name] = mine
        chosen[role] = (cut.name, None if whole else mine)
        done.record[f"{role}_split"] = text
        if not whole:
            done.notes.append(
                f"{wanted.shown}: {role} is `{text}`, {len(mine):,} of {n:,} images, each class in "
                f"its share, seed {wanted.seed}"
            )
    if "test" not in chosen:  # what the data has besides stays as it is
        used = {name for name, _ in chosen.values()}
        chosen |= {k: v for k, v in done.parts.items() if k not in used and k != "train"}
    elif "train" not in chosen and "train" in done.parts:
        name, part = chosen["test"]
        if name == "train":
            rest = np.setdiff1d(np.arange(len(labels[name])), taken[name])
            if part is not None and len(rest):
                chosen["train"] = ("train", rest)
        else:
            chosen["train"] = done.parts["train"]
    done.record["seed"] = wanted.seed
    done.parts = in_split_order(chosen)


def _part(done: Division, labels: Mapping[str, Integers]) -> tuple[str, Integers, Integers]:
    """The training images so far: (their split, their indices there, their labels)."""
    name, indices = done.parts["train"]
    indices = np.arange(len(labels[name])) if indices is None else indices
    return name, indices, labels[name][indices]


def _fold(done: Division, labels: Mapping[str, Integers], wanted: Wanted) -> None:
    """One of the folds of the training images is held out."""
    assert wanted.folds is not None
    if wanted.validation_fraction is not None or "validation" in done.parts:
        raise VitcliError(
            f"`{wanted.shown}`: `data.folds` hold images out, and there are validation images",
            "leave out `data.validation_fraction`; name the images with `data.train_split`",
        )
    name, indices, mine = _part(done, labels)
    if len(mine) < wanted.folds:
        raise VitcliError(
            f"`{wanted.shown}` has {len(mine)} training images for {wanted.folds} folds",
            "fewer `data.folds`",
        )
    keep, held = fold_of(mine, wanted.folds, wanted.fold, wanted.seed)
    role = "validation" if "test" in done.parts else "test"
    done.parts["train"], done.parts[role] = (name, indices[keep]), (name, indices[held])
    done.parts = in_split_order(done.parts)
    done.record |= {"folds": wanted.folds, "fold": wanted.fold, "seed": wanted.seed}
    done.notes.append(
        f"{wanted.shown}: fold {wanted.fold} of {wanted.folds} (0 to {wanted.folds - 1}) is held "
        f"out as {role}: {len(held):,} of {len(mine):,} training images, seed {wanted.seed}"
    )


def _set_aside_test(done: Division, labels: Mapping[str, Integers], wanted: Wanted) -> None:
    name, indices, mine = _part(done, labels)
    keep, aside = stratified_split(mine, wanted.test_fraction, wanted.seed)
    done.parts["train"] = (name, indices[keep])
    if len(aside):
        done.parts["test"] = (name, indices[aside])
    done.record |= {"test_fraction": wanted.test_fraction, "seed": wanted.seed}
    done.notes.append(
        f"{wanted.shown}: no test images given, so {len(aside):,} of {len(mine):,} are set aside "
        f"({wanted.test_fraction:.0%} of each class, seed {wanted.seed})"
    )


def _set_aside_validation(done: Division, labels: Mapping[str, Integers], wanted: Wanted) -> None:
    if "validation" in done.parts:
        raise VitcliError(
            f"`{wanted.shown}` has validation images, and `data.validation_fraction` asks for more",
            "leave it out",
        )
    assert wanted.validation_fraction is not None
    name, indices, mine = _part(done, labels)
    keep, aside = stratified_split(mine, wanted.validation_fraction, wanted.seed)
    done.parts["train"] = (name, indices[keep])
    done.record |= {"validation_fraction": wanted.validation_fraction, "seed": wanted.seed}
    if len(aside):
        done.parts["validation"] = (name, indices[aside])
        done.parts = in_split_order(done.parts)
    done.notes.append(
        f"{wanted.shown}: {len(aside):,} of {len(mine):,} training images are the validation set "
        f"({wanted.validation_fraction:.0%} of each class, seed {wanted.seed})"
    )


def _refuse_without_train(wanted: Wanted) -> None:
    if wanted.folds is not None or wanted.validation_fraction is not None:
        raise VitcliError(
            f"`{wanted.shown}` has no training images to take `data.folds` or "
            "`data.validation_fraction` from",
            "`--set data.train_split=NAME` names them",
        )
