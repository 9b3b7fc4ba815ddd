"""From a file or folder in any layout to a `Checkpoint`: finding out which layout it is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitcli.errors import VitcliError
from vitcli.weights.google import load_npz, read_google
from vitcli.weights.huggingface import is_huggingface, read_huggingface
from vitcli.weights.stated import Stated, stated_preprocess
from vitcli.weights.store import (
    PICKLE_SUFFIXES,
    Checkpoint,
    load_own,
    load_weights,
    read_header,
    refuse_foreign,
)
from vitcli.weights.timm import is_timm, read_timm

UNDERSTOOD = (
    "a MODEL is a run directory, a .safetensors file of ours or in timm's layout, a Hugging Face "
    "ViT folder, a Google .npz of a plain ViT, or a variant such as `B/16`"
)


def read_checkpoint(source: str, stated: Stated | None = None) -> Checkpoint:
    """What lies at `source`, in our terms.

    Raises:
        VitcliError: nothing there, or nothing that is understood.
    """
    stated = stated or Stated()
    path = Path(source)
    if not source:  # an empty path would be the current folder
        raise VitcliError("the MODEL is empty text", hint=UNDERSTOOD)
    if source.startswith(("hf:", "https:", "http:", "gs:")):
        raise VitcliError(f"`{source}` is not understood yet", hint=UNDERSTOOD)
    if path.is_dir():
        path = _weights_in(path)
    elif not path.exists():
        raise VitcliError(f"no such model: `{source}`", hint=UNDERSTOOD)
    if path.suffix == ".npz":
        return read_google(load_npz(path), source, stated)
    if path.suffix in (".npy", ".onnx", ".msgpack", ".toml", ".json"):
        raise VitcliError(f"`{source}` is no weights file that is understood", hint=UNDERSTOOD)
    if read_header(path) is not None:
        return _restated(load_own(path), stated)
    tensors = load_weights(path)
    beside = _json(path.parent / "config.json") or {}
    if is_huggingface(tensors):
        if "model_type" not in beside:
            raise VitcliError(
                f"`{source}` has Hugging Face's layout, but no config.json of theirs beside it",
                hint="give the folder that `save_pretrained` wrote",
            )
        processor = _json(path.parent / "preprocessor_config.json")
        return read_huggingface(tensors, source, beside, processor, stated)
    if "model_type" in beside and not is_timm(tensors):
        read_huggingface(tensors, source, beside, None, stated)
    if not is_timm(tensors):
        shown = ", ".join(list(tensors)[:4])
        raise VitcliError(
            f"`{source}` does not hold a Vision Transformer in a layout that is understood; its "
            f"tensors are {shown}{' …' if len(tensors) > 4 else ''}",
            hint=UNDERSTOOD,
        )
    hub = beside if {"architecture", "pretrained_cfg"} & set(beside) else None
    return read_timm(tensors, source, hub, stated)


def _restated(checkpoint: Checkpoint, stated: Stated) -> Checkpoint:
    """A file of ours says everything itself; what the caller states still goes before it."""
    values: dict[str, Any] = {"num_heads": stated.num_heads, "norm_eps": stated.norm_eps}
    values["gelu"] = stated.gelu
    said = {key: value for key, value in values.items() if value is not None}
    try:
        checkpoint.config = replace(checkpoint.config, **said)
    except ValueError as error:
        raise VitcliError(
            f"the settings do not fit this model: {error}", hint="leave them out: the file says all"
        ) from error
    config = checkpoint.config
    checkpoint.preprocess = stated_preprocess(
        checkpoint.preprocess, stated.preprocess, config.image_size, config.num_channels
    )
    return checkpoint


def _weights_in(folder: Path) -> Path:
    """The weights file of a run directory or model folder."""
    whole = folder / "model.safetensors"
    if whole.is_file():
        return whole
    files = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    if len(files) == 1:
        return files[0]
    if files:
        raise VitcliError(
            f"`{folder}` holds {len(files)} weights files: {', '.join(p.name for p in files[:4])}",
            hint="give one of the files itself",
        )
    if (folder / "recipe.toml").is_file():
        raise VitcliError(
            f"the run `{folder}` has no model.safetensors: it did not finish",
            hint=f"go on with it: the same command with `--out {folder} --resume`",
        )
    pickles = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        refuse_foreign(pickles[0])
    raise VitcliError(f"`{folder}` holds no weights", hint=UNDERSTOOD)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise VitcliError(
            f"`{path}` cannot be read as JSON: {error}", hint="mend it or remove it"
        ) from error
    return value if isinstance(value, dict) else None
