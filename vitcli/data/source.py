"""From DATA to a `Source`: the images, labels and class names of each split.

A reader (`vitcli/data/readers/`) maps a `DataRequest` to the images of the splits that the data
has. `make_source` then aligns the class names, makes the splits that were asked for, and hashes.
Nothing is decoded here.
"""

import hashlib
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitcli.config.schema import DataSection
from vitcli.data.copies import image_units, join_groups, leak_notes
from vitcli.data.image_set import ImageSet, Integers
from vitcli.data.numeric_labels import numeric_request, with_numbers
from vitcli.data.readers import READERS, expand_home, find_reader, import_function
from vitcli.data.splits import GROUP_COLUMN, divides, split_images
from vitcli.errors import VitcliError, printable
from vitcli.progress import Quiet, Watcher


@dataclass(frozen=True)
class DataRequest:
    """What a reader gets.

    Attributes:
        notation: DATA as the user wrote it.
        settings: the `[data]` section; `notation` replaces its `name`.
        whole: make no splits in addition to those of the data.
        labelled: require labels; False accepts images without labels.
        min_classes: the number of classes that the labels must have.
        watch: receives progress.
        numeric: True takes the labels as numbers to predict, False refuses fractions, and None
            takes them as class names.
    """

    notation: str
    settings: DataSection = field(default_factory=DataSection)
    whole: bool = False
    labelled: bool = True
    min_classes: int = 2
    watch: Watcher = field(default_factory=Quiet, compare=False)
    numeric: bool | None = False

    @property
    def path(self) -> Path:
        return Path(self.notation)

    @property
    def shown(self) -> str:
        """The notation as text for output."""
        return printable(self.notation)


@dataclass(frozen=True)
class Source:
    """A dataset.

    Attributes:
        notation: DATA as the user wrote it.
        splits: "train", "validation" and "test", as far as they exist.
        classes: class names; the labels of every split index into them.
        fingerprint: a hash of names, sizes, labels and splits; it does not depend on the path.
        notes: messages for the user, one line each: what was split, skipped or assumed.
        warnings: those of the notes that make figures unreliable.
        division: makes the source that `divided` gives, if the data were opened in one piece.
        splitting: how the splits were made, as plain values for a run's record.
        layout: where the images of each class were found, such as `train/CLASS/*`; or empty.
    """

    notation: str
    splits: Mapping[str, ImageSet]
    classes: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()
    splitting: Mapping[str, Any] = field(default_factory=dict)
    layout: str = ""
    warnings: tuple[str, ...] = ()
    division: "Callable[[], Source] | None" = field(default=None, compare=False, repr=False)

    def divided(self) -> "Source":
        """The same data with the splits that the settings ask for, as without `whole=True`.

        The data are not opened again.

        Raises:
            VitcliError: such splits cannot be made.
        """
        return self if self.division is None else self.division()

    def adjusted(self, change: "Callable[[Source], Source]") -> "Source":
        """`change(self)`; the divided source is changed too."""
        divide = self.division
        later = None if divide is None else lambda: divide().adjusted(change)
        return replace(change(self), division=later)

    def tell(self, watch: Watcher) -> None:
        """Print the notes; those that make figures unreliable are warnings."""
        for note in self.notes:
            (watch.warn if note in self.warnings else watch.note)(note)

    @property
    def multi_label(self) -> bool:
        """True if an image has any number of labels."""
        return any(images.targets is not None for images in self.splits.values())

    @property
    def numeric(self) -> bool:
        """True if an image has a number to predict instead of a class."""
        sets = self.splits.values()
        return any(getattr(images, "values", None) is not None for images in sets)

    def split(self, *names: str) -> ImageSet:
        """The first of these splits that exists.

        Raises:
            VitcliError: none of them exists.
        """
        for name in names:
            if name in self.splits:
                return self.splits[name]
        raise VitcliError(
            f"`{self.notation}` has no {' or '.join(f'`{name}`' for name in names)} images",
            f"it has only {', '.join(f'`{name}`' for name in self.splits)} images",
        )


def load_data(
    notation: str | os.PathLike[str],
    *,
    whole: bool = False,
    labelled: bool = True,
    watch: Watcher | None = None,
    **settings: Any,
) -> Source:
    """The dataset `notation`, for Python: `settings` are keys of `[data]`, see `DataSection`.

    Raises:
        VitcliError: as `open_data`.
    """
    section = DataSection(**settings)
    return open_data(section, os.fspath(notation), whole=whole, labelled=labelled, watch=watch)


