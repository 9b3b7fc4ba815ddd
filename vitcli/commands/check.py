"""`vitcli check`: what is wrong with a data set, before a run is spent on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.config.recipe import load_inference
from vitcli.config.schema import Settings
from vitcli.data.contact_sheet import Row, draw_sheet
from vitcli.data.image_set import Integers
from vitcli.data.scan import Survey, same_pictures, survey
from vitcli.data.source import Source, open_data
from vitcli.errors import VitcliError
from vitcli.files import replacing
from vitcli.progress import Quiet, Watcher

EXAMPLES = 5  # class names in one line
TINY = 16  # pixels of the shorter side
ODD_ASPECT = 3.0
IMBALANCED = 10.0  # images of the largest class for one of the smallest
FEW = 5  # images of a class, below which neither few-shot nor a split makes sense
SHEET_COLUMNS, SHEET_ROWS, SHEET_SIDE = 8, 40, 64
# Shorter side of the images up to -> side of a patch: about 50 to 250 tokens, and small patches
# for small images, without which training from little data fails.
PATCHES = ((20, 2), (48, 4), (128, 8))
USUAL_SIZE, USUAL_PATCH = 224, 16


@dataclass(frozen=True)
class Check:
    """The findings about one data set.

    Attributes:
        data: as it was named.
        source: its splits and classes.
        seen: a row for each readable image.
        groups: (n,) of these, by what they show.
        sheet: the picture of samples, or None.
    """

    data: str
    source: Source
    seen: Survey
    groups: Integers
    sheet: str | None

    @property
    def exit_code(self) -> int:
        """3 when some images could not be read."""
        return 3 if self.seen.unreadable else 0

    def name(self, row: int) -> str:
        """What errors call the image of a row."""
        split = self.seen.splits[int(self.seen.split[row])]
        return self.source.splits[split].describe(int(self.seen.index[row]))

    def label(self, row: int) -> str:
        """The class of the image of a row, or its classes."""
        split = self.seen.splits[int(self.seen.split[row])]
        return self.source.splits[split].label_name(int(self.seen.index[row]))

    def _names(self, rows: Sequence[int] | Integers) -> list[str]:
        return [self.name(int(row)) for row in rows]

    @cached_property
    def exact(self) -> list[Integers]:
        """Rows of images whose stored bytes are the same, a group each."""
        _, which = np.unique(self.seen.digest, return_inverse=True)
        return _repeated(which)

    @cached_property
    def near(self) -> list[Integers]:
        """Rows of images that show the same and are not all the same bytes."""
        digests = self.seen.digest
        return [g for g in _repeated(self.groups) if len(np.unique(digests[g])) > 1]

    @cached_property
    def alike(self) -> list[Integers]:
        """Every group of images that show the same."""
        return _repeated(self.groups)

    @cached_property
    def leaks(self) -> dict[str, list[list[int]]]:
        """`train -> test` -> pairs of rows that show the same, one pair for each leaked image."""
        found: dict[str, list[list[int]]] = {}
        for group in self.alike:
            of = self.seen.split[group]
            for later in np.unique(of)[1:]:
                first = int(of.min())
                key = f"{self.seen.splits[first]} -> {self.seen.splits[int(later)]}"
                origin = int(group[of == first][0])
                found.setdefault(key, []).extend([origin, int(r)] for r in group[of == later])
        return found

    @cached_property
    def conflicts(self) -> list[Integers]:
        """Groups of images that show the same and have different labels."""
        return [g for g in self.alike if len({self.label(int(row)) for row in g}) > 1]

    @cached_property
    def tiny(self) -> Integers:
        """Rows of images with a side below TINY pixels."""
        return np.flatnonzero(self.seen.size.min(axis=1) < TINY)

    @cached_property
    def odd(self) -> Integers:
        """Rows of images that are more than ODD_ASPECT times longer than wide."""
        size = self.seen.size
        return np.flatnonzero(size.max(axis=1) > ODD_ASPECT * size.min(axis=1))

    @cached_property
    def counts(self) -> dict[str, NDArray[np.int64]]:
        """Split -> (K,) images of each class, unreadable ones included."""
        return {name: images.class_counts() for name, images in self.source.splits.items()}

    @property
    def imbalance(self) -> float:
        """Images of the largest class for one of the smallest, in the first split."""
        counts = next(iter(self.counts.values()))
        present = counts[counts > 0]
        return float(present.max() / present.min()) if len(present) else 1.0

    @property
    def variants(self) -> list[list[str]]:
        """Class names that differ by case, space, `_` or `-` alone."""
        by_form: dict[str, list[str]] = {}
        for name in self.source.classes:
            form = "".join(c for c in name.casefold() if c.isalnum()) or name.strip()
            by_form.setdefault(form, []).append(name)
        return [names for names in by_form.values() if len(names) > 1]

    @property
    def suggestion(self) -> dict[str, int]:
        """Image size, patch size and tokens that suit the images."""
        if not len(self.seen):
            return {}
        side = int(np.median(self.seen.size.min(axis=1)))
        patch = next((p for most, p in PATCHES if side <= most), USUAL_PATCH)
        size = min(USUAL_SIZE, max(patch, round(side / patch) * patch))
        return {"image_size": size, "patch_size": patch, "tokens": (size // patch) ** 2}

    def problems(self) -> list[str]:
        """A line for each kind of finding, the gravest first."""
        lines = [
            f"{counted(len(pairs), 'image leaks', 'images leak')} from {key}: accuracy measured "
            "there is not to be trusted"
            for key, pairs in self.leaks.items()
        ]
        longer = f"more than {ODD_ASPECT:g} times longer than wide"
        many = [
            (len(self.seen.unreadable), "image cannot be read", "images cannot be read"),
            (
                len(self.conflicts),
                "group of equal images has different labels",
                "groups of equal images have different labels",
            ),
            (
                sum(len(g) - 1 for g in self.exact),
                "image is an exact copy of another",
                "images are exact copies of others",
            ),
            (
                sum(len(g) - 1 for g in self.near),
                "image looks the same as another",
                "images look the same as others",
            ),
            (
                len(self.tiny),
                f"image has a side below {TINY} pixels",
                f"images have a side below {TINY} pixels",
            ),
            (len(self.odd), f"image is {longer}", f"images are {longer}"),
        ]
        lines += [counted(count, one, more) for count, one, more in many if count]
        lines += [
            f"classes that may be one: {', '.join(f'`{n}`' for n in names)}"
            for names in self.variants[:EXAMPLES]
        ]
        if self.imbalance >= IMBALANCED:
            lines.append(
                f"the largest class has {self.imbalance:.0f} times the images of the smallest"
            )
        counts = next(iter(self.counts.values()))
        if few := [self.source.classes[k] for k in np.flatnonzero(counts < FEW)]:
            shown = ", ".join(f"`{name}`" for name in few[:EXAMPLES])
            what = counted(len(few), "class has", "classes have")
            lines.append(f"{what} fewer than {FEW} images: {shown}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The object of `check --json`."""
        seen, size = self.seen, self.seen.size
        return {
            "data": self.data,
            "images": len(seen) + len(seen.unreadable),
            "splits": {name: len(images) for name, images in self.source.splits.items()},
            "classes": {
                name: {split: int(counts[k]) for split, counts in self.counts.items()}
                for k, name in enumerate(self.source.classes)
            },
            "problems": self.problems(),
            "unreadable": [{"path": name, "reason": why} for name, why in seen.unreadable],
            "exact_duplicates": [self._names(group) for group in self.exact],
            "near_duplicates": [self._names(group) for group in self.near],
            "leaks": {key: [self._names(p) for p in pairs] for key, pairs in self.leaks.items()},
            "label_conflicts": [
                [{"path": self.name(int(r)), "label": self.label(int(r))} for r in group]
                for group in self.conflicts
            ],
            "imbalance": self.imbalance,
            "label_variants": self.variants,
            "tiny": [self.name(int(row)) for row in self.tiny],
            "odd_aspect": [self.name(int(row)) for row in self.odd],
            "height": _spread(size[:, 0]),
            "width": _spread(size[:, 1]),
            "suggested": self.suggestion,
            "sheet": self.sheet,
        }


