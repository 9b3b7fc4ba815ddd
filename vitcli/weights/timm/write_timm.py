"""Write timm's layout: a folder for `timm.create_model("local-dir:DIR", pretrained=True)`.

The Hub `config.json` names one of timm's architectures and the arguments that differ. We write
every argument that changes the computation. The architecture adds the rest, which JSON cannot hold.
"""

from math import floor
from pathlib import Path
from typing import Any

from torch import Tensor

from vitcli.preprocess import Preprocess
from vitcli.vit.config import ViTConfig
from vitcli.weights.expressible import check_expressible
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.store import write_folder
from vitcli.weights.timm.timm_config import CROP_MODES, GELUS
from vitcli.weights.timm.timm_names import POOLS, bit_architecture, vit_architecture


def write_timm(model: LoadedModel, out: Path) -> list[str]:
    """Write `model` into the new folder `out`, completely or not at all.

    Returns:
        A line for each property that the folder does not store.

    Raises:
        VitcliError: timm cannot express the model, or `out` is not empty or not writable.
    """
    notes = check_expressible(model, "timm")
    write_folder(out, _named(model), {"config.json": _config_json(model)})
    return notes


def _config_json(model: LoadedModel) -> dict[str, Any]:
    """Return the content of the Hub `config.json`."""
    config = model.config
    if isinstance(config, ViTConfig):
        architecture, arguments = vit_architecture(config), vit_arguments(config)
        root = "patch_embed.backbone.stem.conv" if config.stem else "patch_embed.backbone.conv"
        input_conv = "patch_embed.proj" if config.stem is None else root
        heads = ["head", "head_dist"] if config.distillation_token else ["head"]
        width = config.embed_dim
    else:
        architecture, widths = bit_architecture(config)
        arguments = {"global_pool": "avg", **widths}
        input_conv, heads, width = "stem.conv", ["head.fc"], config.feature_dim
    classes, channels = config.num_classes, config.num_channels
    described: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": width,
        "global_pool": arguments["global_pool"],
        "model_args": {**arguments, "num_classes": classes, "in_chans": channels},
        "activation": model.head_activation,  # timm ignores it and returns logits
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [channels, *config.image_size],
            "fixed_input_size": isinstance(config, ViTConfig),
            **_transform(model.preprocess),
            "num_classes": classes,
            "pool_size": None,
            "first_conv": input_conv,
            "classifier": heads if len(heads) > 1 else heads[0],
        },
    }
    if model.labels is not None and classes:
        described["label_names"] = list(model.labels)
    return described


def vit_arguments(config: ViTConfig) -> dict[str, Any]:
    """Return the arguments of timm's VisionTransformer; null overrides the architecture's value."""
    hidden = config.mlp_dim * (2 if config.mlp == "swiglu" else 1)
    ratio = hidden / config.embed_dim
    if int(config.embed_dim * ratio) != hidden:  # timm rounds down
        ratio = (hidden + 0.5) / config.embed_dim
    gelu = next(name for name, kind in GELUS.items() if kind == config.gelu)
    arguments = {
        "img_size": list(config.image_size),
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": ratio,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "init_values": None if config.layer_scale is None else config.layer_scale or 1e-5,
        "class_token": config.class_token,
        "no_embed_class": not config.position_covers_prefix,
        "reg_tokens": config.num_registers,
        "pre_norm": config.norm_before_blocks,
        "final_norm": config.final_norm,
        "fc_norm": config.norm_after_pool,
        "global_pool": POOLS[config.pool],
        "act_layer": "silu" if config.mlp == "swiglu" else gelu,
    }
    if config.position == "none":
        arguments["pos_embed"] = "none"
    if config.dropout_rate:
        arguments |= {"pos_drop_rate": config.dropout_rate, "proj_drop_rate": config.dropout_rate}
    if config.drop_path_rate:
        arguments["drop_path_rate"] = config.drop_path_rate
    return arguments


def _transform(preprocess: Preprocess | None) -> dict[str, Any]:
    """Return the evaluation transform in the terms of `pretrained_cfg`."""
    if preprocess is None:
        return {}
    return {
        "interpolation": preprocess.interpolation,
        "crop_pct": crop_pct(preprocess),
        "crop_mode": next(k for k, v in CROP_MODES.items() if v == preprocess.resize_mode),
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
    }


def crop_pct(preprocess: Preprocess) -> float:
    """Return the p for which floor(side / p), timm's formula, is the side that we resize to."""
    rows, side = preprocess.image_size[0], preprocess.resize_size
    if preprocess.resize_mode == "pad":
        return 1.0
    if side is None:
        return preprocess.crop_fraction
    fraction = rows / side
    return fraction if floor(rows / fraction) == side else rows / (side + 0.5)


def _named(model: LoadedModel) -> dict[str, Tensor]:
    """Return the state dict in timm's names and shapes."""
    tensors, config = dict(model.state_dict()), model.config
    tensors.pop("projection.weight", None)  # without a head nothing reads it
    if not isinstance(config, ViTConfig):
        if "head.weight" in tensors:
            tensors["head.fc.weight"] = tensors.pop("head.weight")[:, :, None, None]  # (K, F, 1, 1)
            tensors["head.fc.bias"] = tensors.pop("head.bias")
        return tensors
    if not config.patch_bias and not config.norm_before_blocks:
        weight = tensors["patch_embed.proj.weight"]
        tensors["patch_embed.proj.bias"] = weight.new_zeros(weight.shape[0])
    if config.stem == ():
        root = "patch_embed.backbone.stem."
        return {n.replace(root, "patch_embed.backbone."): t for n, t in tensors.items()}
    return tensors
