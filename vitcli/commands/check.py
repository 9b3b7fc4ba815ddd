"""`vitcli check`: find problems of a dataset before training on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.config.recipe import load_data_check
from vitcli.config.schema import DataSection, Settings
from vitcli.data.facts import measure_data
from vitcli.data.image_set import ImageSet, Integers, Numbers
from vitcli.data.labels import spelling_variants
from vitcli.data.numeric_labels import distribution, has_fractions, label_values, number_problems
from vitcli.data.sample_range import SampleRange, measure_samples
from vitcli.data.scan import (
    DatasetScan,
    group_duplicates,
    leaked_pairs,
    repeated_rows,
    scan_dataset,
    split_numbers,
)
from vitcli.data.source import Source, open_data
from vitcli.data.splits import with_auto_validation
from vitcli.errors import VitcliError, counted, quoted
from vitcli.files import make_folder, writing
from vitcli.inspection.dataset_report import dataset_page, draw_samples, output_files
from vitcli.pixels import Window
from vitcli.progress import Quiet, Watcher
from vitcli.report.page import Page, write_report
from vitcli.train.defaults import default_size
from vitcli.train.imbalance import IMBALANCED, ClassSizes
from vitcli.train.objectives import objective_class
from vitcli.train.resolve import this_machine

MAX_EXAMPLES = 5  # class names in one line
TINY = 16  # px, of the shorter side
ODD_ASPECT = 3.0
FEW = 5  # images per class that few-shot evaluation and a split need at least


@dataclass(frozen=True)
class CheckResult:
    """The problems of one dataset.

    Attributes:
        data: DATA as the user wrote it.
        source: its splits and classes.
        training: the splits that a training run makes of the data, or the error that it stops with.
        scan: the facts about each readable image; a "row" below is a row of it.
        samples: the wide samples of the training images; None if they have 8 bits.
        window: the window that training takes for them.
        groups: (n,) group numbers, equal for images that show the same.
        sheet: file of the contact sheet, or None.
        report: file of the report, or None.
    """

    data: str
    source: Source
    training: Source | VitcliError
    scan: DatasetScan
    groups: Integers
    sheet: str | None
    samples: SampleRange | None = None
    window: Window | None = None
    report: str | None = None

    @cached_property
    def values(self) -> Numbers | None:
        """(n,) the labels of all splits as numbers; None if they are words or several per image."""
        return label_values(self.source)

    def name(self, row: int) -> str:
        """The name of the image of a row."""
        return self._split_of(row).describe(int(self.scan.index[row]))

    def label(self, row: int) -> str:
        """The class of the image of a row, or its classes."""
        return self._split_of(row).label_name(int(self.scan.index[row]))

    def _split_of(self, row: int) -> ImageSet:
        return self.source.splits[self.scan.splits[int(self.scan.split[row])]]

    def _names(self, rows: Sequence[int] | Integers) -> list[str]:
        return [self.name(int(row)) for row in rows]

    @cached_property
    def exact_duplicates(self) -> list[Integers]:
        """Groups of rows with equal stored bytes."""
        _, which = np.unique(self.scan.digest, return_inverse=True)
        return repeated_rows(which)

    @cached_property
    def near_duplicates(self) -> list[Integers]:
        """Groups of rows that show the same, but not all with equal bytes."""
        digests = self.scan.digest
        return [g for g in repeated_rows(self.groups) if len(np.unique(digests[g])) > 1]

    @cached_property
    def duplicates(self) -> list[Integers]:
        """All groups of rows that show the same."""
        return repeated_rows(self.groups)

    @cached_property
    def leaks(self) -> dict[str, list[list[int]]]:
        """`train -> test` -> pairs of rows that show the same, one pair per leaked image."""
        # First those in two splits of the data, then those in splits that training makes.
        found: dict[str, list[list[int]]] = {}
        told: set[int] = set()
        made = self.training_split, tuple(self.training_splits)
        for numbers, names in ((self.scan.split, self.scan.splits), made):
            pairs = [p for p in leaked_pairs(numbers, self.groups).tolist() if p[1] not in told]
            for pair in pairs:
                first, later = (names[int(numbers[row])] for row in pair)
                found.setdefault(f"{first} -> {later}", []).append(pair)
            told |= {later for _, later in pairs}
        return found

    @property
    def training_splits(self) -> Mapping[str, ImageSet]:
        """The splits that training makes; empty if it stops."""
        return {} if isinstance(self.training, VitcliError) else self.training.splits

    @cached_property
    def training_split(self) -> Integers:
        """(n,) the place of the split in `training_splits` of each row; -1: in none."""
        names = ((self._split_of(row).name, self.name(row)) for row in range(len(self.scan)))
        return split_numbers(names, self.training_splits)

    @cached_property
    def conflicts(self) -> list[Integers]:
        """Groups of rows that show the same and have different labels."""
        return [g for g in self.duplicates if len({self.label(int(row)) for row in g} - {""}) > 1]

    @cached_property
    def tiny(self) -> Integers:
        """Rows with a side below TINY pixels."""
        return np.flatnonzero(self.scan.size.min(axis=1) < TINY)

    @cached_property
    def odd_aspect(self) -> Integers:
        """Rows whose longer side is more than ODD_ASPECT times the shorter side."""
        size = self.scan.size
        return np.flatnonzero(size.max(axis=1) > ODD_ASPECT * size.min(axis=1))

    @cached_property
    def counts(self) -> dict[str, NDArray[np.int64]]:
        """Split -> (K,) images per class, including unreadable images; 0 for the class `""`."""
        named = np.array([name != "" for name in self.source.classes])
        return {k: images.class_counts() * named for k, images in self.source.splits.items()}

    @property
    def unlabelled(self) -> int:
        """Images without a label, which have the class `""`."""
        classes = self.source.classes
        splits = self.source.splits.values()
        return sum(int(s.class_counts()[classes.index("")]) for s in splits) if "" in classes else 0

    @property
    def class_sizes(self) -> ClassSizes | None:
        """The largest and the smallest class of the first split."""
        counts = next(iter(self.counts.values()))
        return ClassSizes.of(counts, self.source.classes, self.source.multi_label)

    @property
    def imbalance(self) -> float:
        """Size of the largest class divided by that of the smallest, in the first split."""
        return self.class_sizes.ratio if self.class_sizes else 1.0

    @property
    def label_variants(self) -> list[list[str]]:
        """Groups of class names that differ only in case, spaces, `_` or `-`."""
        return spelling_variants(self.source.classes)

    @cached_property
    def suggestion(self) -> dict[str, int]:
        """The image size and patch size of `pretrain` here, and the number of tokens."""
        source = self.source if isinstance(self.training, VitcliError) else self.training
        if not len(self.scan) or "train" not in source.splits:
            return {}
        size, patch = default_size(measure_data(source), this_machine())
        return {"image_size": size, "patch_size": patch, "tokens": (size // patch) ** 2}

    def problems(self) -> list[str]:
        """One line per kind of problem, the most serious first."""
        lines = []
        if isinstance(self.training, VitcliError):
            words = filter(None, (self.training.message, self.training.hint))
            lines.append(f"training stops: {'; '.join(words)}")
        if not len(self.scan):
            lines.append("no image can be read")
        if self.samples and self.samples.is_dark:
            lines.append(
                f"{self.samples.describe()}: images are nearly black in programs that take 65535 "
                "as white; training takes the window above"
            )
        for key, pairs in self.leaks.items():
            first, _, later = key.partition(" -> ")
            found = counted(len(pairs), f"{later} image is", f"{later} images are")
            lines.append(f"{found} also in {first} ({key}): accuracy on {later} is unreliable")
        inside = self._conflicts_in_training()
        kinds = [
            (self.unlabelled, "image has no label", "images have no label"),
            (len(self.scan.unreadable), "image cannot be read", "images cannot be read"),
            (
                len(self.conflicts),
                f"group of images that look the same has different labels{inside}",
                f"groups of images that look the same have different labels{inside}",
            ),
        ]
        lines += [counted(count, one, more) for count, one, more in kinds if count]
        for groups, one, more in (
            (self.exact_duplicates, "is an exact copy of another", "are exact copies of others"),
            (self.near_duplicates, "looks the same as another", "look the same as others"),
        ):
            if count := sum(len(group) - 1 for group in groups):
                there = f" ({counted(len(groups), 'group', 'groups')})" if count > 1 else ""
                lines.append(counted(count, f"image {one}", f"images {more}") + there)
        for rows, what in (
            (self.tiny, f"a side below {TINY} px"),
            (self.odd_aspect, f"an aspect ratio above {ODD_ASPECT:g}"),
        ):
            if len(rows):
                lines.append(f"{counted(len(rows), 'image has', 'images have')} {what}")
        lines += [
            f"class names that differ only in case or punctuation: {quoted(names)}"
            for names in self.label_variants[:MAX_EXAMPLES]
        ]
        if (left := len(self.label_variants) - MAX_EXAMPLES) > 0:
            lines[-1] += f"; and {counted(left, 'more group', 'more groups')} of names"
        if self.source.numeric:
            return lines if self.values is None else [*lines, *number_problems(self.values)]
        if self.class_sizes and self.imbalance >= IMBALANCED:
            lines.append(self.class_sizes.describe())
        counts = next(iter(self.counts.values()))
        classes = zip(self.source.classes, counts, strict=True)
        if few := [name for name, count in classes if name and count < FEW]:
            found = counted(len(few), "class has", "classes have")
            lines.append(f"{found} fewer than {FEW} images: {quoted(few, MAX_EXAMPLES)}")
        return lines

    def _conflicts_in_training(self) -> str:
        """The number of conflicts that training reports, which looks at its own images only."""
        train = [group[self.training_split[group] == 0] for group in self.conflicts]
        count = sum(len({self.label(int(row)) for row in g} - {""}) > 1 for g in train)
        if count == len(self.conflicts) or "train" not in self.training_splits:
            return ""
        return f" ({count:,} of them within the training images)"

    def _suggested_setting(self) -> str | None:
        if self.source.numeric or self.class_sizes is None or self.imbalance < IMBALANCED:
            return None
        return self.class_sizes.setting

    def _training_json(self) -> dict[str, Any]:
        if isinstance(self.training, VitcliError):
            return {"error": self.training.message, "hint": self.training.hint}
        return {
            "splits": {name: len(images) for name, images in self.training.splits.items()},
            "classes": len(self.training.classes),
            "unreadable": self._unreadable_in_training(),
            "notes": list(self.training.notes),
        }

    def _unreadable_in_training(self) -> dict[str, int]:
        names = [("", name) for name, _ in self.scan.unreadable]
        numbers = split_numbers(names, self.training_splits)
        counts = np.bincount(numbers[numbers >= 0], minlength=len(self.training_splits))
        return dict(zip(self.training_splits, counts.tolist(), strict=True))

    def _samples_json(self) -> dict[str, Any] | None:
        if self.samples is None:
            return None
        return {
            "bits": self.samples.bits,
            "min": self.samples.low,
            "max": self.samples.high,
            "images": self.samples.num_images,
            "window": list(self.window or self.samples.window),
        }

    def to_json(self) -> dict[str, Any]:
        """The object of `check --json`."""
        scan = self.scan
        return {
            "data": self.data,
            "images": len(scan) + len(scan.unreadable),
            "splits": {name: len(images) for name, images in self.source.splits.items()},
            "classes": {
                name: {split: int(counts[k]) for split, counts in self.counts.items()}
                for k, name in enumerate(self.source.classes)
                if name
            },
            "numbers": None if self.values is None else distribution(self.values),
            "layout": self.source.layout,
            "notes": list(self.source.notes),
            "training": self._training_json(),
            "problems": self.problems(),
            "unreadable": [{"path": name, "reason": why} for name, why in scan.unreadable],
            "exact_duplicates": [self._names(group) for group in self.exact_duplicates],
            "near_duplicates": [self._names(group) for group in self.near_duplicates],
            "leaks": {key: [self._names(p) for p in pairs] for key, pairs in self.leaks.items()},
            "label_conflicts": [
                [{"path": self.name(int(r)), "label": self.label(int(r))} for r in group]
                for group in self.conflicts
            ],
            "imbalance": self.imbalance,
            "suggested_setting": self._suggested_setting(),
            "label_variants": self.label_variants,
            "tiny": [self.name(int(row)) for row in self.tiny],
            "odd_aspect": [self.name(int(row)) for row in self.odd_aspect],
            "height": scan.side_range(0),
            "width": scan.side_range(1),
            "samples": self._samples_json(),
            "suggested": self.suggestion,
            "suggested_objective": None if self.values is None else "mse",
            "sheet": self.sheet,
            "report": self.report,
        }


def run(
    data: str,
    *,
    settings: Settings | None = None,
    out: Path | None = None,
    workers: int | None = None,
    watch: Watcher | None = None,
) -> CheckResult:
    """Scan every image of a dataset once.

    Args:
        data: DATA, checked with all its splits.
        settings: nested settings, such as `data.label_column`.
        out: a folder for the report and the samples of each class, or a PNG file for the samples.
        workers: threads that read; None uses one per core.
        watch: receives progress.

    Raises:
        VitcliError: the data cannot be read, or `out` cannot be written.
    """
    watch, given = watch or Quiet(), load_data_check(settings)
    section, window = given.data, given.preprocess.window
    numeric = objective_class(given.objective.name).regression
    sheet, page = output_files(out)
    open_whole = partial(open_data, section, data, whole=True, labelled=False, watch=watch)
    source: Source = open_whole(numeric=numeric)
    if not numeric and has_fractions(source):  # which no classifier takes
        source = open_whole(numeric=True)
    training = _open_for_training(section, data, numeric)
    made = () if isinstance(training, VitcliError) else training.notes
    for line in dict.fromkeys([*source.notes, *made]):
        watch.note(line)
    seen = source if isinstance(training, VitcliError) else training
    samples = measure_samples(next(iter(seen.splits.values())))
    window = window or (samples.window if samples else None)
    scan = scan_dataset(source, window=window, workers=workers, watch=watch)
    watch.note("comparing images")
    groups = group_duplicates(scan.hashes, scan.thumbnails)
    paths = [None if path is None else str(path) for path in (sheet, page)]
    result = CheckResult(data, source, training, scan, groups, paths[0], samples, window, paths[1])
    if page is not None:
        make_folder(page.parent)
    if sheet is not None:
        with writing(sheet) as temporary:
            draw_samples(source, scan, window, f"samples of {data}").save(temporary, format="PNG")
    if page is not None:
        write_report(page, partial(_make_page, result), watch)
    return result


def _open_for_training(section: DataSection, data: str, numeric: bool) -> Source | VitcliError:
    """The splits and classes that a training run with these settings gets, or its error."""
    if not data.startswith("builtin:"):  # these have recipes of their own
        section = with_auto_validation(section)
    try:
        return open_data(section, data, numeric=numeric)
    except VitcliError as error:
        return error


def _make_page(result: CheckResult) -> Page:
    """The report, with thumbnails of the images."""
    groups: dict[str, Any] = {
        **result.leaks,
        "label_conflicts": result.conflicts,
        "exact_duplicates": result.exact_duplicates,
        "near_duplicates": result.near_duplicates,
    }
    return dataset_page(result.to_json(), groups, result.source, result.scan, result.window)
