"""Reading the `.npz` files of google-research/vision_transformer and big_vision.

ViTs, hybrids and BiT ResNets, in every generation of names (`google_names`). The arithmetic is
flax's: tanh GELU, LayerNorm epsilon 1e-6. Its "gap" averages every token, but a file with that
pooling has no class token, so ours is the same. big_vision keeps a training run's optimizer beside
the weights, and two-tower models (LiT, SigLIP) their text tower: neither is read.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.vit.config import ViTConfig
from vitcli.vit.position import sincos2d
from vitcli.vit.resnet import ResNetConfig
from vitcli.weights.google_archive import WEIGHTS, Archive
from vitcli.weights.google_config import Found, find_config, refuse
from vitcli.weights.google_names import (
    Pair,
    canonical,
    resnet_pairs,
    to_ours,
    vit_pairs,
)
from vitcli.weights.imagenet import imagenet_names
from vitcli.weights.stated import Stated, stated_preprocess
from vitcli.weights.store import Checkpoint

# Where the weights of the picture model lie, outermost first, and what lies beside them.
PREFIXES = {
    "params/": "not under `params/`",
    WEIGHTS: f"not under `{WEIGHTS}`",
    "img/": "not the image tower",
}
STACKED = "Transformer/encoderblock/"


def read_google(archive: Archive, source: str, stated: Stated) -> Checkpoint:
    """An official checkpoint, or one that `write_google` wrote.

    Raises:
        VitcliError: another model, tensors that are missing, too many or of the wrong type or
            shape, an image size that the file does not say.
    """
    dropped = dict.fromkeys(archive.skipped, "optimizer")
    found, names = _present(archive.arrays, dropped, source)
    said = archive.said
    first = any("resnet/root_block/" in name for name in names.values())
    known = find_config(found, source, stated, said, first_release=first)
    config = known.config
    tensors = _convert(found, names, known, source)
    if known.cut and known.positions:
        dropped[f"{names[known.positions]} (first entry)"] = "of a class token that is not there"
    labels, notes = _labels(said, config.num_classes)
    return Checkpoint(
        config=config,
        tensors=tensors,
        layout="google",
        labels=stated.labels or labels,
        preprocess=_preprocess(config, stated, said, notes),
        head_trained=_head_trained(tensors, said),
        activation="sigmoid" if said.get("activation") == "sigmoid" else "softmax",
        dropped=dropped,
        notes=[*known.notes, *notes],
    )


def _present(
    arrays: Mapping[str, NDArray[Any]], dropped: dict[str, str], source: str
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The model's arrays in the present names, and what each is called in the file.

    Prefixes are taken off, the blocks of a scanned encoder apart. What lies beside the model goes
    to `dropped`.
    """
    found, names = dict(arrays), {name: name for name in arrays}
    for prefix, reason in PREFIXES.items():
        if any(name.startswith(prefix) for name in found):
            dropped |= {names[n]: reason for n in found if not n.startswith(prefix)}
            inside = {n: n.removeprefix(prefix) for n in found if n.startswith(prefix)}
            found = {now: found[n] for n, now in inside.items()}
            names = {now: names[n] for n, now in inside.items()}
    for name in [n for n in found if n.startswith(STACKED)]:
        layers, was = found.pop(name), names.pop(name)
        for i, layer in enumerate(layers if layers.ndim else ()):
            apart = f"Transformer/encoderblock_{i}/{name.removeprefix(STACKED)}"
            found[apart], names[apart] = layer, was
    now = canonical(found)
    if twice := [n for n, times in Counter(now.values()).items() if times > 1]:
        both = [name for name in found if now[name] == twice[0]]
        raise refuse(source, [], [names[name] for name in both])
    found = {now[name]: array for name, array in found.items()}
    names = {now[name]: was for name, was in names.items()}
    if "root_block/conv_root/kernel" in found and found.get("head/kernel", np.empty(0)).ndim == 4:
        found["head/kernel"] = found["head/kernel"][0, 0]  # a 1x1 convolution in BiT's first files
    return found, names


