"""The weights file of vitcli: timm's tensor names in safetensors, with a JSON header.

The header is the metadata entry `vitcli`. A second entry is a checksum of the whole file. It is
inside the file, so that it survives a copy, a rename and an upload to the Hub.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitcli.config.choices import Resize
from vitcli.data.split_record import SplitRecord
from vitcli.errors import VitcliError
from vitcli.files import file_checksum, parse_json, read_json, replacing, write_text, writing
from vitcli.hub.models import shard_names
from vitcli.preprocess import Preprocess
from vitcli.run import check_free
from vitcli.vit import Config, config_from_dict
from vitcli.vit.position import DEFAULT_RESIZE
from vitcli.weights import loaded
from vitcli.weights.loaded import HeadActivation, LoadedModel, PixelDecoder, TargetScale
from vitcli.weights.pickles import CONVERT_HINT, is_pickle

FORMAT = 2  # of a regression, which versions that read format 1 only would take for a classifier
MARK_BYTES = 2**20
DAMAGED_HINT = "copy or download the file again"
SEAL = "vitcli_checksum"  # metadata key -> `files.file_checksum` of the file without these digits
UNSEALED = "0" * 32


@dataclass
class Checkpoint:
    """The content of a weights file in any layout, converted to timm's names.

    Attributes:
        config: configuration of the stored model.
        tensors: timm's names -> tensors.
        layout: `vitcli`, `timm`, `huggingface` or `google`.
        head_trained: False for a backbone and for a head that was never trained.
        dropped, dropped_shapes: unused tensors of the file -> the reason, and the shape.
        activation: turns logits into probabilities; `identity` after a regression.
        target_scale, decoder: of a regression, and of a masked autoencoder.
        temperature: divides the logits before the activation.
        thresholds: as in `LoadedModel`.
        position_resize: method that resamples the positions; None for the layout's default.
        notes: assumptions about facts that the file does not state, one line each.
        split_record: which images were trained on and held out; None if the file does not say.
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
    activation: HeadActivation = "softmax"
    temperature: float = 1.0
    thresholds: tuple[float, ...] | None = None
    position_resize: Resize | None = None
    split_record: SplitRecord | None = None
    target_scale: TargetScale = field(default_factory=TargetScale)
    decoder: PixelDecoder | None = None


