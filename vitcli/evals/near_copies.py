"""Near copies between splits, and equal images with different labels, before a run or evaluation.

The hashes are those of `vitcli check`, from images that are decoded at a reduced scale, for SECONDS
at most. They are stored beside the cached features: the same data are compared without reading an
image, and a command on a large dataset continues where the one before it stopped.
"""

import hashlib
import json
import os
import shlex
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from vitcli.data.image_set import ImageSet, Integers
from vitcli.data.prefetch import default_workers
from vitcli.data.sample_range import measure_samples
from vitcli.data.scan import (
    READABLE,
    ROW,
    Rows,
    group_duplicates,
    leaked_pairs,
    repeated_rows,
    scan_images,
)
from vitcli.data.source import Source, open_data
from vitcli.errors import VitcliError, counted, printable
from vitcli.evals.feature_cache import code_hash, content_hash, file_stamps
from vitcli.evals.feature_table import evict, feature_cache_folder, lack_of_space
from vitcli.evals.features import rank_and_world_size
from vitcli.files import replacing, write_text
from vitcli.hub.split_names import SPLITS
from vitcli.progress import Watcher
from vitcli.run import Run

SECONDS = 10.0
MAX_COMPARED = 200_000  # their hashes take 60 MB, and the comparison some seconds
HASH_CODE = ("data/scan.py", "decode.py", "pixels.py")  # the sources that a hash depends on


@dataclass
class HashCache:
    """Computes and stores the hashes of images, until a point in time.

    Attributes:
        seconds: the limit of all calls together.
        stored: False neither reads nor writes the cache.
    """

    watch: Watcher
    seconds: float = SECONDS
    stored: bool = True

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.seconds

    def hash(self, images: ImageSet, fingerprint: str) -> Rows:
        """(n,) of ROW; the state is 0 for images that the time was too short for."""
        folder = feature_cache_folder() / _table_name(images, fingerprint)
        rows = np.zeros(len(images), ROW)
        if self.stored:
            rows = _read(folder / "hashes.npz", rows)
            with suppress(OSError):
                os.utime(folder / "about.json")  # `evict` reads the time of the last use from it
        # A random order: a part of the images stands for all, whatever their order is.
        order = np.random.default_rng(0).permutation(len(images))
        todo = order[rows["state"][order] == 0]
        if not len(todo) or time.monotonic() > self.deadline:
            return rows
        window = images.stored_window or getattr(measure_samples(images), "window", None)
        label = f"{images.name} images, looking for copies"
        parts = scan_images(images, todo, window, default_workers(), reduced=True)
        with self.watch.progress(label, len(images), len(images) - len(todo)) as bar:
            for part, _ in parts:
                rows[part["index"]] = part
                bar.advance(len(part))
                if time.monotonic() > self.deadline:
                    break
        parts.close()
        if self.stored:
            self._write(folder, rows, images)
        return rows

    def _write(self, folder: Path, rows: Rows, images: ImageSet) -> None:
        reason = lack_of_space(folder, rows.nbytes)
        try:
            if reason is None:
                with replacing(folder / "hashes.npz") as temporary, temporary.open("wb") as file:
                    np.savez(file, rows=rows)
                about = {"what": "hashes", "split": images.name, "images": len(images)}
                write_text(folder / "about.json", json.dumps(about) + "\n")
                evict({folder})
        except (OSError, VitcliError) as error:
            reason = str(error)
        if reason is not None:
            self.stored = False
            self.watch.warn(f"hashes of the images are not cached in `{folder.parent}`: {reason}")


