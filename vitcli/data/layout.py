"""Folder layouts: which folders are splits, which are classes, and which are neither.

`read_layout` is a pure function from the image paths of a folder or an archive to the images of
each split and class. It notes each decision that a user may want to change.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vitcli.data.folder_tree import CONTAINERS, Folder, folder_split, is_container, named, words_of
from vitcli.data.labels import sorted_classes
from vitcli.data.splits import SPLITS, in_split_order
from vitcli.errors import VitcliError, printable

IMAGE_WORDS = frozenset({
    "image", "images", "img", "imgs", "photo", "photos", "pic", "pics", "picture", "pictures"
})  # fmt: skip
MASK_WORDS = frozenset({
    "annotation", "annotations", "bbox", "bboxes", "contour", "contours", "ground", "groundtruth",
    "groundtruths", "gt", "label", "labels", "mask", "masks", "segmentation", "segmentations",
    "truth"
})  # fmt: skip
MASK_ENDS = ("mask", "masks", "seg", "segmentation", "gt", "groundtruth")
MASK_STEM = re.compile(rf"(.+?)[ _-](?:{'|'.join(MASK_ENDS)})(?:[ _-]?\d+)?", re.I)


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
    _drop_masks(root, shown, notes)
    base = _unwrap(root, notes, shown)
    bodies = _split_bodies(base, shown, notes)
    inner = None if bodies else _splits_in_classes(base, shown)
    if inner is not None:
        names = in_split_order({split: None for one in inner.values() for split in one})
        splits = {split: SplitImages(base.path) for split in names}
        for name, by_split in inner.items():
            for split, folders in by_split.items():
                splits[split].classes[name] = [p for one in folders for p in one.paths()]
        rule = f"{base.path}CLASS/SPLIT/*"
        return Layout(splits, rule, [*notes, f"{shown}: splits are folders in each class: {rule}"])
    bodies = bodies or {"train": [base]}
    for body in next(iter(bodies.values())):
        _drop_repeated(_unwrap(body, None, shown), shown, notes)
    level, said = _class_level(next(iter(bodies.values())), level)
    splits, rules = {}, []
    for split, folders in bodies.items():
        known = set(splits["train"].classes) if "train" in splits else None
        opened = [_unwrap(one, None, shown, known) for one in folders]
        for body in opened:
            _drop_repeated(body, shown, notes)
        images = SplitImages(opened[0].path if len(opened) == 1 else base.path)
        for body in opened:
            images.loose += [body.path + file for file in body.files]
            for name, paths in _classes(body, level):
                images.classes.setdefault(name, []).extend(paths)
            inside = "*" if not body.folders else "CLASS/*" if level == "top" else "…/CLASS/*"
            rules.append(body.path + inside)
        images.classes = {name: images.classes[name] for name in sorted_classes(images.classes)}
        splits[split] = images
    if said:
        notes.append(f"{shown}: {said}")
    return Layout(splits, ", ".join(rules), notes)


# Wrappers: folders that only hold the folder that matters


def _unwrap(
    folder: Folder, notes: list[str] | None, shown: str, known: set[str] | None = None
) -> Folder:
    """The folder that holds the splits or the classes, below folders that hold nothing else.

    Args:
        known: classes of the training images, which are not wrappers; None where all names count.
    """
    first = folder
    while not folder.files and len(folder.folders) == 1:
        (child,) = folder.folders
        if not _is_wrapper(folder, child) or child.name in (known or ()):
            break
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
    meanings = {folder.name: folder_split(folder.name) for folder in base.folders}
    stems: dict[tuple[str, ...], set[str]] = {}
    for found in meanings.values():
        if found is not None:
            stems.setdefault(found[1], set()).add(found[0])
    bodies: dict[str, list[Folder]] = {}
    others = []
    # A plain name goes before an alias: `validation` before `dev`.
    for folder in sorted(base.folders, key=lambda folder: folder.name.lower() not in SPLITS):
        found = meanings[folder.name]
        if found is None or (found[1] and len(stems[found[1]]) < 2):
            others.append(folder)
            continue
        same = bodies.setdefault(found[0], [])
        # `train_1` and `train_2` are parts of one split; `val` beside `validation` is not.
        if not same or _without_digits(same[0].name) == _without_digits(folder.name):
            same.append(folder)
        else:
            notes.append(
                f"{shown}: skipped `{printable(folder.name)}`, because `{printable(same[0].name)}` "
                f"is the {found[0]} split"
            )
    if not bodies or ("train" not in bodies and others):
        return {}
    # `train/` that holds images only, beside `car/` and `bus/`, is a class of vehicles.
    if others and not any(one.folders for folders in bodies.values() for one in folders):
        return {}
    if others:
        skipped = named(sorted(folder.name for folder in others))
        notes.append(f"{shown}: skipped folders that are not splits: {skipped}")
    return in_split_order(bodies)


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
    tops = {top.name for body in opened for top in body.folders}
    leaves = {
        _without_containers(leaf.path[len(body.path) : -1]): None  # a set that keeps the order
        for body in opened
        for top in body.folders
        for leaf in top.walk()
        if leaf.files
    }
    deep = [path for path in leaves if "/" in path]
    if not deep:
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


# Masks


def _drop_masks(root: Folder, shown: str, notes: list[str]) -> None:
    """Remove folders and files of masks that belong to images beside them."""
    folders: list[str] = []
    files: list[str] = []
    _collect_masks(root, folders, files)
    if folders:
        notes.append(f"{shown}: skipped masks: {named(folders)}")
    if files:
        notes.append(
            f"{shown}: skipped {len(files):,} mask files beside their images, such as "
            f"`{printable(files[0])}`"
        )


def _collect_masks(folder: Folder, folders: list[str], files: list[str]) -> None:
    masks = [child for child in folder.folders if _is_mask_folder(child, folder)]
    for child in masks:
        del folder.entries[child.name]
        folders.append(child.path)
    files_inside = folder.files
    ends = [name for name in files_inside if _ends_like_mask(name)]
    matches = {name: found for name in ends if (found := MASK_STEM.fullmatch(_stem(name)))}
    stems = {_stem(name) for name in files_inside} if matches else set()
    for name, found in matches.items():
        if found[1] in stems:
            del folder.entries[name]
            files.append(folder.path + name)
    for child in folder.folders:
        _collect_masks(child, folders, files)


def _is_mask_folder(folder: Folder, parent: Folder) -> bool:
    """True for `masks` beside `images`, `train_masks` beside `train`, `masks` beside its images."""
    words = set(words_of(folder.name))
    if not words & MASK_WORDS:
        return False
    rest = words - MASK_WORDS - CONTAINERS
    siblings = {one.name: one for one in parent.folders if one is not folder}
    beside = {name: one for name, one in siblings.items() if not set(words_of(name)) & MASK_WORDS}
    if not rest:
        names = [name for name in beside if is_container(name)]
        splits = [found for name in beside if (found := folder_split(name)) and not found[1]]
        if splits or any(IMAGE_WORDS & set(words_of(name)) for name in names):
            return True
    else:
        names = [name for name in beside if set(words_of(name)) - CONTAINERS == rest]
    images = [path for name in names for path in beside[name].paths()]
    return _share_stems(folder, [*parent.files, *images])


def _ends_like_mask(name: str) -> bool:
    """A quick test before MASK_STEM, because a dataset can have millions of files."""
    return _stem(name).lower().rstrip("0123456789 _-").endswith(MASK_ENDS)


def _stem(path: str) -> str:
    """The file name without its suffix; `PurePosixPath.stem` takes ten times as long."""
    return path.rpartition("/")[2].rpartition(".")[0]


def _share_stems(masks: Folder, images: Iterable[str]) -> bool:
    """True if at least half of the masks have the name of an image."""
    stems = {_stem(path) for path in images}
    names = [_stem(path) for path in masks.paths()]
    paired = 0
    for name in names:
        found = MASK_STEM.fullmatch(name)
        paired += name in stems or (found is not None and found[1] in stems)
    return 2 * paired >= len(names)
