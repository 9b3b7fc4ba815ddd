"""Find the weights of a MODEL, detect their layout and read them into a `Checkpoint`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vitcli.errors import VitcliError
from vitcli.files import is_url, read_json
from vitcli.hub.http import fetch_url
from vitcli.hub.models import INDEX, fetch_model
from vitcli.progress import Watcher
from vitcli.vit import ResNetConfig, ViTConfig
from vitcli.weights.google.npz import read_npz
from vitcli.weights.google.read_google import read_google
from vitcli.weights.huggingface.read_huggingface import is_huggingface, read_huggingface
from vitcli.weights.imagenet import SETS, imagenet_names
from vitcli.weights.open_clip import CONFIG, is_open_clip, read_open_clip
from vitcli.weights.overrides import Overrides, override_preprocess
from vitcli.weights.pickles import PICKLE_SUFFIXES, is_pickle, load_pickle
from vitcli.weights.public import is_listed, resolve_name, similar_names
from vitcli.weights.store import (
    Checkpoint,
    load_sharded_weights,
    load_weights,
    read_header,
    read_split_record,
    read_vitcli,
)
from vitcli.weights.timm.read_timm import read_timm
from vitcli.weights.timm.timm_names import is_bit, is_timm

UNDERSTOOD = (
    "a MODEL is a run directory, a .safetensors file of vitcli or timm, a .pth file with a plain "
    "state dict, a Hugging Face ViT folder, an official Google .npz, a variant such as `B/16`, "
    "or a name that `vitcli models` lists"
)


def read_checkpoint(
    source: str, overrides: Overrides | None = None, watch: Watcher | None = None
) -> Checkpoint:
    """Read the checkpoint at `source`. A trained head of ImageNet's size gets ImageNet's names.

    Args:
        source: a path, a public name, `hf:NAME`, or the URL of a weights file.
        overrides: settings of the caller.
        watch: receives the progress of a download.

    Raises:
        VitcliError: the weights do not exist, or their format is not supported.
    """
    overrides = overrides or Overrides()
    checkpoint = _read(source, overrides, watch)
    config = checkpoint.config
    if overrides.stem_arithmetic is not None:
        if not isinstance(config, ViTConfig) or config.stem is None:
            raise VitcliError(
                "`model.stem_arithmetic` is set, but the model is not a hybrid", hint="remove it"
            )
        checkpoint.config = replace(config, stem_arithmetic=overrides.stem_arithmetic)
    outputs = checkpoint.config.num_classes
    if checkpoint.labels is None and checkpoint.head_trained and outputs in SETS:
        checkpoint.labels = imagenet_names(outputs)
        checkpoint.notes.append(
            f"{outputs} outputs have no names: assumed the classes of {SETS[outputs][0]}"
        )
    return checkpoint


def _read(source: str, overrides: Overrides, watch: Watcher | None) -> Checkpoint:
    path = Path(source)
    if not source:  # an empty path would be the current folder
        raise VitcliError("the MODEL is empty", hint=UNDERSTOOD)
    notes: list[str] = []
    if source.startswith("hf:") or is_url(source) or not path.exists():
        path, notes = fetch_public(source, watch)
    elif path.is_dir():
        path = _weights_in(path)
    checkpoint = _read_file(path, source, overrides)
    checkpoint.notes[:0] = notes
    if checkpoint.split_record is None:
        checkpoint.split_record = read_split_record(path)
    return checkpoint


def fetch_public(source: str, watch: Watcher | None = None) -> tuple[Path, list[str]]:
    """Download weights by their name, `hf:NAME` or URL -> (file in a cache, notes).

    Raises:
        VitcliError: the name is unknown, or the download fails.
    """
    model = resolve_name(source)
    try:
        return (fetch_url if is_url(model) else fetch_model)(model, watch)
    except VitcliError as error:
        if model == source or is_listed(source):
            raise
        # The name may also be a misspelling, or a path that does not exist.
        message = f"`{source}` is no path here, and {error.message}"
        raise VitcliError(message, "; ".join([*similar_names(source), error.hint or ""])) from error


def _read_file(path: Path, source: str, overrides: Overrides) -> Checkpoint:
    """Read one file or its shards; `source` is the MODEL that the user named."""
    if path.suffix == ".npz":
        return read_google(read_npz(path), source, overrides)
    if path.name.endswith(INDEX):
        tensors = load_sharded_weights(path)
    elif path.suffix in (".npy", ".onnx", ".msgpack", ".toml", ".json"):
        raise VitcliError(f"`{source}` has an unsupported weights format", hint=UNDERSTOOD)
    elif is_pickle(path) and path.suffix != ".safetensors":
        tensors, notes = load_pickle(path)
        checkpoint = _read_tensors(tensors, path, source, overrides)
        checkpoint.notes[:0] = notes
        return checkpoint
    elif read_header(path) is not None:
        return _with_overrides(read_vitcli(path), overrides)
    else:
        tensors = load_weights(path)
    return _read_tensors(tensors, path, source, overrides)


def _read_tensors(
    tensors: dict[str, Tensor], path: Path, source: str, overrides: Overrides
) -> Checkpoint:
    """Convert `tensors` from `path` to a checkpoint with the shapes of the dropped tensors."""
    checkpoint = _in_layout(tensors, path, source, overrides)
    left = [name for name in checkpoint.dropped if name in tensors]
    checkpoint.dropped_shapes = {name: tuple(tensors[name].shape) for name in left}
    return checkpoint


def _in_layout(
    tensors: dict[str, Tensor], path: Path, source: str, overrides: Overrides
) -> Checkpoint:
    """Detect the layout by the names of `tensors`, and convert them to a checkpoint."""
    if is_open_clip(tensors):
        return read_open_clip(tensors, source, _json(path.parent / CONFIG), overrides)
    described = _json(path.parent / "config.json") or {}
    if is_huggingface(tensors):
        if "model_type" not in described:
            raise VitcliError(
                f"`{source}` has Hugging Face's layout, but there is no config.json next to it",
                hint="use the folder that `save_pretrained` wrote",
            )
        processor = _json(path.parent / "preprocessor_config.json")
        return read_huggingface(tensors, source, described, processor, overrides)
    if "model_type" in described and not is_timm(tensors) and not is_bit(tensors):
        read_huggingface(tensors, source, described, None, overrides)
    if not is_timm(tensors) and not is_bit(tensors):
        shown = ", ".join(list(tensors)[:4])
        raise VitcliError(
            f"`{source}` does not hold a Vision Transformer in a supported layout; its "
            f"tensors are {shown}{' …' if len(tensors) > 4 else ''}",
            hint=UNDERSTOOD,
        )
    hub = described if {"architecture", "pretrained_cfg"} & set(described) else None
    return read_timm(tensors, source, hub, overrides)


def _with_overrides(checkpoint: Checkpoint, overrides: Overrides) -> Checkpoint:
    """Apply the caller's settings to a file of vitcli, which states all facts itself."""
    values: dict[str, Any] = {"num_heads": overrides.num_heads, "norm_eps": overrides.norm_eps}
    values["gelu"] = overrides.gelu
    given = {key: value for key, value in values.items() if value is not None}
    if given and isinstance(checkpoint.config, ResNetConfig):
        raise VitcliError(
            f"a ResNet has no {', '.join(f'`model.{key}`' for key in given)}",
            hint="remove it",
        )
    try:
        checkpoint.config = replace(checkpoint.config, **given)
    except ValueError as error:
        raise VitcliError(
            f"the settings do not fit this model: {error}",
            hint="remove these settings",
        ) from error
    config = checkpoint.config
    checkpoint.preprocess = override_preprocess(
        checkpoint.preprocess, overrides.preprocess, config.image_size, config.num_channels
    )
    return checkpoint