def _tensor(array: NDArray[Any], name: str) -> Tensor:
    """float16, 32 or 64, or bfloat16, which numpy knows as two bytes without a type."""
    if array.dtype == np.dtype("V2"):
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(f"`{name}` is of type {array.dtype}, which no weights have")
    native = array.dtype.newbyteorder("=")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=native))


def _convert(
    found: dict[str, NDArray[Any]], names: dict[str, str], known: Found, source: str
) -> dict[str, Tensor]:
    """Every array that the configuration asks for, in our names; an error where the sets differ."""
    config = known.config
    pairs = list(resnet_pairs(config) if isinstance(config, ResNetConfig) else vit_pairs(config))
    if known.positions:
        pairs.append(Pair("pos_embed", (known.positions,), "same"))
    wanted = [name for pair in pairs for name in pair.theirs]
    missing = [name for name in wanted if name not in found]
    foreign = sorted(set(found) - set(wanted))
    if missing or foreign:
        raise refuse(source, missing, [names[name] for name in foreign])
    tensors, faults = {}, []
    for pair in pairs:
        try:
            parts = [_tensor(found[name], names[name]) for name in pair.theirs]
            tensors[pair.ours] = to_ours(pair.kind, parts)
        except ValueError as error:
            faults.append(f"`{names[pair.theirs[0]]}`: {error}")
    if known.cut and "pos_embed" in tensors:
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    if faults:
        raise VitcliError(
            f"`{source}` is damaged; {'; '.join(faults[:4])}", hint="copy or download it again"
        )
    if isinstance(config, ViTConfig) and config.position == "sincos2d":
        table = sincos2d(config.grid, config.embed_dim)
        covered = table.new_zeros(1, config.num_covered_tokens, config.embed_dim)
        tensors["pos_embed"] = torch.cat([covered, table], dim=1)
    return tensors


def _head_trained(tensors: dict[str, Tensor], said: Mapping[str, Any]) -> bool:
    head = tensors.get("head.weight")
    if head is None:
        return False
    return bool(said.get("head_trained", head.count_nonzero() > 0))


def _labels(said: Mapping[str, Any], num_classes: int) -> tuple[tuple[str, ...] | None, list[str]]:
    """The class names that our comment says, and notes."""
    match said.get("labels"):
        case "imagenet":
            return imagenet_names(num_classes), []
        case [*names] if len(names) == num_classes and all(isinstance(n, str) for n in names):
            return tuple(names), []
        case None:
            return None, []
    return None, ["the class names in the file do not fit its head: left out"]


def _preprocess(
    config: ViTConfig | ResNetConfig, stated: Stated, said: Mapping[str, Any], notes: list[str]
) -> Preprocess | None:
    """What the file or the caller says; else what the official evaluation does, with a note."""
    size, channels = config.image_size, config.num_channels
    base = None
    if "preprocess" in said:  # a file of ours, which may say that nobody knows
        base = _said_preprocess(said["preprocess"])
    elif channels in (1, 3):
        half = (0.5,) * channels
        base = Preprocess(size, "squash", None, 1.0, "bilinear", half, half, channels)
        if not {"mean", "std"} <= set(stated.preprocess):
            notes.append(
                "mean and std 0.5, squashed bilinearly to the image size: assumed, as the official "
                "evaluation does; it does not smooth (`--set preprocess.antialias=false`)"
            )
    preprocess = stated_preprocess(base, stated.preprocess, size, channels)
    differs = preprocess is not None and preprocess.image_size != size
    return preprocess.resized_to(size) if preprocess and differs else preprocess


def _said_preprocess(values: Any) -> Preprocess | None:
    try:
        return Preprocess.from_dict(values) if values is not None else None
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise VitcliError(
            f"the preprocessing in the file's comment is damaged: {error}",
            hint="copy or download the file again",
        ) from error
