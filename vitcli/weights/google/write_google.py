"""Writing the `.npz` files of google-research/vision_transformer and big_vision."""

from pathlib import Path
from typing import Any

import torch

from vitcli.errors import VitcliError
from vitcli.vit.config import ViTConfig
from vitcli.vit.position import sincos2d
from vitcli.vit.resnet import ResNetConfig
from vitcli.weights.google.google_names import (
    POSITIONS,
    STEM_POSITIONS,
    Pair,
    first_release,
    released,
    resnet_pairs,
    to_theirs,
    vit_pairs,
)
from vitcli.weights.google.npz import write_npz
from vitcli.weights.google.read_google import RATES
from vitcli.weights.imagenet import imagenet_names
from vitcli.weights.loaded import LoadedModel

# The one value of each setting that the official code has.
OFFICIAL: dict[str, Any] = {
    "gelu": "tanh",
    "norm_eps": 1e-6,
    "mlp": "gelu",
    "qkv_bias": True,
    "qk_norm": False,
    "layer_scale": None,
    "num_registers": 0,
    "pool_blocks": 1,
    "distillation_token": False,
    "position_at": "stem",
    "norm_before_blocks": False,
    "norm_after_pool": False,
    "patch_bias": True,
    "axial": False,
}
# Those that can be changed at the price of a small difference: `load_model` takes both.
CLOSE = ("gelu", "norm_eps")


def write_google(model: LoadedModel, out: Path) -> list[str]:
    """Write `model` as one `.npz` in the official code's names, float32; returns notes.

    A ViT or hybrid with covered class token, or without one and pool `mean`, gets the names of the
    files that Google released, which vit_jax and big_vision read. A class token without position,
    fixed positions and attention pooling only exist in big_vision and get its names. A BiT ResNet
    gets those of big_vision's `bit_paper`, or those of the first BiT files where its arithmetic is
    theirs and timm's.

    What the arrays cannot hold stands as JSON in the comment of the zip archive, where the official
    loaders, which refuse unknown arrays, do not look: `labels` (or `"imagenet"` for its own),
    `preprocess`, `head_trained`, `image_size`, the dropout rates. It is packed where it is long;
    where even that passes zip's 65,535 bytes, the names are left out and a note says so.

    Raises:
        VitcliError: the official code has no such model (every setting that contradicts is named),
            there is a file at `out` already, or it cannot be written.
    """
    if out.suffix != ".npz":
        raise VitcliError(f"`{out}` does not end in `.npz`", hint="official files do")
    config = model.config
    if isinstance(config, ResNetConfig):
        arrays, notes = _resnet_arrays(model, config)
    else:
        arrays, notes = _vit_arrays(model, config)
    if not config.num_classes:
        notes.append("no head: vit_jax's `load_pretrained` asks for one, big_vision's does not")
    return [*notes, *write_npz(out, arrays, _said(model))]


def contradictions(config: ViTConfig) -> dict[str, str]:
    """Settings that the official code does not have -> the values that it has instead."""
    found = {k: str(v) for k, v in OFFICIAL.items() if getattr(config, k) != v}
    if config.stem is not None and config.stem_arithmetic != "google":
        found["stem_arithmetic"] = "google"
    if config.pool not in ("token", "mean", "map"):
        found["pool"] = "token, mean or map"
    elif config.pool != "token" and config.class_token:
        found["class_token"] = f"False with pool `{config.pool}`"
    if config.position not in ("learned", "sincos2d"):
        found["position"] = "learned or sincos2d"
    elif config.stem is not None and not _is_vit_jax(config) and not found:
        # Only vit_jax has hybrids, so they must be within what it expresses.
        if config.position != "learned":
            found["position"] = "learned in a hybrid"
        elif config.pool == "map":
            found["pool"] = "token or mean in a hybrid"
        else:
            found["position_covers_prefix"] = "True in a hybrid"
    return found


def _is_vit_jax(config: ViTConfig) -> bool:
    """Whether vit_jax itself has this model: its positions cover every token it has."""
    plain = config.position == "learned" and config.pool != "map"
    hybrid_without_token = config.stem is not None and not config.class_token
    return plain and (config.position_covers_prefix or hybrid_without_token)


def _refuse(config: ViTConfig) -> None:
    found = contradictions(config)
    if not found:
        return
    told = ", ".join(f"`{k}` is {getattr(config, k)}, not {v}" for k, v in found.items())
    hint = "`--to onnx` takes every model"
    if set(found) <= set(CLOSE):
        settings = " ".join(f"--set model.{k}={found[k]}" for k in found)
        hint = f"`{settings}`, if the small difference is acceptable"
    raise VitcliError(f"the official code has no such model: {told}", hint=hint)


def _vit_arrays(model: LoadedModel, config: ViTConfig) -> tuple[dict[str, Any], list[str]]:
    _refuse(config)
    arrays = _arrays(model, list(vit_pairs(config)), config.num_heads)
    notes: list[str] = []
    table = model.state_dict()["pos_embed"].detach().cpu().float()
    name = STEM_POSITIONS if _is_vit_jax(config) else POSITIONS
    if config.position == "sincos2d":
        prefix, grid = table[:, : config.num_covered_tokens], table[:, config.num_covered_tokens :]
        fixed = sincos2d(config.grid, config.embed_dim)
        if torch.equal(grid, fixed) and not prefix.any():
            return arrays, notes  # computed by their code as by ours
        table = grid
        notes.append("the fixed positions were carried to another grid: written as learned ones")
    arrays[name] = table.numpy()
    if _is_vit_jax(config):
        arrays = {released(n): array for n, array in arrays.items()}
    return arrays, notes


def _resnet_arrays(model: LoadedModel, config: ResNetConfig) -> tuple[dict[str, Any], list[str]]:
    arrays = _arrays(model, list(resnet_pairs(config)), 1)
    if config.arithmetic == "google":
        return arrays, []
    for name in arrays:
        if "gn" in name or "norm" in name:
            arrays[name] = arrays[name].flatten()
        elif name == "head/kernel":
            arrays[name] = arrays[name][None, None]  # a 1x1 convolution
    note = "weight standardisation adds 1e-10 to the variance in Google's code, 1e-8 in this model"
    return {first_release(name): array for name, array in arrays.items()}, [note]


def _arrays(model: LoadedModel, pairs: list[Pair], num_heads: int) -> dict[str, Any]:
    state = model.state_dict()
    return dict(a for pair in pairs for a in to_theirs(pair, state[pair.ours], num_heads))


def _said(model: LoadedModel) -> dict[str, Any]:
    """What the arrays do not say."""
    config = model.config
    said: dict[str, Any] = {
        "format": 1,
        "image_size": list(config.image_size),
        "head_trained": bool(model.head_trained and config.num_classes),
        "activation": model.head_activation,
        "preprocess": model.preprocess.to_dict() if model.preprocess is not None else None,
    }
    if isinstance(config, ViTConfig):
        said |= {key: getattr(config, key) for key in (*RATES, "position_covers_prefix")}
    if model.labels is not None:
        known = model.labels == imagenet_names(config.num_classes)
        said["labels"] = "imagenet" if known else list(model.labels)
    return said