def counted(count: int, one: str, more: str) -> str:
    """`1 image is …` or `2 images are …`."""
    return f"{count:,} {one if count == 1 else more}"


def _repeated(which: Integers) -> list[Integers]:
    """The rows of every number that occurs more than once, in the order of their first row."""
    order = np.argsort(which, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(which[order])) + 1)
    return sorted((g for g in groups if len(g) > 1), key=lambda g: int(g[0]))


def _spread(values: Integers) -> dict[str, int] | None:
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
) -> Check:
    """Look at every image of DATA once.

    Args:
        data: DATA with all its splits.
        settings: nested settings: `data.label_column` …
        out: a PNG file for samples of each class.
        workers: threads that read; None takes one a core.

    Raises:
        VitcliError: bad input; the picture cannot be written.
    """
    watch = watch or Quiet()
    section = load_inference(settings).data
    if out is not None and out.suffix.lower() != ".png":
        raise VitcliError(f"`--out {out}` is no PNG file", hint="for example `--out samples.png`")
    source = open_data(section, data, whole=True, labelled=False, watch=watch)
    for line in source.notes:
        watch.note(line)
    seen = survey(source, workers=workers, watch=watch)
    watch.note("comparing what the images show")
    groups = same_pictures(seen.look, seen.thumbs)
    if out is not None:
        with replacing(out) as temporary:
            samples(source, seen).save(temporary, format="PNG")
    return Check(data, source, seen, groups, None if out is None else str(out))


def samples(source: Source, seen: Survey) -> Image.Image:
    """Samples of each class of the first split, a row for each class, its name before it."""
    images = next(iter(source.splits.values()))
    rows = []
    for label, name in enumerate(source.classes[:SHEET_ROWS]):
        members = seen.index[(seen.split == 0) & (seen.label == label)]
        chosen = members[:: max(1, len(members) // SHEET_COLUMNS)][:SHEET_COLUMNS]
        rows.append(Row(name, [int(index) for index in chosen]))
    return draw_sheet(rows, images.read, columns=SHEET_COLUMNS, side=SHEET_SIDE)
