"""Folder layouts: which folders are splits, which are classes, and which are neither.

`read_layout` is a pure function from the image paths of a folder or an archive to the images of
each split and class. It notes each decision that a user may want to change.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vitcli.data.folder_tree import Folder, is_numbered_parts, named
from vitcli.data.labels import label_text, merged_note, sorted_classes
from vitcli.data.masks import drop_masks
from vitcli.data.splits import in_split_order
from vitcli.errors import VitcliError, counted, printable
from vitcli.hub.split_names import (
    CONTAINERS,
    SPLITS,
    folder_split,
    folder_splits,
    is_container,
    words_of,
)


@dataclass
class SplitImages:
    """The images of a split.

    Attributes:
        base: the folder that holds its classes, below the root, with a slash at the end.
        classes: class name -> image paths below the root.
        loose: images of `base` that are in no class folder.
    """

    base: str
    classes: dict[str, list[str]] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)


@dataclass
class Layout:
    """What a folder holds.

    Attributes:
        splits: split -> its images.
        rule: the layout in a line, such as `seg_train/seg_train/CLASS/*`.
        notes: what was skipped or assumed.
    """

    splits: dict[str, SplitImages]
    rule: str
    notes: list[str]


def read_layout(root: Folder, shown: str, level: str = "auto") -> Layout:
    """The splits and classes of a tree of images; masks are removed from `root`.

    Args:
        root: from `tree_of`.
        shown: the name of the data in messages.
        level: `data.class_level`.

    Raises:
        VitcliError: only some classes have folders for splits.
    """
    notes: list[str] = []
    drop_masks(root, shown, notes)
    base = _unwrap(root, notes, shown)
    bodies = _split_bodies(base, shown, notes)
    if not bodies:
        base, bodies = _one_with_splits(base, shown, notes)
    inner = None if bodies else _splits_in_classes(base, shown)
    if inner is not None:
        names = in_split_order({split: None for one in inner.values() for split in one})
        splits = {split: SplitImages(base.path) for split in names}
        for name, by_split in inner.items():
            for split, folders in by_split.items():
                paths = [path for one in folders for path in one.paths()]
                splits[split].classes.setdefault(_class_name(name), []).extend(paths)
        rule = f"{base.path}CLASS/SPLIT/*"
        notes += [f"{shown}: splits are folders in each class: {rule}", *merged_note(shown, inner)]
        return _sorted_layout(splits, rule, notes)
    bodies = bodies or {"train": [base]}
    for body in next(iter(bodies.values())):
        _drop_repeated(_unwrap(body, None, shown), shown, notes)
    level, said = _class_level(next(iter(bodies.values())), level)
    splits, rules, written = {}, [], set()
    for split, folders in bodies.items():
        known = set(splits["train"].classes) if "train" in splits else None
        opened = [_unwrap(one, None, shown, known) for one in folders]
        for body in opened:
            _drop_repeated(body, shown, notes)
        images = SplitImages(opened[0].path if len(opened) == 1 else base.path)
        for body in opened:
            images.loose += [body.path + file for file in body.files]
            for name, paths in _classes(body, level):
                images.classes.setdefault(_class_name(name), []).extend(paths)
                written.add(name)
            inside = "*" if not body.folders else "CLASS/*" if level == "top" else "…/CLASS/*"
            rules.append(body.path + inside)
        splits[split] = images
    if said:
        notes.append(f"{shown}: {said}")
    return _sorted_layout(splits, ", ".join(rules), [*notes, *merged_note(shown, written)])


def _sorted_layout(splits: dict[str, SplitImages], rule: str, notes: list[str]) -> Layout:
    for images in splits.values():
        images.classes = {name: images.classes[name] for name in sorted_classes(images.classes)}
    return Layout(splits, rule, notes)


def _class_name(folder: str) -> str:
    """The name of a class folder as a label: macOS and Linux encode accents differently."""
    return label_text(folder) or folder


# Wrappers: folders that only hold the folder that matters


def _unwrap(
    folder: Folder, notes: list[str] | None, shown: str, known: set[str] | None = None
) -> Folder:
    """The folder that holds the splits or the classes, below folders that hold nothing else.

    Args:
        known: classes of the training images, which are not wrappers; None where all names count.
    """
    first = folder
    while len(folder.folders) == 1:
        (child,) = folder.folders
        beside = folder.files
        if not _is_wrapper(folder, child) or _class_name(child.name) in (known or ()):
            break
        if beside and (notes is None or not child.folders):
            break
        if beside and notes is not None:
            skipped = counted(len(beside), "image", "images")
            notes.append(f"{shown}: skipped {skipped} beside `{printable(child.path)}`")
        folder = child
    if notes is not None and folder is not first:
        notes.append(f"{shown}: the data are in `{printable(folder.path)}`")
    return folder


def _is_wrapper(parent: Folder, child: Folder) -> bool:
    own = folder_split(child.name)
    if parent.name.casefold() == child.name.casefold():
        return True
    if own is not None and not own[1]:  # `train/` alone is a split, `train/train_images/` is not
        return folder_split(parent.name) == own
    if is_container(child.name) or (child.folders and CONTAINERS & set(words_of(child.name))):
        return True
    splits = {found[0] for one in child.folders if (found := folder_split(one.name))}
    if "train" in splits and len(splits) > 1:
        return True
    inner = child.folders[0] if len(child.folders) == 1 and not child.files else None
    return inner is not None and bool(inner.folders) and _is_wrapper(child, inner)


# Splits


def _split_bodies(base: Folder, shown: str, notes: list[str]) -> dict[str, list[Folder]]:
    """Split -> its folders; {} if the folders of `base` are classes."""
    meanings = folder_splits(folder.name for folder in base.folders)
    bodies: dict[str, list[Folder]] = {}
    others, said = [], []
    # A plain name goes before an alias: `validation` before `dev`.
    for folder in sorted(base.folders, key=lambda folder: folder.name.lower() not in SPLITS):
        split = meanings.get(folder.name)
        if split is None:
            others.append(folder)
            continue
        same = bodies.setdefault(split, [])
        # `train_1` and `train_2` are parts of one split; `val` beside `validation` is not.
        if not same or _without_digits(same[0].name) == _without_digits(folder.name):
            same.append(folder)
        else:
            skipped, kept = printable(folder.name), printable(same[0].name)
            said.append(f"{shown}: skipped `{skipped}`, because `{kept}` is the {split} split")
    if "train" not in bodies and others:
        return _beside_test_set(base, shown, notes)
    # `train/` that holds images only, beside `car/` and `bus/`, is a class of vehicles.
    if others and not any(one.folders for folders in bodies.values() for one in folders):
        return {}
    if others:
        names = named(sorted(folder.name for folder in others))
        said.append(f"{shown}: skipped folders that are not splits: {names}")
    notes += said
    return in_split_order(bodies)


def _beside_test_set(base: Folder, shown: str, notes: list[str]) -> dict[str, list[Folder]]:
    """`photos/CLASS` beside `photos_test/`: all other folders are for testing or validation."""
    meanings = {folder.name: folder_split(folder.name) for folder in base.folders}
    rest = [folder for folder in base.folders if meanings[folder.name] is None]
    if not (len(rest) == 1 < len(base.folders) and _is_wrapper(base, rest[0])):
        return {}
    if len(rest[0].folders) < 2:
        return {}
    bodies = {"train": rest}
    for folder in base.folders:
        if (found := meanings[folder.name]) is not None:
            bodies.setdefault(found[0], []).append(folder)
    beside = named([folder.name for folder in base.folders if folder is not rest[0]])
    notes.append(
        f"{shown}: `{printable(rest[0].name)}` is the train split, because {beside} beside it is "
        "for testing or validation"
    )
    return bodies


def _one_with_splits(
    base: Folder, shown: str, notes: list[str]
) -> tuple[Folder, dict[str, list[Folder]]]:
    """The only folder with splits of class folders: `data/train/CLASS` beside `docs/`."""
    found = []
    for folder in base.folders:
        bodies = _split_bodies(folder, shown, [])
        if len(bodies) > 1 and any(one.folders for one in bodies.get("train", [])):
            found.append((folder, bodies))
    if len(found) != 1 or len(base.folders) == 1:
        return base, {}
    folder, bodies = found[0]
    others = named(sorted(one.name for one in base.folders if one is not folder))
    notes.append(f"{shown}: the data are in `{printable(folder.path)}`; skipped {others}")
    return folder, bodies


def _without_digits(name: str) -> str:
    return re.sub(r"\d+", "", name)


def _splits_in_classes(
    base: Folder, shown: str
) -> Mapping[str, Mapping[str, Sequence[Folder]]] | None:
    """Class -> split -> folders for `CLASS/train/*`, `CLASS/test/*`; None for other layouts."""
    found = {}
    for folder in base.folders:
        bodies = {} if folder.files else _split_bodies(folder, shown, [])
        inside = sum(len(folders) for folders in bodies.values())
        if "train" in bodies and len(bodies) > 1 and inside == len(folder.folders):
            found[folder.name] = bodies
    without = [folder.name for folder in base.folders if folder.name not in found]
    if found and without:
        some = next(iter(found))
        raise VitcliError(
            f"`{shown}`: class `{printable(some)}` has folders for splits, "
            f"`{printable(without[0])}` has none",
            "give each class the same folders, such as `train/` and `test/`",
        )
    return {name: found[name] for name in sorted_classes(found)} if found else None


# Classes


def _classes(body: Folder, level: str) -> Iterator[tuple[str, list[str]]]:
    """(class name, image paths below the root) of each class folder of a split."""
    for folder in body.folders:
        if level == "top":
            yield folder.name, list(folder.paths())
            continue
        for leaf in folder.walk():
            if leaf.files:
                path = _without_containers(leaf.path[len(body.path) : -1])
                name = path if level == "path" else path.rpartition("/")[2]
                yield name, [leaf.path + file for file in leaf.files]


def _drop_repeated(body: Folder, shown: str, notes: list[str]) -> None:
    """Remove a folder that repeats the class folders beside it."""
    names = {folder.name for folder in body.folders}
    for folder in body.folders:
        inside = {one.name for one in folder.folders}
        if len(inside) > 1 and not folder.files and inside <= names - {folder.name}:
            del body.entries[folder.name]
            skipped = printable(folder.path)
            notes.append(f"{shown}: skipped `{skipped}`, which repeats the class folders beside it")


def _without_containers(path: str) -> str:
    """`cat/images` -> `cat`."""
    first, *parts = path.split("/")
    kept = [part for part in parts if not is_container(part)]
    return "/".join([first, *kept])


def _class_level(bodies: Sequence[Folder], level: str) -> tuple[str, str | None]:
    """(the level of the classes: top, leaf or path; a note, or None if there is one level)."""
    opened = [_unwrap(body, None, "") for body in bodies]
    tops = {_class_name(top.name) for body in opened for top in body.folders}
    leaves = {
        _class_name(
            _without_containers(leaf.path[len(body.path) : -1])
        ): None  # a set that keeps the order
        for body in opened
        for top in body.folders
        for leaf in top.walk()
        if leaf.files
    }
    deep = [path for path in leaves if "/" in path]
    if not deep or (level == "auto" and len(tops) == 1):
        return ("top" if level == "auto" else level), None
    names = Counter(path.rpartition("/")[2] for path in leaves)
    repeated = [name for name, count in names.items() if count > 1]
    if level == "leaf" and repeated:
        return level, (
            f"innermost folders with the same name, such as {named(repeated)}, are one class; to "
            "keep them apart: `--set data.class_level=path`"
        )
    if level != "auto":
        return level, None
    if is_numbered_parts(sorted(tops)) and repeated and len(deep) == len(leaves):
        parts = named(sorted(tops))
        return "leaf", f"{parts} are parts; the classes are the folders in them: {named(repeated)}"
    # A taxonomy: two words or more under each of several top folders, and none of them twice.
    # Years, patients and sessions have digits, or they are the same under each class.
    words = Counter(path.partition("/")[0] for path in deep if re.search(r"/[^/\d]+$", path))
    taxonomy = all(path.count("/") == 1 for path in leaves) and not repeated and len(tops) > 1
    if taxonomy and sum(words.values()) == len(leaves) and min(words.values()) > 1:
        return "leaf", (
            f"the classes are the {len(deep)} innermost folders, such as `{printable(deep[0])}`; "
            f"for the {len(tops)} top folders: `--set data.class_level=top`"
        )
    return "top", (
        f"the classes are the {len(tops)} top folders, which have subfolders such as "
        f"`{printable(deep[0])}`; for the innermost folders: `--set data.class_level=leaf`"
    )
