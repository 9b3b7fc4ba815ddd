"""Read the `.npz` files of google-research/vision_transformer and big_vision.

We read ViTs, hybrids and BiT ResNets, in every generation of names (`google_names`). The arithmetic
is flax's: tanh GELU, LayerNorm epsilon 1e-6. Its "gap" averages all tokens, but a file with this
pooling has no class token, so our `mean` is the same. The optimizer in big_vision's training
checkpoints and the text tower of two-tower models (LiT, SigLIP) are not read.
"""

import math
import re
from collections.abc import Mapping
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
    PARTS,
    POSITIONS,
    STEM_POSITIONS,
    TensorPair,
    not_official,
    present_names,
    resnet_pairs,
    to_ours,
    vit_pairs,
)
from vitcli.weights.google.npz import Arrays, NpzContents
from vitcli.weights.imagenet import imagenet_names
from vitcli.weights.loaded import as_activation
from vitcli.weights.overrides import PICTURES, Overrides, override_preprocess
from vitcli.weights.store import Checkpoint

QUERY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
HIDDEN = "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"
# Only training uses these rates, so no array depends on them.
RATES = ("dropout_rate", "drop_path_rate")
# The table of fixed positions grows with the image size. So a damaged comment may not set any size.
LARGEST_SIDE = 8192


@dataclass(frozen=True)
class GoogleConfig:
    """A configuration, and the facts about the file that go with it.

    Attributes:
        positions: name of the array with the positions; None for fixed positions.
        cut: True if the array has a row for a class token that the model does not have.
        notes: one line for each assumption.
    """

    config: ViTConfig | ResNetConfig
    positions: str | None = None
    cut: bool = False
    notes: tuple[str, ...] = ()


def read_google(archive: NpzContents, source: str, overrides: Overrides) -> Checkpoint:
    """Convert an official checkpoint, or one that `write_google` wrote.

    Raises:
        VitcliError: the file holds another model; tensors are missing, unknown, or of the wrong
            type or shape; or the image size is unknown.
    """
    comment, dropped = archive.comment, dict.fromkeys(archive.skipped, "optimizer")
    found, names = present_names(archive.arrays, dropped, source)
    first = any("resnet/root_block/" in name for name in names.values())
    try:
        known = _find_config(found, source, overrides, comment, first_release=first)
    except ValueError as error:
        raise VitcliError(
            f"the arrays of `{source}` contradict each other: {error}",
            hint="download the file again, or correct `--set model.…`",
        ) from error
    config = known.config
    tensors = _convert(found, names, known, source)
    if known.cut and known.positions:
        dropped[f"{names[known.positions]} (first row)"] = "for a missing class token"
    labels, notes = _labels(comment, config.num_classes)
    fixed = isinstance(config, ViTConfig) and config.position == "sincos2d"
    return Checkpoint(
        config=config,
        tensors=tensors,
        layout="google",
        labels=overrides.labels or labels,
        preprocess=_preprocess(config, overrides, comment, notes),
        head_trained=_head_trained(tensors, comment),
        activation=as_activation(comment.get("activation")),
        dropped=dropped,
        notes=[*known.notes, *notes],
        # big_vision computes fixed positions for the size at hand; the paper's code resamples.
        position_resize="computed" if fixed else "bilinear",
    )


def _find_config(
    found: Arrays,
    source: str,
    overrides: Overrides,
    comment: Mapping[str, Any],
    *,
    first_release: bool,
) -> GoogleConfig:
    """Find the configuration of arrays in the present names.

    `first_release` means the names of the first BiT files, whose code pads the max-pool with zeros
    (big_transfer, issue 74). big_vision reads these files too, but pads with minus infinity.
    """
    if "root_block/conv_root/kernel" not in found:
        return _vit(found, source, overrides, comment)
    ((*_, channels, features),) = _shapes(found, source, {"root_block/conv_root/kernel": 4})
    size = _comment_size(comment) or overrides.image_size
    config = ResNetConfig(
        image_size=size or (224, 224),
        num_channels=channels,
        layers=_layers(found, "unit01"),
        width=features / 64,
        num_classes=_outputs(found, "head/kernel") or 0,
        arithmetic="timm" if first_release else "google",
    )
    note = "assumed images of 224x224 px (change with `--set model.image_size=…`)"
    return GoogleConfig(config, notes=() if size else (note,))