def save_model(
    path: str | os.PathLike[str],
    model: LoadedModel,
    *,
    recipe_hash: str | None = None,
    extra: Mapping[str, str] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `model` to `path` atomically. Equal models give equal bytes.

    Args:
        tensors: write these instead of the model's own, which FSDP shards over the processes.

    Raises:
        VitcliError: the file cannot be written (disk full, no permission).
    """
    resize = getattr(model.network, "position_resize", None)  # a ResNet has no positions
    described = {
        "format": FORMAT if model.is_regression else 1,
        "config": model.config.to_dict(),
        "labels": list(model.labels) if model.labels is not None else None,
        "preprocess": model.preprocess.to_dict() if model.preprocess is not None else None,
        "head_trained": bool(model.head_trained and model.config.num_classes),
        "activation": model.head_activation,
        **({"target": asdict(model.target_scale)} if model.is_regression else {}),
        # The default is not written, so that the files of runs that do not set it stay the same.
        **({"position_resize": resize} if resize not in (None, DEFAULT_RESIZE) else {}),
        **({"temperature": model.temperature} if model.temperature != 1.0 else {}),
        **({"thresholds": list(model.thresholds)} if model.thresholds is not None else {}),
        "recipe_hash": recipe_hash,
        **({"extra": dict(extra)} if extra else {}),
        **({"split": model.split_record.to_json()} if model.split_record is not None else {}),
    }
    metadata = {"vitcli": json.dumps(described, sort_keys=True)}
    save_tensors(path, model.state_dict() if tensors is None else tensors, metadata)


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file atomically; raises as `writing` does."""
    with writing(path) as temporary:
        write_sealed_tensors(temporary, tensors, metadata)


def write_sealed_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file in place, with a checksum that `load_weights` verifies."""
    write_tensors(path, tensors, {**(metadata or {}), SEAL: UNSEALED})
    with Path(path).open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        # safetensors writes metadata in a random order, and equal weights must give equal bytes.
        header = {**header, "__metadata__": dict(sorted(header["__metadata__"].items()))}
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(content) <= size
        file.seek(8)
        file.write(content.ljust(size))
        file.flush()
        first, last = _seal_place(content, UNSEALED)
        file.seek(first)
        file.write(file_checksum(path, (first, last)).encode())


def _seal_place(header: bytes, digest: str) -> tuple[int, int]:
    """The first byte of the checksum in a file with this header, and the byte after the last."""
    entry = f'"{SEAL}":"{digest}"'.encode()
    # Quotes inside names are escaped, so nothing else in a header looks like this entry.
    end = 8 + header.index(entry) + len(entry) - 1
    return end - len(digest), end


def check_seal(path: str | os.PathLike[str]) -> None:
    """Check the checksum of a safetensors file; files of other programs have none.

    Raises:
        VitcliError: the file is damaged.
    """
    with _opened(path) as file:
        digest = (file.metadata() or {}).get(SEAL)
    if digest is None:
        return
    with readable_values("checksum", path, DAMAGED_HINT), Path(path).open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
        found = file_checksum(path, _seal_place(header, digest))
    if found != digest:
        raise VitcliError(
            f"`{path}` is damaged: its checksum is {found}, and {digest} is recorded",
            hint=DAMAGED_HINT,
        )


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file in place, from tensors on any device; may raise an OSError."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:  # safetensors reports a full disk in this way
        raise OSError(str(error)) from error


def write_folder(
    out: Path, tensors: Mapping[str, Tensor], files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write `model.safetensors` and JSON files into the new folder `out`, atomically.

    Raises:
        VitcliError: `out` is not empty or not writable.
    """
    check_free(out)
    with replacing(out) as temporary:
        temporary.mkdir()
        write_sealed_tensors(temporary / "model.safetensors", tensors, {"format": "pt"})
        for name, values in files.items():
            text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
            (temporary / name).write_text(text, encoding="utf-8")


def read_header(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the header that vitcli wrote, or None for a safetensors file of another program.

    Raises:
        VitcliError: the file does not exist, is truncated, is a pickle, or has an invalid header.
    """
    check_safetensors(path)
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if "vitcli" not in metadata:
        return None
    with readable_values("header", path, DAMAGED_HINT):
        header = parse_json(metadata["vitcli"])
        if header["format"] > FORMAT:
            raise VitcliError(
                f"`{path}` was written by a newer vitcli (format {header['format']}, not {FORMAT})",
                hint="update vitcli",
            )
        config_from_dict(header["config"])
        return dict(header)


def _own_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the header, or raise a VitcliError if another program wrote the file."""
    header = read_header(path)
    if header is None:
        raise VitcliError(
            f"`{path}` was not written by vitcli", hint="use the model.safetensors of a run"
        )
    return header


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata of any safetensors file; raises as `load_weights` does."""
    check_safetensors(path)
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def readable_values(file: str, source: str | os.PathLike[str], hint: str) -> Iterator[None]:
    """Turn the exceptions that invalid values of a file cause into a VitcliError."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise VitcliError(f"the {file} of `{source}` is invalid: {error}", hint=hint) from error


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, memory-mapped.

    Raises:
        VitcliError: the file does not exist, is truncated or damaged, is a pickle, or has an
            invalid header.
    """
    check_safetensors(path)
    check_seal(path)
    return load_file(os.fspath(path))


def load_sharded_weights(index: Path) -> dict[str, Tensor]:
    """Return all tensors of the files that `index` lists; raises as `load_weights` does."""
    tensors: dict[str, Tensor] = {}
    for name in shard_names(index):
        tensors |= load_weights(index.parent / name)
    return tensors


def read_vitcli(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the checkpoint in a file that `save_model` wrote.

    Raises:
        VitcliError: as `read_header`, or another program wrote the file.
    """
    header = _own_header(path)
    with readable_values("header", path, DAMAGED_HINT):
        config = config_from_dict(header["config"])
        values = header.get("preprocess")
        preprocess = Preprocess.from_dict(values) if values is not None else None
        labels = tuple(header["labels"]) if header.get("labels") is not None else None
        if labels is not None and len(labels) != config.num_classes:
            raise ValueError(f"{len(labels)} class names for {config.num_classes} classes")
        if (resize := header.get("position_resize")) not in (None, *get_args(Resize)):
            raise ValueError(f"unknown position_resize `{resize}`")
        temperature = float(header.get("temperature", 1.0))
        if not 0 < temperature < float("inf"):
            raise ValueError(f"the temperature is {temperature}")
        thresholds = header.get("thresholds")
        if thresholds is not None:
            thresholds = tuple(map(float, thresholds))
            if len(thresholds) != config.num_classes or not all(0 <= t <= 1 for t in thresholds):
                raise ValueError(f"{config.num_classes} classes have the thresholds {thresholds}")
        scale = TargetScale(**header.get("target", {}))
        if not (isfinite(scale.mean) and 0 < scale.std < inf):
            raise ValueError(f"the scale of the numbers is {scale}")
        record = SplitRecord.from_json(header.get("split"))
    return Checkpoint(
        config=config,
        tensors=load_weights(path),
        layout="vitcli",
        labels=labels,
        preprocess=preprocess,
        head_trained=bool(header.get("head_trained")),
        recipe_hash=header.get("recipe_hash"),
        # Old files do not store the activation; all of them were trained with softmax.
        activation=loaded.as_activation(header.get("activation")),
        target_scale=scale,
        temperature=temperature,
        thresholds=thresholds,
        position_resize=resize,
        split_record=record,
    )


def record_file(weights: Path) -> Path:
    """The file beside weights of another layout that tells which images were held out."""
    return weights.with_name(f"{weights.name}.split.json")


def write_split_record(model: LoadedModel, weights: Path) -> None:
    """Write the record of the training images beside the exported file `weights`."""
    if model.split_record is not None:
        values = {"weights": _mark(weights), "split": model.split_record.to_json()}
        write_text(record_file(weights), json.dumps(values) + "\n")


def read_split_record(weights: Path) -> SplitRecord | None:
    """The record beside `weights`; None without one, and if it belongs to other weights."""
    file = record_file(weights)
    if not file.is_file():
        return None
    with readable_values("record of the training images", file, "remove the file"):
        values = read_json(file)
        return (
            SplitRecord.from_json(values["split"]) if values["weights"] == _mark(weights) else None
        )


def _mark(weights: Path) -> str:
    """Tells one weights file from another of the same name: its size and its last bytes."""
    with weights.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MARK_BYTES))
        return f"{size}-{zlib.crc32(file.read()):08x}"


