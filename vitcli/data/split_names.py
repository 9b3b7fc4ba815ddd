"""What the names of files and folders say about splits."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

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