def _shapes(found: Arrays, source: str, wanted: dict[str, int]) -> list[tuple[int, ...]]:
    """Return the shapes of the arrays in `wanted`, which maps names to numbers of dimensions."""
    missing = [name for name in wanted if name not in found]
    if missing:
        raise not_official(source, missing, [name for name in found if not PARTS.match(name)])
    for name, ndim in wanted.items():
        if found[name].ndim != ndim or 0 in found[name].shape:
            raise ValueError(f"`{name}` has the shape {found[name].shape}")
    return [found[name].shape for name in wanted]


def _vit(
    found: Arrays, source: str, overrides: Overrides, comment: Mapping[str, Any]
) -> GoogleConfig:
    kernel, query, hidden = _shapes(found, source, {"embedding/kernel": 4, QUERY: 3, HIDDEN: 2})
    patch, patch_x, channels, width = kernel
    if patch != patch_x:
        raise ValueError(f"patches of {patch}x{patch_x} px are not square")
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
        # Count the blocks instead of using the highest index: the error then names a missing block.
        "depth": len({n.split("/")[1] for n in found if n.startswith("Transformer/encoderblock_")}),
        "num_heads": overrides.num_heads or query[1],
        "mlp_dim": hidden[1],
        "num_classes": _outputs(found, "head/kernel") or 0,
        "pool": "map" if attention_pool else "token" if class_token else "mean",
        "class_token": class_token,
        "representation_size": _outputs(found, "pre_logits/kernel"),
        "gelu": overrides.gelu or "tanh",
        "norm_eps": overrides.norm_eps or 1e-6,
        "stem": stem,
        "stem_width": stem_width,
        **{k: v for k in RATES if isinstance(v := comment.get(k), (int, float))},
    }
    # Pixels per patch. ViTConfig has this property too, but needs the image size first.
    cell = patch * (4 * 2 ** max(len(stem) - 1, 0) if stem is not None else 1)
    sizes = [size for size in (_comment_size(comment), overrides.image_size) if size is not None]
    name = next((n for n in (STEM_POSITIONS, POSITIONS) if n in found), None)
    if name is None:
        note = "assumed images of 224x224 px (change with `--set model.image_size=…`)"
        covers = bool(comment.get("position_covers_prefix", False))
        values |= {"position": "sincos2d", "position_covers_prefix": covers}
        config = ViTConfig(image_size=(sizes or [(224, 224)])[0], **values)
        return GoogleConfig(config, notes=() if sizes else (note,))
    if found[name].ndim != 3 or found[name].shape[2] != width:
        raise ValueError(f"`{name}` has the shape {found[name].shape}, but the width is {width}")
    size, covered = _grid(found[name].shape[1], cell, sizes, class_token, name, source)
    covers = name == STEM_POSITIONS or (covered and class_token)
    if not class_token:  # the setting has no effect then; keep the comment's value
        covers = bool(comment.get("position_covers_prefix", covers))
    config = ViTConfig(image_size=size, position_covers_prefix=covers, **values)
    return GoogleConfig(config, name, cut=covered and not class_token)


