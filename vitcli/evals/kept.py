"""Features that are computed once: what is in the cache is read, the rest is added to it."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitcli import distributed as launch
from vitcli.data.image_set import ImageSet
from vitcli.devices import pick_device, resolve_precision
from vitcli.errors import VitcliError
from vitcli.evals.cache import (
    HINT,
    Integers,
    Rows,
    code_hash,
    content_hash,
    features_folder,
    room_for,
    stamps_of,
    table_name,
    trim,
)
from vitcli.evals.features import (
    PIXEL_SIDE,
    Extracted,
    extract,
    none_readable,
    processes,
    run_over,
)
from vitcli.hub.http import size_text
from vitcli.progress import Bar, Quiet, Watcher
from vitcli.vit import Model
from vitcli.weights.hashing import model_hash
from vitcli.weights.load import require_preprocess


@dataclass
class Features:
    """The frozen features of one model on one set of data, for any images of it, once each.

    They are kept in the cache by weights, code, preprocessing, precision, device and data; rows of
    images whose file has changed, and damaged ones, are computed again. An extraction that broke
    off goes on where it stopped. Of several processes on this machine each adds its part; on
    several machines nothing is kept.

    Args:
        model: in eval mode; what `features` gives is what is kept.
        data: the fingerprint of the data.
        about: what a person who finds the table should know.
        keep: False neither reads nor writes a cache.
    """

    model: Model
    data: str
    about: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 128
    precision: str = "auto"
    keep: bool = True
    watch: Watcher = field(default_factory=Quiet)
    _weights: str | None = None
    _used: set[Path] = field(default_factory=set)
    _added: bool = False

    def of(
        self, images: ImageSet, indices: Integers, *, label: str, with_pixels: bool = False
    ) -> Extracted:
        """The features of the images `indices` (ascending) of a split, as `extract` gives them.

        `indices` of the result point into `images`.

        Raises:
            VitcliError: none of them can be read; the disk is full.
        """
        keep = self.keep and launch.local_size() == launch.size()
        dims = self.model.config.feature_dim, self._pixels() if with_pixels else 0
        if keep and processes()[0] == 0:
            needed = len(indices) * sum(dims) * 4
            if reason := room_for(features_folder(), needed):
                self.watch.warn(f"no features are kept in `{features_folder()}`: {reason}")
                keep = self.keep = False
        if not _agreed(keep):
            found = extract(
                self.model,
                images.subset(indices),
                batch_size=self.batch_size,
                precision=self.precision,
                with_pixels=with_pixels,
                watch=self.watch,
                label=label,
            )
            return replace(found, indices=indices[found.indices])
        tables = [self._table(images, "features", dims[0])]
        tables += [self._table(images, "pixels", dims[1])] if with_pixels else []
        return self._through(tables, images, indices, label)

    def _through(
        self, tables: list[Rows], images: ImageSet, indices: Integers, label: str
    ) -> Extracted:
        """Compute what is missing in the tables, then read them."""
        first, stamps = processes()[0] == 0, stamps_of(images, indices)
        broken: list[str] = []
        with tables[0].alone(self.watch) if first else nullcontext():
            missing = _agreed([self._missing(t, indices, stamps) for t in tables] if first else [])
            todo = missing[0]
            self._tell_found(len(indices), int(todo.sum()), label)
            with self.watch.progress(label, len(indices), int(len(indices) - todo.sum())) as bar:
                broken += self._add(tables, images, indices[todo], stamps[todo], "features", bar)
            if len(tables) > 1 and (rest := missing[1] & ~todo).any():
                with self.watch.progress(f"pixels of {label}", int(rest.sum())) as bar:
                    left = indices[rest], stamps[rest]
                    broken += self._add(tables[1:], images, *left, "pixels", bar)
            broken = _joined(broken)  # and by then all processes have written
        there = np.ones(len(indices), dtype=np.bool_)
        for table, lacked in zip(tables, missing, strict=True):
            there[lacked] &= table.there(indices[lacked], stamps[lacked])[0]
        told = tuple(dict.fromkeys(broken))
        if not there.any():
            raise none_readable(len(indices), broken)
        if lost := len(indices) - int(there.sum()) - len(told):
            raise VitcliError(
                f"{lost} rows that were written to `{tables[0].folder}` cannot be read back", HINT
            )
        self._added = self._added or bool(todo.any())
        kept = indices[there]
        return Extracted(
            tables[0].read(kept),
            images.labels[kept],
            kept,
            tables[1].read(kept) if len(tables) > 1 else None,
            told,
        )

    def _missing(self, table: Rows, indices: Integers, stamps: Any) -> NDArray[np.bool_]:
        there, damaged = table.there(indices, stamps)
        if damaged:
            self.watch.warn(
                f"{damaged} rows in `{table.folder}` are damaged, and computed once more"
            )
        return ~there

    def _add(
        self,
        tables: list[Rows],
        images: ImageSet,
        indices: Integers,
        stamps: NDArray[np.uint32],
        what: str,
        bar: Bar,
    ) -> list[str]:
        """Write the rows of the images `indices`; lines about those that cannot be read."""
        broken: list[str] = []
        if not len(indices):
            return broken
        for part in self._parts(images.subset(indices), what, len(tables) > 1):
            broken += part.broken
            if len(part.indices):
                where, marks = indices[part.indices], stamps[part.indices]
                for table, values in zip(tables, (part.outputs, part.pixels), strict=False):
                    assert values is not None
                    table.write(where, values, marks)
            bar.advance(len(part.indices) + len(part.broken))
        return broken

    def _parts(self, images: ImageSet, what: str, with_pixels: bool) -> Iterator[Extracted]:
        return run_over(
            self.model,
            images,
            what=what,
            batch_size=self.batch_size,
            precision=self.precision,
            with_pixels=with_pixels,
        )

    def _table(self, images: ImageSet, what: str, dim: int) -> Rows:
        preprocess, device = require_preprocess(self.model), pick_device()
        precision = "fp32" if self.precision == "auto" else self.precision
        if self._weights is None:
            self._weights = model_hash(self.model, head=False)
        facts = {
            "what": what,
            "code": code_hash(),
            "preprocess": preprocess.to_dict(),
            "data": self.data,
            "split": images.name,
            "images": len(images),
            "content": content_hash(images),
            "dim": dim,
        }
        if what == "features":
            facts |= {
                "weights": self._weights,
                "precision": resolve_precision(precision, device),
                "device": device.type,
            }
        folder = features_folder() / table_name(facts)
        self._used.add(folder)
        return Rows(folder, len(images), dim, {**self.about, **facts})

    def _pixels(self) -> int:
        """Numbers of one image in the raw-pixel baseline."""
        preprocess = require_preprocess(self.model)
        rows, columns = (min(side, PIXEL_SIDE) for side in preprocess.image_size)
        return preprocess.num_channels * rows * columns

    def _tell_found(self, count: int, missing: int, label: str) -> None:
        if missing < count:
            here = f"{count - missing:,} of {count:,}"
            self.watch.note(f"{label}: the features of {here} are here already")

    def tell_kept(self) -> None:
        """Where what was added to the cache lies; the longest unused goes where it is too much."""
        if self._added and processes()[0] == 0:
            total = size_text(trim(self._used))
            self.watch.note(f"features are kept in `{features_folder()}` ({total} in all); {HINT}")


def _agreed(value: Any) -> Any:
    """The value that process 0 has."""
    if processes()[1] == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def _joined(lines: list[str]) -> list[str]:
    """The lines of all processes, in their order."""
    number = processes()[1]
    if number == 1:
        return lines
    parts: list[Any] = [None] * number
    torch.distributed.all_gather_object(parts, lines)
    return [line for part in parts for line in part]
