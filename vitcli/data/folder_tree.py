"""The tree of the images in a folder or an archive."""

from collections.abc import Iterable, Iterator, Sequence

from vitcli.errors import quoted
from vitcli.hub.split_names import CONTAINERS, words_of

PART_WORDS = {"batch", "chunk", "fold", "part", "shard"} | CONTAINERS - {
    "categories", "category", "class", "classes", "classification"
}  # fmt: skip
MAX_NAMED = 5  # names in one note


class Folder:
    """A folder that holds images, at any depth.

    Args:
        name: its name; the name of the dataset for the root.
        path: its path below the root with a slash at the end; empty for the root.

    Attributes:
        entries: name -> folder, or None for an image, in the order of the walk.
    """

    def __init__(self, name: str, path: str = "") -> None:
        self.name, self.path = name, path
        self.entries: dict[str, Folder | None] = {}

    @property
    def files(self) -> list[str]:
        return [name for name, entry in self.entries.items() if entry is None]

    @property
    def folders(self) -> list["Folder"]:
        return [entry for entry in self.entries.values() if entry is not None]

    def walk(self) -> Iterator["Folder"]:
        """This folder and all folders below it."""
        yield self
        for folder in self.folders:
            yield from folder.walk()

    def paths(self) -> Iterator[str]:
        """The paths below the root of all images, in the order of the walk."""
        for name, entry in self.entries.items():
            if entry is None:
                yield self.path + name
            else:
                yield from entry.paths()


def tree_of(name: str, paths: Iterable[str]) -> Folder:
    """The tree of image paths such as `train/cat/1.png`."""
    root = Folder(name)
    known = {"": root}
    for path in paths:
        parent, slash, file = path.rpartition("/")
        folder = known.get(parent + slash) or _make_folder(known, parent + slash)
        folder.entries[file] = None
    return root


def _make_folder(known: dict[str, Folder], path: str) -> Folder:
    if path not in known:
        parent, slash, name = path[:-1].rpartition("/")
        known[path] = Folder(name, path)
        _make_folder(known, parent + slash).entries[name] = known[path]
    return known[path]


def is_numbered_parts(names: Sequence[str]) -> bool:
    """True for `images_001`, `images_002`, …; `class_1`, `class_2` are classes."""
    words = {tuple(words_of(name)) for name in names}
    first = set(next(iter(words), ()))
    return len(words) == 1 and len(names) > 1 and bool(first & PART_WORDS)


def named(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    return quoted(names, MAX_NAMED)
