"""Out-of-distribution (OOD) scores: how far the features of an image are from known ones.

The distance is that of Mahalanobis to the nearest class mean, under the covariance that the classes
share (Lee et al., 2018, section 2.1), of features of length one (Mueller and Hein, 2025). The OOD
score is the share of held-out in-distribution images with a smaller distance.
"""

# Features of length one: their lengths differ between classes, and a shared covariance assumes
# that they do not. The distance to the k-th nearest image (Sun et al., 2022) detects other data as
# well on the datasets in recipes/LOG.md, but its file would hold every training image.
#
# The score uses images that were also held out from training. A network moves the images it was
# trained on close to their means; compared with these, every new image would look far away.

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
from vitcli.data.image_set import ImageSet
from vitcli.data.source import Source
from vitcli.errors import VitcliError, printable
from vitcli.evals.features import Extracted, extract
from vitcli.evals.held_out import open_known
from vitcli.files import parse_json
from vitcli.hub.http import cache_folder
from vitcli.progress import Watcher
from vitcli.run import Run
from vitcli.weights.loaded import LoadedModel, model_hash
from vitcli.weights.store import load_weights, save_tensors

FORMAT = 1
TENSORS = ("centre", "whiten", "means", "held_out")
FOLDER = "reference"
# Enough for the mean of every class and a covariance of 1,000 features, and fast on a laptop.
MAX_FITTED_IMAGES = 30_000
MAX_HELD_OUT_IMAGES = 10_000


@dataclass(frozen=True)
class OODReference:
    """Statistics of in-distribution features.

    Attributes:
        centre: (F,) mean of the features.
        whiten: (F, F) matrix that makes the shared covariance the identity.
        means: (K, F) class means, whitened.
        held_out: (n,) sorted distances of held-out images.
        facts: origin: `data`, `fingerprint`, `images`, `held_out`, `model`.
    """

    centre: Tensor
    whiten: Tensor
    means: Tensor
    held_out: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})

    def distances(self, features: Tensor) -> Tensor:
        """(B, F) -> (B,): distance to the nearest class mean, in standard deviations."""
        x = (F.normalize(features.float(), dim=1) - self.centre) @ self.whiten  # (B, F)
        return torch.cdist(x, self.means).amin(dim=1)  # (B,)

    def scores(self, distances: Tensor) -> Tensor:
        """(B,) -> (B,) float64: share of the held-out images that are nearer, 0..1."""
        nearer = torch.searchsorted(self.held_out, distances.contiguous())
        scores = nearer.double() / len(self.held_out)
        # A distance that is NaN must not pass as near.
        return scores.masked_fill(distances.isnan(), 1.0)


def fit_reference(
    features: NDArray[np.float32],
    labels: NDArray[Any],
    held_out: NDArray[np.float32],
    facts: Mapping[str, Any] | None = None,
) -> OODReference:
    """Fit class means and a shared covariance, with the shrinkage of Ledoit and Wolf (2004).

    Args:
        features: (n, F) of training images.
        labels: (n,) classes. Multi-label images, (n, K), and classes with fewer than two images on
            average count as one class.
        held_out: (m, F) of images that the model was not trained on.
    """
    from sklearn.covariance import LedoitWolf

    if len(features) < 2 or len(held_out) < 1:
        raise VitcliError(
            f"{len(features)} images and {len(held_out)} held-out images are too few for an OOD "
            "reference",
            "give a larger dataset with `--reference DATA`",
        )
    if not (np.isfinite(features).all() and np.isfinite(held_out).all()):
        raise VitcliError("the features of the model are not finite", "its weights are damaged")
    # float64: the covariance of 30,000 x 1,000 features is inverted below.
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
    # Shrinkage makes the covariance invertible with fewer images than features.
    fitted = LedoitWolf(assume_centered=True).fit(x - means[place])
    eigenvalues, vectors = np.linalg.eigh(fitted.covariance_)
    # A constant feature, such as that of a dead unit, has an eigenvalue near 0. Without a floor
    # its inverse would decide every distance.
    floor = max(eigenvalues[-1], 1e-12) * 1e-7
    whiten = vectors / np.sqrt(np.maximum(eigenvalues, floor))  # (F, F)
    arrays = {"centre": centre, "whiten": whiten, "means": means @ whiten}
    tensors = {name: torch.from_numpy(a.astype(np.float32)) for name, a in arrays.items()}
    reference = OODReference(**tensors, held_out=torch.zeros(0), facts=facts or {})
    distances = reference.distances(torch.from_numpy(held_out)).sort().values
    return replace(reference, held_out=distances)


def save_reference(path: Path, reference: OODReference) -> None:
    """Write a safetensors file atomically; raises as `replacing` does."""
    metadata = {"vitcli_reference": json.dumps({"format": FORMAT, **reference.facts})}
    save_tensors(path, {name: getattr(reference, name) for name in TENSORS}, metadata)