def update_header(path: str | os.PathLike[str], entries: Mapping[str, Any]) -> None:
    """Set entries of the header of a weights file of vitcli; the tensors do not change.

    Raises:
        VitcliError: as `read_header`, or another program wrote the file, or it cannot be written.
    """
    header = {**_own_header(path), **entries}
    metadata = {"vitcli": json.dumps(header, sort_keys=True)}
    save_tensors(path, load_weights(path), metadata)


def check_safetensors(path: str | os.PathLike[str]) -> None:
    """Raise a VitcliError if the first bytes show another file format."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            start = stream.read(9)
    except FileNotFoundError as error:
        raise VitcliError(
            f"no such weights file: `{file}`",
            hint="`--model` takes a run directory, a weights file or a variant",
        ) from error
    except OSError as error:
        raise VitcliError(
            f"cannot read `{file}`: {error.strerror}", hint="check the file permissions"
        ) from error
    if is_pickle(file):
        raise VitcliError(f"`{file}` is a pickle, not a safetensors file", hint=CONVERT_HINT)
    if start.startswith(b"\x89HDF"):
        raise VitcliError(
            f"`{file}` is an HDF5 file, which is not supported",
            hint="convert it with `transformers`: `from_pretrained(DIR, from_tf=True)`",
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
            hint=DAMAGED_HINT,
        ) from error