def open_data(
    section: DataSection,
    notation: str | None = None,
    *,
    whole: bool = False,
    labelled: bool = True,
    min_classes: int = 2,
    watch: Watcher | None = None,
    streams: bool = False,
    numeric: bool = False,
) -> Source:
    """The dataset of a `[data]` section.

    Args:
        section: the settings.
        notation: DATA, if it is not `section.name`.
        whole: make no splits in addition to those of the data.
        labelled: require labels; False accepts images without labels.
        min_classes: the number of classes that the labels must have.
        watch: receives progress.
        streams: True if the caller can read a stream of training images.
        numeric: take the labels as numbers to predict.

    Raises:
        VitcliError: the data does not exist, has no images, one class, a class without training
            images, or no such column or split; or a stream where `streams` is False.
    """
    notation = expand_home(section.name or "" if notation is None else notation)
    request = DataRequest(notation, section, whole, labelled, min_classes, watch or Quiet())
    if numeric:
        request = numeric_request(request)
    elif not labelled:
        request = replace(request, numeric=None)
    if section.streaming:
        if not streams:
            raise VitcliError(
                "this command needs random access to the images, and `data.streaming` has none",
                "remove `--streaming` or `data.streaming`",
            )
        from vitcli.data.streaming import open_stream

        return open_stream(request)
    try:
        source: Source = import_function(READERS[find_reader(notation)].load)(request)
        if numeric and not source.numeric:
            raise VitcliError(
                f"`{request.shown}` generates classes, and objective `mse` predicts numbers",
                "give a table with a column of numbers",
            )
        return source
    except OSError as error:
        reason = error.strerror or str(error)
        raise VitcliError(f"cannot read `{request.shown}`: {reason}", "check the path") from None


def make_source(
    request: DataRequest,
    splits: Mapping[str, ImageSet],
    parts: Iterable[bytes],
    notes: Sequence[str],
    target: str = "value",
) -> Source:
    """Align the classes by name, make the splits that were asked for, and check them.

    Args:
        request: what the user asked for.
        splits: split name -> images; empty splits are dropped.
        parts: content of the fingerprint; labels and splits are added here.
        notes: messages for the user.
        target: the name of the numbers if `request.numeric`.

    Raises:
        VitcliError: no images, only one class, a class without training images, or splits that
            cannot be made.
    """
    shown, parts, division = request.shown, list(parts), None
    if request.whole:
        later = replace(request, whole=False, min_classes=DataRequest.min_classes)
        division = partial(make_source, later, splits, parts, notes, target)
    splits = {name: images for name, images in splits.items() if len(images)}
    if not splits:
        raise VitcliError(f"`{shown}` has no images", "give data with at least two classes")
    multi_label = any(images.targets is not None for images in splits.values())
    if request.settings.multi_label and not multi_label:
        raise VitcliError(
            f"`data.multi_label` is set, but each image of `{shown}` has exactly one class",
            "write several labels as lists (parquet, JSON lines, shards) or as `a;b` (CSV)",
        )
    if request.numeric:
        splits = {name: with_numbers(shown, images, target) for name, images in splits.items()}
    elif multi_label:
        splits = {name: _with_targets(images) for name, images in splits.items()}
    base = splits.get("train") or next(iter(splits.values()))
    if not request.labelled:
        base = _with_all_classes(base, splits)
    aligned = _align_classes(shown, base, splits)
    num_classes = len(np.unique(base.labels))
    classified = request.labelled and not request.numeric
    if classified and not multi_label and num_classes < request.min_classes:
        only = base.classes[int(base.labels[0])]
        raise VitcliError(f"`{shown}` has only one class: `{only}`", _one_class_hint(request, only))
    if classified and multi_label and not base.class_counts().any():
        raise VitcliError(
            f"no image of `{shown}` has a label",
            "check its label column, or name another: `--set data.label_column=NAME`",
        )
    labels = {name: images.labels for name, images in aligned.items()}
    groups, group_notes, warnings = _groups(request, aligned)
    for name, units in (groups or {}).items():
        aligned[name].groups = units  # so that a later split, such as for calibration, keeps them
    assigned = split_images(labels, request.settings, shown, whole=request.whole, groups=groups)
    cut = {}  # the final splits
    for name, (origin, indices) in assigned.parts.items():
        cut[name] = aligned[origin]
        if indices is not None:
            cut[name] = aligned[origin].subset(indices, name)
        elif name != origin:
            cut[name] = aligned[origin].subset(np.arange(len(aligned[origin])), name)
    hashed = [*parts, *(name.encode() + s.labels.tobytes() for name, s in cut.items())]
    hashed += [s.rows.tobytes() for s in cut.values()]
    hashed += [s.targets.tobytes() for s in cut.values() if s.targets is not None]
    hashed += [s.values.tobytes() for s in cut.values() if s.values is not None]
    record = {"images": {name: len(images) for name, images in cut.items()}, **assigned.record}
    all_notes = (*notes, *group_notes, *assigned.notes)
    return Source(
        shown, cut, base.classes, fingerprint(hashed), all_notes, record, warnings=warnings,
        division=division,
    )  # fmt: skip


