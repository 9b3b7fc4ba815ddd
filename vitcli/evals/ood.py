"""How far an image lies from those that a model learned from, by its features.

The Mahalanobis distance to the nearest class mean under the covariance that the classes share (Lee
et al., 2018, section 2.1), of features scaled to length one (Müller and Hein, 2025: lengths differ
between classes, and the distance assumes that they do not). Beside the distance to the k-th nearest
image (Sun et al., 2022) it finds other data as well on the sets tried here (recipes/LOG.md), and a
file of it holds class means and one matrix, not every training image.

A distance alone says little, so it is given as the share of held-out images that lie nearer. Held
out from the training too: a network draws the images that it learned from around their means, and
beside those every other image would look strange.

Where the features that outliers are measured against come from, and where they are kept.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitcli.config.schema import DataSection
from vitcli.data.image_set import ImageSet, Source
from vitcli.data.source import open_data
from vitcli.errors import VitcliError, printable
from vitcli.evals.features import Extracted, extract
from vitcli.hub.http import cache_folder
from vitcli.progress import Watcher
from vitcli.run import Run
from vitcli.weights.hashing import model_hash
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.store import load_weights, save_tensors

FORMAT = 1
NAMES = ("centre", "whiten", "means", "held_out")


@dataclass(frozen=True)
class Reference:
    """What is kept of the images that a model knows.

    Attributes:
        centre: (F,) the mean of their features.
        whiten: (F, F) makes the shared covariance the identity.
        means: (K, F) class means, whitened.
        held_out: (n,) distances of images that were neither trained on nor fitted to, sorted.
        facts: where it comes from: `data`, `fingerprint`, `images`, `held_out`, `model`.
    """

    centre: Tensor
    whiten: Tensor
    means: Tensor
    held_out: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in NAMES})

    def distances(self, features: Tensor) -> Tensor:
        """(B, F) -> (B,): to the nearest class mean, in standard deviations."""
        x = (F.normalize(features.float(), dim=1) - self.centre) @ self.whiten  # (B, F)
        return torch.cdist(x, self.means).amin(dim=1)  # (B,)

    def shares(self, distances: Tensor) -> Tensor:
        """(B,) -> (B,) float64: the share of the held-out images that lie nearer, 0..1."""
        nearer = torch.searchsorted(self.held_out, distances.contiguous())
        shares = nearer.double() / len(self.held_out)
        return shares.masked_fill(distances.isnan(), 1.0)  # nothing is as strange as no number


def fit_reference(
    features: NDArray[np.float32],
    labels: NDArray[Any],
    held_out: NDArray[np.float32],
    facts: Mapping[str, Any] | None = None,
) -> Reference:
    """Class means and a shared covariance, shrunk by the rule of Ledoit and Wolf (2004).

    Args:
        features: (n, F) of training images.
        labels: (n,) their classes. Images of several labels, (n, K), and classes of fewer than two
            images on average are taken as one class.
        held_out: (m, F) of images that the model did not learn from.

    Raises:
        VitcliError: fewer than two images, or features that are not numbers.
    """
    from sklearn.covariance import LedoitWolf

    if len(features) < 2 or len(held_out) < 1:
        raise VitcliError(
            f"{len(features)} images and {len(held_out)} held out are too few to say what is usual",
            "give more of them with `--reference DATA`",
        )
    if not (np.isfinite(features).all() and np.isfinite(held_out).all()):
        raise VitcliError("the model's features are not finite", "its weights are damaged")
    x = features.astype(np.float64)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    centre = x.mean(axis=0)
    x -= centre  # (n, F)
    classes, place = np.unique(labels, return_inverse=True) if labels.ndim == 1 else ((), ())
    if len(classes) == 0 or len(x) < 2 * len(classes):
        classes, place = np.zeros(1), np.zeros(len(x), dtype=np.int64)
    means = np.zeros((len(classes), x.shape[1]))
    np.add.at(means, place, x)
    means /= np.bincount(place)[:, None]  # (K, F)
    fitted = LedoitWolf(assume_centered=True).fit(x - means[place])
    values, vectors = np.linalg.eigh(fitted.covariance_)
    # Features that do not vary at all, such as those of a dead unit, say nothing.
    floor = max(values[-1], 1e-12) * 1e-7
    whiten = vectors / np.sqrt(np.maximum(values, floor))  # (F, F)
    parts = {"centre": centre, "whiten": whiten, "means": means @ whiten}
    tensors = {name: torch.from_numpy(a.astype(np.float32)) for name, a in parts.items()}
    reference = Reference(**tensors, held_out=torch.zeros(0), facts=facts or {})
    distances = reference.distances(torch.from_numpy(held_out)).sort().values
    return replace(reference, held_out=distances)


def save_reference(path: Path, reference: Reference) -> None:
    """Write it as a safetensors file, whole or not at all; raises as `replacing` does."""
    metadata = {"vitcli_reference": json.dumps({"format": FORMAT, **reference.facts})}
    save_tensors(path, {name: getattr(reference, name) for name in NAMES}, metadata)


def load_reference(path: Path) -> Reference:
    """What `save_reference` wrote.

    Raises:
        VitcliError: it is damaged, or of a newer vitcli.
    """
    from safetensors import safe_open

    tensors = load_weights(path)
    with safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get("vitcli_reference", "")
    try:
        facts = json.loads(said)
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']}, not {FORMAT}")
        found = Reference(**{name: tensors[name] for name in NAMES}, facts=facts)
        width = len(found.centre)
        if found.whiten.shape != (width, width) or found.means.shape[1:] != (width,):
            raise ValueError("its tensors do not fit together")
        if found.held_out.ndim != 1 or not len(found.held_out):
            raise ValueError("no held-out images")
        return found
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise VitcliError(
            f"the reference features in `{path}` cannot be used: {error}",
            "remove the file; `--reference DATA` makes it again",
        ) from None


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

    net: LoadedModel
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
