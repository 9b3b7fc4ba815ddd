"""Our own weights file: timm's tensor names in safetensors, with a header that says the rest.

The header has one metadata entry, `vitcli`, which holds JSON. It is one entry because safetensors
writes several of them in a random order, and the same weights must be the same bytes.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitcli.errors import VitcliError
from vitcli.files import replacing
from vitcli.preprocess import Preprocess
from vitcli.vit import Config, config_from_dict
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.pickles import CONVERT_HINT, is_pickle

FORMAT = 1


@dataclass
class Checkpoint:
    """A weights file in our terms, whatever its layout was.

    Attributes:
        config: of the model as stored.
        tensors: timm's names -> tensors.
        layout: `vitcli`, `timm`, `huggingface` or `google`.
        head_trained: False for a backbone, and for a head that was never trained.
        dropped: tensors of the file that have no place in the model -> the reason.
        dropped_shapes: of these, as far as they were read.
        activation: what makes probabilities of the head's logits.
        temperature: what the logits are divided by before that.
        notes: what was assumed because the file does not say it, one line each.
    """

    config: Config
    tensors: dict[str, Tensor]
    layout: str
    labels: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None
    head_trained: bool = True
    recipe_hash: str | None = None
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dropped_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    activation: Literal["softmax", "sigmoid"] = "softmax"
    temperature: float = 1.0


def save_model(
    path: str | os.PathLike[str],
    model: LoadedModel,
    *,
    recipe_hash: str | None = None,
    extra: Mapping[str, str] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `model` to `path`: the old file or the whole new one is there, never a part.

    The header carries configuration, class names, preprocessing, temperature and whether the head
    is trained (`model.head_trained`). Equal weights give equal bytes.

    Args:
        tensors: instead of the model's own, where those are shared out among processes.

    Raises:
        VitcliError: the file cannot be written (disk full, no permission).
    """
    described = {
        "format": FORMAT,
        "config": model.config.to_dict(),
        "labels": list(model.labels) if model.labels is not None else None,
        "preprocess": model.preprocess.to_dict() if model.preprocess is not None else None,
        "head_trained": bool(model.head_trained and model.config.num_classes),
        "activation": model.head_activation,
        **({"temperature": model.temperature} if model.temperature != 1.0 else {}),
        "recipe_hash": recipe_hash,
        **({"extra": dict(extra)} if extra else {}),
    }
    metadata = {"vitcli": json.dumps(described, sort_keys=True)}
    save_tensors(path, model.state_dict() if tensors is None else tensors, metadata)


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file whole or not at all; raises as `replacing` does."""
    with replacing(path) as temporary:
        write_tensors(temporary, tensors, metadata)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file in place, from tensors anywhere.

    Raises:
        OSError: it cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:  # a full disk, in safetensors' own words
        raise OSError(str(error)) from error


def read_header(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What the header of a file of ours says; None for anybody else's safetensors file.

    Raises:
        VitcliError: no such file, a pickle, truncated, or a header that cannot be understood.
    """
    refuse_foreign(path)
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if "vitcli" not in metadata:
        return None
    with _understood(path):
        header = json.loads(metadata["vitcli"])
        if header["format"] > FORMAT:
            raise VitcliError(
                f"`{path}` was written by a newer vitcli (format {header['format']}, not {FORMAT})",
                hint="update vitcli",
            )
        config_from_dict(header["config"])
        return dict(header)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts in the header of any safetensors file; raises as `load_weights` does."""
    refuse_foreign(path)
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _understood(path: str | os.PathLike[str]) -> Iterator[None]:
    """What a header of ours says may be anything, once somebody has changed it."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise VitcliError(
            f"the header of `{path}` is damaged: {error}", hint="copy or download the file again"
        ) from error


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in memory that is read when it is first used.

    Raises:
        VitcliError: no such file, a pickle, truncated, or a header that lies.
    """
    refuse_foreign(path)
    with _opened(path):
        pass
    return load_file(os.fspath(path))


def load_own(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a file that `save_model` wrote.

    Raises:
        VitcliError: as `read_header`, or the file is not ours.
    """
    header = read_header(path)
    if header is None:
        raise VitcliError(f"`{path}` was not written by vitcli", hint="give a run's weights")
    with _understood(path):
        config = config_from_dict(header["config"])
        said = header.get("preprocess")
        preprocess = Preprocess.from_dict(said) if said is not None else None
        labels = tuple(header["labels"]) if header.get("labels") is not None else None
        if labels is not None and len(labels) != config.num_classes:
            raise ValueError(f"{len(labels)} class names for {config.num_classes} classes")
        temperature = float(header.get("temperature", 1.0))
        if not 0 < temperature < float("inf"):
            raise ValueError(f"the temperature is {temperature}")
    return Checkpoint(
        config=config,
        tensors=load_weights(path),
        layout="vitcli",
        labels=labels,
        preprocess=preprocess,
        head_trained=bool(header.get("head_trained")),
        recipe_hash=header.get("recipe_hash"),
        # Files from before this was stored were all trained under softmax.
        activation="sigmoid" if header.get("activation") == "sigmoid" else "softmax",
        temperature=temperature,
    )


def set_temperature(
    path: str | os.PathLike[str], temperature: float, fitted_on: Mapping[str, Any] | None = None
) -> None:
    """Note a temperature in the header of a weights file of ours; its tensors stay as they are.

    Args:
        fitted_on: which images it was fitted on, for whoever reports a calibration error.

    Raises:
        VitcliError: as `read_header`, or the file is not ours or cannot be written.
    """
    header = read_header(path)
    if header is None:
        raise VitcliError(f"`{path}` was not written by vitcli", hint="give a run's weights")
    header |= {"temperature": temperature, "fitted_on": fitted_on and dict(fitted_on)}
    metadata = {"vitcli": json.dumps(header, sort_keys=True)}
    save_tensors(path, load_weights(path), metadata)


def refuse_foreign(path: str | os.PathLike[str]) -> None:
    """Raises a VitcliError for what is not a safetensors file, going by name and first bytes."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            start = stream.read(9)
    except FileNotFoundError as error:
        raise VitcliError(
            f"no such weights file: `{file}`", hint="`--model` takes a run, a file or a variant"
        ) from error
    except OSError as error:
        raise VitcliError(
            f"cannot read `{file}`: {error.strerror}", hint="see to its permissions"
        ) from error
    if is_pickle(file):
        raise VitcliError(
            f"`{file}` is a pickle, where a safetensors file is wanted", hint=CONVERT_HINT
        )
    if start.startswith(b"\x89HDF"):
        raise VitcliError(
            f"`{file}` is an HDF5 file, which is not read",
            hint="`transformers` converts TensorFlow weights: `from_pretrained(DIR, from_tf=True)`",
        )
    if start.startswith(b"version https://git-lfs"[:9]):
        raise VitcliError(
            f"`{file}` is a Git LFS pointer, not the weights", hint="fetch it with `git lfs pull`"
        )


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise VitcliError(
            f"`{path}` is truncated or is not a safetensors file: {error}",
            hint="copy or download it again",
        ) from error
