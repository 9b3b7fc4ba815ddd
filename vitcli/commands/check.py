"""`vitcli check`: find problems of a dataset before training on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.config.recipe import load_data_check
from vitcli.config.schema import DataSection, Settings
from vitcli.data.image_set import ImageSet, Integers, Numbers
from vitcli.data.numeric_labels import distribution, far_values, has_fractions, label_values
from vitcli.data.sample_range import SampleRange, measure_samples
from vitcli.data.scan import (
    DatasetScan,
    group_duplicates,
    leaked_pairs,
    repeated_rows,
    scan_dataset,
)
from vitcli.data.source import Source, open_data
from vitcli.data.splits import with_auto_validation
from vitcli.errors import VitcliError, quoted
from vitcli.files import make_folder, writing
from vitcli.inspection.dataset_report import dataset_page, draw_samples, output_files
from vitcli.pixels import Window
from vitcli.progress import Quiet, Watcher
from vitcli.report.page import Page, write_report
from vitcli.train.defaults import USUAL_SIZE, usual_patch
from vitcli.train.imbalance import IMBALANCED, ClassSizes
from vitcli.train.objectives import objective_class

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
        training: what a training run makes of the data, or the error that it stops with.
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
        found: dict[str, list[list[int]]] = {}
        for pair in leaked_pairs(self.scan.split, self.groups).tolist():
            first, later = (self.scan.splits[int(self.scan.split[row])] for row in pair)
            found.setdefault(f"{first} -> {later}", []).append(pair)
        return found

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
        labelled = np.array([name != "" for name in self.source.classes])
        return {k: images.class_counts() * labelled for k, images in self.source.splits.items()}

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
        by_form: dict[str, list[str]] = {}
        for name in self.source.classes:
            form = "".join(c for c in name.casefold() if c.isalnum()) or name.strip()
            by_form.setdefault(form, []).append(name)
        return [names for names in by_form.values() if len(names) > 1]

    @property
    def suggestion(self) -> dict[str, int]:
        """A suitable image size and patch size, and the number of tokens."""
        if not len(self.scan):
            return {}
        side = int(np.median(self.scan.size.min(axis=1)))
        patch = usual_patch(side)
        size = min(USUAL_SIZE, max(patch, round(side / patch) * patch))
        return {"image_size": size, "patch_size": patch, "tokens": (size // patch) ** 2}

    def problems(self) -> list[str]:
        """One line per kind of problem, the most serious first."""
        lines = []
        if isinstance(self.training, VitcliError):
            lines.append(f"training stops: {self.training.message}")
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
        kinds = [
            (self.unlabelled, "image has no label", "images have no label"),
            (len(self.scan.unreadable), "image cannot be read", "images cannot be read"),
            (
                len(self.conflicts),
                "group of equal images has different labels",
                "groups of equal images have different labels",
            ),
            (
                sum(len(group) - 1 for group in self.exact_duplicates),
                "image is an exact copy of another",
                "images are exact copies of others",
            ),
            (
                sum(len(group) - 1 for group in self.near_duplicates),
                "image looks the same as another",
                "images look the same as others",
            ),
            (
                len(self.tiny),
                f"image has a side below {TINY} px",
                f"images have a side below {TINY} px",
            ),
            (
                len(self.odd_aspect),
                f"image has an aspect ratio above {ODD_ASPECT:g}",
                f"images have an aspect ratio above {ODD_ASPECT:g}",
            ),
        ]
        lines += [counted(count, one, more) for count, one, more in kinds if count]
        lines += [
            f"class names that differ only in case or punctuation: {quoted(names)}"
            for names in self.label_variants[:MAX_EXAMPLES]
        ]
        if self.source.numeric:
            return [*lines, *self._number_problems()]
        if self.class_sizes and self.imbalance >= IMBALANCED:
            lines.append(self.class_sizes.describe())
        counts = next(iter(self.counts.values()))
        classes = zip(self.source.classes, counts, strict=True)
        if few := [name for name, count in classes if name and count < FEW]:
            found = counted(len(few), "class has", "classes have")
            lines.append(f"{found} fewer than {FEW} images: {quoted(few[:MAX_EXAMPLES])}")
        return lines

    def _number_problems(self) -> list[str]:
        lines: list[str] = []
        if self.values is None:
            return lines
        far = far_values(self.values)
        if self.values.min() == self.values.max():
            lines.append(f"all numbers are {self.values[0]:.6g}, so there is nothing to learn")
        if len(far):
            found = counted(len(far), "number is", "numbers are")
            lines.append(
                f"{found} far from all others, such as {far[0]:.6g}; remove them if they mean "
                "`unknown`"
            )
        return lines

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
            "notes": list(self.training.notes),
        }

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
        scan, size = self.scan, self.scan.size
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
            "height": _min_median_max(size[:, 0]),
            "width": _min_median_max(size[:, 1]),
            "samples": self._samples_json(),
            "suggested": self.suggestion,
            "suggested_objective": None if self.values is None else "mse",
            "sheet": self.sheet,
            "report": self.report,
        }


def counted(count: int, one: str, more: str) -> str:
    """`1 image is …` or `2 images are …`."""
    return f"{count:,} {one if count == 1 else more}"


def _min_median_max(values: Integers) -> dict[str, int] | None:
    if not len(values):
        return None
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}


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