def _table_name(images: ImageSet, fingerprint: str) -> str:
    """A hash of everything that decides the rows: code, data, and the times of image files."""
    every = np.arange(len(images))
    parts = [code_hash(HASH_CODE).encode(), fingerprint.encode(), images.name.encode()]
    parts += [images.rows.tobytes(), content_hash(images).encode()]
    parts += [file_stamps(images, every).tobytes()]
    return "hashes-" + hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _read(path: Path, empty: Rows) -> Rows:
    """The stored rows; those of `empty` if there are none, or the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            rows: Any = file["rows"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return empty
    return rows if rows.dtype == ROW and rows.shape == empty.shape else empty


def warn_of_copies(
    source: Source,
    watch: Watcher,
    *,
    labels: bool = True,
    cached: bool = True,
    seconds: float = SECONDS,
) -> Source:
    """Warn of near copies between the splits, and of equal training images with different labels.

    Streams, generated and built-in images are not looked at.

    Args:
        labels: look at the labels too.
        cached: False neither reads nor writes the cache.
        seconds: stop to read images after this time; a note says how many were compared.

    Returns:
        The source with these lines among its notes and warnings.
    """
    sets = {name: source.splits[name] for name in SPLITS if name in source.splits}
    plain = all(isinstance(images, ImageSet) for images in sets.values())
    if not plain or source.notation.startswith("builtin:"):
        return source
    if len(sets) < 2 and not (labels and "train" in sets):
        return source
    shown, total = source.notation, sum(map(len, sets.values()))
    command = f"`vitcli check {shlex.quote(shown)}`"
    if total > MAX_COMPARED:
        note = f"{shown}: {total:,} images are not compared at the start; {command} does it"
        return _told(source, watch, note)
    cache = HashCache(watch, seconds, cached)
    # The training images come last: if the time is too short, fewer of them are compared.
    rows = {name: cache.hash(sets[name], source.fingerprint) for name in reversed(sets)}
    found = CopyFinder({name: (images, rows[name]) for name, images in sets.items()})
    sentences = found.leaks(bool(source.warnings)) + (found.conflicts("train") if labels else [])
    if sentences:
        sentences.append(f"{command} lists them")
        source = _told(source, watch, f"{shown}: {'. '.join(sentences)}", is_warning=True)
    if missing := sum(int((part["state"] == 0).sum()) for part in rows.values()):
        so_far = "are compared so far, " if cache.stored else "were compared in "
        each = " per command" if cache.stored else ""
        note = (
            f"{shown}: {total - missing:,} of {total:,} images {so_far}{seconds:.3g} s{each}; "
            f"{command} compares all"
        )
        source = _told(source, watch, note)
    return source


def warn_before_evaluation(tasks: Iterable[tuple[str, Source, ImageSet, Watcher]]) -> None:
    """Warn of near copies in each dataset once, and of copies of the training images of a model.

    Args:
        tasks: MODEL, the data, the images to evaluate, and a watcher for each.
    """
    if rank_and_world_size()[0] > 0:  # one process looks for all
        return
    told: set[str] = set()
    for model, source, images, watch in tasks:
        if source.fingerprint not in told:
            warn_of_copies(source, watch)
        told.add(source.fingerprint)
        warn_of_trained_copies(images, source, model, watch)


def warn_of_trained_copies(images: ImageSet, source: Source, model: str, watch: Watcher) -> None:
    """Warn of images that look the same as the training images of the run that made `model`.

    Images of the same dataset are left to `warn_of_copies`. The training data must still be where
    the run has recorded them.
    """
    path = Path(model)
    run = Run(path.parent if path.is_file() else path)
    section = run.data_section() if run.recipe_file.is_file() else None
    if section is None or section.streaming or section.name in (None, source.notation):
        return
    if str(section.name).startswith(("builtin:", "hf:")) or not isinstance(images, ImageSet):
        return
    recorded = run.provenance().get("data", {}).get("fingerprint")
    try:
        trained = open_data(section, numeric=source.numeric)
    except VitcliError:  # the data have moved
        return
    train = trained.splits.get("train")
    if trained.fingerprint != recorded or not isinstance(train, ImageSet):
        return
    if len(train) + len(images) > MAX_COMPARED:
        return
    cache = HashCache(watch)
    tested = cache.hash(images, source.fingerprint)
    found = CopyFinder(
        {
            "train": (train, cache.hash(train, trained.fingerprint)),
            images.name: (images, tested),
        }
    )
    for sentence in found.leaks(False, f"images that `{model}` was trained on"):
        watch.warn(f"{source.notation}: {sentence}")


def _told(source: Source, watch: Watcher, line: str, *, is_warning: bool = False) -> Source:
    (watch.warn if is_warning else watch.note)(line)
    warnings = (*source.warnings, line) if is_warning else source.warnings
    return replace(source, notes=(*source.notes, line), warnings=warnings)


class CopyFinder:
    """Finds copies among hashed images.

    Args:
        sets: split -> images and their rows, the training images first.
    """

    def __init__(self, sets: Mapping[str, tuple[ImageSet, Rows]]) -> None:
        self.sets = [images for images, _ in sets.values()]
        self.names = list(sets)
        known = [rows[rows["state"] == READABLE] for _, rows in sets.values()]
        self.rows = np.concatenate(known)
        self.split = np.repeat(np.arange(len(known)), [len(rows) for rows in known])
        self.groups = group_duplicates(self.rows["hash"], self.rows["thumbnail"])

    def leaks(self, exact_known: bool, origin: str | None = None) -> list[str]:
        """Sentences about images of a later split that look the same as those of an earlier one.

        Args:
            exact_known: the user knows of the exact copies: say nothing if there are no others.
            origin: the images of the first split, in words.
        """
        pairs = leaked_pairs(self.split, self.groups)
        digests, later_split = self.rows["digest"], self.split[pairs[:, 1]]
        exact = np.zeros(len(pairs), dtype=np.bool_)
        for split in np.unique(later_split):  # the partner of a pair need not be the exact copy
            own = later_split == split
            exact[own] = np.isin(digests[pairs[own, 1]], digests[self.split < split])
        if not len(pairs) or (exact_known and exact.all()):
            return []
        sentences = []
        for first, later in np.unique(self.split[pairs], axis=0).tolist():
            chosen = (self.split[pairs] == (first, later)).all(axis=1)
            images, count, copies = self.sets[later], int(chosen.sum()), int(exact[chosen].sum())
            like = origin or f"{self.names[first]} images"
            also = f" ({counted(copies, 'exact copy', 'exact copies')})" if copies else ""
            one, more = f"{images.name} images looks", f"{images.name} images look"
            sentences.append(
                f"{counted(count, one, more, len(images))} the same as {like}{also}, "
                f"such as {self._names(pairs[chosen][0])}"
            )
        return [*sentences, "Figures on these images are unreliable"]

    def conflicts(self, split: str) -> list[str]:
        """A sentence about images of a split that look the same and have different labels."""
        if split not in self.names:
            return []
        rows = np.flatnonzero(self.split == self.names.index(split))
        groups = [rows[group] for group in repeated_rows(self.groups[rows])]
        groups = [group for group in groups if len(self._labels(group) - {""}) > 1]
        if not groups:
            return []
        count = sum(map(len, groups))
        return [
            f"{count:,} {split} images in {counted(len(groups), 'group', 'groups')} look the same "
            f"and have different labels, such as {self._names(groups[0][:2], label=True)}"
        ]

    def _labels(self, rows: Integers) -> set[str]:
        return {self._label(row) for row in rows.tolist()}

    def _label(self, row: int) -> str:
        return self.sets[int(self.split[row])].label_name(int(self.rows["index"][row]))

    def _names(self, rows: Integers, *, label: bool = False) -> str:
        names = []
        for row in rows.tolist():
            images = self.sets[int(self.split[row])]
            name = f"`{printable(images.describe(int(self.rows['index'][row])))}`"
            names.append(f"{name} ({printable(self._label(row))})" if label else name)
        return " and ".join(names)
