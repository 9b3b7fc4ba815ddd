"""Which split the name of a folder, a file or a column means: `train`, `seg_test`, `dev-00000`."""

import re
from collections.abc import Iterable, Sequence

SPLITS = ("train", "validation", "test")
# The words of the Hub's loader (`SPLIT_KEYWORDS` in `datasets/data_files.py`), and `trainval` of
# Pascal VOC, which is for training.
SPLIT_ALIASES = {
    "train": "train",
    "training": "train",
    "trainval": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
SPLIT_FORM = re.compile(
    rf"({'|'.join(sorted(SPLIT_ALIASES, key=len, reverse=True))})"
    r"(?:set|data|images?|imgs?|folder|split|labels?|list)?"
)
# Words that say nothing about a class. A folder with one of them in its name can be a wrapper.
CONTAINERS = frozenset({
    "archive", "archives", "categories", "category", "class", "classes", "classification", "crop",
    "cropped", "data", "dataset", "datasets", "dir", "folder", "folders", "image", "images",
    "imageset", "img", "imgs", "jpeg", "jpegs", "jpg", "jpgs", "original", "originals", "photo",
    "photos", "pic", "pics", "picture", "pictures", "png", "pngs", "raw", "resized", "rgb",
    "sample", "samples", "set", "sets", "split",
})  # fmt: skip
Meaning = tuple[str, tuple[str, ...]]  # the split that a name means, and the other words


def words_of(name: str) -> list[str]:
    """`TrainSet-2` -> ["train", "set"]: the words of a name, without digits."""
    separated = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    return re.findall(r"[^\W\d_]+", separated.lower())


def is_container(name: str) -> bool:
    """True for `images`, `raw-img`: a name that says nothing about a class."""
    words = set(words_of(name))
    return bool(words) and words <= CONTAINERS


def split_words(name: str) -> list[str | None]:
    """The split that each word means: `seg_train-01` -> [None, "train"]."""
    found = map(SPLIT_FORM.fullmatch, words_of(name))
    return [SPLIT_ALIASES[word[1]] if word else None for word in found]


def folder_split(name: str) -> Meaning | None:
    """(the split that a folder name means, its other words) for `train_set`, `seg_train`, …

    A folder with other words is a split only beside its counterpart: `seg_train` and `seg_test`.
    """
    meant = split_words(name)
    hits = [split for split in meant if split is not None]
    if len(hits) != 1:
        return None
    words = zip(words_of(name), meant, strict=True)
    return hits[0], tuple(w for w, split in words if split is None and w not in CONTAINERS)


def folder_splits(names: Iterable[str]) -> dict[str, str]:
    """Name -> split, for those of some folders beside each other that are splits."""
    names = list(names)
    meanings = {name: found for name in names if (found := folder_split(name)) is not None}
    meant = {split for split, _ in meanings.values()}
    plain = any(not rest for _, rest in meanings.values())
    if plain and "train" in meant and 1 < len(meant) == len(meanings) == len(names):
        # `train_mini` beside `val`: all folders are splits, and each is another one.
        return {name: split for name, (split, _) in meanings.items()}
    stems: dict[tuple[str, ...], set[str]] = {}
    for split, rest in meanings.values():
        stems.setdefault(rest, set()).add(split)
    return {
        name: split for name, (split, rest) in meanings.items() if not rest or len(stems[rest]) > 1
    }


def file_splits(names: Sequence[str]) -> list[str | None]:
    """The split of each file of a dataset, by its name without the suffix.

    The first word decides: `train-00000-of-00004`. If no name begins with a split, any word does,
    provided that a file is for training: `imagenet-train-000`, `imagenet-val-000`.
    """
    meant = [_unless_divider(split_words(name)) for name in names]
    first = [words[0] if words else None for words in meant]
    if any(first):
        return first
    found = [next(filter(None, words), None) for words in meant]
    return found if "train" in found else first


def _unless_divider(splits: list[str | None]) -> list[str | None]:
    """`train_test_split` tells the splits apart, and is none of them."""
    return [] if {"train", "test"} <= set(splits) else splits


def split_of_paths(paths: Sequence[str]) -> list[str | None]:
    """The split of each file, by the folders in its path, else by the names of the files.

    Args:
        paths: below a common folder, with `/` between the parts.
    """
    parts = [path.split("/") for path in paths]
    meant = folder_splits({folder for path in parts for folder in path[:-1]})
    inner = [next((meant[f] for f in reversed(path[:-1]) if f in meant), None) for path in parts]
    if any(inner):
        return inner
    return file_splits([path[-1].rpartition(".")[0] or path[-1] for path in parts])
