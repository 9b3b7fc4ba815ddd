"""Masks: folders and files that mark parts of the images beside them, and that are no images."""

import re
from collections.abc import Iterable

from vitcli.data.folder_tree import Folder, named
from vitcli.errors import counted, printable
from vitcli.hub.split_names import CONTAINERS, folder_split, is_container, words_of

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


def drop_masks(root: Folder, shown: str, notes: list[str]) -> None:
    """Remove folders and files of masks that belong to images beside them."""
    folders: list[str] = []
    files: list[str] = []
    _collect_masks(root, folders, files)
    if folders:
        notes.append(f"{shown}: skipped masks: {named(folders)}")
    if files:
        one, more = "mask file beside its image", "mask files beside their images"
        notes.append(
            f"{shown}: skipped {counted(len(files), one, more)}, such as `{printable(files[0])}`"
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