def _groups(
    request: DataRequest, splits: Mapping[str, ImageSet]
) -> tuple[dict[str, Integers] | None, list[str], tuple[str, ...]]:
    """Equal numbers for images that stay in one split, by split; notes; those that are warnings."""
    settings, shown = request.settings, request.shown
    grouped = all(images.groups is not None for images in splits.values())
    if settings.group_column is not None and not grouped:
        raise VitcliError(
            f"`data.group_column` is set, but `{shown}` has no columns",
            "give a table or a parquet file with this column, or remove `data.group_column`",
        )
    divided = divides(splits, settings, whole=request.whole)
    if not request.labelled or not (divided or len(splits) > 1):
        return None, [], ()
    units = image_units(splits, request.watch, within=divided)
    notes = leak_notes(shown, units, splits) if units else []
    leaks = tuple(notes)
    if units == {}:
        notes.append(
            f"{shown}: too many images have equal sizes to look for copies of train images in the "
            f"other splits at the start; `vitcli check {shlex.quote(shown)}` does"
        )
    if not divided:
        return None, notes, leaks
    if units is None:
        units = {name: np.arange(len(images)) for name, images in splits.items()}
    elif copies := sum(len(found) - len(np.unique(found)) for found in units.values()):
        are = "image is an exact copy" if copies == 1 else "images are exact copies"
        if not grouped and all(_one_unit_per_class(splits[k], units[k]) for k in splits):
            notes.append(
                f"{shown}: all images of each class are copies of one image, so copies are in "
                "train and test, and accuracy on test means nothing"
            )
            return None, notes, (*leaks, notes[-1])
        notes.append(f"{shown}: {copies:,} {are} of other images; copies stay in the same split")
    if grouped:
        known = [images.groups for images in splits.values() if images.groups is not None]
        sizes = [len(np.unique(numbers)) for numbers in known]
        column = settings.group_column or GROUP_COLUMN
        notes.append(
            f"{shown}: images with the same `{column}` stay in the same split ({sum(sizes):,} "
            "groups)"
        )
    groups = {name: join_groups(units[name], splits[name].groups) for name in splits}
    return groups, notes, leaks


def _one_unit_per_class(images: ImageSet, units: Integers) -> bool:
    """True if nothing could be held out without a division of copies."""
    pairs = np.unique(np.stack([images.labels, units], axis=1), axis=0)
    return len(pairs) == len(np.unique(images.labels))


def fingerprint(parts: Iterable[bytes]) -> str:
    """A short hash of the parts and of their lengths."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def _one_class_hint(request: DataRequest, only: str) -> str:
    """Many archives unpack into one folder that holds the class folders."""
    inside = request.path / only
    while inside.is_dir():
        folders = [entry for entry in inside.iterdir() if entry.is_dir()]
        if len(folders) > 1:
            return f"if the subfolders of `{printable(inside)}` are the classes, give that folder"
        inside = folders[0] if folders else inside / "-"
    return "a classifier needs at least two classes; put each class into its own folder"


def _with_targets(images: ImageSet) -> ImageSet:
    """The set with a multi-hot target per image; a single label becomes a one."""
    if images.targets is None:
        images.targets = np.zeros((len(images), len(images.classes)), dtype=np.uint8)
        images.targets[np.arange(len(images)), images.labels] = 1
    return images


def _with_all_classes(base: ImageSet, splits: Mapping[str, ImageSet]) -> ImageSet:
    """`base` with the classes of all splits; those that it lacks come last."""
    others = (name for images in splits.values() for name in images.classes)
    return base.relabelled(tuple(dict.fromkeys([*base.classes, *others])))


def _align_classes(
    shown: str, base: ImageSet, splits: Mapping[str, ImageSet]
) -> dict[str, ImageSet]:
    """All splits with labels that index into the classes of `base`."""
    aligned = {}
    known = set(base.classes)
    for name, images in splits.items():
        present = [images.classes[label] for label in np.flatnonzero(images.class_counts())]
        extra = [label for label in present if label not in known]
        if extra:
            more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
            raise VitcliError(
                f"`{shown}`: class `{extra[0]}`{more} is in `{name}` but not in `{base.name}`",
                f"add training images of this class, or remove it from `{name}`",
            )
        aligned[name] = (
            images if images.classes == base.classes else images.relabelled(base.classes)
        )
    return aligned
