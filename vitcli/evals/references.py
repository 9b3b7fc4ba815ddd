"""Where the features that outliers are measured against come from, and where they are kept."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitcli.config.schema import DataSection
from vitcli.data.image_set import ImageSet, Source
from vitcli.data.source import open_data
from vitcli.errors import VitcliError, printable
from vitcli.evals.features import Extracted, extract
from vitcli.evals.outliers import Reference, fit_reference, load_reference, save_reference
from vitcli.hub.http import cache_folder
from vitcli.progress import Watcher
from vitcli.run import Run
from vitcli.vit import Model
from vitcli.weights.hashing import model_hash

FOLDER = "reference"
# Enough for every mean and the covariance of a thousand features, and little enough for a laptop.
MOST_FITTED = 30_000
MOST_HELD_OUT = 10_000


@dataclass(frozen=True)
class References:
    """The reference features of one model.

    They lie in a file named after a hash of what makes the features, in the folder `reference`
    beside the weights; where that cannot be written to, or the weights are no file here, in the
    folder for caches. A model with another head has the same.

    Attributes:
        net: the model.
        name: MODEL as the user wrote it.
        section: the `[data]` settings for DATA.
        batch_size, precision: as of the prediction.
    """

    net: Model
    name: str
    section: DataSection
    batch_size: int
    precision: str
    watch: Watcher

    def get(self, data: str | None) -> Reference:
        """Those that are kept; else, or where they are of other data, those of `data`, kept.

        Args:
            data: DATA; None takes what is kept, else the data that the run learned from.

        Raises:
            VitcliError: there are none, and no data to make them of; or DATA cannot be used.
        """
        key = model_hash(self.net, head=False)
        kept = self._kept(key, strict=data is None)
        if data is None and kept is not None:
            return kept
        source = self._source(data)
        if kept is not None and kept.facts.get("fingerprint") == source.fingerprint:
            return kept
        for line in source.notes:
            self.watch.note(line)
        if kept is not None:
            self.watch.note(f"these replace the reference features of {kept.facts.get('data')}")
        made = self._fit(source, key)
        self._keep(made, key)
        return made

    def _places(self, key: str) -> Iterator[Path]:
        with suppress(OSError, ValueError):
            path = Path(self.name)
            if path.exists():
                yield (path if path.is_dir() else path.parent) / FOLDER / f"{key[:16]}.safetensors"
        yield cache_folder() / FOLDER / f"{key[:16]}.safetensors"

    def _kept(self, key: str, *, strict: bool) -> Reference | None:
        for place in self._places(key):
            if place.is_file():
                try:
                    return load_reference(place)
                except VitcliError:
                    if strict:
                        raise
        return None

    def _keep(self, made: Reference, key: str) -> None:
        for place in self._places(key):
            with suppress(OSError, VitcliError):
                place.parent.mkdir(parents=True, exist_ok=True)
                save_reference(place, made)
                facts = made.facts
                self.watch.note(
                    f"reference features of {facts['images']:,} images of {facts['data']}, "
                    f"{facts['held_out']:,} held out: {place}"
                )
                return
        self.watch.warn("the reference features could not be kept; the next time makes them again")

    def _source(self, data: str | None) -> Source:
        """The data; of the run's own its own split."""
        run = Run(Path(self.name))
        own = run.data_section()
        if data is None and (own is None or own.name is None):
            raise VitcliError(
                f"there are no reference features for `{printable(self.name)}`, and it does not "
                "say what it learned from",
                "`--reference DATA`, once: images like those that it is meant for",
            )
        mine = own is not None and data in (None, own.name)
        section = own if mine and own is not None else self.section
        section = section.model_copy(update={"streaming": False})
        try:
            source = open_data(section, data, labelled=mine, watch=self.watch)
        except VitcliError as error:
            if data is not None:
                raise
            raise VitcliError(
                f"the data that `{printable(self.name)}` learned from: {error.message}",
                "`--reference DATA` says where they are now, or gives others",
            ) from None
        known = run.provenance().get("data", {}).get("fingerprint")
        if mine and known not in (None, source.fingerprint):
            self.watch.warn(f"{section.name} has changed since `{self.name}` learned from it")
        return source

    def _fit(self, source: Source, key: str) -> Reference:
        try:
            train, held_out = source.split("train"), source.split("test", "validation")
        except VitcliError as error:
            raise VitcliError(
                error.message,
                "reference features take training images, and held-out ones that say how far is "
                "usual; `--set data.test_fraction=0.2` holds some out",
            ) from None
        fitted = self._features(train, MOST_FITTED, "reference images")
        others = self._features(held_out, MOST_HELD_OUT, "held-out images")
        facts: dict[str, Any] = {
            "data": source.notation,
            "fingerprint": source.fingerprint,
            "images": len(fitted.labels),
            "held_out": len(others.labels),
            "model": key,
        }
        return fit_reference(fitted.outputs, fitted.labels, others.outputs, facts)

    def _features(self, images: ImageSet, most: int, label: str) -> Extracted:
        if len(images) > most:
            images = images.subset(np.linspace(0, len(images) - 1, most).astype(np.int64))
        return extract(
            self.net,
            images,
            batch_size=self.batch_size,
            precision=self.precision,
            watch=self.watch,
            label=label,
        )
