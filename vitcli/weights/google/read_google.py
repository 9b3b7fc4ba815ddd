"""The configuration of an official checkpoint, from the names and shapes of its arrays.

Reading the `.npz` files of google-research/vision_transformer and big_vision.

ViTs, hybrids and BiT ResNets, in every generation of names (`google_names`). The arithmetic is
flax's: tanh GELU, LayerNorm epsilon 1e-6. Its "gap" averages every token, but a file with that
pooling has no class token, so ours is the same. big_vision keeps a training run's optimizer beside
the weights, and two-tower models (LiT, SigLIP) their text tower: neither is read.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.vit.config import ViTConfig
from vitcli.vit.hybrid import stem_channels
from vitcli.vit.position import sincos2d
from vitcli.vit.resnet import ResNetConfig
from vitcli.weights.google.google_names import (
    POSITIONS,
    STEM_POSITIONS,
    Pair,
    canonical,
    resnet_pairs,
    to_ours,
    vit_pairs,
)
from vitcli.weights.google.npz import WEIGHTS, Archive
from vitcli.weights.imagenet import imagenet_names
from vitcli.weights.overrides import Stated, stated_preprocess
from vitcli.weights.store import Checkpoint

Arrays = Mapping[str, NDArray[Any]]
Size = tuple[int, int]
QUERY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
HIDDEN = "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"
# Of training only, so that no array depends on them.
RATES = ("dropout_rate", "drop_path_rate")
# A comment that says more pixels is damaged; tables of fixed positions grow with them.
LONGEST_SIDE = 8192
# What an array of a ViT, hybrid or BiT ResNet can begin with.
PARTS = re.compile(
    r"(Transformer|embedding|cls|pos_embedding|head|pre_logits|MAPHead_0|conv_root|gn_root|"
    r"root_block|norm-pre-head|block\d+)(/|$)"
)


@dataclass(frozen=True)
class Found:
    """A configuration, and what the arrays do not say.

    Attributes:
        positions: name of the array with the positions; None for fixed ones.
        cut: the array has an entry for a class token that is not there.
        notes: what was assumed.
    """

    config: ViTConfig | ResNetConfig
    positions: str | None = None
    cut: bool = False
    notes: tuple[str, ...] = ()


def find_config(
    found: Arrays,
    source: str,
    stated: Stated,
    said: Mapping[str, Any],
    *,
    first_release: bool = False,
) -> Found:
    """Arrays in the present names -> configuration.

    Args:
        said: what our own comment says.
        first_release: the file has the names of the first BiT files, whose code pads the max-pool
            with zeros (big_transfer, issue 74); big_vision, which reads them too, does not.

    Raises:
        VitcliError: another architecture, or an image size that cannot be known.
    """
    try:
        if "root_block/conv_root/kernel" in found:
            return _resnet(found, source, stated, said, first_release)
        return _vit(found, source, stated, said)
    except ValueError as error:
        raise VitcliError(
            f"`{source}` does not fit together: {error}",
            hint="it is damaged, or a `--set model.…` does not fit it",
        ) from error


def refuse(source: str, missing: Collection[str], foreign: Collection[str]) -> VitcliError:
    """The error for a file of another architecture, which names what contradicts."""
    groups = {"missing": missing, "not part of one": foreign}
    told = [
        f"{kind}: {', '.join(f'`{n}`' for n in list(names)[:6])}"
        + (f" and {len(names) - 6} more" * (len(names) > 6))
        for kind, names in groups.items()
        if names
    ]
    return VitcliError(
        f"`{source}` is not an official ViT, hybrid or BiT checkpoint; {'; '.join(told)}",
        hint="is this the file of another architecture, or a part of one?",
    )


def _shapes(found: Arrays, source: str, wanted: dict[str, int]) -> list[tuple[int, ...]]:
    """The shapes of arrays that the configuration follows from; `wanted` has their dimensions."""
    missing = [name for name in wanted if name not in found]
    if missing:
        raise refuse(source, missing, [name for name in found if not PARTS.match(name)])
    for name, ndim in wanted.items():
        if found[name].ndim != ndim or 0 in found[name].shape:
            raise ValueError(f"`{name}` is of shape {found[name].shape}")
    return [found[name].shape for name in wanted]


def _vit(found: Arrays, source: str, stated: Stated, said: Mapping[str, Any]) -> Found:
    kernel, query, hidden = _shapes(found, source, {"embedding/kernel": 4, QUERY: 3, HIDDEN: 2})
    patch, patch_x, channels, width = kernel
    if patch != patch_x:
        raise ValueError(f"patches of {patch}x{patch_x} are not square")
    stem, stem_width = None, 1.0
    if "conv_root/kernel" in found:
        ((*_, channels, features),) = _shapes(found, source, {"conv_root/kernel": 4})
        stem, stem_width = _layers(found, "unit1"), features / 64
        stem_channels(stem_width)
    class_token, attention_pool = "cls" in found, "MAPHead_0/probe" in found
    if class_token and attention_pool:
        raise ValueError("it has both a class token and an attention pool")
    values: dict[str, Any] = {
        "patch_size": patch,
        "num_channels": channels,
        "embed_dim": width,
        # The number of blocks and not the highest: where one is missing, it is named as such.
        "depth": len({n.split("/")[1] for n in found if n.startswith("Transformer/encoderblock_")}),
        "num_heads": stated.num_heads or query[1],
        "mlp_dim": hidden[1],
        "num_classes": _outputs(found, "head/kernel") or 0,
        "pool": "map" if attention_pool else "token" if class_token else "mean",
        "class_token": class_token,
        "representation_size": _outputs(found, "pre_logits/kernel"),
        "gelu": stated.gelu or "tanh",
        "norm_eps": stated.norm_eps or 1e-6,
        "stem": stem,
        "stem_width": stem_width,
        **{k: v for k in RATES if isinstance(v := said.get(k), (int, float))},
    }
    # The stride of the stem, without asking a grid of it yet.
    cell = patch * (4 * 2 ** max(len(stem) - 1, 0) if stem is not None else 1)
    sizes = [size for size in (_said_size(said), stated.image_size) if size is not None]
    name = next((n for n in (STEM_POSITIONS, POSITIONS) if n in found), None)
    if name is None:
        notes = () if sizes else ("fixed positions do not say their grid: 224 pixels assumed",)
        covers = bool(said.get("position_covers_prefix", False))
        values |= {"position": "sincos2d", "position_covers_prefix": covers}
        return Found(ViTConfig(image_size=(sizes or [(224, 224)])[0], **values), notes=notes)
    if found[name].ndim != 3 or found[name].shape[2] != width:
        raise ValueError(f"`{name}` is of shape {found[name].shape}, the width is {width}")
    size, covered = _grid(found[name].shape[1], cell, sizes, class_token, name, source)
    covers = name == STEM_POSITIONS or (covered and class_token)
    if not class_token:  # without a prefix it means nothing, so what was said is kept
        covers = bool(said.get("position_covers_prefix", covers))
    config = ViTConfig(image_size=size, position_covers_prefix=covers, **values)
    return Found(config, name, cut=covered and not class_token)


def _grid(
    count: int, cell: int, sizes: list[Size], class_token: bool, name: str, source: str
) -> tuple[Size, bool]:
    """Image size, and whether the first of `count` entries belongs to a class token.

    vit_jax gives the class token a position, big_vision does not, and its older files do. Whether
    they do can only be seen from the count: a square and one more.
    """
    always = name == STEM_POSITIONS and class_token
    for rows, cols in [(y // cell, x // cell) for y, x in sizes]:
        if rows * cols == count - always:
            return (rows * cell, cols * cell), always
        if class_token and rows * cols == count - 1:
            return (rows * cell, cols * cell), True
    for covered in (True,) if always else (False, True):
        side = math.isqrt(count - covered)
        if side * side == count - covered and side:
            return (side * cell, side * cell), covered
    raise VitcliError(
        f"`{source}` has {count} positions, no square grid, and does not say which one",
        hint=f"`--set model.image_size=[Y,X]` in pixels; a position stands for {cell}x{cell}",
    )


def _resnet(
    found: Arrays, source: str, stated: Stated, said: Mapping[str, Any], first_release: bool
) -> Found:
    ((*_, channels, features),) = _shapes(found, source, {"root_block/conv_root/kernel": 4})
    size = _said_size(said) or stated.image_size
    notes = () if size else ("a ResNet's file does not say its image size: 224 assumed",)
    return Found(
        ResNetConfig(
            image_size=size or (224, 224),
            num_channels=channels,
            layers=_layers(found, "unit01"),
            width=features / 64,
            num_classes=_outputs(found, "head/kernel") or 0,
            arithmetic="timm" if first_release else "google",
        ),
        notes=notes,
    )


def _layers(found: Arrays, first: str) -> tuple[int, ...]:
    """Units of each ResNet stage; as many as there are, so that one left out is missed by name."""
    stages: dict[str, set[str]] = {}
    for name in found:
        if m := re.match(r"(block\d+)/(unit\d+)/", name):
            stages.setdefault(m[1], set()).add(m[2])
    return tuple(len(stages.get(f"block{i + 1}", set()) | {first}) for i in range(len(stages)))


def _outputs(found: Arrays, kernel: str) -> int | None:
    return int(found[kernel].shape[-1]) if kernel in found else None


def _said_size(said: Mapping[str, Any]) -> Size | None:
    match said.get("image_size"):
        case [int(y), int(x)] if 0 < y <= LONGEST_SIDE and 0 < x <= LONGEST_SIDE:
            return y, x
    return None


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
