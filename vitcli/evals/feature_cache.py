"""The feature cache: features of a frozen model, stored on disk and computed once per image.

`CachedFeatures` computes the rows that a `FeatureTable` lacks and reads the rest. Rows are written
in any order and by any process: an interrupted extraction continues with the missing rows.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import vitcli
from vitcli import distributed as launch
from vitcli.data.image_set import ImageSet
from vitcli.devices import pick_device, resolve_precision
from vitcli.errors import VitcliError, counted
from vitcli.evals.feature_table import (
    SWITCHES,
    FeatureTable,
    evict,
    feature_cache_folder,
    lack_of_space,
)
from vitcli.evals.features import (
    MAX_PIXEL_SIDE,
    Extracted,
    extract,
    extract_batches,
    gather_from_ranks,
    no_image_readable,
    rank_and_world_size,
)
from vitcli.hub.client import size_text
from vitcli.progress import Bar, Quiet, Watcher
from vitcli.weights.load import require_preprocess
from vitcli.weights.loaded import LoadedModel, model_hash

Ints = NDArray[np.int64]

FORMAT = 1
NUM_PROBES = 16  # images whose content distinguishes datasets with equal names and sizes
# Sources between an image file and its features. Another version may compute other features.
CODE = ["vit/*.py", "decode.py", "preprocess.py"]
CODE += ["data/image_set.py", "data/readers/decoded.py"]


def code_hash(patterns: Iterable[str] = CODE) -> str:
    """Hash of the sources that match."""
    digest = hashlib.sha256()
    package = Path(vitcli.__path__[0])
    for path in sorted(path for pattern in patterns for path in package.glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def content_hash(images: ImageSet) -> str:
    """Hash of the content of some images. The fingerprint of the data reads no content."""
    digest = hashlib.sha256()
    for index in np.linspace(0, len(images) - 1, min(NUM_PROBES, len(images))).astype(int):
        with suppress(OSError):
            content: Any = images.content(int(index))
            if isinstance(content, Path):
                content = content.read_bytes()
            digest.update(content if isinstance(content, bytes) else content.tobytes())
        digest.update(b";")
    return digest.hexdigest()


def file_stamps(images: ImageSet, indices: Ints) -> NDArray[np.uint32]:
    """(n,) hash of the size and modification time of each image file; 1 without an own file."""
    stamps = np.ones(len(indices), dtype=np.uint32)
    for place, index in enumerate(indices):
        path = images.content(int(index))
        if not isinstance(path, Path):
            break  # images in one table or archive: the fingerprint covers that file
        try:
            facts = path.stat()
        except OSError:
            continue  # the image is missing; decoding it reports that
        # `| 1`: a stamp of 0 marks a row that was never written.
        stamps[place] = zlib.crc32(f"{facts.st_size} {facts.st_mtime_ns}".encode()) | 1
    return stamps


@dataclass
class CachedFeatures:
    """Features of one frozen model on one dataset; each image is computed once.

    A table belongs to weights, code, preprocessing, precision, device and data. Rows of changed
    files and damaged rows are computed again. Several processes on one machine share the work;
    processes on several machines use no cache, because they may not share a disk.

    Args:
        model: in eval mode; its `features` are stored.
        data: fingerprint of the data.
        about: further entries of `about.json`.
        use_cache: False neither reads nor writes the cache.
        half: store bfloat16, which `rows_of` returns; a teacher needs no more.
    """

    model: LoadedModel
    data: str
    about: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 128
    precision: str = "auto"
    use_cache: bool = True
    watch: Watcher = field(default_factory=Quiet)
    half: bool = False
    _weights: str | None = None
    _used: set[Path] = field(default_factory=set)
    _added: bool = False

    def extract(
        self, images: ImageSet, indices: Ints, *, label: str, with_pixels: bool = False
    ) -> Extracted:
        """Features of the images `indices` (ascending) of a split, in the form of `extract`.

        `indices` of the result index `images`.
        """
        # Ranks on one machine write into one table; other machines may see another disk.
        cached = self.use_cache and launch.local_world_size() == launch.world_size()
        dims = self.model.config.feature_dim, self._num_pixel_values() if with_pixels else 0
        if cached and rank_and_world_size()[0] == 0:
            folder = feature_cache_folder()
            # Check before the work, not after an hour of it.
            if reason := lack_of_space(folder, len(indices) * sum(dims) * 4):
                self.watch.warn(f"features are not cached in `{folder}`: {reason}")
                cached = self.use_cache = False
        if not _from_rank_0(cached):
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
        return self._fill_and_read(tables, images, indices, label)

    def rows_of(self, images: ImageSet, *, label: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """(n, F) bits of bfloat16 on the disk, and (n,) True for the images that could be read.

        The rows are mapped: only those that are used are in memory.

        Raises:
            VitcliError: the features cannot be stored.
        """
        indices = np.arange(len(images), dtype=np.int64)
        if launch.local_world_size() != launch.world_size():
            raise VitcliError(
                "several machines cannot share features on one disk",
                "use one machine, or compute the teacher in each step: "
                "`--set objective.teacher_cache=false`",
            )
        folder, dim = feature_cache_folder(), self.model.config.feature_dim
        first = rank_and_world_size()[0] == 0
        reason = _from_rank_0(lack_of_space(folder, len(indices) * dim * 2) if first else None)
        if reason:
            raise VitcliError(
                f"features cannot be stored in `{folder}`: {reason}",
                "free some space, or move the cache with the variable VITCLI_CACHE",
            )
        table = self._table(images, "features", dim)
        found = self._fill_and_read([table], images, indices, label)
        self.report()
        present = np.zeros(len(images), dtype=np.bool_)
        present[found.indices] = True
        return table.read(indices), present

    def report(self) -> None:
        """Say where new features are cached, and evict old tables."""
        if self._added and rank_and_world_size()[0] == 0:
            total = size_text(evict(self._used))
            folder = feature_cache_folder()
            off = SWITCHES[self.half]
            self.watch.note(f"cached features in `{folder}` ({total}); disable with {off}")

    def _fill_and_read(
        self, tables: list[FeatureTable], images: ImageSet, indices: Ints, label: str
    ) -> Extracted:
        """Compute the rows that are missing, then read all rows."""
        first, stamps = rank_and_world_size()[0] == 0, file_stamps(images, indices)
        broken: list[str] = []
        with tables[0].locked(self.watch) if first else nullcontext():
            if first:  # the other ranks wait for the list of rank 0, which follows
                for table in tables:
                    table.create()
            # All ranks take the list of rank 0: a row that a fast rank has written meanwhile
            # would shift the parts of the others.
            missing = _from_rank_0(
                [self._missing(t, indices, stamps) for t in tables] if first else []
            )
            todo = missing[0]
            if done := len(indices) - int(todo.sum()):
                cached = counted(done, "features is", "features are", len(indices))
                self.watch.note(f"{label}: {cached} cached")
            with self.watch.progress(label, len(indices), done) as bar:
                broken += self._compute(tables, images, indices[todo], stamps[todo], bar)
            if len(tables) > 1 and (rest := missing[1] & ~todo).any():
                with self.watch.progress(f"pixels of {label}", int(rest.sum())) as bar:
                    args = indices[rest], stamps[rest], bar
                    broken += self._compute(tables[1:], images, *args, output="pixels")
            # Also a barrier: when all lists are here, every rank has written its rows.
            broken = [line for part in gather_from_ranks(broken) for line in part]
            self._added = self._added or bool(todo.any())
            found = self._read(tables, images, indices, stamps, missing, broken)
            gather_from_ranks(None)  # rank 0 keeps the lock until all ranks have read
            return found

    def _read(
        self,
        tables: list[FeatureTable],
        images: ImageSet,
        indices: Ints,
        stamps: NDArray[np.uint32],
        missing: list[NDArray[np.bool_]],
        broken: list[str],
    ) -> Extracted:
        """Read all rows; `missing` are those that were computed just now."""
        # Read the checksums of new rows back: a full disk may have cut a sparse file short.
        present = np.ones(len(indices), dtype=np.bool_)
        for table, absent in zip(tables, missing, strict=True):
            present[absent] &= table.find_valid(indices[absent], stamps[absent])[0]
        unique = tuple(dict.fromkeys(broken))
        if not present.any():
            raise no_image_readable(len(indices), broken)
        if lost := len(indices) - int(present.sum()) - len(unique):
            raise VitcliError(
                f"cannot read back {lost} rows that were written to `{tables[0].folder}`",
                tables[0].hint,
            )
        rows = indices[present]
        pixels = tables[1].read(rows) if len(tables) > 1 else None
        return Extracted(tables[0].read(rows), images.labels[rows], rows, pixels, unique)

    def _missing(self, table: FeatureTable, indices: Ints, stamps: Any) -> NDArray[np.bool_]:
        valid, damaged = table.find_valid(indices, stamps)
        if damaged:
            self.watch.warn(
                f"computing {counted(damaged, 'damaged row', 'damaged rows')} of `{table.folder}` "
                "again"
            )
        return ~valid

    def _compute(
        self,
        tables: list[FeatureTable],
        images: ImageSet,
        indices: Ints,
        stamps: NDArray[np.uint32],
        bar: Bar,
        output: str = "features",
    ) -> list[str]:
        """Write the rows of the images `indices`; describe the images that cannot be read."""
        broken: list[str] = []
        if not len(indices):
            return broken
        batches = extract_batches(
            self.model,
            images.subset(indices),
            output=output,
            batch_size=self.batch_size,
            precision=self.precision,
            with_pixels=len(tables) > 1,
        )
        for part in batches:
            broken += part.broken
            if len(part.indices):
                for table, values in zip(tables, (part.outputs, part.pixels), strict=False):
                    assert values is not None
                    table.write(indices[part.indices], values, stamps[part.indices])
            bar.advance(len(part.indices) + len(part.broken))
        return broken

    def _table(self, images: ImageSet, what: str, dim: int) -> FeatureTable:
        if self._weights is None:
            self._weights = model_hash(self.model, head=False)  # a new head keeps the features
        facts = {
            "what": what,
            "code": code_hash(),
            "preprocess": require_preprocess(self.model).to_dict(),
            "data": self.data,
            "split": images.name,
            "images": len(images),
            "content": content_hash(images),
            "dim": dim,
        }
        # Raw pixels depend on neither weights nor device, so all models share them.
        if what == "features":
            device = pick_device()
            precision = "fp32" if self.precision == "auto" else self.precision
            facts |= {
                "weights": self._weights,
                "precision": resolve_precision(precision, device),
                "device": device.type,
            }
        if self.half:
            facts["stored"] = "bf16"
        # The name of the folder is a hash of everything that decides the content.
        values = json.dumps({"format": FORMAT, **facts}, sort_keys=True, default=str)
        name = hashlib.sha256(values.encode()).hexdigest()[:32]
        folder = feature_cache_folder() / name
        self._used.add(folder)
        about = {**self.about, **facts}
        return FeatureTable(folder, len(images), dim, about, half=self.half)

    def _num_pixel_values(self) -> int:
        """Values of one image in the raw-pixel baseline."""
        preprocess = require_preprocess(self.model)
        rows, columns = (min(side, MAX_PIXEL_SIDE) for side in preprocess.image_size)
        return preprocess.num_channels * rows * columns


def _from_rank_0(value: Any) -> Any:
    if rank_and_world_size()[1] == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]
