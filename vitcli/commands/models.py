"""`vitcli models`: list public weights with their cost on this machine, or download some."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitcli.devices import matrix_peak, pick_device
from vitcli.errors import VitcliError
from vitcli.progress import Quiet, Watcher
from vitcli.weights.public import PublicModel, resolve_name, search_models
from vitcli.weights.read import fetch_public

GIGA = 1e9
# A forward pass of Ti/16 to B/16 and R26+S/32 in fp32 on CPUs reaches 0.6 to 0.8 of the FLOP/s of
# large matrix products.
FORWARD_MFU = 0.6


@dataclass(frozen=True)
class ModelRow:
    """One model of the list.

    Attributes:
        images_per_second: an estimate for this machine, with fp32 and batches that fill it.
    """

    public: PublicModel
    images_per_second: float

    def to_json(self) -> dict[str, Any]:
        """One object of `models --json`."""
        public, facts = self.public, self.public.facts
        return {
            "name": public.name,
            "family": public.family,
            "model": public.source,
            "revision": public.revision,
            "licence": facts.licence,
            "description": facts.title,
            "variant": public.variant,
            "image_size": public.image_size,
            "accuracy": public.accuracy,
            "accuracy_protocol": facts.protocol if public.accuracy is not None else None,
            "accuracy_source": facts.evidence if public.accuracy is not None else None,
            "parameters_millions": public.parameters,
            "gmacs": public.gmacs,
            "images_per_second_estimate": self.images_per_second,
        }


@dataclass(frozen=True)
class ModelList:
    """Public weights that load here, and the device of the estimate."""

    rows: tuple[ModelRow, ...]
    device: str

    def to_json(self) -> list[dict[str, Any]]:
        """The JSON of `models --json`."""
        return [row.to_json() for row in self.rows]


@dataclass(frozen=True)
class FetchedModel:
    """Weights that are in a cache now.

    Attributes:
        model: the MODEL that the name means.
        path: the weights file.
        folder: the folder to copy to the same place on another machine.
        notes: the commit or version.
    """

    name: str
    model: str
    path: Path
    folder: Path
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON of `models fetch --json`."""
        return {**asdict(self), "path": str(self.path), "folder": str(self.folder)}


def run(words: list[str]) -> ModelList:
    """List the public weights that contain all `words`, with an estimate of their speed here.

    Raises:
        VitcliError: there are none.
    """
    found = search_models(words)
    if not found:
        raise VitcliError(
            f"no listed model contains `{' '.join(words)}`",
            "`vitcli models` lists all; any other repository on the Hub is `hf:ORG/NAME`",
        )
    device = pick_device()
    speed = FORWARD_MFU * matrix_peak(device, "fp32")  # FLOP/s
    rows = tuple(ModelRow(row, speed / (2 * GIGA * row.gmacs)) for row in found)
    return ModelList(rows, device.type)


def fetch(name: str, watch: Watcher | None = None) -> FetchedModel:
    """Download the weights of a name, `hf:NAME` or URL into the cache.

    Raises:
        VitcliError: the name is unknown or a path, or the download fails.
    """
    if Path(name).exists():
        raise VitcliError(f"`{name}` is on this machine already", f"use `--model {name}`")
    path, notes = fetch_public(name, watch or Quiet())
    model = resolve_name(name)
    # In the Hub's cache a file is REPOSITORY/snapshots/COMMIT/FILE.
    folder = path.parents[2] if model.startswith("hf:") else path.parent
    return FetchedModel(name, model, path, folder, tuple(notes))