def _grid(
    count: int, cell: int, sizes: list[tuple[int, int]], class_token: bool, name: str, source: str
) -> tuple[tuple[int, int], bool]:
    """Return the image size, and True if the first of `count` rows is for a class token.

    vit_jax gives the class token a position, and so did older versions of big_vision. Only the
    number of rows shows it: a square number plus one.
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
        f"`{source}` has {count} positions, which do not form a square grid",
        hint=f"set `--set model.image_size=[Y,X]` in px; a patch is {cell}x{cell} px",
    )


def _layers(found: Arrays, first: str) -> tuple[int, ...]:
    """Return the number of units in each ResNet stage, so that the error names a missing one."""
    stages: dict[str, set[str]] = {}
    for name in found:
        if m := re.match(r"(block\d+)/(unit\d+)/", name):
            stages.setdefault(m[1], set()).add(m[2])
    return tuple(len(stages.get(f"block{i + 1}", set()) | {first}) for i in range(len(stages)))


def _outputs(found: Arrays, kernel: str) -> int | None:
    return int(found[kernel].shape[-1]) if kernel in found else None


def _comment_size(comment: Mapping[str, Any]) -> tuple[int, int] | None:
    match comment.get("image_size"):
        case [int(y), int(x)] if 0 < y <= LARGEST_SIDE and 0 < x <= LARGEST_SIDE:
            return y, x
    return None


def _tensor(array: NDArray[Any], name: str) -> Tensor:
    """Convert float16, 32, 64 or bfloat16, which numpy sees as two bytes without a type."""
    if array.dtype == np.dtype("V2"):
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(f"`{name}` has the type {array.dtype}, which is not floating-point")
    native = array.dtype.newbyteorder("=")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=native))


def _convert(
    found: dict[str, NDArray[Any]], names: dict[str, str], known: GoogleConfig, source: str
) -> dict[str, Tensor]:
    """Convert the arrays to tensors in our names; raise an error if some are missing or unknown."""
    config = known.config
    pairs = list(resnet_pairs(config) if isinstance(config, ResNetConfig) else vit_pairs(config))
    if known.positions:
        pairs.append(TensorPair("pos_embed", (known.positions,), "same"))
    wanted = [name for pair in pairs for name in pair.theirs]
    missing = [name for name in wanted if name not in found]
    foreign = sorted(set(found) - set(wanted))
    if missing or foreign:
        raise not_official(source, missing, [names[name] for name in foreign])
    tensors, faults = {}, []
    for pair in pairs:
        try:
            parts = [_tensor(found[name], names[name]) for name in pair.theirs]
            tensors[pair.ours] = to_ours(pair.kind, parts)
        except ValueError as error:
            faults.append(str(error) if "`" in str(error) else f"`{names[pair.theirs[0]]}` {error}")
    if known.cut and "pos_embed" in tensors:
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    if faults:
        faults[4:] = [f"and {len(faults) - 4:,} more"] * (len(faults) > 4)
        raise VitcliError(
            f"`{source}` is damaged: {'; '.join(faults)}", hint="copy or download it again"
        )
    if isinstance(config, ViTConfig) and config.position == "sincos2d":
        table = sincos2d(config.grid, config.embed_dim)
        covered = table.new_zeros(1, config.num_covered_tokens, config.embed_dim)
        tensors["pos_embed"] = torch.cat([covered, table], dim=1)
    return tensors


def _head_trained(tensors: dict[str, Tensor], comment: Mapping[str, Any]) -> bool:
    head = tensors.get("head.weight")
    if head is None:
        return False
    return bool(comment.get("head_trained", head.count_nonzero() > 0))


def _labels(
    comment: Mapping[str, Any], num_classes: int
) -> tuple[tuple[str, ...] | None, list[str]]:
    """Return the class names in the comment, and notes."""
    match comment.get("labels"):
        case "imagenet":
            return imagenet_names(num_classes), []
        case [*names] if len(names) == num_classes and all(isinstance(n, str) for n in names):
            return tuple(names), []
        case None:
            return None, []
    return None, ["ignored the class names in the file, because they do not fit its head"]


def _preprocess(
    config: ViTConfig | ResNetConfig,
    overrides: Overrides,
    comment: Mapping[str, Any],
    notes: list[str],
) -> Preprocess | None:
    """Return the transform of the file or the caller, else the one of the official evaluation."""
    size, channels = config.image_size, config.num_channels
    base = None
    if "preprocess" in comment:  # null means that vitcli wrote the file and did not know it
        base = _comment_preprocess(comment["preprocess"])
    elif channels in PICTURES:
        half = (0.5,) * channels
        base = Preprocess(size, "squash", None, 1.0, "bilinear", half, half, channels)
        if not {"mean", "std"} <= set(overrides.preprocess):
            notes.append(
                "assumed mean and std 0.5 and bilinear resize to the image size, as in the "
                "official evaluation, which does not smooth (`--set preprocess.antialias=false`)"
            )
    preprocess = override_preprocess(base, overrides.preprocess, size, channels)
    differs = preprocess is not None and preprocess.image_size != size
    return preprocess.resized_to(size) if preprocess and differs else preprocess


def _comment_preprocess(values: Any) -> Preprocess | None:
    try:
        return Preprocess.from_dict(values) if values is not None else None
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise VitcliError(
            f"the preprocessing in the file's comment is damaged: {error}",
            hint="copy or download the file again",
        ) from error
