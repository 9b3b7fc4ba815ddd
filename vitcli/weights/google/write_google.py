"""Write the `.npz` files of google-research/vision_transformer and big_vision."""

from pathlib import Path
from typing import Any

import torch

from vitcli.errors import VitcliError
from vitcli.vit.config import ViTConfig
from vitcli.vit.position import sincos2d
from vitcli.vit.resnet import ResNetConfig
from vitcli.weights.expressible import check_expressible
from vitcli.weights.google.google_names import (
    POSITIONS,
    STEM_POSITIONS,
    TensorPair,
    released,
    resnet_pairs,
    to_bit_release,
    to_theirs,
    vit_pairs,
)
from vitcli.weights.google.npz import write_npz
from vitcli.weights.google.read_google import RATES
from vitcli.weights.imagenet import imagenet_names
from vitcli.weights.loaded import LoadedModel


def write_google(model: LoadedModel, out: Path) -> list[str]:
    """Write `model` as one float32 `.npz` in the official code's names; return notes.

    vit_jax and big_vision both have ViTs and hybrids whose positions cover the class token, or
    which have none and pool `mean`. These get the names of the files that Google released. A class
    token without position, fixed positions and attention pooling exist only in big_vision and get
    its names. A BiT ResNet gets the names of big_vision's `bit_paper`, or those of the first BiT
    files if it has their arithmetic, which is also timm's.

    The comment of the zip archive holds the settings that arrays cannot hold: `labels` (or
    `"imagenet"` for ImageNet's own), `preprocess`, `head_trained`, `image_size`, dropout rates.

    Raises:
        VitcliError: the official code cannot express the model, or `out` exists or is not writable.
    """
    if out.suffix != ".npz":
        raise VitcliError(f"`{out}` does not end in `.npz`", hint="choose a name that ends in .npz")
    notes = check_expressible(model, "google")
    config = model.config
    if isinstance(config, ResNetConfig):
        arrays = _resnet_arrays(model, config)
    else:
        arrays = _vit_arrays(model, config, notes)
    return [*notes, *write_npz(out, arrays, _comment_settings(model))]


def _is_vit_jax(config: ViTConfig) -> bool:
    """Return True if vit_jax itself has this model: its positions cover every token."""
    plain = config.position == "learned" and config.pool != "map"
    hybrid_without_token = config.stem is not None and not config.class_token
    return plain and (config.position_covers_prefix or hybrid_without_token)


def _vit_arrays(model: LoadedModel, config: ViTConfig, notes: list[str]) -> dict[str, Any]:
    arrays = _arrays(model, list(vit_pairs(config)), config.num_heads)
    table = model.state_dict()["pos_embed"].detach().cpu().float()
    if config.position == "sincos2d":
        prefix, grid = table[:, : config.num_covered_tokens], table[:, config.num_covered_tokens :]
        fixed = sincos2d(config.grid, config.embed_dim)
        if torch.equal(grid, fixed) and not prefix.any():
            return arrays  # the official code computes the same table
        table = grid
        notes.append("the fixed positions were resampled, so they are written as learned positions")
    arrays[STEM_POSITIONS if _is_vit_jax(config) else POSITIONS] = table.numpy()
    if _is_vit_jax(config):
        arrays = {released(n): array for n, array in arrays.items()}
    return arrays


def _resnet_arrays(model: LoadedModel, config: ResNetConfig) -> dict[str, Any]:
    arrays = _arrays(model, list(resnet_pairs(config)), 1)
    if config.arithmetic == "google":
        return arrays
    for name in arrays:
        if "gn" in name or "norm" in name:
            arrays[name] = arrays[name].flatten()
        elif name == "head/kernel":
            arrays[name] = arrays[name][None, None]  # a 1x1 convolution
    return {to_bit_release(name): array for name, array in arrays.items()}


def _arrays(model: LoadedModel, pairs: list[TensorPair], num_heads: int) -> dict[str, Any]:
    state = model.state_dict()
    return dict(a for pair in pairs for a in to_theirs(pair, state[pair.ours], num_heads))


def _comment_settings(model: LoadedModel) -> dict[str, Any]:
    """Return the settings that the arrays do not show."""
    config = model.config
    settings: dict[str, Any] = {
        "format": 1,
        "image_size": list(config.image_size),
        "head_trained": bool(model.head_trained and config.num_classes),
        "activation": model.head_activation,
        "preprocess": model.preprocess.to_dict() if model.preprocess is not None else None,
    }
    if isinstance(config, ViTConfig):
        settings |= {key: getattr(config, key) for key in (*RATES, "position_covers_prefix")}
    if model.labels is not None:
        known = model.labels == imagenet_names(config.num_classes)
        settings["labels"] = "imagenet" if known else list(model.labels)
    return settings