def load_reference(path: Path) -> OODReference:
    """Read what `save_reference` wrote."""
    from safetensors import safe_open

    tensors = load_weights(path)
    with safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get("vitcli_reference", "")
    try:
        facts = parse_json(header)
        if facts["format"] != FORMAT:
            raise ValueError(f"its format is {facts['format']}, not {FORMAT}")
        found = OODReference(**{name: tensors[name] for name in TENSORS}, facts=facts)
        width = len(found.centre)
        if found.whiten.shape != (width, width) or found.means.shape[1:] != (width,):
            raise ValueError("the shapes of its tensors do not agree")
        if found.held_out.ndim != 1 or not len(found.held_out):
            raise ValueError("it has no held-out images")
        return found
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise VitcliError(
            f"the OOD reference `{path}` cannot be used: {error}",
            "remove the file, and make it again with `--reference DATA`",
        ) from None


@dataclass(frozen=True)
class ReferenceStore:
    """The stored OOD reference of one model.

    The file name is a hash of everything that makes the features, so a model with another head
    has the same reference. The file is in the folder `reference` beside the weights; if that is
    not writable, or the weights are not local, it is in the cache folder.

    Attributes:
        name: MODEL as the user wrote it.
        section: the `[data]` settings for DATA.
    """

    net: LoadedModel
    name: str
    section: DataSection
    batch_size: int
    precision: str
    watch: Watcher

    def get(self, data: str | None) -> OODReference:
        """Return the stored reference, or make and store one of `data`.

        Args:
            data: DATA; it replaces a stored reference of other data. None uses the stored
                reference, else the data that the run was trained on.
        """
        key = model_hash(self.net, head=False)
        stored = self._load(key, strict=data is None)
        if data is None and stored is not None:
            return stored  # without opening the data, which may be gone
        source = self._open_source(data)
        if stored is not None and stored.facts.get("fingerprint") == source.fingerprint:
            return stored
        source.tell(self.watch)
        if stored is not None:
            self.watch.note(f"replacing the OOD reference of {stored.facts.get('data')}")
        made = self._make(source, key)
        self._save(made, key)
        return made

    def _paths(self, key: str) -> Iterator[Path]:
        name = f"{key[:16]}.safetensors"
        with suppress(OSError, ValueError):
            path = Path(self.name)
            if path.exists():
                yield (path if path.is_dir() else path.parent) / FOLDER / name
        yield cache_folder() / FOLDER / name

    def _load(self, key: str, *, strict: bool) -> OODReference | None:
        for path in self._paths(key):
            if path.is_file():
                try:
                    return load_reference(path)
                except VitcliError:
                    if strict:  # with DATA, a damaged file is simply made again
                        raise
        return None

    def _save(self, made: OODReference, key: str) -> None:
        for path in self._paths(key):
            with suppress(OSError, VitcliError):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_reference(path, made)
                facts = made.facts
                self.watch.note(
                    f"stored the OOD reference ({facts['images']:,} images of {facts['data']}, "
                    f"{facts['held_out']:,} held out) in {path}"
                )
                return
        self.watch.warn("cannot store the OOD reference; the next command computes it again")

    def _open_source(self, data: str | None) -> Source:
        """Open DATA, or the data of the run with the split of the run."""
        run = Run(Path(self.name))
        own = run.data_section()
        if data is None and (own is None or own.name is None):
            raise VitcliError(
                f"there is no OOD reference for `{printable(self.name)}`, and it does not record "
                "its training data",
                "give in-distribution images once with `--reference DATA`",
            )
        is_own = own is not None and data in (None, own.name)
        section = own if is_own and own is not None else self.section
        # A reference takes images that are spread over the set, so it needs random access.
        section = section.model_copy(update={"streaming": False})
        try:
            source = open_known(section, data, self.net, self.watch, labelled=is_own)
        except VitcliError as error:
            if data is not None:
                raise
            raise VitcliError(
                f"cannot open the training data of `{printable(self.name)}`: {error.message}",
                "give their new path, or other data, with `--reference DATA`",
            ) from None
        known = run.provenance().get("data", {}).get("fingerprint")
        unrecorded = self.net.split_record is None
        if is_own and unrecorded and known not in (None, source.fingerprint):
            self.watch.warn(f"{section.name} has changed since `{self.name}` was trained on it")
        return source

    def _make(self, source: Source, key: str) -> OODReference:
        try:
            train, held_out = source.split("train"), source.split("test", "validation")
        except VitcliError as error:
            raise VitcliError(
                error.message,
                "an OOD reference needs training images and held-out images; hold some out with "
                "`--set data.test_fraction=0.2`",
            ) from None
        fitted = self._features(train, MAX_FITTED_IMAGES, "reference images")
        others = self._features(held_out, MAX_HELD_OUT_IMAGES, "held-out images")
        facts: dict[str, Any] = {
            "data": source.notation,
            "fingerprint": source.fingerprint,
            "images": len(fitted.labels),
            "held_out": len(others.labels),
            "model": key,
        }
        return fit_reference(fitted.outputs, fitted.labels, others.outputs, facts)

    def _features(self, images: ImageSet, max_images: int, label: str) -> Extracted:
        if len(images) > max_images:
            # Evenly spaced: datasets are often sorted by class.
            rows = np.linspace(0, len(images) - 1, max_images).astype(np.int64)
            images = images.subset(rows)
        return extract(
            self.net,
            images,
            batch_size=self.batch_size,
            precision=self.precision,
            watch=self.watch,
            label=label,
        )