def vitcli_weights_file(source: str) -> Path | None:
    """Return the local weights file of a MODEL that vitcli wrote; None for any other MODEL."""
    path = Path(source)
    if source.startswith(("hf:", "https:", "http:", "gs:")) or not path.exists():
        return None
    file = _weights_in(path) if path.is_dir() else path
    if file.suffix != ".safetensors":
        return None
    return file if read_header(file) is not None else None


def _weights_in(folder: Path) -> Path:
    """Return the weights file of a run directory or model folder."""
    whole = folder / "model.safetensors"
    if whole.is_file():
        return whole
    if (folder / INDEX).is_file():
        return folder / INDEX
    files = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    if len(files) == 1:
        return files[0]
    if files:
        raise VitcliError(
            f"`{folder}` holds {len(files)} weights files: {', '.join(p.name for p in files[:4])}",
            hint="name one of these files",
        )
    if (folder / "recipe.toml").is_file():
        raise VitcliError(
            f"the run `{folder}` has no model.safetensors: it did not finish",
            hint=f"resume it: repeat the command with `--out {folder} --resume`",
        )
    pickles = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICKLE_SUFFIXES)
    known = [p for p in pickles if p.stem in ("pytorch_model", "model")]
    if len(known or pickles) == 1:
        return (known or pickles)[0]
    if pickles:
        raise VitcliError(
            f"`{folder}` holds {len(pickles)} weights files: "
            f"{', '.join(p.name for p in pickles[:4])}",
            hint="name one of these files",
        )
    if inside := _newest_checkpoint(folder):
        raise VitcliError(
            f"`{folder}` holds no weights, but `{inside}` does", hint=f"use `--model {inside}`"
        )
    raise VitcliError(f"`{folder}` holds no weights", hint=UNDERSTOOD)


def _newest_checkpoint(folder: Path) -> Path | None:
    """The last `checkpoint-STEP` of a folder that transformers' Trainer wrote."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()]
    found = [p for p in found if any(p.glob("*.safetensors")) or any(p.glob("*.bin"))]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise VitcliError(
            f"`{path}` cannot be read as JSON: {error}", hint="fix it or remove it"
        ) from error
    return value if isinstance(value, dict) else None
